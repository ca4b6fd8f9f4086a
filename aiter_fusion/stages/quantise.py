"""Quantisers: a value to FP8 or int8, with a scale for each row, group of columns, or the tensor, or a given one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..domains import TOKEN, Blocks, Domain, Steps, Tensors
from ..formats import Format, format_of
from ..op import FusedOp, Spec
from ..scale_program import DTYPES, UNARY, WITH_NUMBER, WITH_SCALE, is_of_bytes, result_dtype, run
from ..stage import Sample, Setting, Stage, Value

F32 = torch.float32


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
        return cls(name, width if name == "token" else int(text.removeprefix(name)) if name == "group" else 0)


def granularity(op: FusedOp, arguments: Mapping[str, Any], width: Any) -> Granularity | None:
    """That of a call of an op, of rows of ``width``; None if nothing is quantised."""
    if op.stages[-1] in (STATIC, *SEVERAL):
        return Granularity("static", 0)
    if op.stages[-1] not in (DYNAMIC, *BOUNDED):
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
    blocks, maximum = _maximum(value, block)
    q = run(value_steps, blocks, run(factor_steps, maximum)).to(quant_dtype).reshape(value.shape)
    scale = run(scale_steps, maximum)
    scale = scale.reshape(scale.shape[: value.dim() if block else 0])
    if column_major and block:
        scale = scale.movedim(-1, 0).clone(memory_format=torch.contiguous_format).movedim(0, -1)
    return whole, {"q": q, "scale": scale}


def _maximum(value: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The value in blocks, and the maximum of each."""
    if block == 0:
        # the maximum of nothing is 0: a graph without rows quantises nothing
        return value, value.abs().amax() if value.numel() else value.new_zeros(())
    blocks = value.reshape(*value.shape[:-1], value.shape[-1] // block, block)
    return blocks, blocks.abs().amax(-1, keepdim=True)


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


def _compute_several(
    value: Tensor, factor_steps: str, value_steps: str, quant_dtype: torch.dtype, **scales: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """``q``, ``q2``, ...: the value with the scale ``scale``, ``scale2``, ..., as one alone would be."""
    quantised = {
        _of_scale(name): _compute_static(value, scale, factor_steps, value_steps, quant_dtype)[1]["q"]
        for name, scale in scales.items()
    }
    return value, quantised


def _spec_several(
    value: Value, factor_steps: str, value_steps: str, quant_dtype: torch.dtype, **scales: Tensor
) -> tuple[Value, dict[str, Spec]]:
    return value, {_of_scale(name): (value.sizes, quant_dtype) for name in scales}


def _compute_bounded(
    value: Tensor,
    block: int,
    scale_steps: str,
    factor_steps: str,
    value_steps: str,
    quant_dtype: torch.dtype,
    **bounds: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """As ``_compute``, with the maximum in float32 and at most ``bound``; ``q2`` and ``scale2`` with ``bound2``, ..."""
    blocks, maximum = _maximum(value, block)
    made: dict[str, Tensor] = {}
    for name, bound in bounds.items():
        most = torch.minimum(maximum.to(F32), bound.reshape(()))
        q = run(value_steps, blocks, run(factor_steps, most)).to(quant_dtype)
        made[_of(name, "q")], made[_of(name, "scale")] = q.reshape(value.shape), run(scale_steps, most).squeeze(-1)
    return value, made


def _spec_bounded(
    value: Value,
    block: int,
    scale_steps: str,
    factor_steps: str,
    value_steps: str,
    quant_dtype: torch.dtype,
    **bounds: Tensor,
) -> tuple[Value, dict[str, Spec]]:
    scales = ([*value.sizes[:-1], value.sizes[-1] // block], result_dtype(scale_steps, F32))
    outputs = {"q": (value.sizes, quant_dtype), "scale": scales}
    return value, {_of(name, output): spec for name in bounds for output, spec in outputs.items()}


def _of_scale(name: str) -> str:
    """The output that a scale is for."""
    return _of(name, "q")


def _of(name: str, output: str) -> str:
    """An output with the number of an input: ``scale2`` for ``bound2``."""
    return output + name.lstrip("abcdefghijklmnopqrstuvwxyz")


def _numbered(name: str, count: int) -> list[str]:
    """``scale``, ``scale2``, ``scale3``."""
    return [name, *(f"{name}{number}" for number in range(2, count + 1))]


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
    rounded = {
        "scale_steps": "float32 div=127.5 clamp_min=1e-07",
        "factor_steps": "float32 div=127.5 clamp_min=1e-07 reciprocal",
        "value_steps": "mul_scale float32 round clamp_min=-128.0 clamp_max=127.0",
        "quant_dtype": torch.int8,
    }
    of_bytes = {
        "scale_steps": "float32 div=448.0 e8m0",
        "factor_steps": "float32 div=448.0 e8m0_inverse",
        "value_steps": "float32 mul_scale clamp_min=-448.0 clamp_max=448.0",
    }
    by_product = {
        "scale_steps": bounded,
        "factor_steps": f"{bounded} reciprocal",
        "value_steps": "float32 mul_scale clamp_min=-240.0 clamp_max=240.0",
        "quant_dtype": torch.float8_e4m3fnuz,
    }
    return [
        _STEPS | {"scale_steps": "div=448.0 float32", "block": width, "column_major": False},
        _STEPS | {"scale_steps": "div=448.0 float32", "block": 0, "column_major": False},
        rounded | {"block": width, "column_major": False},
        by_product | {"block": width // 2, "column_major": False},
        by_product | {"block": width // 4, "column_major": True},
        _STEPS | of_bytes | {"block": 32, "column_major": False},
    ]


def _samples_static(sample: Sample) -> Sequence[dict[str, Any]]:
    return [_STEPS | {"factor_steps": "", "scale": torch.full(sizes, 0.02)} for sizes in ([], [1], [1, 1, 1, 1])]


def _typical(setting: Setting) -> Mapping[str, Any]:
    """torchao's arithmetic."""
    top, block = setting.format.top, Granularity.parse(setting.granularity, setting.hidden).block
    scale = factor = f"div={top!r} float32"
    values = f"float32 div_scale clamp_min={-top!r} clamp_max={top!r}"
    if setting.format.is_integer:
        scale = f"div={top + 0.5!r} float32 clamp_min={torch.finfo(torch.float32).eps!r} bfloat16 float32"
        factor = f"{scale} reciprocal"
        values = f"float32 mul_scale round clamp_min={-top - 1!r} clamp_max={top!r}"
    elif setting.format.scale is torch.uint8:
        values = values.replace("div_scale", "mul_scale")
        scale, factor = (f"float32 div={top!r} {step}" for step in ("e8m0", "e8m0_inverse"))
    return {
        "block": block,
        "scale_steps": scale,
        "column_major": False,
        "factor_steps": factor,
        "value_steps": values,
        "quant_dtype": setting.format.dtype,
    }


def _typical_static(setting: Setting) -> Mapping[str, Any]:
    scale = torch.full((), 0.02, device=setting.device)
    given = {**_typical(setting._replace(granularity="tensor")), "scale": scale, "factor_steps": ""}
    return {name: given[name] for name in STATIC.arguments}


def _several(count: int) -> Stage:
    """So many quantisers of one value, each with a scale that is given, as AMD Quark has one for each of q, k and v."""
    scales = _numbered("scale", count)

    def samples(sample: Sample) -> Sequence[dict[str, Any]]:
        apart = {name: torch.full([], 0.02 * number) for number, name in enumerate(scales, 1)}
        return [one | apart for one in _samples_static(sample)[:1]]

    def typical(setting: Setting) -> Mapping[str, Any]:
        one = _typical_static(setting)
        return {name: one["scale"] * number for number, name in enumerate(scales, 1)} | {n: one[n] for n in _PROGRAMS}

    return Stage(
        "fp8_quant",
        dict.fromkeys(scales, "Tensor") | _PROGRAMS,
        _compute_several,
        _spec_several,
        samples,
        typical,
        feature=f"static{count}",
        outputs=tuple(map(_of_scale, scales)),
        label=STATIC.label,
        levels={f"static{count}": 2},
        domains={**dict.fromkeys(scales, STATIC.domains["scale"]), **_DOMAINS},
        fits=_fits,
    )


def _bounded(count: int) -> Stage:
    """So many quantisers of one value, each with a bound of its own for the maximum, as FBGEMM's layers have one."""
    bounds = _numbered("bound", count)
    programs = {"scale_steps": "float32 div=448.0 clamp_min=1e-05", "factor_steps": "float32 div=448.0 clamp_min=1e-05"}

    def samples(sample: Sample) -> Sequence[dict[str, Any]]:
        apart = {name: torch.full([1], float(number)) for number, name in enumerate(bounds, 1)}
        return [_STEPS | programs | {"block": sample.sizes[-1]} | apart]

    def typical(setting: Setting) -> Mapping[str, Any]:
        apart = {name: torch.full((1,), 1200.0, device=setting.device) for name in bounds}
        one = {**_typical(setting), **programs}
        return {"block": one["block"]} | apart | {name: one[name] for name in ("scale_steps", *_PROGRAMS)}

    return Stage(
        "fp8_quant",
        {"block": "int"} | dict.fromkeys(bounds, "Tensor") | {"scale_steps": "str"} | _PROGRAMS,
        _compute_bounded,
        _spec_bounded,
        samples,
        typical,
        feature="bounded" if count == 1 else f"bounded{count}",
        outputs=tuple(_of(name, output) for name in bounds for output in ("q", "scale")),
        label=DYNAMIC.label,
        domains={
            "block": Blocks((TOKEN,)),
            "scale_steps": _OF_THE_MAXIMUM,
            **dict.fromkeys(bounds, STATIC.domains["scale"]),
            **_DOMAINS,
        },
        fits=_fits,
    )


def _named(attributes: Mapping[str, Any], granularity: str = "") -> str:
    """The format of a record and its granularity, as a site's variant has them."""
    return "+".join(filter(None, (named_format(attributes).word(), granularity)))


def named_format(attributes: Mapping[str, Any]) -> Format:
    """The format of a record."""
    return format_of(attributes["quant_dtype"], torch.uint8 if is_of_bytes(attributes["factor_steps"]) else F32)


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
    label=lambda attributes, sizes: _named(
        attributes, str(Granularity.of(attributes["block"], attributes.get("row", sizes[-1])))
    ),
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
    label=lambda attributes, sizes: _named(attributes),
    levels={"static": 2},
    domains={"scale": Tensors((torch.float32,), elements=1), **_DOMAINS},
    fits=_fits,
)
QUANTISE = (DYNAMIC, STATIC)
# Of gate and up, and of q, k and v.
SEVERAL = (_several(2), _several(3))
BOUNDED = (_bounded(1), _bounded(2), _bounded(3))
