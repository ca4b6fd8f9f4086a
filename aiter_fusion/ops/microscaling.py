"""Microscaling formats: 4-bit or FP8 values with a power of two as the scale of each 32 elements of a row.

Source: OCP Microscaling Formats (MX) 1.0. A scale is a byte b, ``2 ** (b - 127)`` (E8M0); 4-bit values are E2M1, two in
a byte, the first in the low half.
"""

from __future__ import annotations

import torch
from torch import Tensor

F32 = torch.float32
GROUP = 32

# The numbers of E2M1 by their lower three bits; the fourth is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def scales_as_numbers(scales: Tensor) -> Tensor:
    """E8M0 bytes, uint8 or ``float8_e8m0fnu``, as float32."""
    return torch.ldexp(torch.ones_like(scales, dtype=F32), scales.view(torch.uint8).to(torch.int32) - 127)


def unpacked(packed: Tensor) -> Tensor:
    """Bytes ``[..., K / 2]`` of E2M1 as float32 ``[..., K]``."""
    codes = packed.view(torch.uint8)
    codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    numbers = torch.tensor((*E2M1, *(-number for number in E2M1)), dtype=F32, device=packed.device)
    return numbers[codes.long()]


def packed_e2m1(x: Tensor) -> Tensor:
    """Float32 ``[..., K]`` rounded to E2M1, ties to an even code, saturated: bytes ``[..., K / 2]``."""
    numbers = torch.tensor(E2M1, dtype=F32, device=x.device)
    between = (numbers[1:] + numbers[:-1]) / 2
    size = x.abs().contiguous()
    below, above = torch.bucketize(size, between, right=False), torch.bucketize(size, between, right=True)
    codes = torch.where(below % 2 == 0, below, above) | (torch.signbit(x).long() << 3)
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return (low | high << 4).to(torch.uint8)


def _groups(x: Tensor, top: float) -> tuple[Tensor, Tensor]:
    """``x`` in groups, divided by their scales, and these: the least powers of two with which the maximum of a group
    is at most ``top``."""
    groups = x.to(F32).unflatten(-1, (-1, GROUP))
    mantissa, exponent = torch.frexp(groups.abs().amax(-1) / top)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)  # 0: 2 ** -127
    exponent = torch.where(mantissa == 0, -127, exponent)
    return torch.ldexp(groups, -exponent[..., None]), (exponent + 127).to(torch.uint8)


def to_mxfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """``[..., K]`` as bytes ``[..., K / 2]`` of E2M1 and E8M0 scales ``[..., K / 32]``, uint8 both."""
    values, scales = _groups(x, 6.0)
    return packed_e2m1(values.flatten(-2)), scales


def to_mxfp8(x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """``[..., K]`` as FP8 ``[..., K]`` and E8M0 scales ``[..., K / 32]``, uint8."""
    values, scales = _groups(x, torch.finfo(dtype).max)
    return values.flatten(-2).to(dtype), scales


def dequantised(values: Tensor, scales: Tensor) -> Tensor:
    """Float32 ``[..., K]`` of E2M1 in bytes, or of FP8, with E8M0 scales ``[..., K / 32]``."""
    numbers = unpacked(values) if values.dtype in (torch.uint8, torch.float4_e2m1fn_x2) else values.to(F32)
    return (numbers.unflatten(-1, (-1, GROUP)) * scales_as_numbers(scales)[..., None]).flatten(-2)
