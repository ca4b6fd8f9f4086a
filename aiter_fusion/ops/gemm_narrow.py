"""Further matrix products of narrow values: batches of int8, and 4-bit weights with microscaling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..providers.tiles import in_rows, shuffled, shuffled_scales, unshuffled_scales
from . import microscaling
from .bridge import bridge_op

__all__ = ["batched_gemm_a8w8", "gemm_a4w4", "gemm_a8wfp4"]

F32 = torch.float32


def _batched_samples() -> Iterator[dict[str, Any]]:
    for seed, (b, m, n, k) in enumerate(((3, 5, 48, 64), (1, 1, 16, 32), (2, 0, 32, 64), (2, 7, 16, 640))):
        generator = torch.Generator().manual_seed(seed)
        x, w = (torch.randint(-127, 128, (b, rows, k), generator=generator, dtype=torch.int8) for rows in (m, n))
        scales = {"x_scale": 0.005 * (1 + torch.rand(b, m, 1)), "w_scale": 0.005 * (1 + torch.rand(b, 1, n))}
        for dtype in (torch.bfloat16, torch.float16):
            bias = torch.randn(b, 1, n, generator=generator).to(dtype) if seed % 2 else None
            yield {"x": x, "w": w} | scales | {"bias": bias, "dtype": dtype}


def _fp4_samples() -> Iterator[dict[str, Any]]:
    for seed, (m, n, k) in enumerate(((5, 48, 256), (1, 32, 64), (0, 32, 128), (33, 16, 512))):
        generator = torch.Generator().manual_seed(seed)
        x, x_scale = microscaling.to_mxfp4(torch.randn(m, k, generator=generator))
        w, w_scale = microscaling.to_mxfp4(torch.randn(n, k, generator=generator))
        tiles, w_scale = shuffled(w).view(n, k // 2), shuffled_scales(w_scale)
        yield {"x": x, "w": tiles, "x_scale": x_scale, "w_scale": w_scale, "dtype": torch.bfloat16}


def _a8wfp4_samples() -> Iterator[dict[str, Any]]:
    for seed, (m, n, k) in enumerate(((5, 48, 256), (1, 32, 64), (0, 32, 128), (17, 16, 512))):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(m, k, generator=generator).to(torch.float8_e4m3fn)
        w, w_scale = microscaling.to_mxfp4(torch.randn(n, k, generator=generator))
        for dtype in (torch.bfloat16, torch.float16):
            scales = {"x_scale": torch.rand(m, 1) + 0.5, "w_scale": w_scale}
            yield {"x": x, "w": w} | scales | {"dtype": dtype}


@bridge_op(
    "y",
    shape=lambda x, w, dtype, **_: {"y": ([x.shape[0], x.shape[1], w.shape[1]], dtype)},
    samples=_batched_samples,
)
def batched_gemm_a8w8(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    provider: str = "auto",
) -> Tensor:
    """``(x[b] @ w[b].T) * x_scale[b] * w_scale[b] + bias[b]`` of int8 values, a scale for each row of x and of w.

    Args:
        x: ``[B, M, K]`` int8.
        w: ``[B, N, K]`` int8.
        x_scale: ``[B, M, 1]`` float32, dequantisation scales.
        w_scale: ``[B, 1, N]`` float32, dequantisation scales.
        bias: ``[B, 1, N]`` of ``dtype``.
        dtype: of the result, bfloat16 or float16.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[B, M, N]`` of ``dtype``, contiguous.

    AITER: ``aiter.batched_gemm_a8w8_CK``; gfx90a, gfx942 and gfx950.
    """
    # sums may exceed 2**24, which float32 does not count by ones
    y = torch.bmm(x.double(), w.double().mT).to(F32) * (x_scale.to(F32) * w_scale.to(F32))
    return (y if bias is None else y + bias.to(F32)).to(dtype)


@bridge_op("y", shape=lambda x, w, dtype, **_: {"y": ([x.shape[0], w.shape[0]], dtype)}, samples=_fp4_samples)
def gemm_a4w4(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    provider: str = "auto",
) -> Tensor:
    """``dequantised(x) @ dequantised(weight).T`` of MXFP4: 4-bit values, a power of two for each 32 of a row.

    Args:
        x: ``[M, K / 2]`` uint8, two E2M1 values in a byte, the first in the low half.
        w: ``[N, K / 2]`` uint8: ``shuffled(weight).view(N, K / 2)``.
        x_scale: ``[M, K / 32]`` uint8, E8M0; in rows: AITER's order is made of them at every call.
        w_scale: ``[up to 256s of N, up to 8s of K / 32]`` uint8: ``shuffled_scales`` of the weight's ``[N, K / 32]``.
        dtype: of the result, bfloat16.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[M, N]`` of ``dtype``, contiguous.

    AITER: ``aiter.gemm_a4w4`` (v0.1.9 on); gfx950. Source: OCP Microscaling Formats 1.0.
    """
    n, k = w.shape[0], 2 * w.shape[1]
    weight = microscaling.dequantised(in_rows(w.t(), True), unshuffled_scales(w_scale, n, k // microscaling.GROUP))
    return (microscaling.dequantised(x, x_scale) @ weight.t()).to(dtype)


@bridge_op("y", shape=lambda x, w, dtype, **_: {"y": ([x.shape[0], w.shape[0]], dtype)}, samples=_a8wfp4_samples)
def gemm_a8wfp4(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    provider: str = "auto",
) -> Tensor:
    """``(x * x_scale) @ dequantised(w).T``: FP8 activations with a scale for each row, MXFP4 weights.

    Args:
        x: ``[M, K]`` FP8.
        w: ``[N, K / 2]`` uint8, two E2M1 values in a byte, the first in the low half; in rows.
        x_scale: ``[M, 1]`` float32, dequantisation scales.
        w_scale: ``[N, K / 32]`` uint8, E8M0.
        dtype: of the result, bfloat16 or float16.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[M, N]`` of ``dtype``, contiguous.

    AITER: ``aiter.ops.triton.gemm.basic.gemm_a8wfp4.gemm_a8wfp4`` (v0.1.10 on), a Triton kernel; gfx950.
    """
    y = x.to(F32) @ microscaling.dequantised(w, w_scale).t()
    return (y * x_scale.to(F32).reshape(-1, 1)).to(dtype)
