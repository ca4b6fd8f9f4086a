"""All-reduce over peers' memory, then the norm and its quantisation, in one launch.

The protocol (``../README.md`` has a drawing). A channel is memory of each rank that all ranks of a group can write to.
Data is its own signal, as in the low-latency protocols of NCCL and TensorRT-LLM: memory that is to be written holds
``EMPTY``, a number that is never sent. The reader polls until no element is ``EMPTY``, and writes ``EMPTY`` back when
it has read. So data crosses the link once, without a flag and without an acknowledgement.

Memory ordering. Every element carries its own signal, so the order in which a peer's stores arrive does not matter:
plain stores suffice, and neither a fence nor a release is needed. The reader's loads are volatile, so that each poll
reads memory again.

Why two halves suffice. An epoch is one launch of a rank's kernel, and epochs write to the two halves in turn. In every
epoch a rank waits for data of all ranks, directly or through a row's owner. So when a rank begins epoch t, each peer
has begun epoch t - 1, and therefore ended epoch t - 2: its stream runs one launch after the other, and the end of a
launch makes its stores visible. The memory that epoch t writes to was last read, and emptied, in epoch t - 2. One half
would not suffice: ``test_protocol.py`` explores every order of steps, with two halves and with one.

The epoch lives on the GPU, so that a CUDA graph can be replayed.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from .norm_quant import normalised, number_of, statistic_of
from .steps import apply_steps, codes_of, dtype_called, mask_of, nan_max, scale_index, wide

# One of so many polls also tells NaN in the data from missing data, and looks at the clock.
POLLS = tl.constexpr(16)
# Bytes before a channel's data. In the first word a peer writes which rank is late.
HEADER = tl.constexpr(128)
# 0xFFFF, a NaN in bfloat16 and in float16, which arithmetic does not produce. An input with these bits is sent as
# another NaN.
EMPTY, ANOTHER = tl.constexpr(-1), tl.constexpr(0x7FFF)


@triton.jit
def begin(epoch):
    """Count this block in. The low 16 bits of the result are the blocks that started before it in this epoch, the 17th
    is the half of the channel that the epoch uses.

    The last block to start leaves the next epoch's value, with a count of 0 and the other half. Relaxed order suffices:
    only launches of this rank touch the counter, and they run one after the other.
    """
    mark = tl.atomic_add(epoch, 1, sem="relaxed", scope="gpu")
    if (mark & 0xFFFF) == tl.num_programs(0) - 1:
        tl.store(epoch, (mark & 0x10000) ^ 0x10000)
    return mark


@triton.jit
def as_row(address, dtype: tl.constexpr):
    """A pointer to a row. Rows begin at multiples of 16 bytes, because their lengths are such multiples."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


@triton.jit
def send(address, values, columns, mask):
    tl.store(as_row(address, values.dtype) + columns, values, mask=mask)


@triton.jit
def safe(x):
    """x as it is sent: never with the bits of ``EMPTY``."""
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
    """(sum, whether all parts came). The sum is over what ``SOURCES`` ranks, from ``source`` on, sent: in the order of
    ranks, in float32, rounded once, so that every rank gets the same bits.

    Part p is at ``offset + p * slot`` bytes of this rank's channel, but part number ``own``, this rank's own, at
    ``own_address``.

    If a part does not come within ``limit`` nanoseconds, its rank's number plus 1 is written to ``late`` (host memory)
    and to the header of every rank's channel, whose kernels then stop polling; and ``failed`` is set, so that later
    launches of this rank do not poll at all.
    """
    here = tl.load(peers + rank)
    begun = tl.full([], 0, tl.int64)
    sums = tl.zeros(columns.shape, tl.float32)
    told = rank * 0
    polls = rank * 0
    missing = rank * 0 + 1
    waiting = rank >= 0
    while waiting:
        # All parts are loaded before the first is added, so that their latencies overlap.
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
        missing = any_of(sums != sums)  # EMPTY is a NaN: a part has not come, or the data has a NaN
        waiting = missing > 0
        if waiting and polls % POLLS == 0:
            # Compare bits: with NaN in the data the sum stays NaN after every part has come.
            missing = 0
            for p in tl.static_range(SOURCES):
                if (missing == 0) & (p != own):
                    missing = any_of(parts[p] == EMPTY) * (p + 1)
            now = globaltimer().to(tl.int64)
            begun = tl.where(begun == 0, now, begun)
            told = tl.load(here.to(tl.pointer_type(tl.int32)), volatile=True)
            waiting = (missing > 0) & (told == 0) & (now - begun < limit)
    if missing > 0:  # the time is up, or a peer has written that a rank is late
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
    """The residual addition, norm and quantisation of one row's sum.

    all_rows: rows of the outputs, of which a launch may compute a part; column-major scales depend on it.
    """
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
            codes = codes_of(y, VALUE_STEPS, factor, q.dtype.element_ty, PTX)
            # A thread writes the codes of the 8 elements (16 bytes of x) that it has loaded. Without this hint codes
            # would be exchanged between threads first.
            tl.store(q + tl.max_contiguous(row * WIDTH + columns, [1, 8]), codes, mask=mask)


@triton.jit
def row_of(tensor, stride, row, columns, mask):
    """A row of a tensor, None if there is no tensor."""
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
    """A block computes one row.

    ALGORITHM: ``one_shot``: every rank sends its row to all others, and all sum. ``two_shot``: a row has an owner, to
    whom all send it, and who sums it and sends the sum to all; each rank adds its own residual, which is the same on
    all ranks, so only sums travel, whatever is returned. ``fallback``: the rows are sums already.

    TICKETS: more blocks than multiprocessors, so they do not all run at once. They are numbered as they start.

    A half of the channel's data holds by rank, tensor and row what is to be summed, and after that, by row, the sums.

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
        # Deadlock freedom: a block polls for the same row of other ranks. If rows go to blocks in the order in which
        # these start, the first unfinished row has started on every rank, or starts when an earlier block ends.
        if TICKETS:
            mark = begin(epoch)
            block = mark & 0xFFFF
        else:
            block = tl.program_id(0)
        # Loads that need no other rank are issued before the first poll.
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
        for i in tl.static_range(1, W):  # every rank begins with another peer, to spread the load over the links
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
                # The owner polls for all ranks and knows which one is late. So wait for it twice as long, unless the
                # owner itself is late.
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
            # Empty what was read, for the epoch after the next. Last, because it takes as long as sending.
            tl.debug_barrier()  # all threads have read before the first one empties
            nothing = tl.full(columns.shape, EMPTY, tl.int16)
            here = tl.load(peers + rank)
            if owner == rank:
                for p in tl.static_range(W):
                    if p != rank:
                        for t in tl.static_range(TENSORS):
                            send(here + to_sum + (p * TENSORS + t) * slot, nothing, columns, mask)
            else:
                send(here + sum_at, nothing, columns, mask)
