"""RMSNorm without quantisation, as AITER computes it: float32 all through, one rounding at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..stages import norm
from .bridge import bridge_op

__all__ = ["add_rms_norm", "rms_norm"]

F32 = torch.float32


def _samples(add: bool) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    for sizes, dtype in (
        ((5, 64), torch.bfloat16),
        ((2, 3, 72), torch.float16),
        ((1, 64), F32),
        ((0, 64), torch.bfloat16),
        ((2, 8200), torch.bfloat16),
    ):
        tensors = [torch.randn(sizes, generator=generator).to(dtype) for _ in ("x", "residual")]
        weight = torch.randn(sizes[-1], generator=generator).to(dtype)
        yield {"x": tensors[0]} | ({"residual": tensors[1]} if add else {}) | {"weight": weight, "eps": 1e-5}


@bridge_op("y", shape=lambda x, **_: {"y": (x.shape, x.dtype)}, samples=lambda: _samples(add=False))
def rms_norm(x: Tensor, weight: Tensor, eps: float, *, provider: str = "auto") -> Tensor:
    """``x * rsqrt(mean(x**2, -1) + eps) * weight`` in float32, rounded once.

    Args:
        x: ``[..., H]`` bfloat16 or float16 (reference: any float).
        weight: ``[H]`` of the dtype of x.
        eps: added to the mean.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[..., H]`` of the dtype of x, contiguous.

    AITER: ``aiter.rms_norm``; H up to 8192 and a multiple of 8, x contiguous.
    """
    return norm.rms_norm(x, weight.to(F32), eps, None, False, x.dtype).contiguous()


@bridge_op(
    "y",
    "residual_out",
    shape=lambda x, **_: {"y": (x.shape, x.dtype), "residual_out": (x.shape, x.dtype)},
    samples=lambda: _samples(add=True),
)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, provider: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``rms_norm`` of ``x + residual``, and that sum. The sum is normalised in float32 and rounded on its way out.

    Args:
        x: ``[..., H]`` bfloat16 or float16 (reference: any float).
        residual: ``[..., H]`` of the dtype of x.
        weight: ``[H]`` of the dtype of x.
        eps: added to the mean.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        (normalised, sum), each ``[..., H]`` of the dtype of x, contiguous.

    AITER: ``aiter.rmsnorm2d_fwd_with_add``; limits of ``rms_norm``.
    """
    summed = x.to(F32) + residual.to(F32)
    y = norm.rms_norm(summed, weight.to(F32), eps, None, False, x.dtype)
    return y.contiguous(), summed.to(x.dtype).contiguous()
