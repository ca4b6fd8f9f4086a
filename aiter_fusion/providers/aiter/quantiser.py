"""The programs (``aiter_fusion/scale_program.py``) that AITER's quantisers compute, apart from roundings.

They compute ``scale = max(amax, 1e-10) / MAX`` and ``q = cast(clamp(x * (1 / scale), -MAX, MAX))``, all in float32. A
given scale takes the place of the first. A scale that is a byte is the exponent of the next power of two of that scale.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ...scale_program import DTYPES, is_of_bytes, parse, result_dtype

# The largest floor of the maximum that is taken for AITER's, 1e-10: only rows whose values are all below it differ, and
# they count as zero rows.
NEGLIGIBLE = 1e-6
# The relative difference up to which two constants mean the same: 1/448 may have been rounded to bfloat16.
ALIKE = 2**-8


# The steps that can occur in such a program of the maximum, and those that combine a value with a factor.
STEPS = ("reciprocal", "mul", "div", "clamp_min", "clamp_max", "if_zero", "unless_positive", *DTYPES)
BYTES = ("e8m0", "e8m0_inverse")
COMBINING = ("mul_scale", "scale_mul", "div_scale")


class Scale(NamedTuple):
    """``multiplier * max(m, floor)``, or its inverse."""

    multiplier: float
    floor: float
    inverse: bool


def scale_of(program: str, dtype: torch.dtype = torch.float32) -> Scale | None:
    """The scale that a program computes from a maximum of ``dtype``, apart from roundings; None if it computes
    something else, such as a power of two.

    A number in the place of zero acts as a floor at the smallest positive number: rows without a larger one are zero
        rows.
    """
    multiplier, floor, inverse = 1.0, 0.0, False  # the value is multiplier * m, or multiplier / m
    for name, number in parse(program):
        if name in DTYPES:
            dtype = DTYPES[name]
        elif name == "reciprocal":
            multiplier, inverse = 1 / multiplier, not inverse
        elif name in ("mul", "div") and number is not None and number > 0:
            multiplier = multiplier * number if name == "mul" else multiplier / number
        elif name == "clamp_min" and number is not None and not inverse:
            floor = max(floor, number / multiplier)
        elif name in ("if_zero", "unless_positive") and not inverse:
            smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
            floor = max(floor, smallest / multiplier)
        elif name == "clamp_max" and number is not None and number > 0 and inverse:
            floor = max(floor, multiplier / number)
        else:
            return None
    return Scale(1 / multiplier if inverse else multiplier, floor, inverse)


# Source: fp32_to_i8_scaled_x2 of csrc/include/aiter_opus_plus.h, and ``.to(qx.dtype)`` in its Triton quantisers.
_CUT_OFF = "its kernels cut the fraction off where they convert to int8, and this rounds to the nearest"


def _is_alike(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=ALIKE)


def why_not_dynamic(
    scale_steps: str, factor_steps: str, value_steps: str, quant_dtype: torch.dtype, value: torch.dtype
) -> str | None:
    """Why AITER's quantiser does not compute these programs, or None."""
    if not quant_dtype.is_floating_point:
        return _CUT_OFF
    top = torch.finfo(quant_dtype).max
    if is_of_bytes(factor_steps):
        scale, factor = ([name for name, _ in parse(program)][-1:] for program in (scale_steps, factor_steps))
        if scale != ["e8m0"] or factor != ["e8m0_inverse"]:
            return f"its scale is not that of its values: {scale_steps!r} and {factor_steps!r}"
        scales, factors = (program.rpartition(" ")[0] for program in (scale_steps, factor_steps))
        values = value_steps.replace("mul_scale", "div_scale")  # by what divides
        return why_not_dynamic(scales, factors, values, quant_dtype, value)
    for what, program in (("scale", scale_steps), ("factor", factor_steps)):
        found = scale_of(program, value)
        if found is None:
            return f"its {what} is not the maximum over {top:g}: {program!r}"
        if not _is_alike(found.multiplier, 1 / top):
            return f"its {what} is the maximum times {found.multiplier:g}, not over {top:g}"
        if found.floor > NEGLIGIBLE:
            return f"its {what} has a floor of {found.floor:g} for the maximum, and AITER's is 1e-10"
        if what == "scale" and (found.inverse or result_dtype(program, value) is not torch.float32):
            return f"its scale is not a dequantisation scale in float32: {program!r}"
    inverse = scale_of(factor_steps, value)
    return _why_not_values(value_steps, inverse is not None and inverse.inverse, top, clamped=False)


def why_not_static(factor_steps: str, value_steps: str, quant_dtype: torch.dtype) -> str | None:
    """Why AITER's quantiser with a given scale does not compute these programs, or None."""
    if not quant_dtype.is_floating_point:
        return _CUT_OFF
    found = scale_of(factor_steps)
    if found is None or found.floor > 0 or found.multiplier != 1.0:
        return f"it does not divide by the scale that is given: {factor_steps!r}"
    return _why_not_values(value_steps, found.inverse, torch.finfo(quant_dtype).max, clamped=True)


def _why_not_values(program: str, inverse: bool, top: float, clamped: bool) -> str | None:
    """Why values are not divided by the scale and saturated, or None. Saturation matters where the scale is given."""
    steps = [(name, number) for name, number in parse(program) if name not in DTYPES]
    combine, clamps = steps[:1], steps[1:]
    wanted = ("mul_scale", "scale_mul") if inverse else ("div_scale",)
    if not combine or combine[0][0] not in wanted:
        return f"its values are not divided by the scale: {program!r}"
    saturated = {("clamp_min", -top), ("clamp_max", top)}
    if not set(clamps) <= saturated or (clamped and set(clamps) != saturated):
        return f"its values are not clamped to {top:g} as AITER's are: {program!r}"
    return None
