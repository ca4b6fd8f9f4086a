"""Activations and FP8 quantisation: alone, times a second tensor, or of columns beside those of a second tensor."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .steps import (
    apply_steps,
    at_most,
    codes_of,
    dtype_called,
    largest_of,
    mask_of,
    nan_max,
    reciprocal_of_normal,
    scale_index,
    whole_maximum,
    wide,
)


@triton.jit
def activated(x, one, ACT: tl.constexpr):
    """The activation of float32 values, in PyTorch's order of operations.

    A product that is added to something passes through ``fma(product, one, something)``, with ``one`` a number that
    the compiler does not know: otherwise it would merge product and sum, and round once instead of twice.
    """
    if ACT == "silu_of_bfloat16":
        # Near enough that every bfloat16 x gives the same bfloat16 result (test_gpu.py tries all of them). The
        # reciprocal is 16 times too large and x 16 times too small, so that neither is subnormal nor overflows.
        e = tl.exp2(x * -1.4426950408889634)
        y = (x * 0.0625) * reciprocal_of_normal(tl.fma(e, 0.0625, 0.0625))
    elif ACT == "silu":
        y = tl.div_rn(x, libdevice.exp(-x) + 1.0)
    elif ACT == "swish":
        y = x * tl.div_rn(1.0, libdevice.exp(-x) + 1.0)
    elif ACT == "gelu_tanh":
        inner = tl.fma(x * x * x * 0.044715, one, x) * 0.7978845608028654
        y = (x * 0.5) * (libdevice.tanh(inner) + 1.0)
    else:
        tl.static_assert(ACT == "gelu", "unknown activation")
        y = (x * 0.5) * (libdevice.erf(x * 0.7071067811865476) + 1.0)
    return y


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x as a number of ``DTYPE``, in float32."""
    return x.to(dtype_called(DTYPE)).to(tl.float32)


@triton.jit
def activated_in_steps(x, one, ACT: tl.constexpr, DTYPE: tl.constexpr):
    """The activation of float32 values that are numbers of ``DTYPE``, each operation's result rounded to it. ``one``:
    as in ``activated``, for float32."""
    if ACT == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "squared_relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y = y * y
    elif ACT == "sigmoid":
        y = tl.div_rn(1.0, libdevice.exp(-x) + 1.0)
    elif ACT == "quick_gelu":
        inner = rounded(x * 1.702, DTYPE)
        y = x * rounded(tl.div_rn(1.0, libdevice.exp(-inner) + 1.0), DTYPE)
    else:
        tl.static_assert(ACT == "gelu_new", "unknown activation")
        cube = rounded(rounded(x * x, DTYPE) * x, DTYPE)
        inner = rounded(tl.fma(rounded(cube * 0.044715, DTYPE), one, x), DTYPE)
        tanh = rounded(libdevice.tanh(rounded(inner * 0.7978845608028654, DTYPE)), DTYPE)
        y = rounded(x * 0.5, DTYPE) * rounded(tanh + 1.0, DTYPE)
    return y.to(dtype_called(DTYPE))


@triton.constexpr_function
def is_in_steps(act):
    return act in ("relu", "squared_relu", "sigmoid", "quick_gelu", "gelu_new")


