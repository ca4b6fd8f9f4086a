"""Attention of one query row that shares its keys with no other: multiply and add in float32.

A program holds BLOCK keys at a time, and each of these places has a softmax of its own over the keys that pass through
it, so nothing is exchanged between threads until the end but the products of one key.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .attention import LOG2E, divided, filled, finite, softcapped, split_length


@triton.jit(do_not_specialize=["keys", "splits"])
def attention_row_kernel(
    q, k, v, mask, position, y, partial_out, sums_out,
    scale, key_heads, keys, splits,
    q_batch, q_head, k_batch, k_head, k_key, v_batch, v_head, v_key,
    mask_batch, mask_head, mask_key, y_batch, y_head,
    SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr,
    HAS_POSITION: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """A program takes one head, and one of ``splits`` parts of its keys.

    Args:
        q to DEPENDENT: as in ``decode_attention``, of as many heads of queries as of keys and one token.
    """
    if DEPENDENT:
        gdc_launch_dependents()
    scale = scale.to(tl.float32)  # Inductor gives numbers in float64
    program = tl.program_id(0)
    split = program % splits
    out_row = program // splits
    head = (out_row % key_heads).to(tl.int64)
    batch = (out_row // key_heads).to(tl.int64)

    _, begin, end = filled(position, keys, 1, WINDOW, HAS_POSITION)
    length = split_length(begin, end, splits, BLOCK)
    begin += split * length
    end = tl.minimum(begin + length, end)
    if SPLIT and begin >= end:
        return

    at = tl.arange(0, PADDED)
    inside = at < SIZE
    lane = tl.arange(0, BLOCK)
    query = tl.load(q + batch * q_batch + head * q_head + at, mask=inside, other=0.0).to(tl.float32)
    k += batch * k_batch + head * k_head + begin.to(tl.int64) * k_key
    v += batch * v_batch + head * v_head + begin.to(tl.int64) * v_key
    if MASK != "none":
        mask += batch * mask_batch + head * mask_head + begin.to(tl.int64) * mask_key

    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK, PADDED], tl.float32)
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
        score = softcapped(tl.sum(key.to(tl.float32) * query[None, :], 1) * scale, SOFTCAP)
        visible = lane < end - start
        if MASK == "bool":
            visible &= tl.load(mask + lie * mask_key)
        if MASK == "added":
            score += tl.load(mask + lie * mask_key).to(tl.float32)
        if MASK != "none":
            mask += BLOCK * mask_key
        score = tl.where(visible, score, float("-inf"))
        highest = tl.maximum(maximum, score)
        subtracted = finite(highest)
        decay = tl.exp2((maximum - subtracted) * LOG2E)
        part = tl.exp2((score - subtracted) * LOG2E)
        weight = weight * decay + part
        total = total * decay[:, None] + part[:, None] * value.to(tl.float32)
        maximum = highest
        k += BLOCK * k_key
        v += BLOCK * v_key

    highest = tl.max(maximum, 0)
    decay = tl.exp2((maximum - finite(highest)) * LOG2E)
    total_weight = tl.sum(weight * decay, 0)
    row = tl.sum(total * decay[:, None], 0)
    if SPLIT:
        to = out_row.to(tl.int64) * splits
        tl.store(partial_out + (to + split) * SIZE + at, row, inside)
        tl.store(sums_out + to * 2 + split, highest)
        tl.store(sums_out + to * 2 + splits + split, total_weight)
    else:
        tl.store(y + batch * y_batch + head * y_head + at, divided(row, total_weight).to(y.dtype.element_ty), inside)
