"""LayerNorm without quantisation, as AITER computes it: float32 all through, one rounding at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from .bridge import bridge_op

__all__ = ["add_layer_norm", "layer_norm"]

F32 = torch.float32


def _samples(add: bool) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    for sizes, dtype in (
        ((5, 64), torch.bfloat16),
        ((2, 3, 72), torch.float16),
        ((1, 100), F32),
        ((0, 64), torch.bfloat16),
        ((2, 5120), torch.bfloat16),
    ):
        draw = [torch.randn(sizes, generator=generator).to(dtype) for _ in ("x", "residual")]
        weight, bias = (torch.randn(sizes[-1], generator=generator).to(dtype) for _ in ("weight", "bias"))
        yield {"x": draw[0]} | ({"residual": draw[1]} if add else {}) | {"weight": weight, "bias": bias, "eps": 1e-5}


def _normalised(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return F.layer_norm(x, weight.shape, weight.to(F32), bias.to(F32), eps).to(dtype).contiguous()


@bridge_op("y", shape=lambda x, **_: {"y": (x.shape, x.dtype)}, samples=lambda: _samples(add=False))
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, provider: str = "auto") -> Tensor:
    """``(x - mean(x, -1)) * rsqrt(var(x, -1) + eps) * weight + bias`` in float32, rounded once; ``var`` divides by H.

    Args:
        x: ``[..., H]`` bfloat16 or float16 (reference: any float).
        weight: ``[H]`` of the dtype of x.
        bias: ``[H]`` of the dtype of x.
        eps: added to the variance.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[..., H]`` of the dtype of x, contiguous.

    AITER: ``aiter.layernorm2d_fwd`` (v0.1.5 on); x contiguous.
    """
    return _normalised(x.to(F32), weight, bias, eps, x.dtype)


@bridge_op(
    "y",
    "residual_out",
    shape=lambda x, **_: {"y": (x.shape, x.dtype), "residual_out": (x.shape, x.dtype)},
    samples=lambda: _samples(add=True),
)
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *, provider: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``layer_norm`` of ``x + residual``, and that sum. The sum is normalised in float32 and rounded on its way out.

    Args:
        x: ``[..., H]`` bfloat16 or float16 (reference: any float).
        residual: ``[..., H]`` of the dtype of x.
        weight: ``[H]`` of the dtype of x.
        bias: ``[H]`` of the dtype of x.
        eps: added to the variance.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        (normalised, sum), each ``[..., H]`` of the dtype of x, contiguous.

    AITER: ``aiter.layernorm2d_fwd_with_add``; limits of ``layer_norm``.
    """
    summed = x.to(F32) + residual.to(F32)
    return _normalised(summed, weight, bias, eps, x.dtype), summed.to(x.dtype).contiguous()