@triton.jit
def activation(x, one, ACT: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The activation of x, rounded to ``DTYPE``; x itself where ``ACT`` is empty."""
    if ACT == "":
        y = x.to(dtype_called(DTYPE))
    elif is_in_steps(ACT):
        y = activated_in_steps(wide(x.to(dtype_called(DTYPE)), PTX), one, ACT, DTYPE)
    else:
        y = activated(wide(x, PTX), one, ACT).to(dtype_called(DTYPE))
    return y


@triton.jit
def clamped_swiglu(g, u, ALPHA: tl.constexpr, LIMIT: tl.constexpr, DTYPE: tl.constexpr):
    """``(clamp(u) + 1) * (g * sigmoid(g * ALPHA))`` of float32 values, each operation's result rounded to ``DTYPE``."""
    g = rounded(tl.minimum(g, LIMIT, propagate_nan=tl.PropagateNan.ALL), DTYPE)
    u = tl.maximum(u, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
    u = rounded(tl.minimum(u, LIMIT, propagate_nan=tl.PropagateNan.ALL), DTYPE)
    inner = rounded(g * ALPHA, DTYPE)
    sigmoid = rounded(tl.div_rn(1.0, libdevice.exp(-inner) + 1.0), DTYPE)
    swish = rounded(g * sigmoid, DTYPE)
    return (rounded(u + 1.0, DTYPE) * swish).to(dtype_called(DTYPE))


@triton.jit
def product(
    gate,
    up,
    gate_at,
    up_at,
    mask,
    one,
    GATE_FROM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Activated gate times up, with the roundings of the graph."""
    if INTERLEAVED:  # read as pairs: every other element alone would be read two bytes at a time
        pair = gate_at[:, :, None] + tl.arange(0, 2)[None, None, :]
        first, second = tl.split(tl.load(gate + pair, mask=mask[:, :, None], other=0.0))
        if GATE_FROM == 0:
            g, u = first, second
        else:
            g, u = second, first
    else:
        g = tl.load(gate + gate_at, mask=mask, other=0.0)
        u = tl.load(up + up_at, mask=mask, other=0.0)
    STEPS: tl.constexpr = DTYPE if CAST_FIRST else "float32"
    if ACT == "clamped_swiglu":
        y = clamped_swiglu(wide(g, PTX), wide(u, PTX), ALPHA, LIMIT, STEPS).to(dtype_called(DTYPE))
    else:
        a = activation(g, one, ACT, STEPS, PTX)
        if a.dtype == u.dtype:  # of half precision too: the product of two is exact before it is rounded
            y = a * u
        else:
            y = wide(a, PTX) * wide(u, PTX)
        if not CAST_FIRST:
            y = y.to(dtype_called(DTYPE))
    return y


@triton.jit
def produced(
    gate,
    up,
    before,
    row,
    columns,
    gate_stride,
    up_stride,
    before_stride,
    mask,
    one,
    GATE_FROM: tl.constexpr,
    UP_FROM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BEFORE: tl.constexpr,
    BEFORE_ACT: tl.constexpr,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """The value at these columns of a row."""
    START: tl.constexpr = 0 if INTERLEAVED else GATE_FROM
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    if before is not None:
        is_before = columns < BEFORE
        a = tl.load(before + row * before_stride + columns, mask=mask & is_before, other=0.0)
        b = tl.load(gate + row * gate_stride + (columns - BEFORE), mask=mask & (columns >= BEFORE), other=0.0)
        a, b = activation(a, one, BEFORE_ACT, DTYPE, PTX), activation(b, one, ACT, DTYPE, PTX)
        y = tl.where(is_before, a, b)
    elif up is not None:
        gate_at = row * gate_stride + START + STEP * columns
        up_at = row * up_stride + UP_FROM + STEP * columns
        y = product(
            gate, up, gate_at, up_at, mask, one, GATE_FROM, INTERLEAVED, ACT, ALPHA, LIMIT, CAST_FIRST, DTYPE, PTX
        )
    else:
        x = tl.load(gate + row * gate_stride + columns, mask=mask, other=0.0)
        y = activation(x, one, ACT, DTYPE, PTX)
    return y


@triton.jit
def act_quant_kernel(
    gate,
    up,
    before,
    scale,
    maxima,
    bound,
    q,
    scale_out,
    value_out,
    maxima_out,
    rows,
    gate_stride,
    up_stride,
    before_stride,
    one,
    GATE_FROM: tl.constexpr,
    UP_FROM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BEFORE: tl.constexpr,
    BEFORE_ACT: tl.constexpr,
    DENSE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACT: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    DTYPE: tl.constexpr,
    VALUE: tl.constexpr,
    GROUPED: tl.constexpr,
    COLUMN_MAJOR: tl.constexpr,
    SCALE_STEPS: tl.constexpr,
    FACTOR_STEPS: tl.constexpr,
    VALUE_STEPS: tl.constexpr,
    PARTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    TILES: tl.constexpr,
    RUN: tl.constexpr,
    PTX: tl.constexpr,
):
    """A row's gate begins at its column ``GATE_FROM``, up at ``UP_FROM``; ``INTERLEAVED``: they take turns. ``DENSE``:
    both are contiguous. Without ``up`` the value is the activated gate; with ``before``, its ``BEFORE`` columns,
    activated by ``BEFORE_ACT``, and then those of the gate.

    A scale for each row: a program takes a row, ``TILES`` tiles of ``SEGMENTS`` segments of ``BLOCK`` elements (padded
    to ``SEGMENT``, a power of two). Otherwise rows do not matter: the tensor is one sequence of segments, and a program
    takes ``SEGMENTS`` of them, in ``GROUPED`` kernels with a scale for each.

    Which tensors are given says what is computed: with ``maxima_out`` only the largest value that each program met, in
    float32; with ``maxima`` (those ``PARTS`` numbers) a scale for the whole tensor; with ``scale`` that one.
    """
    one = tl.cast(one, tl.float32)  # Inductor gives numbers in float64
    ONE_SCALE: tl.constexpr = scale is not None or maxima is not None
    BY_ROW: tl.constexpr = not (ONE_SCALE or GROUPED or maxima_out is not None)
    IN_ROW: tl.constexpr = WIDTH // BLOCK
    COLUMNS: tl.constexpr = SEGMENTS * BLOCK
    segment = tl.arange(0, SEGMENTS)[:, None]
    element = tl.arange(0, SEGMENT)[None, :]

    if ONE_SCALE:
        if scale is not None:
            whole = tl.load(scale)
        else:
            whole = whole_maximum(maxima, PARTS).to(dtype_called(VALUE))
            if tl.program_id(0) == 0:
                tl.store(scale_out, apply_steps(SCALE_STEPS, whole, whole))
        factor = apply_steps(FACTOR_STEPS, whole, whole)

    if BY_ROW:
        for this in range(tl.program_id(0), rows, tl.num_programs(0)):
            row = this.to(tl.int64)
            top = 0.0
            for tile in tl.static_range(TILES):
                columns = tile * COLUMNS + segment * BLOCK + element
                mask = mask_of(columns, element, True, WIDTH, BLOCK, SEGMENT, TILES * COLUMNS != WIDTH, False)
                y = produced(
                    gate,
                    up,
                    before,
                    row,
                    columns,
                    gate_stride,
                    up_stride,
                    before_stride,
                    mask,
                    one,
                    GATE_FROM,
                    UP_FROM,
                    INTERLEAVED,
                    BEFORE,
                    BEFORE_ACT,
                    ACT,
                    ALPHA,
                    LIMIT,
                    CAST_FIRST,
                    DTYPE,
                    PTX,
                )
                size = tl.abs(y).to(tl.float32)
                top = nan_max(top, largest_of(largest_of(size, 1, PTX), 0, PTX))
            top = top.to(dtype_called(VALUE))
            if bound is not None:
                top = at_most(top, bound)
            factor = apply_steps(FACTOR_STEPS, top, top)
            tl.store(scale_out + row, apply_steps(SCALE_STEPS, top, top))
            for tile in tl.static_range(TILES):
                columns = tile * COLUMNS + segment * BLOCK + element
                mask = mask_of(columns, element, True, WIDTH, BLOCK, SEGMENT, TILES * COLUMNS != WIDTH, False)
                if TILES > 1:
                    y = produced(
                        gate,
                        up,
                        before,
                        row,
                        columns,
                        gate_stride,
                        up_stride,
                        before_stride,
                        mask,
                        one,
                        GATE_FROM,
                        UP_FROM,
                        INTERLEAVED,
                        BEFORE,
                        BEFORE_ACT,
                        ACT,
                        ALPHA,
                        LIMIT,
                        CAST_FIRST,
                        DTYPE,
                        PTX,
                    )
                if value_out is not None:
                    tl.store(value_out + row * WIDTH + columns, y, mask=mask)
                codes = codes_of(y, VALUE_STEPS, factor, q.dtype.element_ty, PTX)
                tl.store(q + tl.max_contiguous(row * WIDTH + columns, [1, RUN]), codes, mask=mask)
    else:
        begin = tl.program_id(0)
        if BLOCK < 32:  # there may be more segments than 32 bits count
            begin = begin.to(tl.int64)
            total = rows * tl.full([], IN_ROW, tl.int64)
        else:
            total = rows * IN_ROW
        best = 0.0
        for first in range(begin * SEGMENTS, total, tl.num_programs(0) * SEGMENTS):
            at = first + segment
            row = at // IN_ROW
            columns = (at - row * IN_ROW) * BLOCK + element
            mask = (at < total) & (element < BLOCK)
            at = at.to(tl.int64)
            if DENSE:  # one row of all segments
                of_row, in_row = tl.zeros_like(at), at * BLOCK + element
            else:
                of_row, in_row = row.to(tl.int64), columns
            y = produced(
                gate,
                up,
                before,
                of_row,
                in_row,
                gate_stride,
                up_stride,
                before_stride,
                mask,
                one,
                GATE_FROM,
                UP_FROM,
                INTERLEAVED,
                BEFORE,
                BEFORE_ACT,
                ACT,
                ALPHA,
                LIMIT,
                CAST_FIRST,
                DTYPE,
                PTX,
            )
            size = tl.abs(y).to(tl.float32)
            if value_out is not None and maxima is None:
                tl.store(value_out + at * BLOCK + element, y, mask=mask)
            if maxima_out is not None:
                best = nan_max(best, largest_of(largest_of(size, 1, PTX), 0, PTX))
            else:
                if GROUPED:
                    top = largest_of(size, 1, PTX).to(dtype_called(VALUE))[:, None]
                    factor = apply_steps(FACTOR_STEPS, top, top)
                codes = codes_of(y, VALUE_STEPS, factor, q.dtype.element_ty, PTX)
                tl.store(q + tl.max_contiguous(at * BLOCK + element, [1, RUN]), codes, mask=mask)
                if GROUPED:
                    scale_at = scale_index(row, at - row * IN_ROW, rows, IN_ROW, COLUMN_MAJOR)
                    tl.store(scale_out + scale_at, apply_steps(SCALE_STEPS, top, top), mask=at < total)
        if maxima_out is not None:
            tl.store(maxima_out + tl.program_id(0), best)
