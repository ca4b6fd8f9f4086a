"""RMSNorm and FP8 quantisation: one pass over each row, held in registers (or, if very wide, read again from cache)."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .steps import apply_steps, dtype_called, largest, mask_of, nan_max, scale_index, whole_maximum, wide


@triton.jit
def summed_row(x, residual, x_at, residual_at, mask, SUM: tl.constexpr, PTX: tl.constexpr):
    """What is normalised: x, or residual + x rounded to ``SUM``."""
    value = tl.load(x + x_at, mask=mask, other=0.0)
    if residual is not None:
        other = tl.load(residual + residual_at, mask=mask, other=0.0)
        value = (wide(other, PTX) + wide(value, PTX)).to(dtype_called(SUM))
    return value


@triton.jit
def number_of(eps):
    """The eps that is no constant, in float32, in which it is added: a number, or what a pointer to one points to."""
    number = eps
    if eps is not None:
        if eps.dtype.is_ptr():
            number = tl.load(eps)
        number = number.to(tl.float32)
    return number


@triton.jit
def statistic_of(mean, number, EPS: tl.constexpr):
    """``rsqrt(mean + eps)`` with the constant ``EPS``, or with ``number`` where there is one."""
    if number is None:
        added = mean + EPS
    else:
        added = mean + number
    return libdevice.rsqrt(added)


@triton.jit
def normalised(
    value,
    statistic,
    weight,
    OFFSET: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """The norm's value, with the roundings of the graph."""
    y = wide(value, PTX) * statistic
    if CAST_FIRST:
        y = y.to(dtype_called(DTYPE))
    if weight is not None:
        w = weight
        if OFFSET is not None:
            w = wide(w, PTX) + OFFSET
        if y.dtype == w.dtype:  # of half precision too: the product of two is exact before it is rounded
            y = y * w
        else:
            y = wide(y, PTX) * wide(w, PTX)
    if not CAST_FIRST:
        y = y.to(dtype_called(DTYPE))
    return y


