"""What vector and scalar instructions compute, on numpy arrays: one row for each, whatever its encoding.

A row names the types of the result and of the sources, and a function of arrays of those types. ``machine.py`` reads
operands, applies modifiers (negation, absolute value, DPP, SDWA, op_sel) and writes results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any  # numpy arrays; their dtypes are what the rows below say
U32, I32, U64, I64 = np.uint32, np.int32, np.uint64, np.int64
F16, F32, F64 = np.float16, np.float32, np.float64
DTYPES = {
    "f16": F16,
    "f32": F32,
    "f64": F64,
    "u16": np.uint16,
    "i16": np.int16,
    "u32": U32,
    "i32": I32,
    "u64": U64,
    "i64": I64,
}


@dataclass(frozen=True)
class Context:
    """State besides operands that arithmetic depends on.

    saturates: MODE.FP16_OVFL of the waves, an array that broadcasts over lanes.
    fnuz:      whether the GPU's FP8 format is e4m3fnuz (gfx942), not e4m3fn (gfx950).
    ulps:      added to a finite, non-zero result of ``rcp``, ``rsq``, ``exp``, ``log`` and ``sqrt``.
    flushes:   whether those instructions take and return zeros for subnormal numbers.
    infinite:  whether saturating makes the largest number of an infinity too, rather than NaN.
    """

    saturates: Array
    fnuz: bool
    ulps: int = 0
    flushes: bool = False
    infinite: bool = True


@dataclass(frozen=True)
class Operation:
    """The arithmetic of one instruction.

    result:  type of what it writes; "mask" is a bit for each lane.
    sources: types of what it reads, in order; "old" is the destination's previous content, "carry" a bit for each lane.
    compute: of arrays of these types; with ``wants_context``, of a Context first.
    carries: whether it returns (result, mask) rather than a result alone.
    """

    result: str
    sources: tuple[str, ...]
    compute: Callable[..., Any]
    wants_context: bool = False
    carries: bool = False


def bits(x: Array) -> Array:
    return x.view(U32)


def rounded_to_odd(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` of float32 in float64, rounded so that rounding to float32 afterwards is right.

    The product is exact in float64. If the sum is not, and its last bit is even, it becomes the neighbour on the side
    of what was lost (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums", 2008).
    """
    with np.errstate(all="ignore"):
        product, addend = a.astype(F64) * b.astype(F64), c.astype(F64)
        total = product + addend
        virtual = total - product
        error = (product - (total - virtual)) + (addend - virtual)
        inexact = np.isfinite(total) & (error != 0) & (total.view(I64) & 1 == 0)
        return np.where(inexact, np.nextafter(total, np.where(error > 0, np.inf, -np.inf)), total)


