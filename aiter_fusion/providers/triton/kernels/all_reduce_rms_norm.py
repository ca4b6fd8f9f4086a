"""All-reduce over peers' memory, then the norm and its quantisation, in one launch.

A channel is memory that all ranks of a group can reach. Data is its own signal, as in NCCL's and TensorRT-LLM's
low-latency protocols: memory to be written holds a number that is never sent (``EMPTY``), the reader reads until no
element is that number, and writes it again. So nothing waits for a write to be acknowledged, and data crosses the link
once, with no flag behind it.

A rank's turn is one launch of its kernel, in which every row waits for what the other ranks send of it. So when a rank
is in turn t, all others have begun turn t - 1 and ended turn t - 2, and what they emptied then is empty: data is
written to two halves in turn.

The turn lives on the device, so that a CUDA graph may be replayed.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from .rms_norm_quant import normalised, number_of, statistic_of
from .steps import apply_steps, dtype_called, mask_of, nan_max, scale_index, wide

# Of so many polls at what has come, one asks more than whether all are numbers.
POLLS = tl.constexpr(16)
# Bytes before a channel's data: in the first word other ranks tell which rank is late.
HEADER = tl.constexpr(128)
# As bfloat16 and as float16 a NaN that no arithmetic gives; what has its bits is sent as another.
EMPTY, ANOTHER = tl.constexpr(-1), tl.constexpr(0x7FFF)


@triton.jit
def begin(epoch):
    """The mark: how many blocks have started before, and in the 17th bit this turn's half of the channel.

    The last to start leaves the next turn's.
    """
    mark = tl.atomic_add(epoch, 1, sem="relaxed", scope="gpu")
    if (mark & 0xFFFF) == tl.num_programs(0) - 1:
        tl.store(epoch, (mark & 0x10000) ^ 0x10000)
    return mark


@triton.jit
def as_row(address, dtype: tl.constexpr):
    """Addresses of rows are multiples of 16, as every row's length is."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def send(address, values, columns, mask):
    tl.store(as_row(address, values.dtype) + columns, values, mask=mask)


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
    peers, failed, late, rank, source, own, own_address, columns, mask, offset, slot, limit,
    SOURCES: tl.constexpr, W: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """(sum, whether all came): of what ``SOURCES`` ranks from ``source`` on sent, in their order, in float32, rounded.

    Slots are ``slot`` bytes apart, from ``offset`` on; that of number ``own`` is not in the channel but at
    ``own_address``.

    If something does not come within ``limit`` nanoseconds, its rank's number, from 1 on, goes to ``late`` and to all
    ranks, who then wait no longer, and ``failed`` is set: then this rank waits for nothing any more.
    """
    here = tl.load(peers + rank)
    begun = tl.full([], 0, tl.int64)
    sums = tl.zeros(columns.shape, tl.float32)
    told = rank * 0
    polls = rank * 0
    missing = rank * 0 + 1
    waiting = rank >= 0
    while waiting:
        # Every part is loaded before any is needed.
        parts = ()
        for p in tl.static_range(SOURCES):
            address = tl.where(p == own, own_address, here + offset + p * slot)
            parts = parts + (tl.load(as_row(address, tl.int16) + columns, mask=mask, other=0, volatile=True),)
        for p in tl.static_range(SOURCES):
            part = wide(parts[p].to(DTYPE, bitcast=True), PTX)
            if p == 0:
                sums = part
            else:
                sums = sums + part
        polls += 1
        missing = any_of(sums != sums)  # something has not come, or was no number
        waiting = missing > 0
        if waiting and polls % POLLS == 0:
            missing = 0
            for p in tl.static_range(SOURCES):
                if (missing == 0) & (p != own):
                    missing = any_of(parts[p] == EMPTY) * (p + 1)
            now = globaltimer().to(tl.int64)
            begun = tl.where(begun == 0, now, begun)
            told = tl.load(here.to(tl.pointer_type(tl.int32)), volatile=True)
            waiting = (missing > 0) & (told == 0) & (now - begun < limit)
    if missing > 0:
        if told == 0:
            told = source + missing
            for p in tl.static_range(W):
                tl.store(tl.load(peers + p).to(tl.pointer_type(tl.int32)), told)
        tl.store(late, told)
        tl.store(failed, 1)
    return sums.to(DTYPE), missing == 0


