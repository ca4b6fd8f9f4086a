"""Programs (``aiter_fusion/arithmetic.py``) as the kernels run them: PyTorch's arithmetic on a GPU, spelled out."""

from __future__ import annotations

import ctypes
import math
from functools import cache

import torch

from ...arithmetic import parse, result_dtype

Steps = tuple[tuple[str, float | None], ...]


def _float32(number: float) -> float:
    return ctypes.c_float(number).value


@cache
def nan_from(quant_dtype: torch.dtype) -> float | None:
    """The least float32 that PyTorch's cast to FP8 turns into NaN; None if its cast saturates.

    That depends on the format, and on the version: the cast to e4m3fn saturates in newer ones.
    """
    top = torch.finfo(quant_dtype).max
    if not torch.tensor(1e9).to(quant_dtype).float().isnan():
        return None
    _, exponent = math.frexp(top)
    middle = torch.tensor(top + 2.0 ** (exponent - 5))  # of the largest of four-bit significands and what would follow
    following = torch.nextafter(middle, torch.tensor(1e9))
    return middle.item() if middle.to(quant_dtype).float().isnan() else following.item()


@cache
def steps(program: str) -> Steps:
    """A program of the block's maximum.

    On a GPU, PyTorch divides by a number by multiplying with its reciprocal, rounded to float32.
    """
    translated: list[tuple[str, float | None]] = []
    for name, number in parse(program):
        if name == "div":
            assert number is not None
            divisor = _float32(number)
            translated.append(("mul", _float32(1.0 / divisor) if divisor else math.copysign(math.inf, divisor)))
        elif name == "scale_mul":  # the order of the factors only matters to PyTorch's CPU kernels
            translated.append(("mul_scale", None))
        else:
            translated.append((name, None if number is None else _float32(number)))
    return tuple(translated)


@cache
def value_steps(
    program: str, factor_program: str, value: torch.dtype, quant_dtype: torch.dtype, by_block: bool, saturates: bool
) -> Steps:
    """A program of the values, which are of dtype ``value``, up to the cast to FP8.

    by_block: whether there is a factor for each block, not one for the tensor or from outside.
    saturates: the target's cast to FP8 turns what is too large into the largest number. Then clamps to that number
        before the cast are left out. Where there are none, the program ends as PyTorch's own cast would.
    """
    translated = list(steps(program))
    if by_block:
        # a factor that has dimensions promotes the values; one for the whole tensor has none, and does not
        combine = next((i for i, (name, _) in enumerate(translated) if name.endswith("_scale")), 0)
        before = result_dtype(" ".join(program.split()[:combine]), value)
        if torch.promote_types(before, result_dtype(factor_program, value)) != before:
            translated.insert(combine, ("float32", None))
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
