"""Attention of many query rows over a cache, by matrix units: each program takes a tile of rows and all of their keys.

Only keys that a row of the tile sees are read, and a block of them is compared with the rows' places only if some row
does not see all of it.
"""

import triton
import triton.language as tl

from .attention import LOG2E, divided, finite, softcapped


@triton.jit
def visible(score, place, end, query_place, HAS_POSITION: tl.constexpr, WINDOW: tl.constexpr):
    """The scores of keys that a query sees; -inf of the others."""
    seen = place < end
    if HAS_POSITION:
        seen &= place <= query_place
        if WINDOW > 0:
            seen &= place > query_place - WINDOW
    return tl.where(seen, score, float("-inf"))


@triton.jit
def attend(
    query, maximum, weight, total, k, v, mask, query_place, begin, stop, end, lower, upper, scale, k_key,
    v_key, mask_key,
    SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, COMPARED: tl.constexpr,
    HAS_POSITION: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """(maximum, weight, total) after the keys from ``begin`` to ``stop``; k, v and mask point to key 0; maxima and
    scores are in powers of 2.

    COMPARED: which blocks are compared with the place of every query, and with ``end``: ``none``; ``all``; ``edges``,
        those that are not within ``lower`` to ``upper``, which every query sees.
    """
    at = tl.arange(0, PADDED)
    inside = at < SIZE
    lane = tl.arange(0, BLOCK)
    k += begin.to(tl.int64) * k_key
    v += begin.to(tl.int64) * v_key
    if MASK != "none":
        mask += begin.to(tl.int64) * mask_key
    for start in tl.range(begin, stop, BLOCK, num_stages=STAGES):
        # keys beyond the end stand for its last one, and are invisible
        lie = lane if COMPARED == "none" else tl.minimum(lane, end - start - 1)
        if SIZE == PADDED:
            key = tl.load(k + lie[:, None] * k_key + at[None, :])
            value = tl.load(v + lie[:, None] * v_key + at[None, :])
        else:
            key = tl.load(k + lie[:, None] * k_key + at[None, :], inside[None, :], 0.0)
            value = tl.load(v + lie[:, None] * v_key + at[None, :], inside[None, :], 0.0)
        score = tl.dot(query, tl.trans(key))
        if not FOLDED:
            score = softcapped(score * scale, SOFTCAP) * LOG2E
        if MASK == "added":
            score += tl.load(mask + lie[None, :] * mask_key).to(tl.float32) * LOG2E
        if MASK == "bool":
            score = tl.where(tl.load(mask + lie[None, :] * mask_key), score, float("-inf"))
        if COMPARED == "all":
            score = visible(score, (start + lane)[None, :], end, query_place[:, None], HAS_POSITION, WINDOW)
        if COMPARED == "edges":  # noqa: SIM102 - it is decided when the kernel is compiled, the other when it runs
            if (start < lower) | (start + BLOCK > upper):
                score = visible(score, (start + lane)[None, :], end, query_place[:, None], HAS_POSITION, WINDOW)
        if FOLDED:
            highest = tl.maximum(maximum, tl.max(score, 1) * (scale * LOG2E))
            subtracted = finite(highest)
            part = tl.exp2(score * (scale * LOG2E) - subtracted[:, None])
        else:
            highest = tl.maximum(maximum, tl.max(score, 1))
            subtracted = finite(highest)
            part = tl.exp2(score - subtracted[:, None])
        decay = tl.exp2(maximum - subtracted)
        weight = weight * decay + tl.sum(part, 1)
        total = tl.dot(part.to(value.dtype), value, total * decay[:, None])
        maximum = highest
        k += BLOCK * k_key
        v += BLOCK * v_key
        if MASK != "none":
            mask += BLOCK * mask_key
    return maximum, weight, total


@triton.jit(do_not_specialize=["tokens", "keys", "row_blocks"])
def prefill_attention_kernel(
    q, k, v, mask, position, y,
    scale, key_heads, tokens, keys, row_blocks,
    q_batch, q_head, q_token, k_batch, k_head, k_key, v_batch, v_head, v_key,
    mask_batch, mask_head, mask_token, mask_key, y_batch, y_head, y_token,
    GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, HAS_POSITION: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    MASK: tl.constexpr, MASK_BY_ROW: tl.constexpr, FOLDED: tl.constexpr, COMPARED: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS of the tokens * GROUP query rows of one head of keys, those of a token together.

    Args:
        q to MASK_BY_ROW: as in ``decode_attention``.
        row_blocks: programs for the rows of one head of keys; those of the last rows, which see most, begin first.
        FOLDED: whether scores are neither capped nor masked, and the scale is positive: it is multiplied in later.
        COMPARED: ``apart``, only without a window: blocks that every row sees have a loop of their own, after which
            the others follow; else as in ``attend``.
    """
    scale = tl.cast(scale, tl.float32)  # Inductor gives numbers in float64
    program = tl.program_id(0)
    heads = tl.num_programs(0) // row_blocks
    row_block = row_blocks - 1 - program // heads
    key_head = program % heads % key_heads
    batch = (program % heads // key_heads).to(tl.int64)
    row = row_block * ROWS + tl.arange(0, ROWS)
    token = row // GROUP
    head = (key_head * GROUP + row % GROUP).to(tl.int64)
    given = token < tokens
    at = tl.arange(0, PADDED)
    wanted = given[:, None] & (at < SIZE)[None, :]
    q_at = q + batch * q_batch + head[:, None] * q_head + token.to(tl.int64)[:, None] * q_token + at[None, :]
    query = tl.load(q_at, mask=wanted, other=0.0)

    # the keys that the tile sees, and of these the blocks that all of its rows see
    begin = tl.full([], 0, tl.int32)
    whole = begin
    first = begin
    end = begin + keys
    full = end
    if HAS_POSITION:
        first = tl.load(position).to(tl.int32)
        lowest = first + row_block * ROWS // GROUP
        highest = first + tl.minimum((row_block * ROWS + ROWS - 1) // GROUP, tokens - 1)
        end = tl.maximum(tl.minimum(highest + 1, keys), 0)
        full = tl.minimum(lowest + 1, end)
        if WINDOW > 0:
            begin = tl.minimum(tl.maximum(lowest - WINDOW + 1, 0), end)
            whole = tl.cdiv(tl.maximum(highest - WINDOW + 1 - begin, 0), BLOCK)
    whole = begin + whole * BLOCK
    full = tl.maximum(begin + tl.maximum(full - begin, 0) // BLOCK * BLOCK, whole)

    k += batch * k_batch + key_head.to(tl.int64) * k_head
    v += batch * v_batch + key_head.to(tl.int64) * v_head
    if MASK != "none":
        mask += batch * mask_batch
        if MASK_BY_ROW:
            mask += tl.where(given, head * mask_head + token.to(tl.int64) * mask_token, 0)[:, None]
        else:
            mask += key_head.to(tl.int64) * GROUP * mask_head
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, PADDED], tl.float32)
    if COMPARED == "apart":
        maximum, weight, total = attend(
            query, maximum, weight, total, k, v, mask, first + token, whole, full, end, whole, full, scale, k_key,
            v_key, mask_key, SIZE, PADDED, BLOCK, STAGES, "none", HAS_POSITION, WINDOW, SOFTCAP, MASK, FOLDED,
        )  # fmt: skip
    maximum, weight, total = attend(
        query, maximum, weight, total, k, v, mask, first + token, full if COMPARED == "apart" else begin, end, end,
        whole, full, scale, k_key, v_key, mask_key, SIZE, PADDED, BLOCK, STAGES,
        "all" if COMPARED == "apart" else COMPARED, HAS_POSITION, WINDOW, SOFTCAP, MASK, FOLDED,
    )  # fmt: skip
    y_at = y + batch * y_batch + head[:, None] * y_head + token.to(tl.int64)[:, None] * y_token + at[None, :]
    tl.store(y_at, divided(total, weight[:, None]).to(y.dtype.element_ty), wanted)