@triton.jit
def finish(
    reduced, addend, row, columns, element, mask, weights, factor, number,
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
        if addend is not None:
            value = (wide(addend, PTX) + wide(reduced, PTX)).to(dtype_called(SUM))
        if residual_out is not None:
            tl.store(residual_out + row * WIDTH + columns, value.to(residual_out.dtype.element_ty), mask=mask)
        value32 = wide(value, PTX)
        mean = tl.sum(tl.reshape(value32 * value32, [SEGMENTS * SEGMENT]), 0) * (1.0 / WIDTH)
        y = normalised(value, statistic_of(mean, number, EPS), weights, OFFSET, CAST_FIRST, DTYPE, PTX)
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
def row_of(tensor, stride, row, columns, mask):
    """A row of a tensor, if there is one."""
    values = None
    if tensor is not None:
        values = tl.load(tensor + row * stride + columns, mask=mask, other=0.0)
    return values


@triton.jit(do_not_specialize=["rank", "rows", "all_rows", "limit"])
def all_reduce_rms_norm_kernel(
    x, other, residual, weight, scale, q, scale_out, value_out, residual_out, reduced_out,
    peers, epoch, failed, late, rank, rows, all_rows, x_stride, other_stride, residual_stride, half, limit, eps,
    ALGORITHM: tl.constexpr, TICKETS: tl.constexpr, W: tl.constexpr, ITEM: tl.constexpr,
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

    eps is the constant ``EPS``, or, where that is None, ``eps``: a number or a pointer to one.
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
    number = number_of(eps)

    if ALGORITHM == "fallback":
        row = tl.program_id(0).to(tl.int64)
        came = row >= 0
        addend = row_of(residual, residual_stride, row, columns, mask)
        reduced = row_of(x, x_stride, row, columns, mask)
        if other is not None:
            reduced = (wide(reduced, PTX) + wide(row_of(other, other_stride, row, columns, mask), PTX)).to(ELEMENT)
    else:
        # If not all blocks run at once, they are numbered as they start: those that others wait for have started.
        if TICKETS:
            mark = begin(epoch)
            block = mark & 0xFFFF
        else:
            block = tl.program_id(0)
        # What needs no other rank is asked for before anything is waited for.
        given_up = tl.load(failed)
        row = block.to(tl.int64)
        owner = rank
        nth, count = row, rows
        if ALGORITHM == "two_shot":
            owner = block % W
            nth, count = row // W, tl.cdiv(rows, W)
        mine = safe(row_of(x, x_stride, row, columns, mask))
        more = None
        if other is not None:
            more = safe(row_of(other, other_stride, row, columns, mask))
        addend = row_of(residual, residual_stride, row, columns, mask)
        to_owner = tl.load(peers + owner)
        others = ()
        for i in tl.static_range(1, W):  # every rank begins with another
            others = others + (tl.load(peers + ((rank + i) & (W - 1))),)
        if not TICKETS:
            mark = begin(epoch)

        slot = count.to(tl.int64) * ROW
        base = HEADER + (mark >> 16).to(tl.int64) * half
        to_sum = base + nth * ROW
        own_slot = to_sum + rank * TENSORS * slot
        sum_at = base + W * TENSORS * slot + row * ROW
        came = given_up == 0
        reduced = tl.zeros(columns.shape, ELEMENT)
        if came:
            if ALGORITHM == "one_shot":
                for i in tl.static_range(W - 1):
                    send(others[i] + own_slot, mine, columns, mask)
                    if other is not None:
                        send(others[i] + own_slot + slot, more, columns, mask)
            elif owner != rank:
                send(to_owner + own_slot, mine, columns, mask)
                if other is not None:
                    send(to_owner + own_slot + slot, more, columns, mask)
            if owner == rank:
                reduced, came = total(
                    peers, failed, late, rank, 0, rank, (x + row * x_stride).to(tl.int64), columns, mask, to_sum,
                    TENSORS * slot, limit, W, W, ELEMENT, PTX,
                )  # fmt: skip
                if other is not None and came:
                    second, came = total(
                        peers, failed, late, rank, 0, rank, (other + row * other_stride).to(tl.int64), columns, mask,
                        to_sum + slot, TENSORS * slot, limit, W, W, ELEMENT, PTX,
                    )  # fmt: skip
                    reduced = (wide(reduced, PTX) + wide(second, PTX)).to(ELEMENT)
                if ALGORITHM == "two_shot" and came:
                    reduced = safe(reduced)
                    for i in tl.static_range(W - 1):
                        send(others[i] + sum_at, reduced, columns, mask)
            elif ALGORITHM == "two_shot":
                # The owner, who hears from all, knows better who is late, if he is not.
                reduced, came = total(
                    peers, failed, late, rank, owner, -1, sum_at, columns, mask, sum_at, slot,
                    2 * limit.to(tl.int64), 1, W, ELEMENT, PTX,
                )  # fmt: skip
    if came:
        finish(
            reduced, addend, row, columns, element, mask, weights, factor, number,
            q, scale_out, value_out, residual_out, reduced_out, all_rows, WIDTH, BLOCK, EPS, OFFSET, CAST_FIRST, SUM,
            DTYPE, VALUE, GROUPED, COLUMN_MAJOR, ONE_SCALE, SCALE_STEPS, FACTOR_STEPS, VALUE_STEPS, SEGMENTS, SEGMENT,
            NORM, PTX,
        )  # fmt: skip
        if ALGORITHM != "fallback":
            # Empty what was read; last, because it takes as long as sending.
            tl.debug_barrier()  # all threads have read
            nothing = tl.full(columns.shape, EMPTY, tl.int16)
            here = tl.load(peers + rank)
            if owner == rank:
                for p in tl.static_range(W):
                    if p != rank:
                        for t in tl.static_range(TENSORS):
                            send(here + to_sum + (p * TENSORS + t) * slot, nothing, columns, mask)
            else:
                send(here + sum_at, nothing, columns, mask)
