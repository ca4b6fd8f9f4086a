"""The calls that there are kernels for. A test compares these declarations with the sources of ``kernels``."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...domains import ANYTHING, FLAG, TOKEN, Activations, Blocks, Domain, Number, OneOf, Sizes, Steps, Tensors
from ...formats import DTYPES as VALUES
from ...op import FusedOp
from ..terms import Terms
from . import rules
from .whole import WHOLE

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)
# Hidden sizes. A program holds a tile of a row at a time, but a whole row, in packs of 16 bytes, in an all-reduce.
ROWS = Sizes(1, 65536)
REDUCED_ROWS = Sizes(8, rules.TILE, multiple=8)

# The steps of ``kernels/steps.py``: those for the maximum of a block, and those that combine a value with a factor.
STEPS = (
    *("float32", "bfloat16", "float16"),
    *("mul", "div", "clamp_min", "clamp_max", "if_zero", "unless_positive"),
    *("reciprocal", "log2", "exp2", "ceil", "floor", "round", "e8m0", "e8m0_inverse", "next_power"),
)
COMBINING = ("mul_scale", "scale_mul", "div_scale")

# The activations of ``kernels/act_quant.py``.
ALONE = (
    *("silu", "swish", "gelu_tanh", "gelu"),
    *("relu", "squared_relu", "sigmoid", "quick_gelu", "gelu_new"),
)
ACTIVATIONS = Activations(dict.fromkeys(ALONE, ()))
GATED_ACTIVATIONS = Activations({**ACTIVATIONS.numbers, "clamped_swiglu": ("alpha", "limit")})

ONE = Tensors((torch.float32,), elements=1)
NORM: Mapping[str, Domain] = {
    "weight": Tensors(FLOATS, optional=True),
    "eps": Number(optional=True),
    "eps_tensor": Tensors((*FLOATS, torch.float64), optional=True, elements=1),
    "dtype": OneOf(FLOATS),
}
# The values that the arguments of each stage can have, by the kind of stage. All others are refused.
STAGES: Mapping[str, Mapping[str, Domain]] = {
    "": {
        "x": Tensors(FLOATS),
        "gain": Tensors(FLOATS),
        "shift": Tensors(FLOATS, optional=True),
        "plus_one": FLAG,
        "z": Tensors(FLOATS),
        "act": ACTIVATIONS,
        **dict.fromkeys(("modulated_dtype", "act_dtype", "gated_dtype"), OneOf(FLOATS)),
    },
    "all_reduce": {
        "x": Tensors(HALVES),
        "other": Tensors(HALVES, optional=True),
        "group": ANYTHING,  # ``refuse`` looks at its ranks
    },
    "residual_add": {
        **dict.fromkeys(("residual", "gate"), Tensors(FLOATS)),
        **dict.fromkeys(("product_dtype", "sum_dtype", "residual_dtype"), OneOf(FLOATS)),
    },
    "rms_norm": {**NORM, "offset": Number(optional=True), "cast_first": FLAG},
    "layer_norm": {**NORM, "bias": Tensors(FLOATS, optional=True)},
    "act_mul": {
        **dict.fromkeys(("gate", "up", "gate_up"), Tensors(FLOATS)),
        **dict.fromkeys(("gate_first", "interleaved", "cast_first"), FLAG),
        "act": GATED_ACTIVATIONS,
        "dtype": OneOf(FLOATS),
    },
    "act": {"x": Tensors(FLOATS), "act": ACTIVATIONS, "dtype": OneOf(FLOATS)},
    "cat": {
        **dict.fromkeys(("first", "second"), Tensors(FLOATS)),
        **dict.fromkeys(("first_act", "second_act"), Activations(dict.fromkeys(("", *ALONE), ()))),
        "dtype": OneOf(FLOATS),
    },
    "fp8_quant": {
        "block": Blocks(largest=rules.TILE, spanning=True),  # ``refuse`` looks at what else the call has
        "column_major": FLAG,
        **dict.fromkeys(
            ("scale", "scale2", "scale3", "bound", "bound2", "bound3"), Tensors((torch.float32,), elements=1)
        ),
        "scale_steps": Steps(STEPS),
        "factor_steps": Steps(STEPS),
        "value_steps": Steps((*STEPS, *COMBINING)),
        "quant_dtype": OneOf(VALUES),
    },
}
# The chains of stages that a kernel computes, each with or without a residual addition, and the hidden sizes.
CHAINS: Mapping[tuple[str, ...], Sizes] = {
    ("rms_norm", "fp8_quant"): ROWS,
    ("layer_norm", "fp8_quant"): ROWS,
    ("act_mul", "fp8_quant"): ROWS,
    ("act", "fp8_quant"): ROWS,
    ("cat", "fp8_quant"): ROWS,
    ("fp8_quant",): ROWS,
    ("all_reduce", "rms_norm"): REDUCED_ROWS,
    ("all_reduce", "rms_norm", "fp8_quant"): REDUCED_ROWS,
}


def terms(op: FusedOp) -> Terms | None:
    """The calls of an op that the kernels compute, or None: an op of any name whose stages form one of the chains."""
    if op.family in WHOLE:
        return WHOLE[op.family].TERMS
    kinds = [stage.kind for stage in op.stages]
    rows = CHAINS.get(tuple(kind for kind in kinds if kind not in ("", "residual_add")))
    if rows is None:
        return None
    domains = {name: domain for kind in kinds for name, domain in STAGES[kind].items()}
    if "bound" in op.arguments:
        domains["block"] = Blocks((TOKEN,))
    return Terms(domains, op.features, rows)
