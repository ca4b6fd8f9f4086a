"""Quantisers: a value to FP8, with a scale for each row, group of columns, or the tensor, or a given one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..domains import Blocks, Domain, Steps, Tensors
from ..formats import FORMATS
from ..op import FusedOp, Spec
from ..scale_program import DTYPES, UNARY, WITH_NUMBER, WITH_SCALE, result_dtype, run
from ..stage import Sample, Setting, Stage, Value


class Granularity(NamedTuple):
    """Which elements share a scale: ``token`` (a row), ``group`` (so many columns of it), ``tensor``, or ``static``,
    where it is given. ``block`` is the number of elements that do, as ops have it: 0 for the tensor and for static."""

    name: str
    block: int

    def __str__(self) -> str:
        return f"{self.name}{self.block}" if self.name == "group" else self.name

    @classmethod
    def of(cls, block: int, width: Any) -> Granularity:
        """The one of scales for ``block`` elements each, computed from them, of rows of ``width``."""
        # not before: it loads sympy, which registering ops must not
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        if block == 0:
            return cls("tensor", 0)
        return cls("token" if statically_known_true(block == width) else "group", block)

    @classmethod
    def parse(cls, text: str, width: int) -> Granularity:
        """The one that ``str`` gives for rows of ``width``, e.g. ``group128``."""
        name = text.rstrip("0123456789")
        return cls(name, width if name == "token" else int(text.removeprefix(name) or 0))


def granularity(op: FusedOp, arguments: Mapping[str, Any], width: Any) -> Granularity | None:
    """That of a call of an op, of rows of ``width``; None if nothing is quantised."""
    if STATIC in op.stages:
        return Granularity("static", 0)
    if DYNAMIC not in op.stages:
        return None
    block = arguments["block"]
    return Granularity.of(block, max(width, block) if isinstance(width, int) else width)


def _rows(sizes: Sequence[Any], block: int) -> Sequence[Any]:
    """The sizes of a value whose rows are divided into blocks: its own, or a row for each block of several of them."""
    if block == 0 or not isinstance(sizes[-1], int) or sizes[-1] % block == 0:
        return sizes
    return math.prod(sizes) // block, block


def _compute(
    value: Tensor,
    block: int,
    scale_steps: str,
    column_major: bool,
    factor_steps: str,
    value_steps: str,
    quant_dtype: torch.dtype,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Quantise ``value`` ``[..., H]``.

    ``q = cast(value_steps(value, factor))`` with ``factor = factor_steps(m)`` and the returned
    ``scale = scale_steps(m)``, where m is the maximum of ``|value|`` over the block in the dtype of ``value``.

    Returns q ``[..., H]`` of ``quant_dtype`` and scale ``[..., H / block]``, or ``[]`` for block 0. column_major: in
    memory its columns follow each other, strides ``(..., 1, rows)``, as some matrix products want it. A block that H
    does not divide into is of several whole rows, such as heads, and then q is ``[N, block]`` and scale ``[N, 1]``.
    """
    whole, value = value, value.reshape(_rows(value.shape, block))
    if block == 0:
        # the maximum of nothing is 0: a graph without rows quantises nothing
        maximum = value.abs().amax() if value.numel() else value.new_zeros(())
        blocks = value
    else:
        blocks = value.reshape(*value.shape[:-1], value.shape[-1] // block, block)
        maximum = blocks.abs().amax(-1, keepdim=True)
    q = run(value_steps, blocks, run(factor_steps, maximum)).to(quant_dtype).reshape(value.shape)
    scale = run(scale_steps, maximum)
    scale = scale.reshape(scale.shape[: value.dim() if block else 0])
    if column_major and block:
        scale = scale.movedim(-1, 0).clone(memory_format=torch.contiguous_format).movedim(0, -1)
    return whole, {"q": q, "scale": scale}


def _spec(
    value: Value,
    block: int,
    scale_steps: str,
    column_major: bool,
    factor_steps: str,
    value_steps: str,
    quant_dtype: torch.dtype,
) -> tuple[Value, dict[str, Spec]]:
    sizes = _rows(value.sizes, block)
    scales = [] if block == 0 else [*sizes[:-1], sizes[-1] // block]
    kind = result_dtype(scale_steps, value.dtype)
    columns_first = (len(scales) - 1, *range(len(scales) - 1))
    scale: Spec = (scales, kind, columns_first) if column_major and block else (scales, kind)
    return value, {"q": (sizes, quant_dtype), "scale": scale}


def _compute_static(
    value: Tensor, scale: Tensor, factor_steps: str, value_steps: str, quant_dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """``q = cast(value_steps(value, factor_steps(scale)))``; no scale is returned."""
    # without dimensions, so that neither shape nor dtype of the result depend on how the graph viewed it
    q = run(value_steps, value, run(factor_steps, scale.reshape(()))).to(quant_dtype)
    return value, {"q": q}


def _spec_static(
    value: Value, scale: Tensor, factor_steps: str, value_steps: str, quant_dtype: torch.dtype
) -> tuple[Value, dict[str, Spec]]:
    return value, {"q": (value.sizes, quant_dtype)}


def _fits(attributes: Mapping[str, Any], sizes: Sequence[Any]) -> str | None:
    """Rows of the value that the quantiser reads must consist of blocks, or blocks of rows."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    block, width = attributes["block"], sizes[-1]
    if block == 0 or statically_known_true(width % block == 0) or (isinstance(width, int) and block % width == 0):
        return None
    return f"scales are for blocks of {block}, which its rows of {width} do not divide into"


_STEPS = {
    "factor_steps": "div=448.0 float32",
    "value_steps": "float32 div_scale clamp_min=-448.0 clamp_max=448.0",
    "quant_dtype": torch.float8_e4m3fn,
}


def _samples(sample: Sample) -> Sequence[dict[str, Any]]:
    width, bounded = sample.sizes[-1], "float32 clamp_min=1e-12 div=240.0"
    by_product = {
        "scale_steps": bounded,
        "factor_steps": f"{bounded} reciprocal",
        "value_steps": "float32 mul_scale clamp_min=-240.0 clamp_max=240.0",
        "quant_dtype": torch.float8_e4m3fnuz,
    }
    return [
        _STEPS | {"scale_steps": "div=448.0 float32", "block": width, "column_major": False},
        _STEPS | {"scale_steps": "div=448.0 float32", "block": 0, "column_major": False},
        by_product | {"block": width // 2, "column_major": False},
        by_product | {"block": width // 4, "column_major": True},
    ]


def _samples_static(sample: Sample) -> Sequence[dict[str, Any]]:
    return [_STEPS | {"factor_steps": "", "scale": torch.full(sizes, 0.02)} for sizes in ([], [1], [1, 1, 1, 1])]


def _typical(setting: Setting) -> Mapping[str, Any]:
    """torchao's arithmetic."""
    top = FORMATS[setting.fp8].top
    return {
        "block": Granularity.parse(setting.granularity, setting.hidden).block,
        "scale_steps": f"div={top!r} float32",
        "column_major": False,
        "factor_steps": f"div={top!r} float32",
        "value_steps": f"float32 div_scale clamp_min={-top!r} clamp_max={top!r}",
        "quant_dtype": setting.fp8,
    }


def _typical_static(setting: Setting) -> Mapping[str, Any]:
    scale = torch.full((), 0.02, device=setting.device)
    given = {**_typical(setting._replace(granularity="tensor")), "scale": scale, "factor_steps": ""}
    return {name: given[name] for name in STATIC.arguments}


# The programs (scale_program.py) between a maximum, its scale and the values, and the dtype of these.
_PROGRAMS = {"factor_steps": "str", "value_steps": "str", "quant_dtype": "ScalarType"}

_OF_THE_MAXIMUM = Steps((*UNARY, *WITH_NUMBER, *DTYPES))
_DOMAINS: Mapping[str, Domain] = {
    "factor_steps": _OF_THE_MAXIMUM,
    "value_steps": Steps((*_OF_THE_MAXIMUM.names, *WITH_SCALE)),
}

DYNAMIC = Stage(
    "fp8_quant",
    {"block": "int", "scale_steps": "str", "column_major": "bool"} | _PROGRAMS,
    _compute,
    _spec,
    _samples,
    _typical,
    outputs=("q", "scale"),
    label=lambda attributes, sizes: str(Granularity.of(attributes["block"], attributes.get("row", sizes[-1]))),
    fits=_fits,
    layouts=({"column_major": True}, {"column_major": False}),
    domains={"block": Blocks(spanning=True), "scale_steps": _OF_THE_MAXIMUM, **_DOMAINS},
)
STATIC = Stage(
    "fp8_quant",
    {"scale": "Tensor"} | _PROGRAMS,
    _compute_static,
    _spec_static,
    _samples_static,
    _typical_static,
    feature="static",
    outputs=("q",),
    levels={"static": 2},
    domains={"scale": Tensors((torch.float32,), elements=1), **_DOMAINS},
    fits=_fits,
)
QUANTISE = (DYNAMIC, STATIC)
