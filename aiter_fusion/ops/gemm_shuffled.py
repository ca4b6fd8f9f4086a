"""Matrix products of FP8 tensors whose weight lies in the order in which AMD's matrix cores read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..providers.tiles import in_rows, shuffled
from .bridge import bridge_op

__all__ = ["gemm_a8w8_blockscale_bpreshuffle", "gemm_a8w8_bpreshuffle"]

F32 = torch.float32
BLOCK = 128


def _weight(shuffled_weight: Tensor) -> Tensor:
    """The weight ``[N, K]``, row by row, of ``shuffled(weight).view(N, K)``."""
    return in_rows(shuffled_weight.t(), is_shuffled=True)


def _operands(m: int, n: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(rows, k, generator=generator).to(torch.float8_e4m3fn) for rows in (m, n))
    return x, shuffled(w).view(n, k)


def _row_samples() -> Iterator[dict[str, Any]]:
    for seed, (m, n, k) in enumerate(((5, 48, 64), (1, 16, 32), (0, 32, 64), (17, 32, 1280))):
        x, w = _operands(m, n, k, seed)
        scales = {"x_scale": torch.rand(m, 1) + 0.5, "w_scale": torch.rand(n, 1) + 0.5}
        for dtype in (torch.bfloat16, torch.float16):
            yield {"x": x, "w": w} | scales | {"dtype": dtype}


def _block_samples() -> Iterator[dict[str, Any]]:
    for seed, (m, n, k) in enumerate(((5, 256, 256), (1, 128, 256), (0, 128, 128), (3, 192, 384))):
        x, w = _operands(m, n, k, seed)
        scale = torch.rand(m, k // BLOCK) + 0.5
        w_scale = torch.rand(-(-n // BLOCK), k // BLOCK) + 0.5
        for x_scale in (scale, scale.t().contiguous().t()):
            yield {"x": x, "w": w, "x_scale": x_scale, "w_scale": w_scale, "dtype": torch.bfloat16}


@bridge_op("y", shape=lambda x, w, dtype, **_: {"y": ([x.shape[0], w.shape[0]], dtype)}, samples=_row_samples)
def gemm_a8w8_bpreshuffle(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    provider: str = "auto",
) -> Tensor:
    """``(x @ weight.T) * x_scale * w_scale.T``: FP8 values, a scale for each row of x and of the weight.

    Args:
        x: ``[M, K]`` FP8.
        w: ``[N, K]`` of the dtype of x: ``shuffled(weight).view(N, K)``.
        x_scale: ``[M, 1]`` float32, dequantisation scales.
        w_scale: ``[N, 1]`` or ``[1, N]`` float32, dequantisation scales.
        dtype: of the result, bfloat16 or float16.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[M, N]`` of ``dtype``, contiguous.

    AITER: ``aiter.gemm_a8w8_bpreshuffle`` (v0.1.4 on), which takes no bias; gfx942 and gfx950.
    """
    y = x.to(F32) @ _weight(w).to(F32).t()
    return (y * (x_scale.to(F32).reshape(-1, 1) * w_scale.to(F32).reshape(1, -1))).to(dtype)


@bridge_op("y", shape=lambda x, w, dtype, **_: {"y": ([x.shape[0], w.shape[0]], dtype)}, samples=_block_samples)
def gemm_a8w8_blockscale_bpreshuffle(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    provider: str = "auto",
) -> Tensor:
    """``dequantised(x) @ dequantised(weight).T``: FP8 values, a scale for each 128 columns of a row of x and for each
    block of 128 x 128 of the weight.

    Args:
        x: ``[M, K]`` FP8.
        w: ``[N, K]`` FP8: ``shuffled(weight).view(N, K)``.
        x_scale: ``[M, K / 128]`` float32, dequantisation scales, of any strides: they say where a scale is. AITER reads
            those of strides ``(1, M)``, as ``group_quant(..., column_major=True)`` makes them; others are copied.
        w_scale: ``[ceil(N / 128), K / 128]`` float32, of any strides; dequantisation scales.
        dtype: of the result, bfloat16 or float16.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[M, N]`` of ``dtype``, contiguous.

    AITER: ``aiter.gemm_a8w8_blockscale_bpreshuffle`` (v0.1.5.post3 on); N and K multiples of 128; gfx942 and gfx950.
    """
    weight, columns = _weight(w), x.shape[-1]
    values = x.to(F32) * x_scale.repeat_interleave(BLOCK, -1)[:, :columns]
    scales = w_scale.repeat_interleave(BLOCK, 0)[: weight.shape[0]].repeat_interleave(BLOCK, -1)[:, :columns]
    return (values @ (scales * weight.to(F32)).t()).to(dtype)
