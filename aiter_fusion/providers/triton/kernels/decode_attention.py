"""Attention of a few query rows over many keys, by matrix units: each program reads a part of the keys of one head.

The queries of all heads that share keys are the few rows of the products, so keys and values are read once.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .attention import LOG2E, divided, filled, finite, softcapped, split_length


@triton.jit(do_not_specialize=["keys", "splits"])
def decode_attention_kernel(
    q, k, v, mask, position, y, partial_out, sums_out,
    scale, key_heads, tokens, keys, splits, row_blocks,
    q_batch, q_head, q_token, k_batch, k_head, k_key, v_batch, v_head, v_key,
    mask_batch, mask_head, mask_token, mask_key, y_batch, y_head, y_token,
    GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
    SWAPPED: tl.constexpr, HAS_POSITION: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    MASK: tl.constexpr, MASK_BY_ROW: tl.constexpr, DEPENDENT: tl.constexpr, FOLLOWED: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS of the GROUP * tokens query rows of one head of keys, and one of ``splits`` parts of these.

    Args:
        q: ``[B, key_heads * GROUP, tokens, SIZE]``, as y; elements of a row are 1 apart, as those of k and v are.
        k, v: ``[B, key_heads, keys, SIZE]``.
        mask: ``[B, heads, tokens, keys]``, with a stride of 0 where it is one for all; None without MASK.
        position: of the first query, one integer; None without HAS_POSITION, where all keys are visible.
        partial_out: with SPLIT, sums of values ``[rows of y, splits, SIZE]`` float32, y is None; else None.
        sums_out: with partial_out, each row's maximum and sum of weights ``[rows of y, 2, splits]`` float32.
        SPLIT: whether there are several parts.
        PADDED: SIZE, or the next power of two.
        STAGES: loads of BLOCK keys and values that are under way at a time, and one that is worked on.
        SWAPPED: whether keys are the rows of the products and queries their columns.
        WINDOW: keys that a query sees, itself among them; 0: all up to itself.
        SOFTCAP: bound of the scores; 0: none.
        MASK: ``none``, ``bool`` (True: visible) or ``added``.
        MASK_BY_ROW: whether heads of a group, or tokens, have masks of their own.
        DEPENDENT: whether this launch may begin before the one before it ends.
        FOLLOWED: whether the next launch may begin before this one ends.
    """
    if FOLLOWED:
        gdc_launch_dependents()
    AXIS: tl.constexpr = 0 if SWAPPED else 1  # along which keys lie in scores and weights
    scale = tl.cast(scale, tl.float32)  # Inductor gives numbers in float64
    program = tl.program_id(0)
    row = program % row_blocks * ROWS + tl.arange(0, ROWS)
    program = program // row_blocks
    split = program % splits
    program = program // splits
    key_head = program % key_heads
    batch = (program // key_heads).to(tl.int64)
    token = row % tokens
    head = key_head * GROUP + row // tokens
    given = row < GROUP * tokens

    if DEPENDENT:
        gdc_wait()
    at = tl.arange(0, PADDED)
    inside = at < SIZE
    lane = tl.arange(0, BLOCK)
    q_at = q + batch * q_batch + head.to(tl.int64)[:, None] * q_head + token[:, None] * q_token + at[None, :]
    # before the position is waited for
    query = tl.load(q_at, mask=given[:, None] & inside[None, :], other=0.0)
    first, begin, end = filled(position, keys, tokens, WINDOW, HAS_POSITION)
    length = split_length(begin, end, splits, BLOCK)
    begin += split * length
    end = tl.minimum(begin + length, end)
    if SPLIT and begin >= end:
        return

    k += batch * k_batch + key_head.to(tl.int64) * k_head + begin.to(tl.int64) * k_key
    v += batch * v_batch + key_head.to(tl.int64) * v_head + begin.to(tl.int64) * v_key
    if MASK != "none":
        mask += batch * mask_batch + begin.to(tl.int64) * mask_key
        if MASK_BY_ROW:
            mask += tl.expand_dims(tl.where(given, head * mask_head + token * mask_token, 0), AXIS)
        else:
            mask += key_head * GROUP * mask_head
        # loaded one step ahead
        ahead = tl.load(mask + tl.expand_dims(tl.minimum(lane, tl.maximum(end - begin - 1, 0)), 1 - AXIS) * mask_key)

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([PADDED, ROWS] if SWAPPED else [ROWS, PADDED], tl.float32)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        # keys beyond the end stand for its last one, and are invisible
        lie = tl.minimum(lane, end - start - 1)
        if SIZE == PADDED:
            key = tl.load(k + lie[:, None] * k_key + at[None, :], eviction_policy="evict_first")
            value = tl.load(v + lie[:, None] * v_key + at[None, :], eviction_policy="evict_first")
        else:
            there = inside[None, :]
            key = tl.load(k + lie[:, None] * k_key + at[None, :], there, 0.0, eviction_policy="evict_first")
            value = tl.load(v + lie[:, None] * v_key + at[None, :], there, 0.0, eviction_policy="evict_first")
        score = tl.dot(key, tl.trans(query)) if SWAPPED else tl.dot(query, tl.trans(key))
        score = softcapped(score * scale, SOFTCAP)
        place = tl.expand_dims(start + lane, 1 - AXIS)
        visible = place < end
        if HAS_POSITION:
            query_place = tl.expand_dims(first + token, AXIS)
            visible &= place <= query_place
            if WINDOW > 0:
                visible &= place > query_place - WINDOW
        if MASK == "bool":
            visible &= ahead
        if MASK == "added":
            score += ahead.to(tl.float32)
        if MASK != "none":
            mask += BLOCK * mask_key
            ahead = tl.load(mask + tl.expand_dims(tl.minimum(lane, end - start - BLOCK - 1), 1 - AXIS) * mask_key)
        score = tl.where(visible, score, float("-inf"))
        highest = tl.maximum(maximum, tl.max(score, AXIS))
        subtracted = finite(highest)
        decay = tl.exp2((maximum - subtracted) * LOG2E)
        part = tl.exp2((score - tl.expand_dims(subtracted, AXIS)) * LOG2E)
        weight = weight * decay + tl.sum(part, AXIS)
        total *= tl.expand_dims(decay, AXIS)
        part = part.to(value.dtype)
        total = tl.dot(tl.trans(value), part, total) if SWAPPED else tl.dot(part, value, total)
        maximum = highest
        k += BLOCK * k_key
        v += BLOCK * v_key
    if SWAPPED:
        total = tl.trans(total)
    wanted = given[:, None] & inside[None, :]
    if SPLIT:
        out_row = (batch * key_heads * GROUP + head) * tokens + token
        tl.store(partial_out + (out_row * splits + split)[:, None] * SIZE + at[None, :], total, wanted)
        tl.store(sums_out + out_row * 2 * splits + split, maximum, given)
        tl.store(sums_out + (out_row * 2 + 1) * splits + split, weight, given)
    else:
        y_at = y + batch * y_batch + head.to(tl.int64)[:, None] * y_head + token[:, None] * y_token + at[None, :]
        tl.store(y_at, divided(total, weight[:, None]).to(y.dtype.element_ty), wanted)
