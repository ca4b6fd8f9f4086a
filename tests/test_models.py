"""Real model families: every site that the model's own modules call for, bit-equal, and every other with a reason."""

from __future__ import annotations

import models
import pytest
import torch
from conftest import checked

from aiter_fusion import report


@pytest.mark.parametrize("quantisation", models.QUANTISATIONS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_counts(family: str, quantisation: str, record_property) -> None:
    model = models.build(family)
    models.QUANTISATIONS[quantisation](model)
    tokens = models.tokens()
    replaced, alone = models.expected(model, tokens)
    assert replaced["rms_norm_quant"] > 0
    assert replaced["act_mul_quant"] > 0

    result = checked(model, verify=True)
    with torch.no_grad():
        result.call(tokens, use_cache=False)
    made = result.report
    record_property("row", f"{family} {quantisation}: {made.summary()}")
    assert result.oracle.identical
    assert made.replaced == dict(replaced)
    assert [site.family for site in made.bare].count("fp8_quant") == alone
    assert made.skipped == ()
    assert made.unaccounted == 0
    assert all(site.reason.split(":")[0] in report.REASONS for site in made.bare)
    assert all(site.where for site in made.sites)


def test_one_dynamic_graph_serves_all_lengths() -> None:
    model = models.build("Llama")
    models.QUANTISATIONS["PerRow"](model)
    result = checked(model, dynamic=None)
    with torch.no_grad():
        for batch, length in ((2, 5), (3, 9), (2, 17), (4, 33)):
            result.call(models.tokens(batch, length), use_cache=False)
    assert result.oracle.identical
    assert len(result.reports) == 2  # one with static sizes, one for all others
    assert result.reports[0].replaced == result.reports[1].replaced
