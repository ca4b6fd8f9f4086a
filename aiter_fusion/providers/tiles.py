"""The order in which AMD's matrix cores read an FP8 weight: tiles of 16 rows by 32 columns."""

from __future__ import annotations

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
