"""Formats that values are quantised to, one row each."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Format(NamedTuple):
    """What quantised values are stored as.

    dtype: of the values.
    top:   the largest number that it has, to which values are saturated.
    scale: the dtype of their scales, which are dequantisation scales: ``q * scale`` is near the value.
    """

    dtype: torch.dtype
    top: float
    scale: torch.dtype = torch.float32


# 448 and 240: OCP's format, which most GPUs have, and the one of MI300, without infinities and negative zero.
FORMATS = {
    format.dtype: format for format in (Format(torch.float8_e4m3fn, 448.0), Format(torch.float8_e4m3fnuz, 240.0))
}
