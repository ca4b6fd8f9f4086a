"""Device functions that the kernels share: programs of scalar arithmetic, and quantisation by a block's maximum.

A program (``aiter_fusion/scale_program.py``) arrives as a tuple of (name, number) pairs, translated by ``programs.py``.
Every step computes in float32 and rounds to the dtype of its value, which is what PyTorch's own kernels do.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.constexpr_function
def step_count(steps):
    return len(steps)


@triton.constexpr_function
def step_name(steps, index):
    return steps[index][0]


@triton.constexpr_function
def step_number(steps, index):
    return steps[index][1]


@triton.constexpr_function
def dtype_called(name):
    return {"float32": tl.float32, "bfloat16": tl.bfloat16, "float16": tl.float16}[name]


@triton.jit
def nan_max(a, b):
    """The larger of two, NaN if either is; Triton's own maximum drops NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_of(x, axis: tl.constexpr, PTX: tl.constexpr):
    """The largest of absolute values in float32 along an axis, NaN if one is. Their bits order them as integers do, NaN
    above infinity; that takes one instruction each where AMD's gfx942 takes three, since its maximum drops NaN."""
    if PTX:
        top = tl.reduce(x, axis, nan_max)
    else:
        top = tl.max(x.to(tl.int32, bitcast=True), axis).to(tl.float32, bitcast=True)
    return top


