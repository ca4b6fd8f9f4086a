"""Device functions that the kernels share: programs of scalar arithmetic, and quantisation by a block's maximum.

A program (``aiter_fusion/arithmetic.py``) arrives as a tuple of (name, number) pairs that ``programs.py`` translated.
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
def reciprocal_of_normal(x):
    """``1 / x`` within two units in the last place for x between 2**-126 and 2**126, and right for 0 and infinity."""
    return libdevice.fast_dividef(1.0, x)


@triton.jit
def shared_division(x, s, CORRECTIONS: tl.constexpr, COVERS: tl.constexpr):
    """``x / s`` in float32 for many x that share an s, correctly rounded as far as FP8 reaches.

    A reciprocal for each s and corrections by fused multiply-adds for each x (Markstein 1990), where a division takes
    more instructions. Two corrections are right for every x. For an x of half precision one is, as far as the cast to
    FP8 that follows can tell: only quotients beside the middle of two FP8 numbers matter, which are few enough to try
    all (``tests/test_gpu.py`` does).

    c, a power of two, brings s near 1, where the corrections are exact, and negates x, which later would cost an
    instruction. Where s is 0 or infinite a correction would be 0 * inf: s2 and r2 make it add nothing.

    COVERS: s is positive and about the largest x over FP8's largest number, so no quotient is much larger. Otherwise
    quotients are cut off far above what FP8 can hold, lest a correction be inf - inf.
    """
    exponent = tl.minimum(s.to(tl.int32, bitcast=True) & 0x7F800000, 252 << 23)
    c = ((253 << 23) - exponent).to(tl.float32, bitcast=True)
    near = s * c
    if not COVERS:
        c = tl.where(near < 0.0, -c, c)
        near = tl.abs(near)
    r = reciprocal_of_normal(near) * -1.0  # a minus sign would make +0 of 0
    s2 = tl.minimum(tl.maximum(near, 2.0**-126), 2.0**126)
    r2 = tl.where(near == 0.0, -1.0, r)
    if x.dtype == tl.bfloat16:  # a product with a power of two is exact, and two products are one instruction
        n = (x * (-c).to(tl.bfloat16)).to(tl.float32)
    else:
        n = x.to(tl.float32) * -c
    q = n * r
    if not COVERS:
        q = tl.maximum(q, -(2.0**20), propagate_nan=tl.PropagateNan.ALL)
        q = tl.minimum(q, 2.0**20, propagate_nan=tl.PropagateNan.ALL)
    for _ in tl.static_range(CORRECTIONS):
        q = tl.fma(tl.fma(q, s2, n), r2, q)
    return q


@triton.jit
def apply_step(NAME: tl.constexpr, NUMBER: tl.constexpr, value, scale):
    """One step of a program."""
    if NAME == "float32" or NAME == "bfloat16" or NAME == "float16":
        result = value.to(dtype_called(NAME))
    elif NAME == "covered_div_scale" or NAME == "shared_div_scale":
        CORRECTIONS: tl.constexpr = 1 if value.dtype.primitive_bitwidth == 16 else 2
        result = shared_division(value, scale.to(tl.float32), CORRECTIONS, NAME == "covered_div_scale")
    else:
        x = value.to(tl.float32)
        if NAME == "mul":
            y = x * NUMBER
        elif NAME == "clamp_min":
            y = tl.maximum(x, NUMBER, propagate_nan=tl.PropagateNan.ALL)
        elif NAME == "clamp_max":
            y = tl.minimum(x, NUMBER, propagate_nan=tl.PropagateNan.ALL)
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
def apply_steps(STEPS: tl.constexpr, value, scale):
    """A whole program."""
    for i in tl.static_range(step_count(STEPS)):
        value = apply_step(step_name(STEPS, i), step_number(STEPS, i), value, scale)
    return value


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
