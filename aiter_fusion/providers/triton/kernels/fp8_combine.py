"""The second launch of a product whose k was split: partial sums are added, always in the same order."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .weights import pick, place


@triton.jit(do_not_specialize=["n0", "n1", "n2", "n3", "m", "tiles", "columns", "biased"])
def fp8_combine_kernel(
    partial, x_scale,
    c0, c1, c2, c3, b0, b1, b2, b3, y0, y1, y2, y3,
    n0, n1, n2, n3,
    m, tiles, columns, xs_row, ws_row, biased,
    COUNT: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, BLOCKED: tl.constexpr, BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A program takes one row of one tile of BLOCK_N columns.

    Args:
        partial: ``[SPLITS, m, columns]`` float32, in which every weight begins at a multiple of BLOCK_N.
        x_scale to y3: as in ``fp8_matmul``, whose sums have the scales already if BLOCKED.
        tiles: of all weights.
        DEPENDENT: whether this launch may begin before the one that writes ``partial`` ends.
    """
    launch_tile, row = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    index, tile = place(launch_tile, n0, n1, n2, COUNT, BLOCK_N)
    n = pick(index, n0, n1, n2, n3, COUNT)
    y = pick(index, y0, y1, y2, y3, COUNT)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < n
    if not BLOCKED:
        of_w = tl.load(pick(index, c0, c1, c2, c3, COUNT) + column * ws_row, mask=inside, other=0.0)
        of_x = tl.load(x_scale + row * xs_row)
    if BIAS:
        wanted = inside & ((biased >> index) & 1 != 0)
        bias = tl.load(pick(index, b0, b1, b2, b3, COUNT) + column, mask=wanted, other=0.0)
    if DEPENDENT:
        gdc_wait()
    at = partial + row.to(tl.int64) * columns + launch_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.load(at, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(at + (split * m).to(tl.int64) * columns, mask=inside, other=0.0)
    if not BLOCKED:
        total = total * of_w * of_x
    if BIAS:
        total += bias.to(tl.float32)
    tl.store(y + row.to(tl.int64) * n + column, total.to(y.dtype.element_ty), mask=inside)
