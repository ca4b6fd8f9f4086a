"""Programs (``aiter_fusion/arithmetic.py``) as the kernels run them: PyTorch's arithmetic on a GPU, spelled out."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from ...arithmetic import is_inverse, parse

Steps = tuple[tuple[str, float | None], ...]

# What the cast to FP8 rounds up to the largest number; beyond it lies NaN, in PyTorch. Halfway to where the next
# number would be, were there one.
LAST_FINITE = {torch.float8_e4m3fn: 464.0, torch.float8_e4m3fnuz: 248.0}


def _float32(number: float) -> float:
    return ctypes.c_float(number).value


@cache
def steps(program: str) -> Steps:
    """A program of the block's maximum.

    On a GPU, PyTorch divides by a number by multiplying with its reciprocal, rounded to float32.
    """
    translated: list[tuple[str, float | None]] = []
    for name, number in parse(program):
        if name == "div":
            assert number is not None
            translated.append(("mul", _float32(1.0 / _float32(number))))
        elif name == "scale_mul":  # the order of the factors only matters to PyTorch's CPU kernels
            translated.append(("mul_scale", None))
        else:
            translated.append((name, None if number is None else _float32(number)))
    return tuple(translated)


@cache
def value_steps(program: str, factor_program: str, quant_dtype: torch.dtype, static: bool, saturates: bool) -> Steps:
    """A program of the values, up to the cast to FP8.

    saturates: the target's cast to FP8 turns what is too large into the largest number. Then clamps to that number
        before the cast are left out, and where there are none, what PyTorch's cast makes NaN is made so first.
    """
    translated = list(steps(program))
    top = torch.finfo(quant_dtype).max
    clamps = [step for step in translated[-2:] if step in (("clamp_min", -top), ("clamp_max", top))]
    bounded = len(clamps) == 2
    if bounded and saturates:
        translated = translated[:-2]
    if not bounded:
        translated.append(("nan_above", LAST_FINITE[quant_dtype]))
    if translated[:2] == [("float32", None), ("div_scale", None)]:
        covered = not static and _covers(factor_program)
        translated[:2] = [("covered_div_scale" if covered else "shared_div_scale", None)]
    return tuple(translated)


def _covers(factor_program: str) -> bool:
    """Whether the factor is about the maximum over FP8's largest number, or larger: then no quotient overflows."""
    size = 1.0
    for name, number in parse(factor_program):
        if name == "clamp_max" or (number is not None and number <= 0.0):
            return False
        if name == "mul" and number is not None:
            size *= number
        elif name == "div" and number is not None:
            size /= number
    return 1e-6 < size < 1e6 and not is_inverse(factor_program)
