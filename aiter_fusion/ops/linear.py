"""Products of FP8 activations with the FP8 weights of several linear layers that read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..op import ListOp, Spec, define
from ..providers.choice import implementation

__all__ = ["FP8_LINEAR"]


def _reference(
    x: Tensor,
    weights: Sequence[Tensor],
    x_scale: Tensor,
    weight_scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dtype: torch.dtype,
    fast_accum: bool,
) -> dict[str, Tensor]:
    return {
        f"y.{i}": torch._scaled_mm(x, w, x_scale, s, bias=b, out_dtype=dtype, use_fast_accum=fast_accum)
        for i, (w, s, b) in enumerate(zip(weights, weight_scales, biases, strict=True))
    }


def _shape(x: Tensor, weights: Sequence[Tensor], dtype: torch.dtype, **_: Any) -> dict[str, Spec]:
    return {f"y.{i}": ([x.shape[0], w.shape[1]], dtype) for i, w in enumerate(weights)}


def _samples() -> Iterator[dict[str, Any]]:
    for seed, (m, k, ns) in enumerate(((1, 64, (32, 16)), (5, 128, (48,)))):
        generator = torch.Generator().manual_seed(seed)
        draw = [torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn).t() for n in ns]
        yield {
            "x": torch.randn(m, k, generator=generator).to(torch.float8_e4m3fn),
            "weights": draw,
            "x_scale": torch.rand(m, 1) + 0.5,
            "weight_scales": [torch.rand(1, n) + 0.5 for n in ns],
            "biases": [None] * len(ns),
            "dtype": torch.bfloat16,
            "fast_accum": True,
        }


FP8_LINEAR = define(
    ListOp(
        family="fp8_linear",
        features=frozenset(),
        arguments={
            "x": "Tensor",
            "weights": "Tensor[]",
            "x_scale": "Tensor",
            "weight_scales": "Tensor[]",
            "biases": "Tensor?[]",
            "dtype": "ScalarType",
            "fast_accum": "bool",
        },
        outputs=(),
        reference=_reference,
        shape=_shape,
        samples=_samples,
    ),
    implementation,
)
