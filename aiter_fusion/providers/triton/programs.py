"""Programs (``aiter_fusion/scale_program.py``) translated for the kernels: PyTorch's arithmetic on a GPU."""

from __future__ import annotations

import ctypes
import math
from functools import cache

import torch

from ...scale_program import parse, result_dtype

Steps = tuple[tuple[str, float | None], ...]


def _float32(number: float) -> float:
    return ctypes.c_float(number).value


@cache
def nan_from(quant_dtype: torch.dtype) -> float | None:
    """The smallest float32 that PyTorch's cast to FP8 turns into NaN, or None if its cast saturates.

    It depends on the format and on PyTorch's version, which casts to e4m3fn with saturation in newer releases.
    """
    top = torch.finfo(quant_dtype).max
    if not torch.tensor(1e9).to(quant_dtype).float().isnan():
        return None
    _, exponent = math.frexp(top)
    # halfway from the largest number, which has a significand of four bits, to the one that would follow
    middle = torch.tensor(top + 2.0 ** (exponent - 5))
    following = torch.nextafter(middle, torch.tensor(1e9))
    return middle.item() if middle.to(quant_dtype).float().isnan() else following.item()


@cache
def steps(program: str) -> Steps:
    """A program that computes a scale from the maximum of a block.

    A division by a number becomes a product with its reciprocal, rounded to float32: PyTorch's GPU kernels compute it
        so.
    """
    translated: list[tuple[str, float | None]] = []
    for name, number in parse(program):
        if name == "div":
            assert number is not None
            divisor = _float32(number)
            translated.append(("mul", _float32(1.0 / divisor) if divisor else math.copysign(math.inf, divisor)))
        elif name == "scale_mul":  # the order of factors matters to PyTorch's CPU kernels alone
            translated.append(("mul_scale", None))
        else:
            translated.append((name, None if number is None else _float32(number)))
    return tuple(translated)


@cache
def value_steps(
    program: str, factor_program: str, value: torch.dtype, quant_dtype: torch.dtype, by_block: bool, saturates: bool
) -> Steps:
    """A program that brings values to the range of a format, up to the cast.

    Args:
        program: of the values.
        factor_program: of the factor that they are combined with; its dtype may promote them.
        value: dtype of the values.
        quant_dtype: the format.
        by_block: whether each block has a factor of its own, rather than the tensor, or a given one.
        saturates: whether the GPU's cast to FP8 saturates. Then clamps to the largest number, right before the cast,
            are left out. Without saturation, and without clamps, steps are added that do what PyTorch's cast does.
    """
    translated = list(steps(program))
    if by_block:
        # a factor that has dimensions promotes the values; one for the whole tensor has none, and does not
        combine = next((i for i, (name, _) in enumerate(translated) if name.endswith("_scale")), 0)
        before = result_dtype(" ".join(program.split()[:combine]), value)
        if torch.promote_types(before, result_dtype(factor_program, value)) != before:
            translated.insert(combine, ("float32", None))
    if not quant_dtype.is_floating_point:
        return tuple(translated)
    top = torch.finfo(quant_dtype).max
    clamps: Steps = (("clamp_min", -top), ("clamp_max", top))
    nan = nan_from(quant_dtype)
    bounded = sorted(translated[-2:]) == sorted(clamps)
    if bounded and saturates:
        translated = translated[:-2]
    elif not bounded and nan is not None:
        translated.append(("nan_from", nan))
    elif not bounded and not saturates:
        translated += clamps
    if translated[:2] == [("float32", None), ("div_scale", None)] and value.itemsize == 2:
        translated[:2] = [("shared_div_scale", None)]
    return tuple(translated)