def fused(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` of float32, rounded once."""
    with np.errstate(all="ignore"):
        return rounded_to_odd(a, b, c).astype(F32)


def approximate(exact: Callable[[Array], Array]) -> Callable[[Context, Array], Array]:
    """A float32 function that hardware computes to one ulp: here to half an ulp, then moved by ``Context.ulps``."""

    def compute(context: Context, x: Array) -> Array:
        with np.errstate(all="ignore"):
            if context.flushes:
                x = np.where(np.abs(x) < np.finfo(F32).tiny, np.copysign(F32(0), x), x)
            y = exact(x.astype(F64)).astype(F32)
            movable = np.isfinite(y) & (y != 0)
            for _ in range(abs(context.ulps)):
                y = np.where(movable, np.nextafter(y, F32(np.inf if context.ulps > 0 else -np.inf)), y)
            if context.flushes:
                y = np.where(np.abs(y) < np.finfo(F32).tiny, np.copysign(F32(0), y), y)
        return y

    return compute


def quieted(x: Array) -> tuple[Array, Array]:
    """(x with its NaN made quiet, whether x is a signalling NaN)."""
    unsigned, quiet = (np.uint16, 0x200) if x.dtype == F16 else (U32, 0x400000)
    found = x.view(unsigned)
    return (found | unsigned(quiet)).view(x.dtype), np.isnan(x) & (found & unsigned(quiet) == 0)


def larger(a: Array, b: Array) -> Array:
    """V_MAX_F32 in IEEE mode: a signalling NaN, made quiet, wins; of a quiet NaN and a number, the number."""
    return _extreme(a, b, np.greater_equal(a, b) & ~((a == 0) & (b == 0) & np.signbit(a) & ~np.signbit(b)))


def smaller(a: Array, b: Array) -> Array:
    return _extreme(a, b, np.less(a, b) | ((a == 0) & (b == 0) & np.signbit(a) & ~np.signbit(b)))


def _extreme(a: Array, b: Array, first: Array) -> Array:
    chosen = np.where(first, a, b)
    chosen = np.where(np.isnan(a), b, np.where(np.isnan(b), a, chosen))
    (quiet_a, signals_a), (quiet_b, signals_b) = quieted(a), quieted(b)
    return np.where(signals_a, quiet_a, np.where(signals_b, quiet_b, chosen))


def median(a: Array, b: Array, c: Array) -> Array:
    """V_MED3_F32: the smallest number if one is NaN."""
    top = larger(larger(a, b), c)
    middle = np.where(top == a, larger(b, c), np.where(top == b, larger(a, c), larger(a, b)))
    nan = np.isnan(a) | np.isnan(b) | np.isnan(c)
    return np.where(nan, smaller(smaller(a, b), c), middle)


def maximum(a: Array, b: Array) -> Array:
    """The maximum of IEEE 754-2019, which keeps NaN and orders -0 below +0."""
    chosen = np.where((a > b) | ((a == b) & ~np.signbit(a)), a, b)
    return np.where(np.isnan(a) | np.isnan(b), F32(np.nan), chosen)


def minimum(a: Array, b: Array) -> Array:
    chosen = np.where((a < b) | ((a == b) & np.signbit(a)), a, b)
    return np.where(np.isnan(a) | np.isnan(b), F32(np.nan), chosen)


def to_fp8(context: Context, x: Array, fnuz: bool) -> Array:
    """float32 to the bits of e4m3fnuz or e4m3fn, to nearest, ties to even.

    What is too large becomes the largest number where ``context.saturates``, NaN otherwise.
    """
    saturates = context.saturates
    bias, top = (8, 0x7F) if fnuz else (7, 0x7E)
    b = bits(x)
    sign, magnitude = (b >> 24) & 0x80, b & 0x7FFFFFFF
    normal = ((magnitude + U32(0x7FFFF) + ((magnitude >> 20) & 1)) >> 20) - ((127 - bias) << 3)
    tiny = magnitude < ((127 + 1 - bias) << 23)
    with np.errstate(all="ignore"):
        subnormal = np.rint(np.where(tiny, magnitude, U32(0)).view(F32) * F32(2.0 ** (bias + 2))).astype(U32)
    code = np.where(tiny, subnormal, normal)
    nan = (magnitude > 0x7F800000) | ((magnitude == 0x7F800000) & (not context.infinite))
    over = ~tiny & (code > top)
    if fnuz:
        sign = np.where(code == 0, U32(0), sign)
        return np.where(nan | (over & ~saturates), U32(0x80), sign | np.where(over, U32(top), code))
    return np.where(nan, sign | U32(0x7F), sign | np.where(over, np.where(saturates, U32(top), U32(0x7F)), code))


def pack_fp8(context: Context, a: Array, b: Array) -> Array:
    """Two codes in 16 bits, the first below."""
    return to_fp8(context, a, context.fnuz) | to_fp8(context, b, context.fnuz) << 8


def pack_fp8_scaled(context: Context, a: Array, b: Array, scale: Array) -> Array:
    """The same of two numbers divided by the power of two that ``scale`` begins with; always e4m3fn."""
    power = 127 - ((bits(scale) >> 23) & 0xFF).astype(I32)
    with np.errstate(all="ignore"):
        a, b = np.ldexp(a.astype(F64), power), np.ldexp(b.astype(F64), power)
    # beyond float32's range both ends are beyond FP8's too; within it, scaling down to subnormals would round
    return to_fp8(context, _narrow(a), False) | to_fp8(context, _narrow(b), False) << 8


def _narrow(x: Array) -> Array:
    """float64 to float32, rounded so that rounding to fewer bits afterwards is right."""
    with np.errstate(all="ignore"):
        near = x.astype(F32)
        inexact = np.isfinite(near) & (near.astype(F64) != x) & (bits(near) & 1 == 0)
        return np.where(inexact, np.nextafter(near, np.where(x > near, F32(np.inf), F32(-np.inf))), near)


def to_bf16(x: Array) -> Array:
    b = bits(x)
    rounded = (b + U32(0x7FFF) + ((b >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (b >> 16) | 0x40, rounded)


def half_of(context: Context, exact: Array, *sources: Array) -> Array:
    """float16 of a result; with FP16_OVFL, a finite one that is too large becomes the largest. An infinite source
    keeps infinity."""
    with np.errstate(all="ignore"):
        y = exact.astype(F16)
    infinite = np.zeros(y.shape, bool)
    for source in sources:
        infinite = infinite | ~np.isfinite(source)
    clamped = np.isinf(y) & ~infinite & context.saturates
    return np.where(clamped, np.copysign(F16(65504), y), y)


def half(compute: Callable[..., Array]) -> Callable[..., Array]:
    """An instruction on float16, computed in float32, where sums and products of two are exact or nearly so: float16
    has 11 bits and float32 24, so rounding twice is rounding once."""

    def run(context: Context, *sources: Array) -> Array:
        with np.errstate(all="ignore"):
            return half_of(context, compute(*(source.astype(F32) for source in sources)), *sources)

    return run


def mixed_half(context: Context, a: Array, b: Array, c: Array) -> Array:
    return half_of(context, fused(a, b, c), a, b, c)


def div_scale(a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """V_DIV_SCALE_F32: the denominator b or the numerator c, whichever a is, scaled so that Newton's steps neither
    overflow nor lose bits; and whether the quotient must be scaled back.

    The published pseudocode does not say this: where it scales, its factors are not those that V_DIV_FMAS takes back,
    and two of its conditions never hold. The rules here are those that AMD's own emulator (rocjitsu, ROCm/rocm-systems)
    found on gfx1100 and gfx1201. ``test_division`` shows that quotients are right with them.
    """
    exponent_b, exponent_c = ((bits(x) >> 23 & 0xFF).astype(I32) for x in (b, c))
    apart = exponent_c - exponent_b
    denominator = bits(a) == bits(b)
    with np.errstate(all="ignore"):
        up, down = (np.ldexp(a.astype(F64), by).astype(F32) for by in (64, -64))
    cases = (
        (apart >= 96, np.where(denominator, up, a), True),
        (exponent_b == 0, up, False),
        ((exponent_b >= 253) & (apart <= -96), np.where(denominator, down, a), True),
        (exponent_b >= 253, down, False),
        (apart <= -96, np.where(denominator, a, up), True),
        (exponent_c <= 24, up, False),
    )
    conditions = [case[0] for case in cases]
    value = np.select(conditions, [case[1] for case in cases], a)
    back = np.select(conditions, [np.full(a.shape, case[2]) for case in cases], False)
    value = np.where(np.isfinite(a), value, a)
    return np.where((b == 0) | (c == 0), F32(np.nan), value), back


def div_fmas(carry: Array, a: Array, b: Array, c: Array) -> Array:
    """V_DIV_FMAS_F32: ``a * b + c``, scaled back where ``carry``, up if c is 2 or more and down otherwise (see
    ``div_scale``), rounded once."""
    by = np.where(carry, np.where((bits(c) >> 23 & 0xFF) > 127, 64, -64), 0)
    with np.errstate(all="ignore"):
        return np.ldexp(rounded_to_odd(a, b, c), by).astype(F32)


def div_fixup(a: Array, b: Array, c: Array) -> Array:
    """V_DIV_FIXUP_F32: the quotient a of c by b, right for zeros, infinities, NaN and what leaves the range."""
    sign = (bits(b) ^ bits(c)) & U32(0x80000000)
    exponent_b, exponent_c = ((bits(x) >> 23 & 0xFF).astype(I32) for x in (b, c))

    def signed(magnitude: int) -> Array:
        return (sign | U32(magnitude)).view(F32)

    quiet_b, quiet_c = (bits(b) | 0x400000).view(F32), (bits(c) | 0x400000).view(F32)
    nan = np.full(a.shape, 0xFFC00000, U32).view(F32)
    cases = (
        (np.isnan(c), quiet_c),
        (np.isnan(b), quiet_b),
        ((b == 0) & (c == 0), nan),
        (np.isinf(b) & np.isinf(c), nan),
        ((b == 0) | np.isinf(c), signed(0x7F800000)),
        (np.isinf(b) | (c == 0), signed(0)),
        (exponent_c - exponent_b < -150, signed(0)),
        # of the quotient: the pseudocode asks for the denominator's exponent, which is never 255 here
        (bits(a) & 0x7F800000 == 0x7F800000, signed(0x7F800000)),
    )
    return np.select([case[0] for case in cases], [case[1] for case in cases], (sign | bits(a) & 0x7FFFFFFF).view(F32))


def permute_bytes(a: Array, b: Array, selector: Array) -> Array:
    """V_PERM_B32: each byte of the selector names one of the eight of a and b, the sign of one, 0 or 255."""
    data = a.astype(U64) << U64(32) | b.astype(U64)
    result: Array = np.zeros((), U32)
    for byte in range(4):
        chosen = (selector >> (8 * byte)) & 0xFF
        value = (data >> (U64(8) * np.minimum(chosen, 7).astype(U64)) & U64(0xFF)).astype(U32)
        sign_of = np.clip((chosen.astype(I32) - 8) * 2 + 1, 0, 7).astype(U64)
        sign = (data >> (U64(8) * sign_of + U64(7)) & U64(1)).astype(U32) * 0xFF
        value = np.where(chosen >= 8, np.where(chosen >= 12, np.where(chosen >= 13, U32(0xFF), U32(0)), sign), value)
        result = result | value << (8 * byte)
    return result


def reversed_bits(x: Array) -> Array:
    for by, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF)):
        x = (x >> by & U32(mask)) | (x & U32(mask)) << by
    return x >> 16 | x << 16


def bit_field(x: Array, offset: Array, width: Array) -> Array:
    width = (width & 31).astype(U64)
    return (x >> (offset & 31)) & ((U64(1) << width) - U64(1)).astype(U32)


def signed_bit_field(x: Array, offset: Array, width: Array) -> Array:
    width = (width & 31).view(I32)
    taken = x >> (offset & 31).view(I32) & ((I32(1) << width) - 1)
    sign = I32(1) << np.maximum(width, 1) - 1
    return np.where(width == 0, 0, (taken ^ sign) - sign).astype(I32)


def _wide(compute: Callable[[Array, Array], Array]) -> Callable[..., tuple[Array, Array]]:
    """A sum or difference of 32 bits and a carry, and the carry out of it."""

    def run(a: Array, b: Array, carry: Array | None = None) -> tuple[Array, Array]:
        more = U64(0) if carry is None else carry.astype(U64)
        total = compute(compute(a.astype(U64), b.astype(U64)), more)
        return total.astype(U32), total >> U64(32) != 0

    return run


add_carry, subtract_carry = _wide(np.add), _wide(np.subtract)


def _swap(compute: Callable[[Array, Array], Any]) -> Callable[[Array, Array], Any]:
    return lambda a, b: compute(b, a)


def shift_left(a: Array, b: Array) -> Array:
    return a << (b & 31)


def shift_right(a: Array, b: Array) -> Array:
    return a >> (b & 31)


def shift_right_signed(a: Array, b: Array) -> Array:
    return a >> (b & 31).view(I32)


def multiply_add_64(kind: type) -> Callable[..., tuple[Array, Array]]:
    """``a * b + c`` of 32-bit factors and a 64-bit addend; and the bit above."""

    def run(a: Array, b: Array, c: Array) -> tuple[Array, Array]:
        with np.errstate(over="ignore"):
            product = a.astype(kind) * b.astype(kind)
            total = product + c
        if kind is U64:
            return total, total < c
        return total, (total < 0) ^ (((product ^ total) & (c ^ total)) < 0)

    return run


def to_int(x: Array) -> Array:
    """float32 to int32 towards zero, saturating; NaN becomes 0."""
    with np.errstate(all="ignore"):
        clipped = np.clip(np.nan_to_num(x.astype(F64), nan=0.0), -(2.0**31), 2.0**31 - 1)
    return np.trunc(clipped).astype(I32)


def to_unsigned(x: Array) -> Array:
    """float32 to uint32 towards zero, saturating; NaN becomes 0."""
    with np.errstate(all="ignore"):
        clipped = np.clip(np.nan_to_num(x.astype(F64), nan=0.0), 0.0, 2.0**32 - 1)
    return np.trunc(clipped).astype(U32)


def high_half(a: Array, b: Array) -> Array:
    """The upper 32 bits of a product."""
    return (a.astype(U64) * b.astype(U64) >> U64(32)).astype(U32)


def is_of_class(x: Array, classes: Array) -> Array:
    """Whether a float32 is of one of these classes, a bit each: signalling and quiet NaN; -infinity, negative normal
    and subnormal numbers, -0; 0, positive subnormal and normal numbers, infinity."""
    word = bits(x)
    magnitude, negative = word & U32(0x7FFFFFFF), word >> U32(31)
    size = (magnitude > 0).astype(U32) + (magnitude >= 0x00800000) + (magnitude >= 0x7F800000)
    number = np.where(negative == 1, 5 - size, 6 + size)
    number = np.where(magnitude > 0x7F800000, magnitude >> U32(22) & U32(1), number)
    return classes >> number.astype(U32) & 1 == 1


def table_of_three(context_bits: int) -> Callable[..., Array]:
    """V_BITOP3_B32 with its truth table."""

    def run(a: Array, b: Array, c: Array) -> Array:
        result = np.zeros(np.broadcast(a, b, c).shape, a.dtype)
        for row in range(8):
            if context_bits >> row & 1:
                result = result | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
        return result

    return run


def quietly(compute: Callable[..., Array]) -> Callable[..., Array]:
    def run(*sources: Array) -> Array:
        with np.errstate(all="ignore"):
            return compute(*sources)

    return run


def scaled(x: Array, by: Array) -> Array:
    """``x * 2**by``, rounded once: float64 holds every such product of which float32 keeps anything."""
    with np.errstate(all="ignore"):
        return np.ldexp(x.astype(F64), np.clip(by, -400, 400)).astype(F32)


def _two(kind: str, compute: Callable[..., Array], **more: Any) -> Operation:
    return Operation(kind, (kind, kind), quietly(compute), **more)


def _comparisons() -> dict[str, Operation]:
    rows: dict[str, Operation] = {}
    compare: dict[str, Callable[[Array, Array], Array]] = {
        "LT": np.less,
        "EQ": np.equal,
        "LE": np.less_equal,
        "GT": np.greater,
        "GE": np.greater_equal,
    }
    for kind in ("f16", "f32"):
        floats = compare | {
            "LG": lambda a, b: (a < b) | (a > b),
            "O": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
            "U": lambda a, b: np.isnan(a) | np.isnan(b),
            "NGE": lambda a, b: ~(a >= b),
            "NLG": lambda a, b: ~((a < b) | (a > b)),
            "NGT": lambda a, b: ~(a > b),
            "NLE": lambda a, b: ~(a <= b),
            "NEQ": lambda a, b: ~(a == b),
            "NLT": lambda a, b: ~(a < b),
        }
        for name, test in floats.items():
            rows[f"V_CMP_{name}_{kind.upper()}"] = Operation("mask", (kind, kind), test)
    for kind in ("u32", "i32", "u64", "i64"):
        for name, test in (compare | {"NE": np.not_equal}).items():
            rows[f"V_CMP_{name}_{kind.upper()}"] = Operation("mask", (kind, kind), test)
    return rows


VECTOR: dict[str, Operation] = {
    "V_MOV_B32": Operation("u32", ("u32",), lambda a: a),
    "V_MOV_B64": Operation("u64", ("u64",), lambda a: a),
    "V_ADD_F32": _two("f32", np.add),
    "V_SUB_F32": _two("f32", np.subtract),
    "V_MUL_F32": _two("f32", np.multiply),
    "V_MAX_F32": _two("f32", larger),
    "V_MIN_F32": _two("f32", smaller),
    "V_MED3_F32": Operation("f32", ("f32",) * 3, median),
    "V_MAXIMUM3_F32": Operation("f32", ("f32",) * 3, lambda a, b, c: maximum(maximum(a, b), c)),
    "V_MINIMUM3_F32": Operation("f32", ("f32",) * 3, lambda a, b, c: minimum(minimum(a, b), c)),
    "V_FMA_F32": Operation("f32", ("f32",) * 3, fused),
    "V_FMAC_F32": Operation("f32", ("f32", "f32", "old"), fused),
    "V_FMAMK_F32": Operation("f32", ("f32", "literal", "f32"), fused),
    "V_FMAAK_F32": Operation("f32", ("f32", "f32", "literal"), fused),
    "V_RCP_F32": Operation("f32", ("f32",), approximate(lambda x: 1.0 / x), wants_context=True),
    "V_RCP_IFLAG_F32": Operation("f32", ("f32",), approximate(lambda x: 1.0 / x), wants_context=True),
    "V_RSQ_F32": Operation("f32", ("f32",), approximate(lambda x: 1.0 / np.sqrt(x)), wants_context=True),
    "V_SQRT_F32": Operation("f32", ("f32",), approximate(np.sqrt), wants_context=True),
    "V_EXP_F32": Operation("f32", ("f32",), approximate(np.exp2), wants_context=True),
    "V_LOG_F32": Operation("f32", ("f32",), approximate(np.log2), wants_context=True),
    "V_RNDNE_F32": Operation("f32", ("f32",), np.rint),
    "V_CEIL_F32": Operation("f32", ("f32",), np.ceil),
    "V_FLOOR_F32": Operation("f32", ("f32",), np.floor),
    "V_LDEXP_F32": Operation("f32", ("f32", "i32"), scaled),
    "V_CVT_I32_F32": Operation("i32", ("f32",), to_int),
    "V_CVT_U32_F32": Operation("u32", ("f32",), to_unsigned),
    "V_CVT_F32_U32": Operation("f32", ("u32",), lambda a: a.astype(F32)),
    "V_CVT_F32_F16": Operation("f32", ("f16",), lambda a: a.astype(F32)),
    "V_CVT_F32_F64": Operation("f32", ("f64",), quietly(lambda a: a.astype(F32))),
    "V_CVT_F16_F32": Operation("f16", ("f32",), lambda context, a: half_of(context, a, a), wants_context=True),
    "V_CVT_PK_FP8_F32": Operation("half", ("f32", "f32"), pack_fp8, wants_context=True),
    "V_CVT_SCALEF32_PK_FP8_F32": Operation("half", ("f32", "f32", "f32"), pack_fp8_scaled, wants_context=True),
    "V_CVT_PK_BF16_F32": Operation("u32", ("f32", "f32"), lambda a, b: to_bf16(a) | to_bf16(b) << 16),
    "V_CVT_PK_F16_F32": Operation(
        "u32",
        ("f32", "f32"),
        lambda context, a, b: _bits16(half_of(context, a, a)) | _bits16(half_of(context, b, b)) << 16,
        wants_context=True,
    ),
    "V_PACK_B32_F16": Operation("u32", ("f16", "f16"), lambda a, b: _bits16(a) | _bits16(b) << 16),
    "V_ADD_F16": Operation("f16", ("f16", "f16"), half(np.add), wants_context=True),
    "V_MUL_F16": Operation("f16", ("f16", "f16"), half(np.multiply), wants_context=True),
    "V_MAX_F16": _two("f16", larger),
    "V_DIV_SCALE_F32": Operation("f32", ("f32",) * 3, div_scale, carries=True),
    "V_DIV_FMAS_F32": Operation("f32", ("carry", "f32", "f32", "f32"), div_fmas),
    "V_DIV_FIXUP_F32": Operation("f32", ("f32",) * 3, div_fixup),
    "V_ADD_U32": _two("u32", np.add),
    "V_SUB_U32": _two("u32", np.subtract),
    "V_SUBREV_U32": _two("u32", _swap(np.subtract)),
    "V_ADD3_U32": Operation("u32", ("u32",) * 3, lambda a, b, c: a + b + c),
    "V_ADD_CO_U32": Operation("u32", ("u32", "u32"), add_carry, carries=True),
    "V_ADDC_CO_U32": Operation("u32", ("u32", "u32", "carry"), add_carry, carries=True),
    "V_SUB_CO_U32": Operation("u32", ("u32", "u32"), subtract_carry, carries=True),
    "V_SUBREV_CO_U32": Operation("u32", ("u32", "u32"), _swap(subtract_carry), carries=True),
    "V_SUBB_CO_U32": Operation("u32", ("u32", "u32", "carry"), subtract_carry, carries=True),
    "V_MUL_LO_U32": _two("u32", np.multiply),
    "V_MUL_HI_U32": _two("u32", high_half),
    "V_MUL_HI_I32": _two("i32", lambda a, b: (a.astype(I64) * b.astype(I64) >> 32).astype(I32)),
    "V_MUL_I32_I24": _two("i32", lambda a, b: (a << 8 >> 8) * (b << 8 >> 8)),
    "V_MAD_I64_I32": Operation("i64", ("i32", "i32", "i64"), multiply_add_64(I64), carries=True),
    "V_MAD_U64_U32": Operation("u64", ("u32", "u32", "u64"), multiply_add_64(U64), carries=True),
    **{f"V_MIN_{kind.upper()}": _two(kind, np.minimum) for kind in ("u16", "i16", "u32", "i32")},
    **{f"V_MAX_{kind.upper()}": _two(kind, np.maximum) for kind in ("u16", "i16", "u32", "i32")},
    **{
        f"V_MAX3_{kind.upper()}": Operation(kind, (kind,) * 3, lambda a, b, c: np.maximum(np.maximum(a, b), c))
        for kind in ("u16", "i16", "u32", "i32")
    },
    "V_AND_B32": _two("u32", np.bitwise_and),
    "V_OR_B32": _two("u32", np.bitwise_or),
    "V_XOR_B32": _two("u32", np.bitwise_xor),
    "V_NOT_B32": Operation("u32", ("u32",), np.invert),
    "V_OR3_B32": Operation("u32", ("u32",) * 3, lambda a, b, c: a | b | c),
    "V_AND_OR_B32": Operation("u32", ("u32",) * 3, lambda a, b, c: a & b | c),
    "V_BFI_B32": Operation("u32", ("u32",) * 3, lambda a, b, c: a & b | ~a & c),
    "V_BFE_U32": Operation("u32", ("u32",) * 3, bit_field),
    "V_BFE_I32": Operation("i32", ("i32", "u32", "u32"), signed_bit_field),
    "V_BFREV_B32": Operation("u32", ("u32",), reversed_bits),
    "V_ALIGNBIT_B32": Operation(
        "u32", ("u32",) * 3, lambda a, b, c: ((a.astype(U64) << U64(32) | b) >> (c & 31)).astype(U32)
    ),
    "V_PERM_B32": Operation("u32", ("u32",) * 3, permute_bytes),
    "V_LSHLREV_B32": _two("u32", _swap(shift_left)),
    "V_LSHRREV_B32": _two("u32", _swap(shift_right)),
    "V_ASHRREV_I32": Operation("i32", ("u32", "i32"), _swap(shift_right_signed)),
    "V_LSHLREV_B16": Operation("u16", ("u16", "u16"), lambda a, b: b << (a & 15)),
    "V_LSHRREV_B16": Operation("u16", ("u16", "u16"), lambda a, b: b >> (a & 15)),
    "V_LSHLREV_B64": Operation("u64", ("u32", "u64"), lambda a, b: b << (a & 63).astype(U64)),
    "V_ASHRREV_I64": Operation("i64", ("u32", "i64"), lambda a, b: b >> (a & 63).astype(I64)),
    "V_ADD_LSHL_U32": Operation("u32", ("u32",) * 3, lambda a, b, c: shift_left(a + b, c)),
    "V_MUL_U32_U24": _two("u32", lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF)),
    "V_MAD_U32_U24": Operation("u32", ("u32",) * 3, lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) + c),
    "V_LSHL_ADD_U32": Operation("u32", ("u32",) * 3, lambda a, b, c: shift_left(a, b) + c),
    "V_LSHL_ADD_U64": Operation("u64", ("u64", "u32", "u64"), lambda a, b, c: (a << (b & 7).astype(U64)) + c),
    "V_LSHL_OR_B32": Operation("u32", ("u32",) * 3, lambda a, b, c: shift_left(a, b) | c),
    "V_CNDMASK_B32": Operation("u32", ("u32", "u32", "carry"), lambda a, b, c: np.where(c, b, a)),
    "V_CMP_CLASS_F32": Operation("mask", ("f32", "u32"), is_of_class),
    **_comparisons(),
}


def _bits16(x: Array) -> Array:
    return x.view(np.uint16).astype(U32)


# Each applied to the low and to the high half of its operands, which op_sel chooses.
PACKED: dict[str, Operation] = {
    "V_PK_ADD_F32": VECTOR["V_ADD_F32"],
    "V_PK_MUL_F32": VECTOR["V_MUL_F32"],
    "V_PK_FMA_F32": VECTOR["V_FMA_F32"],
    "V_PK_ADD_F16": VECTOR["V_ADD_F16"],
    "V_PK_MUL_F16": VECTOR["V_MUL_F16"],
    "V_PK_MAX_U16": VECTOR["V_MAX_U16"],
    "V_PK_MAX_I16": VECTOR["V_MAX_I16"],
}

# float32 or halves of float16 (op_sel_hi says which), multiplied and added in float32. The pseudocode's name is V_MAD_;
# from gfx906 on the sum is fused, and compilers say V_FMA_.
MIXED: dict[str, tuple[str, Callable[..., Array]]] = {
    "V_MAD_MIX_F32": ("f32", lambda context, a, b, c: fused(a, b, c)),
    "V_MAD_MIXLO_F16": ("low", mixed_half),
    "V_MAD_MIXHI_F16": ("high", mixed_half),
}


@dataclass(frozen=True)
class Scalar:
    """The arithmetic of a scalar instruction: ``compute`` returns the result, or (result, SCC); SCC alone where there
    is no result. ``scc``: "" unchanged, "nonzero" of the result, "given" by compute."""

    result: str
    sources: tuple[str, ...]
    compute: Callable[..., Any]
    scc: str = ""


def _overflow(compute: Callable[[Array, Array], Array], same: bool) -> Callable[[Array, Array], tuple[Array, Array]]:
    def run(a: Array, b: Array) -> tuple[Array, Array]:
        with np.errstate(over="ignore"):
            y = compute(a, b)
        signs = (a < 0) == (b < 0) if same else (a < 0) != (b < 0)
        return y, signs & ((a < 0) != (y < 0))

    return run


def _of_unsigned(test: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, k: test(a.view(U32), k.view(U32) & 0xFFFF)


def _scalar_comparisons() -> dict[str, Scalar]:
    tests: dict[str, Callable[[Array, Array], Array]] = {
        "EQ": np.equal,
        "LG": np.not_equal,
        "GT": np.greater,
        "GE": np.greater_equal,
        "LT": np.less,
        "LE": np.less_equal,
    }
    rows = {
        f"S_CMP_{name}_{kind.upper()}": Scalar("", (kind, kind), test, "given")
        for name, test in tests.items()
        for kind in ("u32", "i32")
    }
    for name, test in tests.items():  # with an immediate of 16 bits
        rows[f"S_CMPK_{name}_I32"] = Scalar("", ("destination", "k"), test, "given")
        rows[f"S_CMPK_{name}_U32"] = Scalar("", ("destination", "k"), _of_unsigned(test), "given")
    return rows | {f"S_CMP_{name}_U64": Scalar("", ("u64", "u64"), tests[name], "given") for name in ("EQ", "LG")}


def _both(name: str, compute: Callable[[Array, Array], Array]) -> dict[str, Scalar]:
    """A bitwise instruction of 32 and of 64 bits."""
    return {f"S_{name}_B{kind[1:]}": Scalar(kind, (kind, kind), compute, "nonzero") for kind in ("u32", "u64")}


SCALAR: dict[str, Scalar] = {
    "S_MOV_B32": Scalar("u32", ("u32",), lambda a: a),
    "S_MOV_B64": Scalar("u64", ("u64",), lambda a: a),
    "S_ABS_I32": Scalar("i32", ("i32",), quietly(np.abs), "nonzero"),
    "S_BREV_B32": Scalar("u32", ("u32",), reversed_bits),
    "S_NOT_B32": Scalar("u32", ("u32",), np.invert, "nonzero"),
    "S_NOT_B64": Scalar("u64", ("u64",), np.invert, "nonzero"),
    "S_ADD_U32": Scalar("u32", ("u32", "u32"), add_carry, "given"),
    "S_ADDC_U32": Scalar("u32", ("u32", "u32", "scc"), add_carry, "given"),
    "S_SUB_U32": Scalar("u32", ("u32", "u32"), subtract_carry, "given"),
    "S_SUBB_U32": Scalar("u32", ("u32", "u32", "scc"), subtract_carry, "given"),
    "S_ADD_I32": Scalar("i32", ("i32", "i32"), _overflow(np.add, True), "given"),
    "S_SUB_I32": Scalar("i32", ("i32", "i32"), _overflow(np.subtract, False), "given"),
    "S_MUL_I32": Scalar("i32", ("i32", "i32"), quietly(np.multiply)),
    "S_MUL_HI_I32": Scalar("i32", ("i32", "i32"), lambda a, b: (a.astype(I64) * b.astype(I64) >> 32).astype(I32)),
    "S_MUL_HI_U32": Scalar("u32", ("u32", "u32"), high_half),
    "S_MIN_U32": Scalar("u32", ("u32", "u32"), lambda a, b: (np.minimum(a, b), a < b), "given"),
    "S_MIN_I32": Scalar("i32", ("i32", "i32"), lambda a, b: (np.minimum(a, b), a < b), "given"),
    "S_MAX_U32": Scalar("u32", ("u32", "u32"), lambda a, b: (np.maximum(a, b), a >= b), "given"),
    "S_MAX_I32": Scalar("i32", ("i32", "i32"), lambda a, b: (np.maximum(a, b), a >= b), "given"),
    **_both("AND", np.bitwise_and),
    **_both("OR", np.bitwise_or),
    **_both("XOR", np.bitwise_xor),
    **_both("ANDN2", lambda a, b: a & ~b),
    "S_LSHL_B32": Scalar("u32", ("u32", "u32"), shift_left, "nonzero"),
    "S_LSHR_B32": Scalar("u32", ("u32", "u32"), shift_right, "nonzero"),
    "S_ASHR_I32": Scalar("i32", ("i32", "u32"), shift_right_signed, "nonzero"),
    "S_LSHL_B64": Scalar("u64", ("u64", "u32"), lambda a, b: a << (b & 63).astype(U64), "nonzero"),
    "S_LSHR_B64": Scalar("u64", ("u64", "u32"), lambda a, b: a >> (b & 63).astype(U64), "nonzero"),
    **{
        f"S_LSHL{by}_ADD_U32": Scalar("u32", ("u32", "u32"), lambda a, b, by=by: _shifted_sum(a, b, by), "given")
        for by in (1, 2, 3, 4)
    },
    "S_BFE_U32": Scalar("u32", ("u32", "u32"), lambda a, b: bit_field_of_seven(a, b), "nonzero"),
    "S_BFE_I32": Scalar("i32", ("i32", "u32"), lambda a, b: signed_bit_field_of_seven(a, b), "nonzero"),
    "S_PACK_LL_B32_B16": Scalar("u32", ("u32", "u32"), lambda a, b: a & 0xFFFF | b << 16),
    "S_PACK_LH_B32_B16": Scalar("u32", ("u32", "u32"), lambda a, b: a & 0xFFFF | b & U32(0xFFFF0000)),
    "S_CSELECT_B32": Scalar("u32", ("u32", "u32", "scc"), lambda a, b, c: np.where(c, a, b)),
    "S_CSELECT_B64": Scalar("u64", ("u64", "u64", "scc"), lambda a, b, c: np.where(c, a, b)),
    "S_BITCMP0_B32": Scalar("", ("u32", "u32"), lambda a, b: a >> (b & 31) & 1 == 0, "given"),
    "S_BITCMP1_B32": Scalar("", ("u32", "u32"), lambda a, b: a >> (b & 31) & 1 == 1, "given"),
    "S_MOVK_I32": Scalar("i32", ("k",), lambda a: a),
    "S_ADDK_I32": Scalar("i32", ("destination", "k"), _overflow(np.add, True), "given"),
    "S_MULK_I32": Scalar("i32", ("destination", "k"), quietly(np.multiply)),
    **_scalar_comparisons(),
}


def _shifted_sum(a: Array, b: Array, by: int) -> tuple[Array, Array]:
    total = (a.astype(U64) << U64(by)) + b.astype(U64)
    return total.astype(U32), total >> U64(32) != 0


def bit_field_of_seven(a: Array, b: Array) -> Array:
    """S_BFE_U32, whose width has seven bits."""
    width = np.minimum((b >> 16) & 0x7F, 32).astype(U64)
    return (a >> (b & 31)) & ((U64(1) << width) - U64(1)).astype(U32)


def signed_bit_field_of_seven(a: Array, b: Array) -> Array:
    """S_BFE_I32."""
    width = np.minimum((b >> 16) & 0x7F, 32).astype(I64)
    taken = (a >> (b & 31).astype(I32)).astype(I64) & ((I64(1) << width) - 1)
    sign = I64(1) << np.maximum(width, 1) - 1
    return np.where(width == 0, 0, (taken ^ sign) - sign).astype(I32)


# EXEC becomes the result, and the destination what EXEC was.
SAVE_EXEC: dict[str, Callable[[Array, Array], Array]] = {
    "S_AND_SAVEEXEC_B64": np.bitwise_and,
    "S_OR_SAVEEXEC_B64": np.bitwise_or,
    "S_ANDN2_SAVEEXEC_B64": lambda a, exec_: a & ~exec_,
}
