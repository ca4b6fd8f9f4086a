"""All-reduce over peers' memory, then the norm and its quantisation, in one launch.

A channel is memory that all ranks of a group can reach. Data is its own signal, as in NCCL's and TensorRT-LLM's
low-latency protocols: memory to be written holds a number that is never sent (``EMPTY``), the reader reads until no
element is that number, and writes it again. So nothing waits for a write to be acknowledged, and data crosses the link
once, with no flag behind it.

A rank's turn is one launch of its kernel, in which every row waits for what the other ranks send of it. So when a rank
is in turn t, all others have begun turn t - 1 and ended turn t - 2, and what they emptied then is empty: data is
written to two halves in turn.

The turn and the late rank live on the device, so that a CUDA graph may be replayed.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import globaltimer
from triton.language.extra.hip import memrealtime

from .rms_norm_quant import normalised
from .steps import apply_steps, dtype_called, mask_of, nan_max, scale_index, wide

# Words of a channel's state.
MARK, FAILED = tl.constexpr(0), tl.constexpr(1)
# Bytes before a channel's data: in the first word other ranks tell which rank is late.
HEADER = tl.constexpr(128)
# As bfloat16 and as float16 a NaN that no arithmetic gives; what has its bits is sent as another.
EMPTY, ANOTHER = tl.constexpr(-1), tl.constexpr(0x7FFF)


@triton.jit
def clock(CLOCK: tl.constexpr):
    """Ticks of a clock that runs at a constant rate."""
    if CLOCK == "cuda":
        ticks = globaltimer()
    else:
        ticks = memrealtime()
    return ticks


@triton.jit
def begin(state):
    """(half, block): blocks are numbered as they start, so that those that others wait for have started.

    The mark is the number of the next block, and in the 17th bit the half of this turn. The last block to start has the
    next turn's in its place.
    """
    mark = tl.atomic_add(state + MARK, 1, sem="relaxed", scope="gpu")
    block = mark & 0xFFFF
    half = mark >> 16
    if block == tl.num_programs(0) - 1:
        tl.store(state + MARK, (1 - half) << 16)
    return half, block


@triton.jit
def at(peers, peer, offset, dtype: tl.constexpr):
    """A pointer to a rank's memory; ``offset`` in bytes, a multiple of 16, as every row's length is."""
    return tl.multiple_of((tl.load(peers + peer) + offset).to(tl.pointer_type(dtype)), 16)


@triton.jit
def safe(x):
    """What is sent for x: never ``EMPTY``."""
    bits = x.to(tl.int16, bitcast=True)
    return tl.where(bits == EMPTY, ANOTHER, bits).to(x.dtype, bitcast=True)


@triton.jit
def any_of(condition):
    return tl.max(tl.reshape(condition, [condition.numel], can_reorder=True).to(tl.int32), 0)


@triton.jit
def total(
    peers, state, late, rank, source, own, own_address, columns, mask, offset, slot, limit,
    SOURCES: tl.constexpr, W: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr, CLOCK: tl.constexpr,
):  # fmt: skip
    """(sum, whether all came): of what ``SOURCES`` ranks from ``source`` on sent, in their order, in float32, rounded.

    Slots are ``slot`` bytes apart, from ``offset`` on; that of number ``own`` is not in the channel but at
    ``own_address``. What was read is emptied.

    If something does not come within ``limit`` ticks, its rank's number, from 1 on, goes to ``late`` and to all ranks,
    who then wait no longer, and this channel's state is failed.
    """
    here = tl.load(peers + rank)
    header = here.to(tl.pointer_type(tl.int32))
    begun = tl.full([], 0, tl.int64)
    sums = tl.zeros(columns.shape, tl.float32)
    told = rank * 0
    missing = rank * 0 + 1
    waiting = rank >= 0
    while waiting:
        # Every part is loaded before any is needed.
        parts = ()
        for p in tl.static_range(SOURCES):
            address = tl.where(p == own, own_address, here + offset + p * slot)
            pointer = tl.multiple_of(address.to(tl.pointer_type(tl.int16)), 16)
            parts = parts + (tl.load(pointer + columns, mask=mask, other=0, volatile=True),)
        for p in tl.static_range(SOURCES):
            part = wide(parts[p].to(DTYPE, bitcast=True), PTX)
            if p == 0:
                sums = part
            else:
                sums = sums + part
        missing = 0
        if any_of(sums != sums):  # something has not come, or was no number
            for p in tl.static_range(SOURCES):
                if (missing == 0) & (p != own):
                    missing = any_of(parts[p] == EMPTY) * (p + 1)
        waiting = missing > 0
        if waiting:
            now = clock(CLOCK).to(tl.int64)
            begun = tl.where(begun == 0, now, begun)
            told = tl.load(header, volatile=True)
            waiting = (told == 0) & (now - begun < limit)
    if missing > 0:
        if told == 0:
            told = source + missing
            for p in tl.static_range(W):
                tl.store(at(peers, p, 0, tl.int32), told)
        tl.store(late, told)
        tl.store(state + FAILED, 1)
    else:
        tl.debug_barrier()  # all threads have read
        for p in tl.static_range(SOURCES):
            if p != own:
                pointer = tl.multiple_of((here + offset + p * slot).to(tl.pointer_type(tl.int16)), 16)
                tl.store(pointer + columns, tl.full(columns.shape, EMPTY, tl.int16), mask=mask)
    return sums.to(DTYPE), missing == 0


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
def send(peers, rank, value, offset, columns, mask, W: tl.constexpr):
    """Write a row to all other ranks."""
    for i in tl.static_range(1, W):
        peer = (rank + i) & (W - 1)  # all begin with another
        tl.store(at(peers, peer, offset, value.dtype) + columns, value, mask=mask)


@triton.jit(do_not_specialize=["rank", "rows", "all_rows"])
def all_reduce_rms_norm_kernel(
    x, other, residual, weight, scale, q, scale_out, value_out, residual_out, reduced_out,
    peers, state, late, rank, rows, all_rows, x_stride, other_stride, residual_stride, half, limit,
    WAY: tl.constexpr, W: tl.constexpr, CLOCK: tl.constexpr, ITEM: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, CAST_FIRST: tl.constexpr,
    SUM: tl.constexpr, DTYPE: tl.constexpr, VALUE: tl.constexpr, GROUPED: tl.constexpr, COLUMN_MAJOR: tl.constexpr,
    SCALE_STEPS: tl.constexpr, FACTOR_STEPS: tl.constexpr, VALUE_STEPS: tl.constexpr,
    SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, NORM: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """A block has one row.

    WAY: ``one_shot``: every rank sends its row to all others, and all sum. ``two_shot``: a row has an owner, to whom
    all send it, and who sums and sends the sum to all. Each rank adds its own residual, which is the same on all: so
    only sums travel, whatever is returned. ``plain``: the rows are sums already.

    A half of the channel's data has, by rank, tensor and row, what is to be summed, and after that, by row, sums.
    """
    ONE_SCALE: tl.constexpr = scale is not None
    TENSORS: tl.constexpr = 1 if other is None else 2
    ROW: tl.constexpr = WIDTH * ITEM
    ELEMENT: tl.constexpr = x.dtype.element_ty
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

    if WAY == "plain":
        row = tl.program_id(0).to(tl.int64)
        came = row >= 0
        reduced = tl.load(x + row * x_stride + columns, mask=mask, other=0.0)
        if other is not None:
            more = tl.load(other + row * other_stride + columns, mask=mask, other=0.0)
            reduced = (wide(reduced, PTX) + wide(more, PTX)).to(ELEMENT)
    else:
        turn, block = begin(state)
        row = block.to(tl.int64)
        came = tl.load(state + FAILED) == 0
        reduced = tl.zeros(columns.shape, ELEMENT)
        owner = rank
        nth, count = row, rows
        if WAY == "two_shot":
            owner = block % W
            nth, count = row // W, tl.cdiv(rows, W)
        slot = count.to(tl.int64) * ROW
        base = HEADER + turn.to(tl.int64) * half
        to_sum = base + nth * ROW
        sums = base + W * TENSORS * slot + row * ROW
        if came:
            for t in tl.static_range(TENSORS):
                start = x + row * x_stride if t == 0 else other + row * other_stride
                there = to_sum + (rank * TENSORS + t) * slot
                if WAY == "one_shot":
                    send(peers, rank, safe(tl.load(start + columns, mask=mask, other=0.0)), there, columns, mask, W)
                elif owner != rank:
                    mine = safe(tl.load(start + columns, mask=mask, other=0.0))
                    tl.store(at(peers, owner, there, ELEMENT) + columns, mine, mask=mask)
            if owner == rank:
                for t in tl.static_range(TENSORS):
                    start = x + row * x_stride if t == 0 else other + row * other_stride
                    part, came = total(
                        peers, state, late, rank, 0, rank, start.to(tl.int64), columns, mask, to_sum + t * slot,
                        TENSORS * slot, limit, W, W, ELEMENT, PTX, CLOCK,
                    )  # fmt: skip
                    if t == 0:
                        reduced = part
                    else:
                        reduced = (wide(reduced, PTX) + wide(part, PTX)).to(ELEMENT)
                if WAY == "two_shot":
                    reduced = safe(reduced)
                    if came:
                        send(peers, rank, reduced, sums, columns, mask, W)
            elif WAY == "two_shot":
                # The owner, who hears from all, knows better who is late, if he is not.
                reduced, came = total(
                    peers, state, late, rank, owner, -1, sums, columns, mask, sums, slot, 2 * limit, 1, W, ELEMENT, PTX,
                    CLOCK,
                )  # fmt: skip
    if came:
        finish(
            reduced, row, columns, element, mask, residual, residual_stride, weights, factor,
            q, scale_out, value_out, residual_out, reduced_out, all_rows, WIDTH, BLOCK, EPS, OFFSET, CAST_FIRST, SUM,
            DTYPE, VALUE, GROUPED, COLUMN_MAJOR, ONE_SCALE, SCALE_STEPS, FACTOR_STEPS, VALUE_STEPS, SEGMENTS, SEGMENT,
            NORM, PTX,
        )  # fmt: skip
