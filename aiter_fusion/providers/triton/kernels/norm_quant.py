"""Norms and FP8 quantisation: one pass over each row, held in registers (or, if very wide, read again from cache).

What stands once for several rows, such as the modulation of a batch entry, has a row for every ``PERIOD`` rows.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .act_quant import activation
from .steps import (
    apply_steps,
    at_most,
    codes_of,
    dtype_called,
    largest_of,
    mask_of,
    nan_max,
    scale_index,
    whole_maximum,
    wide,
    wide_anew,
)


@triton.jit
def summed_row(
    x,
    residual,
    gate,
    x_at,
    residual_at,
    gate_at,
    mask,
    one,
    PRODUCT: tl.constexpr,
    SUM: tl.constexpr,
    PTX: tl.constexpr,
):
    """What is normalised: x, or residual + x rounded to ``SUM``, where x may be multiplied by a gate, and the product
    rounded to ``PRODUCT``, before. ``one``: as in ``layer_normalised``."""
    value = tl.load(x + x_at, mask=mask, other=0.0)
    if residual is not None:
        other = tl.load(residual + residual_at, mask=mask, other=0.0)
        if gate is not None:
            gates = tl.load(gate + gate_at, mask=mask, other=0.0)
            value = (wide(gates, PTX) * wide(value, PTX)).to(dtype_called(PRODUCT))
            value = tl.fma(wide(value, PTX), one, wide(other, PTX)).to(dtype_called(SUM))
        else:
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
def layer_normalised(value, mean, statistic, weight, bias, one, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The value of a LayerNorm. A product that is added to something passes through ``fma(product, one, something)``,
    with ``one`` a number that the compiler does not know: it would round product and sum once instead of twice."""
    y = (wide_anew(value, PTX) - mean) * statistic
    if weight is not None:
        y = y * wide_anew(weight, PTX)
    if bias is not None:
        y = tl.fma(y, one, wide_anew(bias, PTX))
    return y.to(dtype_called(DTYPE))


