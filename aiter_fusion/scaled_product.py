"""Products of quantised matrices: what shares a scale, and how many of them an op computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

FAMILY = "fp8_linear"

# Sides of a block that shares a scale.
BLOCK = 128
# How many layers one op computes at most.
MOST = 8
# What shares a scale: a tensor; a row of x, a column of the weight; 128 elements of a row, 128 x 128 of the weight.
TENSORS, ROWS, BLOCKS = "tensorwise", "rowwise", "blockwise"


def granularity(x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor) -> str | None:
    """What shares a scale in a product (of tensors that may be fakes), or None if it is none of the three.

    Sizes that are symbolic are compared without a guard. As in ``_scaled_mm``, one scale each is one a tensor.
    """
    # not before: it loads sympy, which registering ops must not
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    def is_shaped(scale: Tensor, *sizes: Any) -> bool:
        return scale.dim() == 2 and all(statically_known_true(a == b) for a, b in zip(scale.shape, sizes, strict=True))

    (rows, k), n = x.shape, weight.shape[1]
    if statically_known_true(x_scale.numel() == 1) and statically_known_true(weight_scale.numel() == 1):
        return TENSORS
    if is_shaped(x_scale, rows, 1) and is_shaped(weight_scale, 1, n):
        return ROWS
    blocks = -(-k // BLOCK)
    if is_shaped(x_scale, rows, blocks) and is_shaped(weight_scale, blocks, -(-n // BLOCK)):
        return BLOCKS
    return None


def strided(tensor: Tensor, row: int = 1) -> Tensor:
    """The tensor with the strides that ``_scaled_mm`` asks for where a dimension has one element: compiled code gives
    such a dimension any."""
    if 1 not in tensor.shape:
        return tensor
    strides = [
        own if size != 1 else row if dim == 0 else 1
        for dim, (size, own) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
    ]
    return tensor.as_strided(tensor.shape, strides)


def is_direct(x: Tensor, weights: Sequence[Tensor], x_scale: Tensor, weight_scales: Sequence[Tensor]) -> bool:
    """Whether ``_scaled_mm`` computes a call from the operands as they are."""
    if any(
        granularity(x, w, x_scale, scale) in (BLOCKS, None) for w, scale in zip(weights, weight_scales, strict=True)
    ):
        return False
    scales = (x_scale, *weight_scales)
    return strided(x, x.shape[1]).stride() == x.stride() and all(strided(s).stride() == s.stride() for s in scales)
