"""The families of fused ops: which stages follow each other. One row makes all overloads of an op."""

from __future__ import annotations

from .op import define
from .providers.choice import implementation
from .registry import REGISTRY
from .stage import Family, maybe
from .stages.activation import ACT, ACT_MUL, PACKED_ACT_MUL
from .stages.cat import CAT
from .stages.gate import GATE
from .stages.modulate import MODULATE
from .stages.norm import LAYER_NORM, RMS_NORM
from .stages.quantise import BOUNDED, QUANTISE, SEVERAL
from .stages.reduce import ALL_REDUCE
from .stages.residual import GATED_RESIDUAL, INPUT, RESIDUAL

# What a norm reads is maybe a sum with the residual stream.
SUMMED = maybe(GATED_RESIDUAL, RESIDUAL)

# Longer chains are tried first, and of equal ones the earlier.
FAMILIES = (
    Family(
        "rms_norm_quant",
        (INPUT, SUMMED, RMS_NORM, maybe(MODULATE, GATE), QUANTISE),
        also=(INPUT, maybe(RESIDUAL), RMS_NORM, (*SEVERAL, *BOUNDED)),
    ),
    Family(
        "layer_norm_quant",
        (INPUT, SUMMED, LAYER_NORM, maybe(MODULATE), QUANTISE),
        also=(INPUT, maybe(RESIDUAL), LAYER_NORM, SEVERAL),
    ),
    Family("act_mul_quant", ((PACKED_ACT_MUL, ACT_MUL), (*QUANTISE, BOUNDED[0]))),
    Family("act_quant", (ACT, QUANTISE)),
    Family("cat_quant", (CAT, QUANTISE)),
    Family("add_quant", (INPUT, (GATED_RESIDUAL, RESIDUAL), QUANTISE)),
    Family(
        "all_reduce_rms_norm",
        (ALL_REDUCE, maybe(RESIDUAL), RMS_NORM, QUANTISE),
        op="all_reduce_rms_norm_quant",
        level=3,
    ),
    Family("all_reduce_rms_norm", (ALL_REDUCE, maybe(RESIDUAL), RMS_NORM), level=3, ending="unquantised"),
)


def register_ops(family: Family) -> Family:
    """Register a family and the overloads of its op. Returns the family."""
    REGISTRY.register(family)
    for op in family.ops():
        define(op, implementation)
    return family


for _family in FAMILIES:
    register_ops(_family)
