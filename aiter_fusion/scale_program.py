"""Scalar arithmetic as text: the steps between a row's maximum, its scale and the quantised values.

Models spell one quantiser in dozens of ways: the maximum divided by 448 in bf16 or in fp32, a floor before or
after the division, a reciprocal and a product instead of a division. Each spelling rounds differently. A *program*
writes down the one that was found, as steps separated by spaces, and a fused op that is given the program repeats
it bit for bit::

    "div=448.0 float32"                      torchao:  (amax / 448) in bf16, then fp32
    "float32 clamp_min=1e-12 div=448.0"      by hand:  a floor in fp32, then the division
    "float32 unless_positive=1.0 div=448.0"  Hugging Face: 1 for the maximum of a row of zeros, or of one with a NaN
    "float32 div=448.0 e8m0"                 MX formats: the exponent of the next power of two, as a byte
    "float32 div_scale clamp_min=-448.0 clamp_max=448.0"      values divided by the scale, then saturated

A step is a name with an optional number. Names of dtypes convert; ``div_scale``, ``mul_scale`` and ``scale_mul``
combine the value with the scale; ``if_zero`` puts its number in the place of 0, ``unless_positive`` in that of whatever
is not above 0, so of NaN too, which ``if_zero`` keeps; every other name is the ATen operation called so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

aten = torch.ops.aten

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "reciprocal": aten.reciprocal.default,
    "log2": aten.log2.default,
    "exp2": aten.exp2.default,
    "ceil": aten.ceil.default,
    "floor": aten.floor.default,
    "round": aten.round.default,  # of two that are as near, to the even one
}


def _e8m0(value: Tensor) -> Tensor:
    """The exponent of the next power of two, 127 more, as a byte: 254 of infinity, 255 of NaN."""
    exponent = aten.clamp_max.default(aten.clamp_min.default(aten.ceil.default(aten.log2.default(value)), -127), 127)
    byte = aten.where.ScalarSelf(value.isinf(), 254, (exponent + 127).to(torch.uint8))
    return aten.where.ScalarSelf(value.isnan(), 255, byte)


def _e8m0_inverse(value: Tensor) -> Tensor:
    """What torchao multiplies with to divide by that power: its reciprocal, but 1 where the byte is 0."""
    byte = _e8m0(value)
    inverse = aten.where.ScalarSelf(byte == 0, 1.0, aten.exp2.default(127 - byte.to(torch.float32)))
    return aten.where.self(byte == 255, value, aten.where.ScalarSelf(byte == 254, 2.0**-127, inverse))


def _next_power(value: Tensor) -> Tensor:
    """The next power of two of ``|value|``, at least 2^-126, by the bits of the number; 2^127 of infinity and NaN."""
    bits = value.abs().view(torch.int32)
    exponent = ((bits >> 23) & 255) + (bits & 0x7FFFFF).to(torch.bool).to(torch.int32)
    return (exponent.clamp(1, 254) << 23).view(torch.float32)


# Of float32, which models spell with several calls (``patterns/composed.py``).
COMPOSED: dict[str, Callable[[Tensor], Tensor]] = {
    "e8m0": _e8m0,
    "e8m0_inverse": _e8m0_inverse,
    "next_power": _next_power,
}
UNARY |= COMPOSED
WITH_NUMBER: dict[str, Callable[[Tensor, float], Tensor]] = {
    "mul": aten.mul.Tensor,
    "div": aten.div.Tensor,
    "clamp_min": aten.clamp_min.default,
    "clamp_max": aten.clamp_max.default,
    "if_zero": lambda value, number: aten.where.ScalarSelf(value == 0, number, value),
    "unless_positive": lambda value, number: aten.where.ScalarOther(value > 0, value, number),
}
WITH_SCALE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mul_scale": aten.mul.Tensor,
    "scale_mul": lambda value, scale: aten.mul.Tensor(scale, value),  # rounds otherwise for a scale without dimensions
    "div_scale": aten.div.Tensor,
}
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def step(name: str, number: float | None = None) -> str:
    """The text of one step, e.g. ``step("div", 448.0) == "div=448.0"``; ``repr`` keeps every bit of the number."""
    return name if number is None else f"{name}={number!r}"


def cast(dtype: torch.dtype) -> str:
    """The step that converts to ``dtype``; a KeyError if programs have no such dtype."""
    name = str(dtype).removeprefix("torch.")
    DTYPES[name]
    return name


@cache
def parse(program: str) -> tuple[tuple[str, float | None], ...]:
    """The steps of a program as (name, number) pairs; a ValueError names a step that does not exist."""
    steps = []
    for text in program.split():
        name, _, number = text.partition("=")
        takes_number = name in WITH_NUMBER
        if takes_number != bool(number) or not (takes_number or name in UNARY or name in WITH_SCALE or name in DTYPES):
            known = ", ".join([*UNARY, *(f"{n}=<number>" for n in WITH_NUMBER), *WITH_SCALE, *DTYPES])
            raise ValueError(f"unknown step {text!r} in program {program!r}; steps are: {known}")
        steps.append((name, float(number) if number else None))
    return tuple(steps)


def run(program: str, value: Tensor, scale: Tensor | None = None) -> Tensor:
    """Apply a program to ``value``; ``scale`` is what ``mul_scale`` and ``div_scale`` combine it with."""
    for name, number in parse(program):
        if name in DTYPES:
            value = value.to(DTYPES[name])
        elif name in UNARY:
            value = UNARY[name](value)
        elif number is not None:
            value = WITH_NUMBER[name](value, number)
        else:
            assert scale is not None, f"{name} needs a scale"
            value = WITH_SCALE[name](value, scale)
    return value


def result_dtype(program: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a program's result for a value of ``dtype``, where no step combines it with a wider scale."""
    for name, _ in parse(program):
        dtype = torch.uint8 if name == "e8m0" else DTYPES.get(name, dtype)
    return dtype


def is_of_bytes(program: str) -> bool:
    """Whether the program's result is the inverse of a scale that is kept as a byte, its exponent."""
    return any(name == "e8m0_inverse" for name, _ in parse(program))


def is_inverse(program: str) -> bool:
    """Whether the program's result falls when the maximum grows: a quantisation scale, not a dequantisation one."""
    return sum(name in ("reciprocal", "e8m0_inverse") for name, _ in parse(program)) % 2 == 1
