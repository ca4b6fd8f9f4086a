"""Matrix products of 8-bit tensors with scales, as AITER has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..op import BridgeOp
from ..providers import bridge_op
from ..providers.tiles import in_rows, shuffled

F32 = torch.float32
BLOCK = 128


def _product(x: Tensor, w: Tensor) -> Tensor:
    """``x @ w.T`` in float32; of integers exact, of FP8 summed in float32."""
    if x.dtype is torch.int8:  # sums may exceed 2**24, which float32 does not count by ones
        return (x.double() @ w.double().t()).to(F32)
    return x.to(F32) @ w.to(F32).t()


def _finished(product: Tensor, bias: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"y": (product if bias is None else product + bias.to(F32)).to(dtype)}


def _a8w8(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    scales = x_scale.to(F32).reshape(-1, 1) * w_scale.to(F32).reshape(1, -1)
    return _finished(_product(x, w) * scales, bias, dtype)


def _blockscale(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    columns = x.shape[-1]
    values = x.to(F32) * x_scale.reshape(len(x), columns // BLOCK).repeat_interleave(BLOCK, -1)
    weights = w_scale.repeat_interleave(BLOCK, 0)[: w.shape[0]].repeat_interleave(BLOCK, -1)[:, :columns] * w.to(F32)
    return _finished(values @ weights.t(), None, dtype)


def _hipb_mm(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    b_is_shuffled: bool,
) -> dict[str, Tensor]:
    return _a8w8(a, in_rows(b, b_is_shuffled), a_scale, b_scale, bias, dtype)


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
            yield (
                {"a": a, "b": weight.t()}
                | scales
                | {
                    "bias": bias,
                    "dtype": torch.bfloat16,
                    "b_is_shuffled": is_shuffled,
                }
            )


GEMM_A8W8 = bridge_op(
    BridgeOp(
        family="gemm_a8w8",
        features=frozenset(),
        arguments={
            "x": "Tensor",
            "w": "Tensor",
            "x_scale": "Tensor",
            "w_scale": "Tensor",
            "bias": "Tensor?",
            "dtype": "ScalarType",
        },
        outputs=("y",),
        reference=_a8w8,
        shape=lambda x, w, dtype, **_: {"y": ([x.shape[0], w.shape[0]], dtype)},
        samples=_a8w8_samples,
    )
)

GEMM_A8W8_BLOCKSCALE = bridge_op(
    BridgeOp(
        family="gemm_a8w8_blockscale",
        features=frozenset(),
        arguments={"x": "Tensor", "w": "Tensor", "x_scale": "Tensor", "w_scale": "Tensor", "dtype": "ScalarType"},
        outputs=("y",),
        reference=_blockscale,
        shape=lambda x, w, dtype, **_: {"y": ([x.shape[0], w.shape[0]], dtype)},
        samples=_blockscale_samples,
    )
)

HIPB_MM_FP8 = bridge_op(
    BridgeOp(
        family="hipb_mm_fp8",
        features=frozenset(),
        arguments={
            "a": "Tensor",
            "b": "Tensor",
            "a_scale": "Tensor",
            "b_scale": "Tensor",
            "bias": "Tensor?",
            "dtype": "ScalarType",
            "b_is_shuffled": "bool",
        },
        outputs=("y",),
        reference=_hipb_mm,
        # b is [K, N]: the columns of the result are its second dimension
        shape=lambda a, b, dtype, **_: {"y": ([a.shape[0], b.shape[1]], dtype)},
        samples=_hipb_mm_samples,
    )
)
