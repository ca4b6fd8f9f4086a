"""The product of a few rows with up to four FP8 weights, by matrix units.

The operands are swapped: rows of the weights fill the 64 rows of an instruction, the few rows of x, padded, its
columns.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .weights import pick, place


@triton.jit(do_not_specialize=["n0", "n1", "n2", "n3", "m", "row_blocks", "tiles", "columns", "biased"])
def fp8_matmul_kernel(
    x, x_scale,
    w0, w1, w2, w3, c0, c1, c2, c3, b0, b1, b2, b3, y0, y1, y2, y3, partial_out,
    n0, n1, n2, n3, d0, d1, d2, d3,
    m, k, length, row_blocks, tiles, columns, x_stride, xs_row, xs_block, ws_row, ws_block, biased,
    COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    PRECISE: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, BLOCKED: tl.constexpr, BIAS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS rows of x, BLOCK_N rows of a weight, and ``length`` of k.

    Args:
        x: ``[m, k]`` FP8, rows x_stride apart.
        x_scale: one a row (xs_row apart; 0: one for all), or ``[m, k / 128]`` (xs_row and xs_block apart).
        w0 to y3: as in ``fp8_gemv``; outputs are ``[m, n_i]``.
        partial_out: with SPLIT, sums without scales ``[k / length, m, columns]`` float32, in which every weight begins
            at a multiple of BLOCK_N. ``fp8_combine`` adds them up. Else None.
        row_blocks, tiles: programs along the rows of x, and along the weights.
        PRECISE: whether sums of the matrix units, which on NVIDIA's keep few bits, go to float32 every 128 of k.
        DEPENDENT: whether the next launch may begin before this one ends.
    """
    program = tl.program_id(0)
    rows_from = program % row_blocks * ROWS
    program = program // row_blocks
    launch_tile, split = program % tiles, program // tiles
    index, tile = place(launch_tile, n0, n1, n2, COUNT, BLOCK_N)
    n = pick(index, n0, n1, n2, n3, COUNT)
    stride = pick(index, d0, d1, d2, d3, COUNT)
    c = pick(index, c0, c1, c2, c3, COUNT)
    if DEPENDENT:
        gdc_launch_dependents()
    begin = split * length
    end = tl.minimum(begin + length, k)
    w = pick(index, w0, w1, w2, w3, COUNT) + (tile * BLOCK_N).to(tl.int64) * stride + begin
    x += rows_from.to(tl.int64) * x_stride + begin
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(column, n - 1)
    row = rows_from + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK_K)[None, :]
    w_at = (inside - tile * BLOCK_N)[:, None] * stride + at
    x_at = tl.arange(0, ROWS)[:, None] * x_stride + at
    given = (row < m)[:, None]
    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    if BLOCKED:
        # BLOCK_N divides 128, so the rows of a program are in one block; its scale is loaded one step ahead
        scales = c + (tile * BLOCK_N // 128) * ws_row
        of_w = tl.load(scales + begin // 128 * ws_block)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        if EVEN:
            left = tl.load(w + w_at, eviction_policy="evict_first")
            right = tl.load(x + x_at, mask=given, other=0.0)
        else:
            left = tl.load(w + w_at, mask=at < end - start, other=0.0, eviction_policy="evict_first")
            right = tl.load(x + x_at, mask=given & (at < end - start), other=0.0)
        if BLOCKED:
            block = start // 128
            of_x = tl.load(x_scale + row * xs_row + block * xs_block, mask=row < m, other=0.0)
            scale = of_x * of_w
            of_w = tl.load(scales + tl.minimum(block + 1, k // 128 - 1) * ws_block)
            total += tl.dot(left, tl.trans(right)) * scale[None, :]
        elif PRECISE and BLOCK_K == 128:
            total += tl.dot(left, tl.trans(right))
        elif PRECISE:
            total = tl.dot(left, tl.trans(right), total, max_num_imprecise_acc=128)
        else:
            total = tl.dot(left, tl.trans(right), total)
        w += BLOCK_K
        x += BLOCK_K
    wanted = (row < m)[None, :] & (column < n)[:, None]
    if SPLIT:
        to = partial_out + (split * m).to(tl.int64) * columns + launch_tile * BLOCK_N
        tl.store(to + row[None, :] * columns + tl.arange(0, BLOCK_N)[:, None], total, wanted)
    else:
        if not BLOCKED:
            of_x = tl.load(x_scale + row * xs_row, mask=row < m, other=0.0)
            total = total * tl.load(c + inside * ws_row)[:, None] * of_x[None, :]
        if BIAS:
            has_one = (column < n) & ((biased >> index) & 1 != 0)
            bias = tl.load(pick(index, b0, b1, b2, b3, COUNT) + column, mask=has_one, other=0.0)
            total += bias.to(tl.float32)[:, None]
        y = pick(index, y0, y1, y2, y3, COUNT)
        tl.store(y + row.to(tl.int64)[None, :] * n + column[:, None], total.to(y.dtype.element_ty), wanted)
