"""What there are kernels for: what ``kernels`` does not spell out must not stand here (a test compares the two)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...domains import ANYTHING, FLAG, Activations, Blocks, Domain, Number, OneOf, Sizes, Steps, Tensors
from ...formats import FORMATS
from ...op import FusedOp
from ..terms import Terms
from . import rules

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)
# Elements of a row, of which a program holds a tile at a time; of all-reduces it holds a row, in packs of 16 bytes.
ROWS = Sizes(1, 65536)
REDUCED_ROWS = Sizes(8, rules.TILE, multiple=8)

# The steps of ``kernels/steps.py``, of a block's maximum; and those that combine a value with its factor.
STEPS = (
    *("float32", "bfloat16", "float16"),
    *("mul", "div", "clamp_min", "clamp_max", "if_zero", "unless_positive"),
    *("reciprocal", "log2", "exp2", "ceil", "floor"),
)
COMBINING = ("mul_scale", "scale_mul", "div_scale")

# Of ``kernels/act_mul_quant.py``.
ACTIVATIONS = Activations(
    {**dict.fromkeys(("silu", "swish", "gelu_tanh", "gelu"), ()), "clamped_swiglu": ("alpha", "limit")}
)

# The values of the arguments of each stage, by its kind. What stands here nowhere is refused.
STAGES: Mapping[str, Mapping[str, Domain]] = {
    "": {"x": Tensors(FLOATS)},
    "all_reduce": {
        "x": Tensors(HALVES),
        "other": Tensors(HALVES, optional=True),
        "group": ANYTHING,  # ``refuse`` looks at its ranks
    },
    "residual_add": {"residual": Tensors(FLOATS), "sum_dtype": OneOf(FLOATS), "residual_dtype": OneOf(FLOATS)},
    "rms_norm": {
        "weight": Tensors(FLOATS, optional=True),
        "eps": Number(optional=True),
        "eps_tensor": Tensors((*FLOATS, torch.float64), optional=True, elements=1),
        "offset": Number(optional=True),
        "cast_first": FLAG,
        "dtype": OneOf(FLOATS),
    },
    "act_mul": {
        **dict.fromkeys(("gate", "up", "gate_up"), Tensors(FLOATS)),
        **dict.fromkeys(("gate_first", "interleaved", "cast_first"), FLAG),
        "act": ACTIVATIONS,
        "dtype": OneOf(FLOATS),
    },
    "fp8_quant": {
        "block": Blocks(largest=rules.TILE),
        "column_major": FLAG,
        "scale": Tensors((torch.float32,), elements=1),
        "scale_steps": Steps(STEPS),
        "factor_steps": Steps(STEPS),
        "value_steps": Steps((*STEPS, *COMBINING)),
        "quant_dtype": OneOf(tuple(FORMATS)),
    },
}
# Which stages a kernel computes one after another, the residual addition with or without, and the rows that it takes.
CHAINS: Mapping[tuple[str, ...], Sizes] = {
    ("rms_norm", "fp8_quant"): ROWS,
    ("act_mul", "fp8_quant"): ROWS,
    ("all_reduce", "rms_norm"): REDUCED_ROWS,
    ("all_reduce", "rms_norm", "fp8_quant"): REDUCED_ROWS,
}


def terms(op: FusedOp) -> Terms | None:
    """What of an op the kernels compute: whatever it is called, of the stages that they know, in their order."""
    kinds = [stage.kind for stage in op.stages]
    rows = CHAINS.get(tuple(kind for kind in kinds if kind not in ("", "residual_add")))
    if rows is None:
        return None
    return Terms({name: domain for kind in kinds for name, domain in STAGES[kind].items()}, op.features, rows)
