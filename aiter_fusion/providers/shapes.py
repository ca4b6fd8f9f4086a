"""Sizes and strides that several providers ask about, of real and of fake tensors; no guard is added."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

Int = int | torch.SymInt


def rows_of(x: Tensor) -> tuple[Int, Int] | None:
    """(rows, elements from one row to the next) of a tensor ``[..., width]``; None if its rows are not evenly
    spaced."""
    rows, stride, follows = 1, None, None
    for size, step in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if not statically_known_true(size == 1):
            if stride is None:
                stride = step
            elif not statically_known_true(step == follows):
                return None
            follows = step * size
        rows = rows * size
    return rows, x.shape[-1] if stride is None else stride


def hint(size: Int, default: int) -> int:
    """The value that a symbolic size had when the graph was captured, or ``default`` if it has none."""
    if isinstance(size, int):
        return size
    return size.node.hint if size.node.has_hint() else default


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()
