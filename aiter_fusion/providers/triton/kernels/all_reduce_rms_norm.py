"""All-reduce over peers' memory, then the norm and its quantisation, in one launch.

A channel is memory that all ranks of a group can reach: two areas of flags, then data. What ranks tell each other are
numbers of turns: ``flags[phase][block][source]`` on a rank is the last turn in which the block of that number on rank
``source`` had written what it had to write for that phase. Turns only grow, so nothing has to be reset, and a rank
that is late by one finds a number that is too large, not one that is missing.

A rank's turn ends with its kernel, for which every block had to hear from its like on every rank. So when a rank is in
turn t, all others have begun turn t - 1 and ended turn t - 2: one-shot data is written to two halves in turn. Two-shot
data needs no halves: rows to sum are written in a turn that the reader of the last one's has left behind by signalling
its second phase, and summed rows after the reader's first signal of this turn, which it gives after its last kernel.

The number of the turn, the late rank and the counters live on the device, so that a CUDA graph may be replayed.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import globaltimer
from triton.language.extra.hip import memrealtime

from .rms_norm_quant import normalised
from .steps import apply_steps, dtype_called, mask_of, nan_max, scale_index, wide

# Words of a channel's state.
TURN, ENDED, TICKET, FAILED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def clock(CLOCK: tl.constexpr):
    """Ticks of a clock that runs at a constant rate."""
    if CLOCK == "cuda":
        ticks = globaltimer()
    else:
        ticks = memrealtime()
    return ticks


@triton.jit
def begin(state, TICKETS: tl.constexpr):
    """(turn, block): blocks are numbered as they start, so that those that others wait for have started."""
    turn = tl.load(state + TURN) + 1
    if TICKETS:
        block = tl.atomic_add(state + TICKET, 1, sem="relaxed", scope="gpu")
    else:
        block = tl.program_id(0)
    return turn, block


@triton.jit
def end(state, turn):
    """The last block to end begins the next turn."""
    if tl.atomic_add(state + ENDED, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(state + ENDED, 0)
        tl.store(state + TICKET, 0)
        tl.store(state + TURN, turn)


@triton.jit
def exchange(
    peers, state, late, rank, turn, block, limit, PHASE: tl.constexpr, W: tl.constexpr, BLOCKS: tl.constexpr,
    CLOCK: tl.constexpr,
):  # fmt: skip
    """Tell all ranks that this block has written, and wait until its like on all ranks has; whether they all did.

    If one does not within ``limit`` ticks, its number, from 1 on, goes to ``late``, and this channel's state is failed.
    """
    source = tl.arange(0, W)
    flags = (PHASE * BLOCKS + block) * W
    theirs = tl.load(peers + source).to(tl.pointer_type(tl.int32))
    own = tl.load(peers + rank).to(tl.pointer_type(tl.int32))
    tl.debug_barrier()  # all threads of this block have written
    tl.atomic_xchg(theirs + (flags + rank), tl.full([W], 0, tl.int32) + turn, sem="release", scope="sys")
    seen = tl.atomic_add(own + flags + source, 0, sem="acquire", scope="sys")
    missing = tl.sum((seen - turn < 0).to(tl.int32), 0)
    if CLOCK is not None:
        start = clock(CLOCK)
        patient = missing > 0
        while patient:
            seen = tl.atomic_add(own + flags + source, 0, sem="acquire", scope="sys")
            missing = tl.sum((seen - turn < 0).to(tl.int32), 0)
            patient = (missing > 0) & (clock(CLOCK) - start < limit)
    else:
        while missing > 0:
            seen = tl.atomic_add(own + flags + source, 0, sem="acquire", scope="sys")
            missing = tl.sum((seen - turn < 0).to(tl.int32), 0)
    if missing > 0:
        tl.store(late, tl.min(tl.where(seen - turn < 0, source + 1, W + 1), 0))
        tl.store(state + FAILED, 1)
    tl.debug_barrier()  # no thread reads before all have heard
    return missing == 0


@triton.jit
def at(peers, peer, offset, like):
    """A pointer to a rank's memory; ``offset`` in bytes, a multiple of 16, as every row's length is."""
    address = tl.load(peers + peer) + offset
    return tl.multiple_of(address.to(tl.pointer_type(like.dtype.element_ty)), 16)


@triton.jit
def finish(
    reduced, row, columns, element, mask, residual, residual_stride, weights, factor,
    q, scale_out, value_out, residual_out, reduced_out, all_rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr,
    SUM: tl.constexpr, DTYPE: tl.constexpr, VALUE: tl.constexpr, GROUPED: tl.constexpr, COLUMN_MAJOR: tl.constexpr,
    ONE_SCALE: tl.constexpr, SCALE_STEPS: tl.constexpr, FACTOR_STEPS: tl.constexpr, VALUE_STEPS: tl.constexpr,
    SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, NORM: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """What follows the sum, for one row; ``all_rows``: how many the tensors have, of which a call may be a part."""
    if reduced_out is not None:
        tl.store(reduced_out + row * WIDTH + columns, reduced, mask=mask)
    if NORM:
        value = reduced
        if residual is not None:
            addend = tl.load(residual + row * residual_stride + columns, mask=mask, other=0.0)
            value = (wide(addend, PTX) + wide(reduced, PTX)).to(dtype_called(SUM))
        if residual_out is not None:
            tl.store(residual_out + row * WIDTH + columns, value.to(residual_out.dtype.element_ty), mask=mask)
        value32 = wide(value, PTX)
        mean = tl.sum(tl.reshape(value32 * value32, [SEGMENTS * SEGMENT]), 0) * (1.0 / WIDTH)
        y = normalised(value, libdevice.rsqrt(mean + EPS), weights, OFFSET, CAST_FIRST, DTYPE, PTX)
        if value_out is not None:
            tl.store(value_out + row * WIDTH + columns, y, mask=mask)
        if q is not None:
            if not ONE_SCALE:
                top = tl.reduce(tl.abs(y).to(tl.float32), 1, nan_max)
                if GROUPED:
                    top = top.to(dtype_called(VALUE))[:, None]
                    group = tl.arange(0, SEGMENTS)[:, None]
                    scales = apply_steps(SCALE_STEPS, top, top)
                    scale_at = scale_index(row, group, all_rows, WIDTH // BLOCK, COLUMN_MAJOR)
                    tl.store(scale_out + scale_at, scales, mask=group < WIDTH // BLOCK)
                else:
                    top = tl.reduce(top, 0, nan_max).to(dtype_called(VALUE))
                    tl.store(scale_out + row, apply_steps(SCALE_STEPS, top, top))
                factor = apply_steps(FACTOR_STEPS, top, top)
            codes = apply_steps(VALUE_STEPS, y, factor, PTX).to(q.dtype.element_ty)
            # A thread writes as many as it reads, 16 bytes of x: else they would change hands.
            tl.store(q + tl.max_contiguous(row * WIDTH + columns, [1, 8]), codes, mask=mask)


@triton.jit
def total(
    peers, rank, x, x_at, columns, mask, offset, slot, W: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The sum over ranks, in their order, in float32, rounded to the dtype of ``x``; slots are ``slot`` bytes apart."""
    for p in tl.static_range(W):
        if p == rank:
            part = tl.load(x + x_at + columns, mask=mask, other=0.0)
        else:
            part = tl.load(at(peers, rank, offset + p * slot, x) + columns, mask=mask, other=0.0)
        if p == 0:
            sums = wide(part, PTX)
        else:
            sums = sums + wide(part, PTX)
    return sums.to(x.dtype.element_ty)