@triton.jit
def rms_norm_quant_kernel(
    x,
    residual,
    weight,
    scale,
    maxima,
    q,
    scale_out,
    value_out,
    residual_out,
    maxima_out,
    rows,
    x_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    SUM: tl.constexpr,
    DTYPE: tl.constexpr,
    VALUE: tl.constexpr,
    GROUPED: tl.constexpr,
    COLUMN_MAJOR: tl.constexpr,
    SCALE_STEPS: tl.constexpr,
    FACTOR_STEPS: tl.constexpr,
    VALUE_STEPS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILES: tl.constexpr,
    RUN: tl.constexpr,
    PTX: tl.constexpr,
):
    """Programs take ``ROWS`` rows at a time; a row is ``TILES`` tiles of ``SEGMENTS`` segments of ``BLOCK`` elements
    (padded to ``SEGMENT``, a power of two). ``GROUPED``: a segment is a group that has a scale of its own.

    Which tensors are given says what is computed: with ``maxima_out`` only the largest value that each program met, in
    float32; with ``maxima`` (those ``PARTS`` numbers) a scale for the whole tensor; with ``scale`` that one.

    eps is the constant ``EPS``, or, where that is None, ``eps``: a number or a pointer to one.
    """
    COLUMNS: tl.constexpr = SEGMENTS * BLOCK
    PADDED: tl.constexpr = TILES * COLUMNS != WIDTH
    ONE_SCALE: tl.constexpr = scale is not None or maxima is not None
    ROW_FIRST: tl.constexpr = maxima_out is not None or not (ONE_SCALE or GROUPED)
    segment = tl.arange(0, SEGMENTS)[None, :, None]
    element = tl.arange(0, SEGMENT)[None, None, :]
    tile_columns = segment * BLOCK + element

    if ONE_SCALE:
        if scale is not None:
            whole = tl.load(scale)
        else:
            whole = whole_maximum(maxima, PARTS).to(dtype_called(VALUE))
            if tl.program_id(0) == 0:
                tl.store(scale_out, apply_steps(SCALE_STEPS, whole, whole))
        factor = apply_steps(FACTOR_STEPS, whole, whole)
    best = 0.0
    number = number_of(eps)
    weights = None
    if weight is not None and TILES == 1:  # on their way while the statistic is computed
        weights = tl.load(weight + tile_columns, mask=(tile_columns < WIDTH) & (element < BLOCK), other=0.0)

    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first.to(tl.int64) + tl.arange(0, ROWS)[:, None, None]
        present = row < rows

        # the row statistic
        total = tl.zeros([ROWS, SEGMENTS, SEGMENT], tl.float32)
        for tile in tl.static_range(TILES):
            columns = tile * COLUMNS + tile_columns
            mask = mask_of(columns, element, present, WIDTH, BLOCK, SEGMENT, PADDED, ROWS > 1)
            value = summed_row(x, residual, row * x_stride + columns, row * residual_stride + columns, mask, SUM, PTX)
            if residual_out is not None:
                rounded = value.to(residual_out.dtype.element_ty)
                tl.store(residual_out + row * WIDTH + columns, rounded, mask=mask)
            value32 = wide(value, PTX)
            total = value32 * value32 if TILES == 1 else total + value32 * value32
        if ROWS == 1:  # one reduction; where a warp has several rows, Triton 3.6 adds across them after a reshape
            squares = tl.sum(tl.reshape(total, [1, SEGMENTS * SEGMENT]), 1)
        else:
            squares = tl.sum(tl.sum(total, 2), 1)
        mean = squares * (1.0 / WIDTH)
        statistic = statistic_of(mean, number, EPS)[:, None, None]

        # The maximum of each row, where nothing can be quantised before it is known. What is masked counts as 0, or,
        # like its row, as NaN.
        if ROW_FIRST:
            top = tl.zeros([ROWS], tl.float32)
            for tile in tl.static_range(TILES):
                columns = tile * COLUMNS + tile_columns
                mask = mask_of(columns, element, present, WIDTH, BLOCK, SEGMENT, PADDED, ROWS > 1)
                if TILES > 1:
                    value = summed_row(
                        x, residual, row * x_stride + columns, row * residual_stride + columns, mask, SUM, PTX
                    )
                if weight is not None and TILES > 1:
                    these = tl.load(weight + columns, mask=mask, other=0.0)
                else:
                    these = weights
                y = normalised(value, statistic, these, OFFSET, CAST_FIRST, DTYPE, PTX)
                if value_out is not None and maxima_out is not None:
                    tl.store(value_out + row * WIDTH + columns, y, mask=mask)
                size = tl.abs(y).to(tl.float32)
                top = nan_max(top, largest(largest(size, 2, PTX), 1, PTX))
            if maxima_out is not None:
                absent = (first + tl.arange(0, ROWS)) >= rows
                best = nan_max(best, tl.reduce(tl.where(absent, 0.0, top), 0, nan_max))
            else:
                top = top.to(dtype_called(VALUE))[:, None, None]
                factor = apply_steps(FACTOR_STEPS, top, top)
                tl.store(scale_out + row, apply_steps(SCALE_STEPS, top, top), mask=present)

        if maxima_out is None:
            for tile in tl.static_range(TILES):
                columns = tile * COLUMNS + tile_columns
                mask = mask_of(columns, element, present, WIDTH, BLOCK, SEGMENT, PADDED, ROWS > 1)
                if TILES > 1:
                    value = summed_row(
                        x, residual, row * x_stride + columns, row * residual_stride + columns, mask, SUM, PTX
                    )
                if TILES > 1 or not ROW_FIRST:
                    if weight is not None and TILES > 1:
                        these = tl.load(weight + columns, mask=mask, other=0.0)
                    else:
                        these = weights
                    y = normalised(value, statistic, these, OFFSET, CAST_FIRST, DTYPE, PTX)
                if value_out is not None:
                    tl.store(value_out + row * WIDTH + columns, y, mask=mask)
                if GROUPED:
                    size = tl.abs(y).to(tl.float32)
                    top = largest(size, 2, PTX).to(dtype_called(VALUE))[:, :, None]
                    factor = apply_steps(FACTOR_STEPS, top, top)
                codes = apply_steps(VALUE_STEPS, y, factor, PTX).to(q.dtype.element_ty)
                # How many elements a thread writes in a row is how many it should read: else they would change hands.
                at = tl.max_contiguous(row * WIDTH + columns, [1, 1, RUN])
                tl.store(q + at, codes, mask=mask)
                if GROUPED:
                    group = tile * SEGMENTS + segment
                    scales = apply_steps(SCALE_STEPS, top, top)
                    exists = (group < WIDTH // BLOCK) & present
                    scale_at = scale_index(row, group, rows, WIDTH // BLOCK, COLUMN_MAJOR)
                    tl.store(scale_out + scale_at, scales, mask=exists)

    if maxima_out is not None:
        tl.store(maxima_out + tl.program_id(0), best)
