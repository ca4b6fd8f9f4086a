"""The product of one row with up to four FP8 weights: multiply and add in float32."""

import triton
import triton.language as tl

from .weights import pick, place


@triton.jit(do_not_specialize=["n0", "n1", "n2", "n3", "biased"])
def fp8_gemv_kernel(
    x, x_scale,
    w0, w1, w2, w3, c0, c1, c2, c3, b0, b1, b2, b3, y0, y1, y2, y3,
    n0, n1, n2, n3, d0, d1, d2, d3,
    k, xs_block, ws_row, ws_block, biased,
    COUNT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
    BLOCKED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_N rows of a weight whole. Its threads stand along K, 16 bytes each, so that a warp reads
    512 consecutive bytes; they add up at the end.

    Args:
        x: ``[k]`` FP8.
        x_scale: one number, or ``[k / 128]``, xs_block apart.
        w0 to w3: ``[n_i, k]`` FP8, rows d_i apart; None from COUNT on, as everything of theirs.
        c0 to c3: scales, one a row of the weight (ws_row apart; 0: one for all), or one a block of 128 x 128 (ws_row
            and ws_block apart).
        b0 to b3: biases ``[n_i]``; which weights have one, ``biased`` says bit by bit.
        y0 to y3: ``[n_i]``.
        EVEN: whether BLOCK_K divides k.
        BLOCKED: whether scales are by block, and thus inside the sum.
    """
    CHUNKS: tl.constexpr = BLOCK_K // 16
    index, tile = place(tl.program_id(0), n0, n1, n2, COUNT, BLOCK_N)
    n = pick(index, n0, n1, n2, n3, COUNT)
    stride = pick(index, d0, d1, d2, d3, COUNT)
    w = pick(index, w0, w1, w2, w3, COUNT) + (tile * BLOCK_N).to(tl.int64) * stride
    c = pick(index, c0, c1, c2, c3, COUNT)
    y = pick(index, y0, y1, y2, y3, COUNT)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tl.minimum(column, n - 1)
    # (chunk, row of the weight, element): neighbouring threads take neighbours in the last dimension, then in the first
    chunk = tl.arange(0, CHUNKS)[:, None, None]
    at = chunk * 16 + tl.arange(0, 16)[None, None, :]
    w_at = (inside - tile * BLOCK_N)[None, :, None] * stride + at
    total = tl.zeros([CHUNKS, BLOCK_N], tl.float32)
    for start in tl.range(0, k, BLOCK_K, num_stages=1):
        if EVEN:
            of_w = tl.load(w + w_at, eviction_policy="evict_first")
            of_x = tl.load(x + at)
        else:
            of_w = tl.load(w + w_at, mask=at < k - start, other=0.0, eviction_policy="evict_first")
            of_x = tl.load(x + at, mask=at < k - start, other=0.0)
        part = tl.sum(of_w.to(tl.float32) * of_x.to(tl.float32), 2)
        if BLOCKED:
            block = tl.minimum((start + tl.arange(0, CHUNKS) * 16) // 128, k // 128 - 1)
            # BLOCK_N divides 128, so the rows of a program are in one block
            scale = tl.load(c + (tile * BLOCK_N // 128) * ws_row + block * ws_block) * tl.load(
                x_scale + block * xs_block
            )
            total += part * scale[:, None]
        else:
            total += part
        w += BLOCK_K
        x += BLOCK_K
    value = tl.sum(total, 0)
    if not BLOCKED:
        value = value * tl.load(x_scale) * tl.load(c + inside * ws_row)
    if BIAS:
        wanted = (column < n) & ((biased >> index) & 1 != 0)
        value += tl.load(pick(index, b0, b1, b2, b3, COUNT) + column, mask=wanted, other=0.0).to(tl.float32)
    tl.store(y + column, value.to(y.dtype.element_ty), mask=column < n)