@triton.jit(do_not_specialize=["rank", "rows", "all_rows"])
def one_shot_kernel(
    x, other, residual, weight, scale, q, scale_out, value_out, residual_out, reduced_out,
    peers, state, late, rank, rows, all_rows, x_stride, other_stride, residual_stride, start, half, limit,
    W: tl.constexpr, BLOCKS: tl.constexpr, TICKETS: tl.constexpr, CLOCK: tl.constexpr, ITEM: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr,
    SUM: tl.constexpr, DTYPE: tl.constexpr, VALUE: tl.constexpr, GROUPED: tl.constexpr, COLUMN_MAJOR: tl.constexpr,
    SCALE_STEPS: tl.constexpr, FACTOR_STEPS: tl.constexpr, VALUE_STEPS: tl.constexpr,
    SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, NORM: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Every rank sends its row to every other, and sums all of them; a block has one row.

    Data begins at byte ``start`` of the channel and has two halves of ``half`` bytes; there, what comes from a rank is
    together. With ``W`` 1 nothing is sent: the rows of ``x`` are sums already.
    """
    ONE_SCALE: tl.constexpr = scale is not None
    segment = tl.arange(0, SEGMENTS)[:, None]
    element = tl.arange(0, SEGMENT)[None, :]
    columns = segment * BLOCK + element
    mask = mask_of(columns, element, True, WIDTH, BLOCK, SEGMENT, SEGMENTS * BLOCK != WIDTH, False)
    weights = None
    if weight is not None:
        weights = tl.load(weight + columns, mask=mask, other=0.0)
    factor = 1.0
    if ONE_SCALE:
        whole = tl.load(scale)
        factor = apply_steps(FACTOR_STEPS, whole, whole)

    if W == 1:
        row = tl.program_id(0).to(tl.int64)
        reduced = tl.load(x + row * x_stride + columns, mask=mask, other=0.0)
        if other is not None:
            more = tl.load(other + row * other_stride + columns, mask=mask, other=0.0)
            reduced = (wide(reduced, PTX) + wide(more, PTX)).to(reduced.dtype)
        finish(
            reduced, row, columns, element, mask, residual, residual_stride, weights, factor,
            q, scale_out, value_out, residual_out, reduced_out, all_rows, WIDTH, BLOCK, EPS, OFFSET, CAST_FIRST, SUM,
            DTYPE, VALUE, GROUPED, COLUMN_MAJOR, ONE_SCALE, SCALE_STEPS, FACTOR_STEPS, VALUE_STEPS, SEGMENTS, SEGMENT,
            NORM, PTX,
        )  # fmt: skip
    else:
        TENSORS: tl.constexpr = 1 if other is None else 2
        turn, block = begin(state, TICKETS)
        if tl.load(state + FAILED) == 0:
            row = block.to(tl.int64)
            ROW: tl.constexpr = WIDTH * ITEM
            slot = rows.to(tl.int64) * (ROW * TENSORS)
            base = start + (turn & 1) * half + row * ROW
            mine = tl.load(x + row * x_stride + columns, mask=mask, other=0.0)
            for i in tl.static_range(1, W):
                peer = (rank + i) & (W - 1)  # all begin with another
                tl.store(at(peers, peer, base + rank * slot, x) + columns, mine, mask=mask)
            if other is not None:
                more = tl.load(other + row * other_stride + columns, mask=mask, other=0.0)
                for i in tl.static_range(1, W):
                    peer = (rank + i) & (W - 1)
                    there = base + rank * slot + rows.to(tl.int64) * ROW
                    tl.store(at(peers, peer, there, other) + columns, more, mask=mask)
            if exchange(peers, state, late, rank, turn, block, limit, 0, W, BLOCKS, CLOCK):
                reduced = total(peers, rank, x, row * x_stride, columns, mask, base, slot, W, PTX)
                if other is not None:
                    there = base + rows.to(tl.int64) * ROW
                    second = total(peers, rank, other, row * other_stride, columns, mask, there, slot, W, PTX)
                    reduced = (wide(reduced, PTX) + wide(second, PTX)).to(reduced.dtype)
                finish(
                    reduced, row, columns, element, mask, residual, residual_stride, weights, factor,
                    q, scale_out, value_out, residual_out, reduced_out, all_rows, WIDTH, BLOCK, EPS, OFFSET, CAST_FIRST,
                    SUM, DTYPE, VALUE, GROUPED, COLUMN_MAJOR, ONE_SCALE, SCALE_STEPS, FACTOR_STEPS, VALUE_STEPS,
                    SEGMENTS, SEGMENT, NORM, PTX,
                )  # fmt: skip
        end(state, turn)


@triton.jit(do_not_specialize=["rank", "rows", "all_rows"])
def two_shot_kernel(
    x, other, residual, weight, scale, q, scale_out, value_out, residual_out, reduced_out,
    peers, state, late, rank, rows, all_rows, x_stride, other_stride, residual_stride, start, half, limit,
    W: tl.constexpr, BLOCKS: tl.constexpr, TICKETS: tl.constexpr, CLOCK: tl.constexpr, ITEM: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr,
    SUM: tl.constexpr, DTYPE: tl.constexpr, VALUE: tl.constexpr, GROUPED: tl.constexpr, COLUMN_MAJOR: tl.constexpr,
    SCALE_STEPS: tl.constexpr, FACTOR_STEPS: tl.constexpr, VALUE_STEPS: tl.constexpr,
    SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, NORM: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Every rank sums one row of ``W`` and sends the sum to all; a block has ``W`` rows.

    The first half of the data is for rows to sum, the second for sums. Each rank adds its own residual, which is the
    same on all, and normalises all rows: so only sums travel, whatever is returned.
    """
    ONE_SCALE: tl.constexpr = scale is not None
    TENSORS: tl.constexpr = 1 if other is None else 2
    ROW: tl.constexpr = WIDTH * ITEM
    segment = tl.arange(0, SEGMENTS)[:, None]
    element = tl.arange(0, SEGMENT)[None, :]
    columns = segment * BLOCK + element
    here = mask_of(columns, element, True, WIDTH, BLOCK, SEGMENT, SEGMENTS * BLOCK != WIDTH, False)
    turn, block = begin(state, TICKETS)
    first = block.to(tl.int64) * W
    slot = tl.cdiv(rows, W).to(tl.int64) * (ROW * TENSORS)
    to_sum = start + block.to(tl.int64) * (ROW * TENSORS)

    if tl.load(state + FAILED) == 0:
        for i in tl.static_range(1, W):
            peer = (rank + i) & (W - 1)
            row = first + peer
            mask = here & (row < rows)
            mine = tl.load(x + row * x_stride + columns, mask=mask, other=0.0)
            tl.store(at(peers, peer, to_sum + rank * slot, x) + columns, mine, mask=mask)
            if other is not None:
                more = tl.load(other + row * other_stride + columns, mask=mask, other=0.0)
                tl.store(at(peers, peer, to_sum + rank * slot + ROW, other) + columns, more, mask=mask)
        if exchange(peers, state, late, rank, turn, block, limit, 0, W, BLOCKS, CLOCK):
            row = first + rank
            mask = here & (row < rows)
            reduced = total(peers, rank, x, row * x_stride, columns, mask, to_sum, slot, W, PTX)
            if other is not None:
                second = total(peers, rank, other, row * other_stride, columns, mask, to_sum + ROW, slot, W, PTX)
                reduced = (wide(reduced, PTX) + wide(second, PTX)).to(reduced.dtype)
            for i in tl.static_range(W):
                peer = (rank + i) & (W - 1)
                tl.store(at(peers, peer, start + half + row * ROW, x) + columns, reduced, mask=mask)
            weights = None
            if weight is not None:
                weights = tl.load(weight + columns, mask=here, other=0.0)
            factor = 1.0
            if ONE_SCALE:
                whole = tl.load(scale)
                factor = apply_steps(FACTOR_STEPS, whole, whole)
            if exchange(peers, state, late, rank, turn, block, limit, 1, W, BLOCKS, CLOCK):
                for nth in range(W):
                    each = first + nth
                    if each < rows:
                        sums = tl.load(at(peers, rank, start + half + each * ROW, x) + columns, mask=here, other=0.0)
                        finish(
                            sums, each, columns, element, here, residual, residual_stride, weights, factor,
                            q, scale_out, value_out, residual_out, reduced_out, all_rows, WIDTH, BLOCK, EPS, OFFSET,
                            CAST_FIRST, SUM, DTYPE, VALUE, GROUPED, COLUMN_MAJOR, ONE_SCALE, SCALE_STEPS, FACTOR_STEPS,
                            VALUE_STEPS, SEGMENTS, SEGMENT, NORM, PTX,
                        )  # fmt: skip
    end(state, turn)