@triton.jit
def at_most(maximum, bound):
    """A maximum in float32, or what a tensor says if that is less; NaN if either is."""
    return tl.minimum(maximum.to(tl.float32), tl.load(bound), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def wide(x, PTX: tl.constexpr):
    """x in float32. ``PTX``: the compiler takes three instructions for two elements of bfloat16, and needs only two."""
    if PTX and x.dtype == tl.bfloat16 and x.numel % 2 == 0:
        halves: tl.constexpr = "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }"
        y = tl.inline_asm_elementwise(halves, "=f,=f,r", [x], tl.float32, is_pure=True, pack=2)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def wide_anew(x, PTX: tl.constexpr):
    """``wide``, computed at every use: the compiler would else keep a row in float32 from one use to the next, in twice
    the registers, and half as many rows would be on their way at a time."""
    if PTX and x.dtype == tl.bfloat16 and x.numel % 2 == 0:
        halves: tl.constexpr = "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }"
        y = tl.inline_asm_elementwise(halves, "=f,=f,r", [x], tl.float32, is_pure=False, pack=2)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def reciprocal_of_normal(x):
    """``1 / x`` within two units in the last place for x between 2**-126 and 2**126, and right for 0 and infinity."""
    return libdevice.fast_dividef(1.0, x)


@triton.jit
def shared_division(x, s, PTX: tl.constexpr):
    """``x / s`` in float32 for many x of half precision that share an s, as far as a cast to FP8 afterwards can tell.

    ``x * r + x * rest``, where r and rest are the reciprocal of s in two parts: two instructions for each x, where a
    division takes more. Before it is rounded the result is right but for 2**-43 of it, and only quotients beside the
    middle of two FP8 numbers matter, which are few enough to try all (``test_gpu.py`` does).

    c, a power of two with the sign of s, brings s near 1: nothing overflows or is subnormal on the way. r is a little
    too small, so that rest is positive: no infinities cancel, and zeros keep their signs. For an s of 0 or infinity,
    r is infinite or 0; rest, any number then, must not be 0, since x may be infinite.
    """
    bits = s.to(tl.int32, bitcast=True)
    exponent = tl.minimum(bits & 0x7F800000, 252 << 23)
    c = (((253 << 23) - exponent) | (bits & -0x80000000)).to(tl.float32, bitcast=True)
    near = s * c
    reciprocal = reciprocal_of_normal(near)
    r = reciprocal * (1.0 - 2.0**-21)
    error = tl.fma(near * -1.0, r, 1.0)
    rest = tl.where(error == error, tl.fma(error, error, error) * reciprocal, 2.0**-126)
    if PTX and x.dtype == tl.bfloat16:  # a product with a power of two is exact, and two products are one instruction
        n = wide(x * c.to(tl.bfloat16), PTX)
    else:
        n = x.to(tl.float32) * c
    return tl.fma(n, r, n * rest)


@triton.jit
def exponent_byte(x):
    """The exponent of the next power of two of float32, 127 more: 254 of infinity, 255 of NaN; in float32."""
    exponent = tl.minimum(tl.maximum(tl.ceil(libdevice.log2(x)), -127.0), 127.0) + 127.0
    return tl.where(x != x, 255.0, tl.where(tl.abs(x) == float("inf"), 254.0, exponent))


@triton.jit
def apply_step(NAME: tl.constexpr, NUMBER: tl.constexpr, value, scale, PTX: tl.constexpr):
    """One step of a program."""
    if NAME == "float32" or NAME == "bfloat16" or NAME == "float16":
        result = value.to(dtype_called(NAME))
    elif NAME == "e8m0":
        result = exponent_byte(value).to(tl.uint8)
    elif NAME == "shared_div_scale":
        result = shared_division(value, scale.to(tl.float32), PTX)
    else:
        x = value.to(tl.float32)
        if NAME == "mul":
            y = x * NUMBER
        elif NAME == "clamp_min":
            y = tl.maximum(x, NUMBER, propagate_nan=tl.PropagateNan.ALL)
        elif NAME == "clamp_max":
            y = tl.minimum(x, NUMBER, propagate_nan=tl.PropagateNan.ALL)
        elif NAME == "if_zero":
            y = tl.where(x == 0.0, NUMBER, x)
        elif NAME == "unless_positive":
            y = tl.where(x > 0.0, x, NUMBER)
        elif NAME == "reciprocal":
            y = tl.div_rn(1.0, x)
        elif NAME == "log2":
            y = libdevice.log2(x)
        elif NAME == "exp2":
            y = libdevice.exp2(x)
        elif NAME == "ceil":
            y = tl.ceil(x)
        elif NAME == "floor":
            y = tl.floor(x)
        elif NAME == "round":
            y = libdevice.nearbyint(x)
        elif NAME == "e8m0_inverse":
            byte = exponent_byte(x)
            y = tl.where(byte == 0.0, 1.0, libdevice.exp2(127.0 - byte))
            y = tl.where(byte == 255.0, x, tl.where(byte == 254.0, 2.0**-127, y))
        elif NAME == "next_power":
            bits = tl.abs(x).to(tl.int32, bitcast=True)
            exponent = ((bits >> 23) & 255) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
            y = (tl.minimum(tl.maximum(exponent, 1), 254) << 23).to(tl.float32, bitcast=True)
        elif NAME == "nan_from":
            y = tl.where(tl.abs(x) >= NUMBER, float("nan"), x)
        else:
            # a factor of a wider dtype than the values has no dimensions, and PyTorch converts it first
            s = scale.to(value.dtype).to(tl.float32)
            if NAME == "mul_scale":
                y = x * s
            else:
                tl.static_assert(NAME == "div_scale", "unknown step")
                x, s = tl.broadcast(x, s)
                y = tl.div_rn(x, s)
        result = y.to(value.dtype)
    return result


@triton.jit
def apply_steps(STEPS: tl.constexpr, value, scale, PTX: tl.constexpr = False):
    """A whole program. ``PTX``: for a GPU of NVIDIA."""
    for i in tl.static_range(step_count(STEPS)):
        value = apply_step(step_name(STEPS, i), step_number(STEPS, i), value, scale, PTX)
    return value


@triton.jit
def codes_of(value, STEPS: tl.constexpr, factor, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The value by a program, as a number of the format ``DTYPE``."""
    y = apply_steps(STEPS, value, factor, PTX)
    if tl.int8 == DTYPE:  # as PyTorch casts: what int8 does not have wraps around, and NaN is 0
        y = y.to(tl.int32)
    return y.to(DTYPE)


@triton.jit
def whole_maximum(maxima, PARTS: tl.constexpr):
    """The largest of what ``PARTS`` programs met (a power of two)."""
    return tl.reduce(tl.load(maxima + tl.arange(0, PARTS)), 0, nan_max)


@triton.jit
def mask_of(
    columns,
    element,
    present,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
    PADDED: tl.constexpr,
    SOME_ABSENT: tl.constexpr,
):
    """Which elements of a tile exist; a constant, which costs nothing, where all do."""
    mask = tl.full(columns.shape, True, tl.int1)
    if PADDED:
        mask = mask & (columns < WIDTH)
    if SEGMENT != BLOCK:
        mask = mask & (element < BLOCK)
    if SOME_ABSENT:
        mask = mask & present
    return mask


@triton.jit
def scale_index(row, group, rows, GROUPS: tl.constexpr, COLUMN_MAJOR: tl.constexpr):
    """Where the scale of a row's group lies."""
    if COLUMN_MAJOR:
        at = group.to(tl.int64) * rows + row
    else:
        at = row.to(tl.int64) * GROUPS + group
    return at
