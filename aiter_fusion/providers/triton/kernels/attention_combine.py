"""The second launch of attention whose keys were split: the parts are added, always in the same order."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .attention import LOG2E, divided, filled, finite, split_length


@triton.jit(do_not_specialize=["tokens", "keys", "splits"])
def attention_combine_kernel(
    partial, sums, position, y,
    heads, tokens, keys, splits, y_batch, y_head, y_token,
    SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    SLOTS: tl.constexpr, COLUMNS: tl.constexpr, HAS_POSITION: tl.constexpr, WINDOW: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A program takes COLUMNS elements of one row of y.

    Args:
        partial, sums: ``partial_out`` and ``sums_out`` of the first launch, which writes those of splits with keys.
        position, keys: as there; so are splits, tokens, SIZE to BLOCK, HAS_POSITION and WINDOW.
        y: ``[B, heads, tokens, SIZE]``.
        SLOTS: splits, or the next power of two.
        DEPENDENT: whether this launch may begin before the one that writes ``partial`` ends.
    """
    row = tl.program_id(0) // (PADDED // COLUMNS)
    at = tl.program_id(0) % (PADDED // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
    token = row % tokens
    head = (row // tokens % heads).to(tl.int64)
    batch = (row // tokens // heads).to(tl.int64)
    _, begin, end = filled(position, keys, tokens, WINDOW, HAS_POSITION)
    used = tl.cdiv(end - begin, tl.maximum(split_length(begin, end, splits, BLOCK), 1))
    slot = tl.arange(0, SLOTS)
    written = slot < used
    inside = at < SIZE
    if DEPENDENT:
        gdc_wait()
    to = row.to(tl.int64) * splits
    maximum = tl.load(sums + to * 2 + slot, mask=written, other=float("-inf"))
    weight = tl.load(sums + to * 2 + splits + slot, mask=written, other=0.0)
    part = tl.load(
        partial + (to + slot)[:, None] * SIZE + at[None, :], mask=written[:, None] & inside[None, :], other=0.0
    )
    decay = tl.exp2((maximum - finite(tl.max(maximum, 0))) * LOG2E)
    mean = divided(tl.sum(part * decay[:, None], 0), tl.sum(weight * decay, 0))
    tl.store(y + batch * y_batch + head * y_head + token * y_token + at, mean.to(y.dtype.element_ty), mask=inside)