@triton.jit
def modulated(y, gain, shift, one, PLUS_ONE: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """``y * (1 + gain) + shift``, every operation's result in the wider dtype of its operands, the last rounded to
    ``DTYPE``."""
    f = gain
    if PLUS_ONE:
        f = (wide(f, PTX) + 1.0).to(gain.dtype)
    if y.dtype == f.dtype:
        y = y * f
    else:
        y = wide(y, PTX) * wide(f, PTX)
    if shift is not None:
        total = tl.fma(wide(y, PTX), one, wide(shift, PTX))
        if y.dtype == shift.dtype:
            total = total.to(y.dtype)
        y = total
    return y.to(dtype_called(DTYPE))


@triton.jit
def gated(y, z, one, ACT: tl.constexpr, ACT_DTYPE: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """``y * act(z)``, the activation of ``ACT_DTYPE``, rounded to ``DTYPE``."""
    a = activation(z, one, ACT, ACT_DTYPE, PTX)
    if y.dtype == a.dtype:
        y = y * a
    else:
        y = wide(y, PTX) * wide(a, PTX)
    return y.to(dtype_called(DTYPE))


@triton.jit
def read_row(x, at, mask):
    """x there, or None where there is no x."""
    values = x
    if x is not None:
        values = tl.load(x + at, mask=mask, other=0.0)
    return values


@triton.jit
def normed(
    value,
    mean,
    statistic,
    weights,
    biases,
    gain,
    shift,
    z,
    gain_at,
    shift_at,
    mask,
    one,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    DTYPE: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    ACT: tl.constexpr,
    ACT_DTYPE: tl.constexpr,
    VALUE: tl.constexpr,
    PTX: tl.constexpr,
):
    """What is quantised: the norm of the value, maybe modulated or gated by the values z."""
    if NORM == "rms":
        y = normalised(value, statistic, weights, OFFSET, CAST_FIRST, DTYPE, PTX)
    elif NORM == "layer":
        y = layer_normalised(value, mean, statistic, weights, biases, one, DTYPE, PTX)
        y = tl.where(mask, y, 0.0)  # what does not exist is the mean's distance from 0 otherwise
    else:
        tl.static_assert(NORM == "", "unknown norm")
        y = value
    if gain is not None:
        gains = tl.load(gain + gain_at, mask=mask, other=0.0)
        y = modulated(y, gains, read_row(shift, shift_at, mask), one, PLUS_ONE, VALUE, PTX)
    if z is not None:
        y = gated(y, z, one, ACT, ACT_DTYPE, VALUE, PTX)
    return y


@triton.jit
def row_sum(values, BY_SEGMENT: tl.constexpr, ROWS: tl.constexpr, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr):
    """The sum of each row of a tile, or of each of its segments."""
    if BY_SEGMENT:
        total = tl.sum(values, 2)[:, :, None]
    elif ROWS == 1:  # one reduction; where a warp has several rows, Triton 3.6 adds across them after a reshape
        total = tl.sum(tl.reshape(values, [1, SEGMENTS * SEGMENT]), 1)[:, None, None]
    else:
        total = tl.sum(tl.sum(values, 2), 1)[:, None, None]
    return total


@triton.jit
def norm_quant_kernel(
    x,
    residual,
    gate,
    weight,
    bias,
    gain,
    shift,
    z,
    scale,
    maxima,
    q,
    scale2,
    q2,
    scale3,
    q3,
    bound,
    bound2,
    scale2_out,
    bound3,
    scale3_out,
    scale_out,
    value_out,
    residual_out,
    maxima_out,
    rows,
    x_stride,
    residual_stride,
    gate_stride,
    gate_period,
    gain_stride,
    gain_period,
    shift_stride,
    shift_period,
    z_stride,
    eps,
    one,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_SEGMENT: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    PRODUCT: tl.constexpr,
    SUM: tl.constexpr,
    DTYPE: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    ACT: tl.constexpr,
    ACT_DTYPE: tl.constexpr,
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
    LATE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Programs take ``ROWS`` rows at a time; a row is ``TILES`` tiles of ``SEGMENTS`` segments of ``BLOCK`` elements
    (padded to ``SEGMENT``, a power of two). ``GROUPED``: a segment is a group that has a scale of its own.

    Which tensors are given says what is computed: with ``maxima_out`` only the largest value that each program met, in
    float32; with ``maxima`` (those ``PARTS`` numbers) a scale for the whole tensor; with ``scale`` that one, and with
    others besides, codes for each; with ``bound`` maxima of rows that are at most that, and with others likewise.

    ``NORM`` is rms, layer or, where only the sum with the residual is quantised, empty. ``BY_SEGMENT``: rows of x, a
    residual and z are segments, so many of which are a row here, and each is normalised by itself. eps is a constant,
    ``EPS``, or, where that is None, ``eps``: a number or a pointer to one. ``LATE``: weight and bias are read when the
    statistic is known, and take no registers before, so that more rows are on their way at a time.
    """
    COLUMNS: tl.constexpr = SEGMENTS * BLOCK
    PADDED: tl.constexpr = TILES * COLUMNS != WIDTH
    ONE_SCALE: tl.constexpr = scale is not None or maxima is not None
    ROW_FIRST: tl.constexpr = maxima_out is not None or not (ONE_SCALE or GROUPED)
    NORMED: tl.constexpr = BLOCK if BY_SEGMENT else WIDTH
    IN_ROW: tl.constexpr = WIDTH // NORMED  # rows of x
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
    if scale2 is not None:
        second = tl.load(scale2)
        factor2 = apply_steps(FACTOR_STEPS, second, second)
    if scale3 is not None:
        third = tl.load(scale3)
        factor3 = apply_steps(FACTOR_STEPS, third, third)
    best = 0.0
    number = number_of(eps)
    weights = None
    biases = None
    exist = (tile_columns < WIDTH) & (element < BLOCK)
    of_weight = element + tl.zeros_like(tile_columns) if BY_SEGMENT else tile_columns
    if TILES == 1 and not LATE:
        weights = read_row(weight, of_weight, exist)
        biases = read_row(bias, of_weight, exist)

    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        near = first + tl.arange(0, ROWS)[:, None, None]
        row = near.to(tl.int64)
        present = row < rows
        # where what is read begins: columns follow, or, by segments, the elements of each
        x_row, residual_row, z_row = row * x_stride, row * residual_stride, row * z_stride
        if BY_SEGMENT:
            x_row = (row * IN_ROW + segment) * x_stride - segment * BLOCK
            residual_row = (row * IN_ROW + segment) * residual_stride - segment * BLOCK
            z_row = (row * IN_ROW + segment) * z_stride - segment * BLOCK
        gate_row, gain_row, shift_row = row, row, row
        if gate is not None:
            gate_row = (near // gate_period).to(tl.int64) * gate_stride
        if gain is not None:
            gain_row = (near // gain_period).to(tl.int64) * gain_stride
        if shift is not None:
            shift_row = (near // shift_period).to(tl.int64) * shift_stride

        zs = None
        if TILES == 1:  # on their way while the statistic is computed
            of_z = mask_of(tile_columns, element, present, WIDTH, BLOCK, SEGMENT, PADDED, ROWS > 1)
            zs = read_row(z, z_row + tile_columns, of_z)

        # the row statistic
        total = tl.zeros([ROWS, SEGMENTS, SEGMENT], tl.float32)
        for tile in tl.static_range(TILES):
            columns = tile * COLUMNS + tile_columns
            mask = mask_of(columns, element, present, WIDTH, BLOCK, SEGMENT, PADDED, ROWS > 1)
            value = summed_row(
                x,
                residual,
                gate,
                x_row + columns,
                residual_row + columns,
                gate_row + columns,
                mask,
                one,
                PRODUCT,
                SUM,
                PTX,
            )
            if residual_out is not None:
                rounded = value.to(residual_out.dtype.element_ty)
                tl.store(residual_out + row * WIDTH + columns, rounded, mask=mask)
            value32 = wide_anew(value, PTX) if NORM == "layer" else wide(value, PTX)
            if NORM == "rms":
                total = value32 * value32 if TILES == 1 else total + value32 * value32
            elif NORM == "layer":
                total = value32 if TILES == 1 else total + value32
        mean = 0.0
        statistic = 0.0
        if NORM == "rms":
            squares = row_sum(total, BY_SEGMENT, ROWS, SEGMENTS, SEGMENT)
            statistic = statistic_of(squares * (1.0 / NORMED), number, EPS)
        elif NORM == "layer":
            mean = row_sum(total, BY_SEGMENT, ROWS, SEGMENTS, SEGMENT) * (1.0 / NORMED)
            total = tl.zeros([ROWS, SEGMENTS, SEGMENT], tl.float32)
            for tile in tl.static_range(TILES):
                columns = tile * COLUMNS + tile_columns
                mask = mask_of(columns, element, present, WIDTH, BLOCK, SEGMENT, PADDED, ROWS > 1)
                if TILES > 1:
                    value = summed_row(
                        x,
                        residual,
                        gate,
                        x_row + columns,
                        residual_row + columns,
                        gate_row + columns,
                        mask,
                        one,
                        PRODUCT,
                        SUM,
                        PTX,
                    )
                apart = tl.where(mask, wide_anew(value, PTX) - mean, 0.0)
                total = apart * apart if TILES == 1 else total + apart * apart
            squares = row_sum(total, BY_SEGMENT, ROWS, SEGMENTS, SEGMENT)
            statistic = statistic_of(squares * (1.0 / NORMED), number, EPS)
        own = weights
        own_bias = biases
        if TILES == 1 and LATE:
            own = read_row(weight, of_weight, exist)
            own_bias = read_row(bias, of_weight, exist)

        # The maximum of each row, where nothing can be quantised before it is known. What is masked counts as 0, or,
        # like its row, as NaN.
        if ROW_FIRST:
            top = tl.zeros([ROWS], tl.float32)
            for tile in tl.static_range(TILES):
                columns = tile * COLUMNS + tile_columns
                mask = mask_of(columns, element, present, WIDTH, BLOCK, SEGMENT, PADDED, ROWS > 1)
                if TILES > 1:
                    value = summed_row(
                        x,
                        residual,
                        gate,
                        x_row + columns,
                        residual_row + columns,
                        gate_row + columns,
                        mask,
                        one,
                        PRODUCT,
                        SUM,
                        PTX,
                    )
                these = own
                those = own_bias
                gates = zs
                if TILES > 1:
                    these = read_row(weight, columns, mask)
                    those = read_row(bias, columns, mask)
                    gates = read_row(z, z_row + columns, mask)
                y = normed(
                    value,
                    mean,
                    statistic,
                    these,
                    those,
                    gain,
                    shift,
                    gates,
                    gain_row + columns,
                    shift_row + columns,
                    mask,
                    one,
                    NORM,
                    OFFSET,
                    CAST_FIRST,
                    DTYPE,
                    PLUS_ONE,
                    ACT,
                    ACT_DTYPE,
                    VALUE,
                    PTX,
                )
                if value_out is not None and maxima_out is not None:
                    tl.store(value_out + row * WIDTH + columns, y, mask=mask)
                size = tl.abs(y).to(tl.float32)
                top = nan_max(top, largest_of(largest_of(size, 2, PTX), 1, PTX))
            if maxima_out is not None:
                absent = (first + tl.arange(0, ROWS)) >= rows
                best = nan_max(best, tl.reduce(tl.where(absent, 0.0, top), 0, nan_max))
            else:
                top = top.to(dtype_called(VALUE))[:, None, None]
                largest = top
                if bound is not None:
                    top = at_most(largest, bound)
                factor = apply_steps(FACTOR_STEPS, top, top)
                tl.store(scale_out + row, apply_steps(SCALE_STEPS, top, top), mask=present)
                if bound2 is not None:
                    second = at_most(largest, bound2)
                    factor2 = apply_steps(FACTOR_STEPS, second, second)
                    tl.store(scale2_out + row, apply_steps(SCALE_STEPS, second, second), mask=present)
                if bound3 is not None:
                    third = at_most(largest, bound3)
                    factor3 = apply_steps(FACTOR_STEPS, third, third)
                    tl.store(scale3_out + row, apply_steps(SCALE_STEPS, third, third), mask=present)

        if maxima_out is None:
            for tile in tl.static_range(TILES):
                columns = tile * COLUMNS + tile_columns
                mask = mask_of(columns, element, present, WIDTH, BLOCK, SEGMENT, PADDED, ROWS > 1)
                if TILES > 1:
                    value = summed_row(
                        x,
                        residual,
                        gate,
                        x_row + columns,
                        residual_row + columns,
                        gate_row + columns,
                        mask,
                        one,
                        PRODUCT,
                        SUM,
                        PTX,
                    )
                if TILES > 1 or not ROW_FIRST:
                    these = own
                    those = own_bias
                    gates = zs
                    if TILES > 1:
                        these = read_row(weight, columns, mask)
                        those = read_row(bias, columns, mask)
                        gates = read_row(z, z_row + columns, mask)
                    y = normed(
                        value,
                        mean,
                        statistic,
                        these,
                        those,
                        gain,
                        shift,
                        gates,
                        gain_row + columns,
                        shift_row + columns,
                        mask,
                        one,
                        NORM,
                        OFFSET,
                        CAST_FIRST,
                        DTYPE,
                        PLUS_ONE,
                        ACT,
                        ACT_DTYPE,
                        VALUE,
                        PTX,
                    )
                if value_out is not None:
                    tl.store(value_out + row * WIDTH + columns, y, mask=mask)
                if GROUPED:
                    size = tl.abs(y).to(tl.float32)
                    top = largest_of(size, 2, PTX).to(dtype_called(VALUE))[:, :, None]
                    factor = apply_steps(FACTOR_STEPS, top, top)
                codes = codes_of(y, VALUE_STEPS, factor, q.dtype.element_ty, PTX)
                # How many elements a thread writes in a row is how many it should read: else they would change hands.
                at = tl.max_contiguous(row * WIDTH + columns, [1, 1, RUN])
                tl.store(q + at, codes, mask=mask)
                if q2 is not None:
                    tl.store(q2 + at, codes_of(y, VALUE_STEPS, factor2, q2.dtype.element_ty, PTX), mask=mask)
                if q3 is not None:
                    tl.store(q3 + at, codes_of(y, VALUE_STEPS, factor3, q3.dtype.element_ty, PTX), mask=mask)
                if GROUPED:
                    group = tile * SEGMENTS + segment
                    scales = apply_steps(SCALE_STEPS, top, top)
                    exists = (group < WIDTH // BLOCK) & present
                    scale_at = scale_index(row, group, rows, WIDTH // BLOCK, COLUMN_MAJOR)
                    tl.store(scale_out + scale_at, scales, mask=exists)

    if maxima_out is not None:
        tl.store(maxima_out + tl.program_id(0), best)
