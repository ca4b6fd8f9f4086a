"""The order in which AMD's matrix cores read a weight of bytes, tiles of 16 rows by 32 columns, and its scales."""

from __future__ import annotations

import torch
from torch import Tensor

# A shuffled weight is stored in tiles of 16 rows by 32 columns, each as two halves of 16 columns.
TILE = (16, 32)


def shuffled(weight: Tensor) -> Tensor:
    """A weight in the order in which AMD's matrix cores read it: tile by tile, and in a tile first the left 16 columns
    of all rows, then the right ones.

    Args:
        weight: ``[N, K]``, one byte an element.

    Returns:
        ``[N / 16, K / 32, 16, 32]`` of the same dtype.

    Raises:
        ValueError: N is not a multiple of 16, K is not a multiple of 32, or an element is not one byte.
    """
    rows, columns = weight.shape
    if rows % TILE[0] or columns % TILE[1] or weight.element_size() != 1:
        raise ValueError(
            f"a weight of {rows} x {columns} ({weight.dtype}) has no shuffled form: it takes rows in multiples of "
            f"{TILE[0]}, columns in multiples of {TILE[1]}, one byte each"
        )
    tiles = weight.reshape(rows // 16, 16, columns // 32, 2, 16)
    return tiles.permute(0, 2, 3, 1, 4).reshape(rows // 16, columns // 32, 16, 32)


def unshuffled(tiles: Tensor) -> Tensor:
    """The weight that ``shuffled`` made tiles of.

    Args:
        tiles: ``[N / 16, K / 32, 16, 32]``.

    Returns:
        ``[N, K]`` of the same dtype, a copy.
    """
    rows, columns = tiles.shape[0] * 16, tiles.shape[1] * 32
    return tiles.reshape(rows // 16, columns // 32, 2, 16, 16).permute(0, 3, 1, 2, 4).reshape(rows, columns)


def in_rows(b: Tensor, is_shuffled: bool) -> Tensor:
    """The weight of a product's right operand, row by row.

    Args:
        b: ``[K, N]``, the transpose of a weight.
        is_shuffled: whether b is the transpose of ``shuffled(weight).view(N, K)``.

    Returns:
        ``[N, K]``: a view, or a copy if it was shuffled.
    """
    weight = b.t()
    if not is_shuffled:
        return weight
    rows, columns = weight.shape
    return unshuffled(weight.reshape(rows // TILE[0], columns // TILE[1], *TILE))


# AITER reads scales of one byte in blocks of 256 rows by 8 columns, and pads to them.
SCALE_BLOCK = (256, 8)


def shuffled_scales(scales: Tensor) -> Tensor:
    """Scales of one byte, one for each 32 elements of a row, in the order in which AMD's matrix cores read them: blocks
    of 32 rows by 8 columns, and in a block the four bytes together whose rows and columns differ by 16 and by 4.

    Args:
        scales: ``[N, K / 32]``, one byte an element.

    Returns:
        ``[N, K / 32]`` up to multiples of 256 and 8, of the same dtype; what is added is 0.
    """
    rows, columns = scales.shape
    below, right = -rows % SCALE_BLOCK[0], -columns % SCALE_BLOCK[1]
    padded = torch.nn.functional.pad(scales.view(torch.uint8), (0, right, 0, below))
    blocks = padded.unflatten(0, (-1, 2, 16)).unflatten(3, (-1, 2, 4))
    return blocks.permute(0, 3, 5, 2, 4, 1).reshape(padded.shape).view(scales.dtype)


def unshuffled_scales(scales: Tensor, rows: int, columns: int) -> Tensor:
    """The scales ``[rows, columns]`` that ``shuffled_scales`` made ``scales`` of, a copy."""
    blocks = scales.view(torch.uint8).view(scales.shape[0] // 32, scales.shape[1] // 8, 4, 16, 2, 2)
    padded = blocks.permute(0, 5, 3, 1, 4, 2).reshape(scales.shape)
    return padded[:rows, :columns].contiguous().view(scales.dtype)


def interleaved(weight: Tensor) -> Tensor:
    """Gate above up, ``[E, 2 I, K]``, as 16 rows of gate and 16 of up in turn."""
    experts, rows, columns = weight.shape
    return weight.view(experts, 2, rows // 32, 16, columns).transpose(1, 2).reshape(weight.shape)


def gates_and_ups(weight: Tensor) -> Tensor:
    """The weight that ``interleaved`` made ``weight`` of, a copy."""
    experts, rows, columns = weight.shape
    return weight.view(experts, rows // 32, 2, 16, columns).transpose(1, 2).reshape(weight.shape)
