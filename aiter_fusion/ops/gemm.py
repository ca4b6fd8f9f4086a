"""Matrix products of 8-bit tensors with scales, as AITER has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..providers.tiles import in_rows, shuffled
from .bridge import bridge_op

__all__ = ["gemm_a8w8", "gemm_a8w8_blockscale", "hipb_mm_fp8"]

F32 = torch.float32
BLOCK = 128


def _product(x: Tensor, w: Tensor) -> Tensor:
    """``x @ w.T`` in float32: exact for integers, summed in float32 for FP8."""
    if x.dtype is torch.int8:  # sums may exceed 2**24, which float32 does not count by ones
        return (x.double() @ w.double().t()).to(F32)
    return x.to(F32) @ w.to(F32).t()


def _scaled(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = _product(x, w) * (x_scale.to(F32).reshape(-1, 1) * w_scale.to(F32).reshape(1, -1))
    return (y if bias is None else y + bias.to(F32)).to(dtype)


def _tensors(m: int, n: int, k: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.int8:
        draw = [torch.randint(-127, 128, sizes, generator=generator, dtype=dtype) for sizes in ((m, k), (n, k))]
    else:
        draw = [torch.randn(sizes, generator=generator).to(dtype) for sizes in ((m, k), (n, k))]
    return draw[0], draw[1]


SIZES = ((5, 48, 64), (1, 16, 32), (0, 32, 64), (17, 32, 1280))


def _a8w8_samples() -> Iterator[dict[str, Any]]:
    for seed, (m, n, k) in enumerate(SIZES):
        for dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int8):
            x, w = _tensors(m, n, k, dtype, seed)
            least = 0.005 if dtype is torch.int8 else 0.5  # integers are large
            scales = {"x_scale": least * (1 + torch.rand(m, 1)), "w_scale": least * (1 + torch.rand(n, 1))}
            for out, bias in ((torch.bfloat16, None), (torch.float16, torch.randn(n).to(torch.float16))):
                yield {"x": x, "w": w} | scales | {"bias": bias, "dtype": out}


def _blockscale_samples() -> Iterator[dict[str, Any]]:
    for seed, (m, n, k) in enumerate(((5, 256, 128), (1, 128, 256), (0, 128, 128), (3, 192, 384))):
        x, w = _tensors(m, n, k, torch.float8_e4m3fn, seed)
        scales = {"x_scale": torch.rand(m, k // BLOCK) + 0.5, "w_scale": torch.rand(-(-n // BLOCK), k // BLOCK) + 0.5}
        yield {"x": x, "w": w} | scales | {"dtype": torch.bfloat16}


def _hipb_mm_samples() -> Iterator[dict[str, Any]]:
    for seed, (m, n, k) in enumerate(SIZES):
        a, w = _tensors(m, n, k, torch.float8_e4m3fn, seed)
        scales = {"a_scale": torch.rand(m, 1) + 0.5, "b_scale": torch.rand(1, n) + 0.5}
        bias = torch.randn(n).to(torch.bfloat16) if seed % 2 else None
        for is_shuffled, weight in ((False, w), (True, shuffled(w).reshape(n, k))):
            more = {"bias": bias, "dtype": torch.bfloat16, "b_is_shuffled": is_shuffled}
            yield {"a": a, "b": weight.t()} | scales | more


@bridge_op("y", shape=lambda x, w, dtype, **_: {"y": ([x.shape[0], w.shape[0]], dtype)}, samples=_a8w8_samples)
def gemm_a8w8(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    provider: str = "auto",
) -> Tensor:
    """``(x @ w.T) * x_scale * w_scale.T + bias``: 8-bit values, a scale for each row of x and of w.

    Args:
        x: ``[M, K]`` int8 or FP8.
        w: ``[N, K]`` of the dtype of x.
        x_scale: ``[M, 1]`` float32, dequantisation scales.
        w_scale: ``[N, 1]`` or ``[1, N]`` float32, dequantisation scales.
        bias: ``[N]`` of ``dtype``.
        dtype: of the result, bfloat16 or float16.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[M, N]`` of ``dtype``, contiguous.

    AITER: ``aiter.gemm_a8w8``; the GPU's own FP8 format, weights in rows (not shuffled).
    """
    return _scaled(x, w, x_scale, w_scale, bias, dtype)


@bridge_op("y", shape=lambda x, w, dtype, **_: {"y": ([x.shape[0], w.shape[0]], dtype)}, samples=_blockscale_samples)
def gemm_a8w8_blockscale(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    provider: str = "auto",
) -> Tensor:
    """``dequantised(x) @ dequantised(w).T``: FP8 values, a scale for each 128 columns of a row of x and for each block
    of 128 x 128 of w.

    Args:
        x: ``[M, K]`` FP8.
        w: ``[N, K]`` FP8.
        x_scale: ``[M, K / 128]`` float32, or a shape that can be reshaped to that; dequantisation scales.
        w_scale: ``[ceil(N / 128), K / 128]`` float32, of any strides; dequantisation scales.
        dtype: of the result, bfloat16 or float16.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[M, N]`` of ``dtype``, contiguous.

    AITER: ``aiter.gemm_a8w8_blockscale``; N and K multiples of 128.
    """
    columns = x.shape[-1]
    values = x.to(F32) * x_scale.reshape(len(x), columns // BLOCK).repeat_interleave(BLOCK, -1)
    scales = w_scale.repeat_interleave(BLOCK, 0)[: w.shape[0]].repeat_interleave(BLOCK, -1)[:, :columns]
    return (values @ (scales * w.to(F32)).t()).to(dtype)


# b is [K, N]: the columns of the result are its second dimension
@bridge_op("y", shape=lambda a, b, dtype, **_: {"y": ([a.shape[0], b.shape[1]], dtype)}, samples=_hipb_mm_samples)
def hipb_mm_fp8(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    b_is_shuffled: bool = False,
    provider: str = "auto",
) -> Tensor:
    """``(a @ b) * a_scale * b_scale + bias`` by hipBLASLt.

    Args:
        a: ``[M, K]`` FP8.
        b: ``[K, N]`` FP8, a transposed weight; with ``b_is_shuffled`` the transpose of ``shuffled(weight).view(N, K)``.
        a_scale: ``[M, 1]`` float32, dequantisation scales.
        b_scale: ``[1, N]`` float32, dequantisation scales.
        bias: ``[N]`` of ``dtype``.
        dtype: of the result, bfloat16.
        b_is_shuffled: whether b has the order in which AMD's matrix cores read it.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[M, N]`` of ``dtype``, contiguous.

    AITER: ``aiter.hipb_mm`` (v0.1.12 on; releases before end the process where hipBLASLt has no kernel for a shape);
    gfx942 and gfx950, N at least 16, N and K multiples of 16 (K of 32 if shuffled). Two kinds of calls are computed as
    ``gemm_a8w8`` is, which a warning says once: shapes for which hipBLASLt has no kernel, and calls on another GPU than
    the process's first, because AITER has one handle of hipBLASLt. With ``AITER_FUSION_TUNING`` the first call of every
    shape of up to 512 rows takes minutes, and prints.
    """
    return _scaled(a, in_rows(b, b_is_shuffled), a_scale, b_scale, bias, dtype)
