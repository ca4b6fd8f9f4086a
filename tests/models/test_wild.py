"""What is quantised in models that are no decoders: every value is fused with its producer, or a reason names that."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from support import models, wild
from support.checked import checked

# Of each model how many values are fused, by family, beside attention that is replaced, and what the others come from,
# as their reasons say.
EXPECTED: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "FLUX": (
        {"act_quant": 10, "layer_norm_quant": 7, "cat_quant": 2},
        {"attention": 2, "boundary": 3, "aten.cat": 2},
    ),
    "SD3.5": (
        {"act_quant": 10, "layer_norm_quant": 9, "decode_attention": 1},
        {"attention": 4, "boundary": 2, "aten.cat": 1},
    ),
    "LTX": (
        {"act_quant": 5, "rms_norm_quant": 4, "layer_norm_quant": 1, "add_quant": 2, "decode_attention": 4},
        {"attention": 4, "boundary": 2, "aten.cat": 1, "a matrix product": 1},
    ),
    "SigLIP": ({"act_quant": 2, "layer_norm_quant": 4, "decode_attention": 2}, {"attention": 2}),
    "Whisper": ({"act_quant": 4, "layer_norm_quant": 12, "decode_attention": 6}, {"attention": 6}),
    "BERT": ({"act_quant": 2, "layer_norm_quant": 5, "decode_attention": 2}, {"attention": 2}),
    "Nemotron": ({"act_quant": 2, "layer_norm_quant": 5, "decode_attention": 2}, {"attention": 2}),
    "T5": ({"rms_norm_quant": 4, "act_mul_quant": 2, "decode_attention": 2}, {"attention": 2}),
}
ALWAYS = ("BERT",)


@pytest.mark.parametrize(
    "family", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in wild.FAMILIES]
)
def test_counts(family: str, record_property) -> None:
    """Bit for bit, and nothing is skipped. What is left comes from attention, a product, an embedding or an input."""
    model, inputs = wild.build(family)
    models.QUANTISATIONS["PerRow"](model)
    counted = wild.values(model, inputs)
    result = checked(model, disable=["fp8_linear"])
    with torch.no_grad():
        result.call(**inputs)
    made = result.report
    record_property("row", f"{family}: {made.summary()}")
    assert result.oracle.identical
    replaced, left = EXPECTED[family]
    bare = [site for site in made.bare if site.family == "fp8_quant"]
    assert made.replaced == replaced
    assert Counter(next((word for word in left if word in site.reason), site.reason) for site in bare) == left
    assert sum(replaced.values()) - replaced.get("decode_attention", 0) + len(bare) == counted
    assert {site.family for site in made.skipped} <= {"fp8_linear"}
    assert made.unaccounted == 0
