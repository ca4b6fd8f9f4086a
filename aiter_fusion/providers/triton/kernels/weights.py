"""What the kernels of FP8 products share: which of up to four weights a program multiplies with."""

import triton
import triton.language as tl


@triton.jit
def pick(index, a, b, c, d, COUNT: tl.constexpr):
    """The entry of this index among the first COUNT."""
    value = a
    if COUNT > 1:
        value = tl.where(index == 1, b, value)
    if COUNT > 2:
        value = tl.where(index == 2, c, value)
    if COUNT > 3:
        value = tl.where(index == 3, d, value)
    return value


@triton.jit
def place(tile, n0, n1, n2, COUNT: tl.constexpr, BLOCK_N: tl.constexpr):
    """(weight that a tile of the launch is of, which of its tiles it is): the weights' tiles follow each other."""
    index = 0
    before = 0
    if COUNT > 1:
        end = tl.cdiv(n0, BLOCK_N)
        index += (tile >= end).to(tl.int32)
        before = tl.where(tile >= end, end, before)
        if COUNT > 2:
            end += tl.cdiv(n1, BLOCK_N)
            index += (tile >= end).to(tl.int32)
            before = tl.where(tile >= end, end, before)
        if COUNT > 3:
            end += tl.cdiv(n2, BLOCK_N)
            index += (tile >= end).to(tl.int32)
            before = tl.where(tile >= end, end, before)
    return index, tile - before
