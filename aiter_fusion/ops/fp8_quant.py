"""The half that all ops share: quantise a value to FP8 with one scale for each block."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..arithmetic import DTYPES, UNARY, WITH_NUMBER, WITH_SCALE, result_dtype, run
from ..domains import Blocks, Domain, Steps, Tensors
from ..op import OPS, FusedOp, Spec, fused_op
from ..providers import implementation

# block: elements of a row that share a scale; the row's length is per token, 0 the whole tensor.
DYNAMIC = {"block": "int", "scale_steps": "str", "column_major": "bool"}
LAYOUTS = ({"column_major": True}, {"column_major": False})
STATIC = {"scale": "Tensor"}
COMMON = {"factor_steps": "str", "value_steps": "str", "quant_dtype": "ScalarType"}
OF_THE_MAXIMUM = Steps((*UNARY, *WITH_NUMBER, *DTYPES))
DOMAINS: dict[str, Domain] = {
    "block": Blocks(),
    "scale_steps": OF_THE_MAXIMUM,
    "scale": Tensors((torch.float32,), elements=1),
    "factor_steps": OF_THE_MAXIMUM,
    "value_steps": Steps((*OF_THE_MAXIMUM.names, *WITH_SCALE)),
}


def arguments(features: frozenset[str]) -> dict[str, str]:
    """The quantiser's arguments in an op's schema."""
    return (STATIC if "static" in features else DYNAMIC) | COMMON


def domains(features: frozenset[str]) -> dict[str, Domain]:
    """The values that the quantiser's arguments may have."""
    return {name: DOMAINS[name] for name in arguments(features) if name in DOMAINS}


def layouts(features: frozenset[str]) -> tuple[dict[str, Any], ...]:
    """How scales can lie in memory."""
    return ({},) if "static" in features else LAYOUTS


def reference(
    value: Tensor,
    *,
    factor_steps: str,
    value_steps: str,
    quant_dtype: torch.dtype,
    block: int = 0,
    scale_steps: str = "",
    column_major: bool = False,
    scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """Quantise ``value`` ``[..., H]``.

    ``q = cast(value_steps(value, factor))`` with ``factor = factor_steps(m)`` and the returned
    ``scale = scale_steps(m)``, where m is the maximum of ``|value|`` over the block in the dtype of ``value``; with
    a given ``scale`` (static), ``factor = factor_steps(scale)`` and no scale is returned.

    Returns q ``[..., H]`` of ``quant_dtype`` and, unless static, scale: ``[..., H / block]``, or ``[]`` for block 0.
    column_major: in memory its columns follow each other, strides ``(..., 1, rows)``, as some matrix products want it.
    """
    if scale is not None:
        # without dimensions, so that neither shape nor dtype of the result depend on how the graph viewed it
        q = run(value_steps, value, run(factor_steps, scale.reshape(()))).to(quant_dtype)
        return {"q": q}
    if block == 0:
        # the maximum of nothing is 0: a graph without rows quantises nothing
        maximum = value.abs().amax() if value.numel() else value.new_zeros(())
        blocks = value
    else:
        blocks = value.reshape(*value.shape[:-1], value.shape[-1] // block, block)
        maximum = blocks.abs().amax(-1, keepdim=True)
    q = run(value_steps, blocks, run(factor_steps, maximum)).to(quant_dtype).reshape(value.shape)
    returned = run(scale_steps, maximum)
    returned = returned.reshape(returned.shape[: value.dim() if block else 0])
    if column_major and block:
        returned = returned.movedim(-1, 0).clone(memory_format=torch.contiguous_format).movedim(0, -1)
    return {"q": q, "scale": returned}


def shape(
    sizes: Sequence[int],
    dtype: torch.dtype,
    *,
    quant_dtype: torch.dtype,
    block: int = 0,
    scale_steps: str = "",
    column_major: bool = False,
    **_: Any,
) -> dict[str, Spec]:
    """What ``reference`` returns for a value of these sizes and this dtype, and that value itself."""
    scales = [] if block == 0 else [*sizes[:-1], sizes[-1] // block]
    kind = result_dtype(scale_steps, dtype)
    columns_first = (len(scales) - 1, *range(len(scales) - 1))
    return {
        "q": (sizes, quant_dtype),
        "scale": (scales, kind, columns_first) if column_major and block else (scales, kind),
        "value": (sizes, dtype),
    }


def outputs(features: frozenset[str]) -> tuple[str, ...]:
    """Names of the outputs that the quantiser and the features add, in order."""
    extra = ("scale",) if "static" not in features else ()
    return ("q", *extra, *(("value",) if "value" in features else ()))


def declare_all(features: tuple[str, ...], declaration: Any) -> None:
    """Register the overload of every subset of ``features``."""
    for size in range(len(features) + 1):
        for subset in combinations(features, size):
            op: FusedOp = declaration(frozenset(subset))
            assert op.features not in OPS.get(op.family, {})
            fused_op(op, implementation)


# How samples quantise: (arguments of a dynamic quantiser, arguments of a static one).
SAMPLE_STEPS = {
    "factor_steps": "div=448.0 float32",
    "value_steps": "float32 div_scale clamp_min=-448.0 clamp_max=448.0",
    "quant_dtype": torch.float8_e4m3fn,
}


def sample_arguments(features: frozenset[str], width: int) -> list[dict[str, Any]]:
    """Quantiser arguments to test an op with."""
    if "static" in features:
        return [
            SAMPLE_STEPS | {"factor_steps": "", "scale": torch.full(sizes, 0.02)} for sizes in ([], [1], [1, 1, 1, 1])
        ]
    bounded = "float32 clamp_min=1e-12 div=240.0"
    by_product = {
        "scale_steps": bounded,
        "factor_steps": f"{bounded} reciprocal",
        "value_steps": "float32 mul_scale clamp_min=-240.0 clamp_max=240.0",
        "quant_dtype": torch.float8_e4m3fnuz,
    }
    return [
        SAMPLE_STEPS | {"scale_steps": "div=448.0 float32", "block": width, "column_major": False},
        SAMPLE_STEPS | {"scale_steps": "div=448.0 float32", "block": 0, "column_major": False},
        by_product | {"block": width // 2, "column_major": False},
        by_product | {"block": width // 4, "column_major": True},
    ]


# What ops are tested with: several rows, more dimensions, one row, none, and no dimension of rows.
SAMPLE_SIZES = (
    ((9, 64), torch.bfloat16),
    ((2, 4, 64), torch.float16),
    ((1, 64), torch.float32),
    ((0, 64), torch.bfloat16),
    ((64,), torch.float32),
)


def hostile_rows(rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows of normal values, then zeros, tiny, subnormal, huge, NaN, infinity: as many as ``rows`` asks for."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator)
    special = [0.0, 1e-30, torch.finfo(dtype).smallest_normal / 4, torch.finfo(dtype).max, float("nan"), float("inf")]
    for row, factor in zip(range(1, rows), special, strict=False):
        if factor in (0.0, 1e-30) or abs(factor) < 1:
            values[row] *= factor
        else:
            values[row, row % width] = factor
    return values.to(dtype)
