"""Quantisers alone: float values to FP8 or int8 with a scale for each row, each group of columns, or the tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..op import Spec
from .bridge import bridge_op

__all__ = ["group_quant", "static_quant", "tensor_quant", "token_quant"]

F32 = torch.float32
FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
# A group's scale is that of a maximum of at least this.
LEAST = 1e-10


def _top(dtype: torch.dtype) -> float:
    return 127.0 if dtype is torch.int8 else torch.finfo(dtype).max


def _codes(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``x / scale``, saturated, rounded to nearest even; zeros where the scale is zero."""
    top = _top(dtype)
    q = torch.where(scale == 0, 0.0, x / scale).clamp(-top, top)
    return (q.round() if dtype is torch.int8 else q).to(dtype)


def _samples(**more: Any) -> Iterator[dict[str, Any]]:
    for seed, (sizes, source) in enumerate(
        (((5, 256), torch.bfloat16), ((2, 3, 384), torch.float16), ((0, 128), torch.bfloat16), ((1, 512), F32))
    ):
        x = torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(source) * 3
        if len(sizes) == 2 and sizes[0] > 1:
            x[1, :128] = 0
        for dtype in (FN, torch.int8):
            yield {"x": x, "dtype": dtype} | more


def _group_samples() -> Iterator[dict[str, Any]]:
    for group, column_major in ((128, False), (64, True), (32, False)):
        yield from _samples(group=group, column_major=column_major)


def _static_samples() -> Iterator[dict[str, Any]]:
    for given in _samples():
        yield {"x": given["x"], "scale": torch.tensor([0.02]), "dtype": given["dtype"]}


def _shape_of_groups(x: Tensor, dtype: torch.dtype, group: int, column_major: bool) -> dict[str, Spec]:
    *rows, width = x.shape
    sizes = [*rows, width // group]
    order = [len(rows), *range(len(rows))]  # the groups outermost
    return {"q": (x.shape, dtype), "scale": (sizes, F32, order) if column_major else (sizes, F32)}


@bridge_op(
    "q",
    "scale",
    shape=lambda x, dtype: {"q": (x.shape, dtype), "scale": ([*x.shape[:-1], 1], F32)},
    samples=_samples,
)
def token_quant(x: Tensor, dtype: torch.dtype, *, provider: str = "auto") -> tuple[Tensor, Tensor]:
    """``q = x / scale`` with ``scale = max(|x|) / MAX`` for each row; MAX is 127, or the largest number of ``dtype``.

    Args:
        x: ``[..., H]`` bfloat16 or float16 (reference: any float).
        dtype: of the values: FP8 or int8.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        (q ``[..., H]`` of ``dtype``, dequantisation scales ``[..., 1]`` float32), contiguous. Rows of zeros have zeros
        and scale 0; AITER's have codes that are not specified.

    AITER: ``aiter.dynamic_per_token_scaled_quant`` (v0.1.5 on); rows up to 8192.
    """
    scale = x.to(F32).abs().amax(-1, keepdim=True) / _top(dtype)
    return _codes(x.to(F32), scale, dtype).contiguous(), scale.reshape(-1).view(scale.shape)


@bridge_op("q", "scale", shape=_shape_of_groups, samples=_group_samples)
def group_quant(
    x: Tensor, dtype: torch.dtype, group: int = 128, column_major: bool = False, *, provider: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``q = x / scale`` with ``scale = max(max(|x|), 1e-10) / MAX`` for each ``group`` columns of a row.

    Args:
        x: ``[..., H]`` bfloat16 or float16 (reference: any float), H a multiple of ``group``.
        dtype: of the values: FP8 or int8.
        group: columns that share a scale.
        column_major: whether the scales of a column of groups follow each other in memory: a real stride.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        (q ``[..., H]`` of ``dtype``, dequantisation scales ``[..., H / group]`` float32).

    AITER: ``aiter.dynamic_per_token_scaled_quant`` of each group (v0.1.5 on); groups of 32, 64 or 128.
    """
    groups = x.to(F32).unflatten(-1, (-1, group))
    scale = groups.abs().amax(-1).clamp_min(LEAST) / _top(dtype)
    q = _codes(groups, scale[..., None], dtype).flatten(-2)
    laid_out = scale.movedim(-1, 0) if column_major else scale
    laid_out = laid_out.clone(memory_format=torch.contiguous_format)
    return q.contiguous(), laid_out.movedim(0, -1) if column_major else laid_out


@bridge_op("q", "scale", shape=lambda x, dtype: {"q": (x.shape, dtype), "scale": ([1], F32)}, samples=_samples)
def tensor_quant(x: Tensor, dtype: torch.dtype, *, provider: str = "auto") -> tuple[Tensor, Tensor]:
    """``q = x / scale`` with ``scale = max(|x|) / MAX`` of the whole tensor.

    Args:
        x: ``[..., H]`` bfloat16 or float16 (reference: any float).
        dtype: of the values: FP8 or int8.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        (q ``[..., H]`` of ``dtype``, the dequantisation scale ``[1]`` float32), contiguous. A tensor of zeros, or of no
        elements, has scale 0 and zeros.

    AITER: ``aiter.dynamic_per_tensor_quant`` (v0.1.3 on).
    """
    top = x.to(F32).abs().amax() if x.numel() else x.new_zeros((), dtype=F32)
    scale = (top / _top(dtype)).reshape(1)
    return _codes(x.to(F32), scale, dtype).contiguous(), scale


@bridge_op("q", shape=lambda x, dtype, **_: {"q": (x.shape, dtype)}, samples=_static_samples)
def static_quant(x: Tensor, scale: Tensor, dtype: torch.dtype, *, provider: str = "auto") -> Tensor:
    """``q = x / scale``, saturated, with a given scale.

    Args:
        x: ``[..., H]`` bfloat16 or float16 (reference: any float).
        scale: one element, float32, above 0: the dequantisation scale.
        dtype: of the values: FP8 or int8.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[..., H]`` of ``dtype``, contiguous.

    AITER: ``aiter.static_per_tensor_quant`` (v0.1.3 on).
    """
    return _codes(x.to(F32), scale.reshape(1), dtype).contiguous()
