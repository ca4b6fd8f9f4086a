"""On a GPU: the reference against the oracle there, and the truth about missing kernels."""

from __future__ import annotations

import cases
import models
import pytest
import torch
from conftest import checked

from aiter_fusion.providers import PROVIDERS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


@pytest.mark.parametrize("quant", cases.QUANTS, ids=lambda q: q.name)
@pytest.mark.parametrize("norm", [n for n in cases.NORMS if n.name in ("R1", "R3", "R4")], ids=lambda n: n.name)
def test_reference_on_the_gpu(norm: cases.NormForm, quant: cases.QuantForm) -> None:
    case = cases.NORM_FUSIONS[1]
    names = (*case.inputs, *(("scale",) if quant.static else ()))
    result = checked(case.call(norm.call, quant.call), provider="reference")
    with torch.no_grad():
        for rows in cases.ROWS:
            result.call(*(t.cuda() for t in cases.tensors(names, (2, 3), torch.bfloat16, rows)))
            assert result.oracle.identical, rows
    assert len(result.variants) == 1


@pytest.mark.parametrize("act", cases.ACTS, ids=lambda a: a.name)
def test_activations_on_the_gpu(act: cases.ActForm) -> None:
    result = checked(cases.ACT_FUSIONS[0].call(act.call, cases.q3), provider="reference")
    with torch.no_grad():
        for rows in cases.ROWS:
            result.call(*(t.cuda() for t in cases.tensors(("x2",), (2, 3), torch.bfloat16, rows)))
            assert result.oracle.identical, rows
    assert len(result.variants) == 1


def test_torchaos_blocks_on_the_gpu() -> None:
    """Their product is a Triton kernel, which the CPU's tests replace."""
    model = models.build("Llama").cuda()
    models.QUANTISATIONS["PerBlock"](model)
    tokens = models.tokens(2).cuda()
    replaced, _ = models.expected(model, "PerBlock", tokens)
    result = checked(model, provider="reference")
    with torch.no_grad():
        result.call(tokens, use_cache=False)
    assert result.oracle.identical
    assert result.report.replaced == dict(replaced)
    assert any("ao.blockwise_fp8_gemm" in target for target in result.targets)


def test_auto_never_means_the_reference() -> None:
    """With no kernel the graph is left to Inductor, and the report says so."""
    result = checked(cases.NORM_FUSIONS[0].call(cases.llama, cases.q3))
    with torch.no_grad():
        result.call(*(t.cuda() for t in cases.tensors(("x", "w"), (4,), torch.bfloat16, "normal")))
    assert result.oracle.identical
    if all(PROVIDERS[name].missing() for name in ("aiter", "triton")):
        assert result.report.replaced == {}
        assert [site.reason.split(":")[0] for site in result.report.skipped] == ["no_kernel"]
    else:
        assert result.report.replaced == {"rms_norm_quant": 1}
        assert result.report.sites[0].provider in ("aiter", "triton")
