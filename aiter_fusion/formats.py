"""Formats that values are quantised to, one row each."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Format(NamedTuple):
    """What quantised values are stored as.

    name:   in reports; of FP8, variants of sites say nothing.
    dtype:  of the values.
    top:    the largest number that it has, to which values are saturated.
    scale:  the dtype of their scales, which are dequantisation scales: ``q * scale`` is near the value.
    """

    name: str
    dtype: torch.dtype
    top: float
    scale: torch.dtype = torch.float32

    @property
    def is_integer(self) -> bool:
        """Whether values are rounded to whole numbers, evenly spaced, before the cast, which would cut off the rest."""
        return not self.dtype.is_floating_point

    def word(self) -> str:
        """What the variant of a site says of it; nothing of FP8."""
        return "" if self.name == "fp8" else self.name


FORMATS = (
    Format("fp8", torch.float8_e4m3fn, 448.0),  # OCP's format, which most GPUs have
    Format("fp8", torch.float8_e4m3fnuz, 240.0),  # that of MI300, without infinities and negative zero
    Format("int8", torch.int8, 127.0),
    Format("mxfp8", torch.float8_e4m3fn, 448.0, torch.uint8),  # scales of 32 elements are a byte, their exponent
)
DTYPES = tuple(dict.fromkeys(format.dtype for format in FORMATS))
FP8 = tuple(dtype for dtype in DTYPES if dtype.is_floating_point)


def format_of(dtype: torch.dtype, scale: torch.dtype = torch.float32) -> Format:
    """The format with values and scales of these dtypes; a KeyError if there is none."""
    found = {(format.dtype, format.scale): format for format in FORMATS}
    return found[dtype, scale]
