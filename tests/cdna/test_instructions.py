"""Each instruction alone, against AMD's pseudocode: operands that are hostile and random, in every encoding it has.

What the pseudocode does not say (DPP, SDWA, op_sel, division's scaling) is tested against the ISA document's tables,
written out lane by lane.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tinygrad", reason="needs the decoder and the pseudocode in tinygrad: pip install '.[test]'")

from tinygrad.renderer.amd.dsl import Reg
from tinygrad.runtime.autogen.amd.cdna import enum as ops
from tinygrad.runtime.autogen.amd.cdna import ins as encodings

from cdna import arithmetic, pseudocode
from cdna.arithmetic import F16, F32, MIXED, PACKED, SAVE_EXEC, SCALAR, U32, U64, VECTOR, Operation
from cdna.formats import BF16, E4M3FN, E4M3FNUZ
from cdna.formats import F16 as F16_FORMAT
from cdna.formats import F32 as F32_FORMAT
from cdna.machine import (
    EXEC,
    FP16_OVFL,
    GFX942,
    GFX950,
    LANES,
    VCC,
    Decoder,
    Program,
    Target,
    UnknownInstructionError,
    Waves,
    typed,
)
from cdna.memory import FaultError, Lds, Memory
from cdna.pseudocode import Lane

pytestmark = pytest.mark.cdna

WAVES = 2
FLOATS = (
    0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 1e-45, -1e-45, 1.1754942e-38, 1.17549435e-38, -1.17549435e-38,
    3.4028235e38, -3.4028235e38, np.inf, -np.inf, 240.0, 247.9, 248.0, 448.0, 464.0, 464.1, -465.0, 0.0009765625,
    0.00048828125, 65504.0, 65519.9, 65520.0, -65520.0, 6e-8, 6.1e-5, 1.7014118e38, 8388609.0, 4294967296.0,
    2147483648.0, -2147483904.0, 1e20, 1e-20,
)  # fmt: skip
# A quiet NaN of each sign, signalling ones, and one with every bit.
NANS = (0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFA00000, 0x7FFFFFFF)
HALVES = (
    0x0000, 0x8000, 0x3C00, 0xBC00, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFE01,
    0x7C01, 0x3555, 0x5640,
)  # fmt: skip
INTEGERS = (
    0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 63, 64, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000,
    0x80000001, 0xFFFFFFFE, 0xFFFFFFFF, 0x01020304, 0x0C0D0B0A, 0x08090706, 0x00100004,
)  # fmt: skip
# Hardware is documented to one unit in the last place.
APPROXIMATE = {"V_RCP_F32", "V_RSQ_F32", "V_SQRT_F32", "V_EXP_F32", "V_LOG_F32"}
# Sources that are float32 by another name.
STILL = ("literal", "old")
# What the published pseudocode is known not to say: test_division.
DIVISION = {"V_DIV_SCALE_F32", "V_DIV_FMAS_F32"}


def operands(kind: str, seed: str, count: int) -> np.ndarray:
    """Bits of so many operands: hostile ones in a random order, then random bits, and numbers near 1."""
    random = np.random.default_rng(zlib.crc32(seed.encode()))
    if kind in ("f32", "literal", "old"):
        known = np.concatenate([np.array(FLOATS, F32).view(U32), np.array(NANS, U32)])
        near = random.normal(size=count).astype(F32).view(U32)
    elif kind in ("f16", "u16", "i16"):
        known, near = np.array(HALVES, U32), random.normal(size=count).astype(F16).view(np.uint16).astype(U32)
    elif kind == "f64":
        known = np.array([*FLOATS, 1e300, 1e-300, np.nan], np.float64).view(U64)
        near = random.normal(size=count).view(U64)
    elif kind in ("u64", "i64"):
        pairs = [low | high << 32 for low in INTEGERS[::4] for high in INTEGERS[::4]]
        known, near = np.array(pairs, U64), random.integers(0, 100, count).astype(U64)
    else:
        known, near = np.array(INTEGERS, U32), random.integers(0, 100, count).astype(U32)
    anything = random.integers(0, 1 << 62, count).astype(known.dtype)
    source = random.integers(0, 4, count)
    return np.where(source < 2, random.choice(known, count), np.where(source == 2, near, anything)).astype(known.dtype)


def machine(waves: int = WAVES, target: Target = GFX942, memory: Memory | None = None, lds: int = 0) -> Waves:
    return Waves.make(target, memory or Memory(), Lds(1, lds), np.zeros(waves, np.int64), 16)


def fill(waves: Waves, register: int, bits: np.ndarray) -> None:
    """Vector registers, one or a pair, from bits for each lane of each wave."""
    bits = bits.reshape(-1, LANES)
    waves.v[register] = bits.astype(U32) if bits.dtype != U64 else bits & U64(0xFFFFFFFF)
    if bits.dtype == U64:
        waves.v[register + 1] = bits >> U64(32)


def register(kind: str, index: int) -> Reg:
    """A vector register, or a pair."""
    return Reg(256 + index, 2 if kind in ("u64", "i64", "f64") else 1)


def encoded(name: str) -> Iterator[tuple[str, Any]]:
    """(the encoding's class, its operation) for every encoding of an instruction."""
    for family, suffixes in (
        ("VOP1", ("", "_E32")),
        ("VOP2", ("", "_E32")),
        ("VOPC", ("", "_E32")),
        ("VOP3", ("", "_E64")),
        ("VOP3SD", ("", "_E64")),
        ("VOP3P", ("",)),
    ):
        for suffix in suffixes:
            op = getattr(getattr(ops, f"{family}Op"), name + suffix, None)
            if op is not None and op.name == name + suffix:
                variants = [family]
                if family == "VOP3" and name.startswith("V_CMP"):
                    variants = ["VOP3_SDST"]
                if name in ("V_FMAMK_F32", "V_FMAAK_F32"):
                    variants = ["VOP2_LIT"]
                for variant in variants:
                    yield variant, op


def make(encoding: str, op: Any, **fields: Any) -> Any:
    """An instruction of these fields; others are 0. (tinygrad's constructors check sizes of registers.)"""
    inst = object.__new__(getattr(encodings, encoding))
    inst._raw = 0
    for name, field in type(inst)._fields:
        inst._raw = field.set(inst._raw, op if name == "op" else fields.get(name))
    return inst


def build(name: str, encoding: str, op: Any, sources: tuple[str, ...], literal: int) -> Any:
    """An instruction that reads v0, v2 and v4 (pairs from there), and s[10:11] as a mask, and writes v6 or s[12:13]."""
    kinds = [kind for kind in sources if kind not in ("carry", "literal", "old")]
    given: dict[str, Any] = {}
    for i, kind in enumerate(kinds):
        field = ("src0", "vsrc1" if encoding.startswith(("VOP2", "VOPC")) else "src1", "src2")[i]
        given[field] = register(kind, 2 * i)
    mask_in = "carry" in sources and not name.startswith("V_DIV_FMAS")
    if mask_in and encoding in ("VOP3", "VOP3SD"):
        given["src2"] = Reg(10, 2)
    if encoding == "VOP3SD":
        given["sdst"] = Reg(12, 2)
    if encoding == "VOP3_SDST":
        given["vdst"] = Reg(12, 2)
    elif encoding != "VOPC":
        given["vdst"] = register(VECTOR[name].result, 6)
    if encoding == "VOP2_LIT":
        given["literal"] = literal
    return make(encoding, op, **given)


def mask_bits(waves: Waves, register: int) -> list[int]:
    return [int(waves.s[register, i]) | int(waves.s[register + 1, i]) << 32 for i in range(waves.s.shape[1])]


# Two results of 16 bits in one register.
PAIRS = {"V_CVT_PK_BF16_F32": BF16, "V_CVT_PK_F16_F32": F16_FORMAT}


def same(have: int, want: int, kind: str, name: str) -> bool:
    """Equal bits, or NaN both; one unit in the last place where hardware has as much."""
    if name in PAIRS:
        parts = [(have >> at & 0xFFFF, want >> at & 0xFFFF) for at in (0, 16)]
        return all(a == b or all(PAIRS[name].decode(x) != PAIRS[name].decode(x) for x in (a, b)) for a, b in parts)
    if kind == "half":  # codes of FP8: the sign of e4m3fn's NaN is not said
        parts = [(have >> at & 0xFF, want >> at & 0xFF) for at in range(0, 32, 8)]
        return all(a == b or (a & 0x7F == b & 0x7F == 0x7F) for a, b in parts)
    if name == "V_RNDNE_F32" and not (have | want) & 0x7FFFFFFF:  # the sign of a zero is not said
        return True
    if kind in ("f32", "f16"):
        dtype, unsigned = (F32, U32) if kind == "f32" else (F16, np.uint16)
        a, b = (np.array(x & ((1 << 8 * dtype().itemsize) - 1), unsigned).view(dtype)[()] for x in (have, want))
        if np.isnan(a) or np.isnan(b):
            return bool(np.isnan(a) and np.isnan(b))
        if name in APPROXIMATE:
            return abs(have - want) <= 1
    return have == want


def lane_of(registers: dict[str, Any], target: Target, saturates: bool = False, lane: int = 0) -> Lane:
    form = E4M3FNUZ if target.fnuz else E4M3FN
    return Lane(registers, fp8=form, saturates=saturates, lane=lane)


def vector_cases() -> list[Any]:
    return [
        pytest.param(name, encoding, op, id=f"{name}-{encoding}")
        for name in VECTOR
        if name not in DIVISION
        for encoding, op in encoded(name)
    ]


@pytest.mark.parametrize(("name", "encoding", "op"), vector_cases())
def test_vector(name: str, encoding: str, op: Any) -> None:
    """Results and masks of every lane; lanes that are not active keep theirs, and have a zero in masks."""
    row = VECTOR[name]
    literal = int(operands("f32", name, 1)[0])
    step = Decoder(GFX942).step(build(name, encoding, op, row.sources, literal))
    for target, saturates in (
        ((GFX942, False), (GFX942, True), (GFX950, True)) if row.wants_context else ((GFX942, False),)
    ):
        waves = machine(target=target)
        waves.mode[:] = FP16_OVFL if saturates else 0
        count = WAVES * LANES
        kinds = [kind for kind in row.sources if kind not in ("carry", "literal", "old")]
        given = [operands(kind, f"{name} {i}", count) for i, kind in enumerate(kinds)]
        for i, bits in enumerate(given):
            fill(waves, 2 * i, bits)
        old = operands("u64", name, count)
        fill(waves, 6, old)
        random = np.random.default_rng(5)
        for pair in (10, VCC, EXEC):
            waves.s[pair : pair + 2] = random.integers(0, 1 << 32, (2, WAVES))
        carry = mask_bits(waves, VCC if encoding in ("VOP1", "VOP2", "VOPC") or name == "V_DIV_FMAS_F32" else 10)
        active = mask_bits(waves, EXEC)
        Decoder(target).step(build(name, encoding, op, row.sources, literal))(waves) if target is GFX950 else step(
            waves
        )
        masks = mask_bits(waves, 12 if encoding in ("VOP3SD", "VOP3_SDST") else VCC)
        wide = row.result in ("u64", "i64")
        text = pseudocode.text_of(name)
        for at in range(count):
            wave, lane = divmod(at, LANES)
            have = int(waves.v[6, wave, lane]) | (int(waves.v[7, wave, lane]) << 32 if wide else 0)
            before = int(old[at]) if wide else int(old[at]) & 0xFFFFFFFF
            if not active[wave] >> lane & 1:
                if row.result != "mask":
                    assert have == before
                if row.result == "mask" or row.carries:
                    assert not masks[wave] >> lane & 1
                continue
            registers: dict[str, Any] = {f"S{i}": int(bits[at]) for i, bits in enumerate(given)}
            if name == "V_DIV_FIXUP_F32" and registers["S0"] & 0x7F800000 == 0x7F800000:
                continue  # an infinite quotient: test_division
            registers |= {"D0": 0 if row.result == "mask" else before, "VCC": carry[wave], "SIMM32": literal, "D1": 0}
            opsel = 0
            result = run_one(text, registers, target, saturates, lane, opsel)
            if row.result == "mask":
                assert masks[wave] >> lane & 1 == result["D0"] >> lane & 1, registers
                continue
            want = result["D0"] & (0xFFFFFFFFFFFFFFFF if wide else 0xFFFFFFFF)
            if row.result in ("f16", "u16", "i16"):  # a result of 16 bits clears the others, on this generation
                want &= 0xFFFF
            if row.result == "f16" and saturates and want & 0x7FFF == 0x7C00:  # MODE.FP16_OVFL, by the ISA document
                finite = [F16_FORMAT if kind == "f16" else F32_FORMAT for kind in kinds]
                numbers = [f.decode(registers[f"S{i}"] & ((1 << f.width) - 1)) for i, f in enumerate(finite)]
                want -= all(abs(number) != np.inf for number in numbers)
            assert same(have, want, row.result, name), (hex(have), hex(want), registers)
            if row.carries:
                wanted = result["D1"] & 1 if name.startswith("V_MAD") else result["VCC"] >> lane & 1
                assert masks[wave] >> lane & 1 == wanted, registers


def run_one(
    text: str, registers: dict[str, Any], target: Target, saturates: bool, lane: int, opsel: int
) -> dict[str, Any]:
    """The registers after the pseudocode; what it writes to VGPR[laneId][VDST] is D0."""
    registers |= {"OPSEL": opsel, "VDST": 0}
    state = lane_of(registers, target, saturates, lane)
    if "VGPR[laneId]" in text:
        state.vgprs = [[registers["D0"] & 0xFFFFFFFF] for _ in range(LANES)]
        pseudocode.run(text, state)
        registers["D0"] = state.vgprs[lane][0]
    else:
        pseudocode.run(text, state)
    return registers


def test_one_number_for_all_lanes() -> None:
    """In every place of an instruction an operand may be a scalar register, or a constant: as in all lanes alike."""
    context = arithmetic.Context(np.array(True), fnuz=True)

    def results(row: Operation, sources: list[np.ndarray]) -> list[bytes]:
        with np.errstate(all="ignore"):
            made = row.compute(context, *sources) if row.wants_context else row.compute(*sources)
        return [np.broadcast_to(each, (2, LANES)).tobytes() for each in (made if isinstance(made, tuple) else (made,))]

    for name, row in VECTOR.items():
        given: list[np.ndarray] = []
        for i, kind in enumerate(row.sources):
            drawn = operands(kind, f"{name} {i}", 2 * LANES).reshape(2, LANES)
            given.append(drawn % 3 == 0 if kind == "carry" else typed(drawn, "f32" if kind in STILL else kind))
        for place, kind in enumerate(row.sources):
            if kind not in ("carry", "old"):
                one = [*given[:place], given[place][:, :1], *given[place + 1 :]]
                whole = [*given[:place], np.repeat(one[place], LANES, 1), *given[place + 1 :]]
                assert results(row, one) == results(row, whole), (name, place)


@pytest.mark.parametrize("table", range(0, 256, 15))
def test_bitop3(table: int) -> None:
    """Its truth table stands where other instructions have modifiers."""
    for name, kind in (("V_BITOP3_B32", "u32"), ("V_BITOP3_B16", "u16")):
        op = getattr(ops.VOP3Op, name)
        inst = make("VOP3", op, vdst=Reg(262), src0=Reg(256), src1=Reg(258), src2=Reg(260))
        inst.omod, inst.abs, inst.neg = table >> 6, table >> 3 & 7, table & 7
        waves = machine(1)
        given = [operands("u32", f"{name} {i}", LANES) for i in range(3)]
        for i, bits in enumerate(given):
            fill(waves, 2 * i, bits)
        Decoder(GFX950).step(inst)(waves)
        for lane in range(LANES):
            registers = {f"S{i}": int(bits[lane]) for i, bits in enumerate(given)}
            registers |= {"INST.OMOD": table >> 6, "INST.ABS": table >> 3 & 7, "INST.NEG": table & 7, "D0": 0}
            pseudocode.run(pseudocode.text_of(name), Lane(registers))
            assert waves.v[6, 0, lane] == registers["D0"] & ((1 << int(kind[1:])) - 1)


def quotient(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """LLVM's expansion of a division of float32, by the instructions' arithmetic."""
    n, d = numerator.view(F32), denominator.view(F32)
    scaled_d, _ = arithmetic.div_scale(d, d, n)
    scaled_n, back = arithmetic.div_scale(n, d, n)
    context = arithmetic.Context(np.zeros(1, bool), True)
    rcp = VECTOR["V_RCP_F32"].compute(context, scaled_d)
    one = np.ones_like(rcp)
    fused = arithmetic.fused
    rcp = fused(fused(-scaled_d, rcp, one), rcp, rcp)
    q = scaled_n * rcp
    q = fused(fused(-scaled_d, q, scaled_n), rcp, q)
    rest = fused(-scaled_d, q, scaled_n)
    return arithmetic.div_fixup(arithmetic.div_fmas(back, rest, rcp, q), d, n).view(U32)


def test_division() -> None:
    """Quotients are those of IEEE 754, for hostile and random operands: V_DIV_SCALE, V_DIV_FMAS and V_DIV_FIXUP work
    together. Where nothing is scaled, the first two are as the pseudocode has them."""
    numbers = np.concatenate([np.array(FLOATS, F32).view(U32), np.array(NANS, U32)])
    random = np.random.default_rng(7).integers(0, 1 << 32, (2, 20000)).astype(U32)
    n = np.concatenate([np.repeat(numbers, len(numbers)), random[0]])
    d = np.concatenate([np.tile(numbers, len(numbers)), random[1]])
    with np.errstate(all="ignore"):
        have, want = quotient(n, d), (n.view(F32) / d.view(F32)).view(U32)
    nan = np.isnan(want.view(F32))
    assert np.isnan(have.view(F32)[nan]).all()
    assert (have == want)[~nan].all()
    for at in range(0, len(n), 37):
        one, other = n[at : at + 1].view(F32), d[at : at + 1].view(F32)
        scaled, back = arithmetic.div_scale(one, other, one)
        if scaled.view(U32)[0] == n[at] and not back[0]:
            registers = {"S0": int(n[at]), "S1": int(d[at]), "S2": int(n[at]), "D0": int(n[at]), "VCC": 0}
            pseudocode.run(pseudocode.text_of("V_DIV_SCALE_F32"), Lane(registers))
            if registers["D0"] & 0xFFFFFFFF != n[at] or registers["VCC"]:  # it scales a little less than this does
                assert int(n[at]) >> 23 & 0xFF <= 24 or not d[at] & 0x7FFFFFFF
    a, b, c = (operands("f32", f"fmas {i}", 256) for i in range(3))
    with np.errstate(all="ignore"):
        result = arithmetic.div_fmas(np.zeros(256, bool), a.view(F32), b.view(F32), c.view(F32)).view(U32)
    for at in range(256):
        registers = {"S0": int(a[at]), "S1": int(b[at]), "S2": int(c[at]), "D0": 0, "VCC": 0}
        pseudocode.run(pseudocode.text_of("V_DIV_FMAS_F32"), Lane(registers))
        assert same(int(result[at]), registers["D0"] & 0xFFFFFFFF, "f32", "V_DIV_FMAS_F32")


@pytest.mark.parametrize("name", [*PACKED, "V_PK_MAXIMUM3_F16"])
def test_packed(name: str) -> None:
    """With every choice of halves (op_sel), and negation of each (neg_lo, neg_hi)."""
    wide = name.endswith("F32")
    sources = 3 if "FMA" in name or "MAXIMUM3" in name else 2
    op = getattr(ops.VOP3POp, name)
    text = pseudocode.text_of(name)
    given = [operands("u64" if wide else "u32", f"{name} {i}", LANES) for i in range(sources)]
    if wide:
        pairs = [
            [operands("f32", f"{name} {i} {half}", LANES).astype(U64) for half in range(2)] for i in range(sources)
        ]
        given = [low | high << U64(32) for low, high in pairs]
    else:
        pairs = [
            [operands("f16", f"{name} {i} {half}", LANES) & U32(0xFFFF) for half in range(2)] for i in range(sources)
        ]
        given = [low | high << U32(16) for low, high in pairs]
    width = 32 if wide else 16
    every = 1 << sources
    floats = name[-3] == "F"
    for low, high, negate, negate_high in itertools.product(
        range(every), range(every), (0, 1, every - 1) if floats else (0,), (0, 2) if floats else (0,)
    ):
        size = 2 if wide else 1
        inst = make("VOP3P", op, vdst=Reg(262, size), src0=Reg(256, size), src1=Reg(258, size))
        if sources == 3:
            inst.src2 = Reg(260, size)
        inst.opsel, inst.opsel_hi, inst.opsel_hi2 = low, high & 3, high >> 2
        inst.neg, inst.neg_hi = negate, negate_high
        waves = machine(1)
        for i, bits in enumerate(given):
            fill(waves, 2 * i, bits)
        Decoder(GFX950).step(inst)(waves)
        for lane in range((low + high) % 13, LANES, 13):
            registers: dict[str, Any] = {"D0": 0}
            for i, bits in enumerate(given):
                halves = []
                for choice, sign in ((low, negate), (high, negate_high)):
                    half = int(bits[lane]) >> (width if choice >> i & 1 else 0) & ((1 << width) - 1)
                    halves.append(half ^ (sign >> i & 1) << (width - 1))
                registers[f"S{i}"] = halves[0] | halves[1] << width
            pseudocode.run(text, Lane(registers))
            want = registers["D0"]
            have = int(waves.v[6, 0, lane]) | int(waves.v[7, 0, lane]) << 32
            kind = "f32" if wide else "f16" if floats else "u16"
            for half in range(2):
                part = [x >> (half * width) & ((1 << width) - 1) for x in (have, want)]
                assert same(part[0], part[1], kind, name), (low, high, negate, negate_high, lane)


@pytest.mark.parametrize("name", MIXED)
def test_mixed(name: str) -> None:
    """float32 and halves of float16 in every combination, negated and absolute."""
    op = getattr(ops.VOP3POp, name)
    text = pseudocode.text_of(name)
    given = [operands("f32" if i % 2 else "f16", f"{name} {i}", LANES) for i in range(3)]
    given[2] = given[2] | operands("f16", f"{name} upper", LANES) << 16
    old = operands("u32", name, LANES)
    for low, high, negate, absolute in itertools.product(range(8), range(8), (0, 5), (0, 3)):
        inst = make("VOP3P", op, vdst=Reg(262), src0=Reg(256), src1=Reg(258), src2=Reg(260))
        inst.opsel, inst.opsel_hi, inst.opsel_hi2 = low, high & 3, high >> 2
        inst.neg, inst.neg_hi = negate, absolute
        waves = machine(1)
        for i, bits in enumerate(given):
            fill(waves, 2 * i, bits)
        fill(waves, 6, old)
        Decoder(GFX942).step(inst)(waves)
        for lane in range((low + high) % 13, LANES, 13):
            signed = []
            for i in range(3):
                bits = int(given[i][lane])
                signs = 0x80000000 if not high >> i & 1 else 0x8000 << (16 if low >> i & 1 else 0)
                if absolute >> i & 1:
                    bits &= ~signs
                signed.append(bits ^ (signs if negate >> i & 1 else 0))
            registers = {"S": signed, "OPSEL": low, "OPSEL_HI": high, "D0": int(old[lane])}
            # the sum is fused from gfx906 on, and the pseudocode's product is exact where an addend is added
            pseudocode.run(text.replace("in[0] * in[1] + in[2]", "fma(in[0], in[1], in[2])"), Lane(registers))
            have, want = int(waves.v[6, 0, lane]), registers["D0"] & 0xFFFFFFFF
            if name.endswith("F32"):
                assert same(have, want, "f32", name)
            else:
                upper = "HI" in name
                shift = 16 if upper else 0
                assert same(have >> shift & 0xFFFF, want >> shift & 0xFFFF, "f16", name)
                assert have >> (16 - shift) & 0xFFFF == int(old[lane]) >> (16 - shift) & 0xFFFF


@pytest.mark.parametrize(("out", "second"), [(6, 2), (0, 0), (0, 2), (2, 2)])
def test_pk_mov(out: int, second: int) -> None:
    """Both halves are read before one is written, where the destination is a source."""
    text = pseudocode.text_of("V_PK_MOV_B32")
    given = [operands("u64", f"pk_mov {i}", LANES) for i in range(2)]
    for select in range(4):
        fields = {"vdst": Reg(256 + out, 2), "src0": Reg(256, 2), "src1": Reg(256 + second, 2)}
        inst = make("VOP3P", ops.VOP3POp.V_PK_MOV_B32, **fields)
        inst.opsel = select
        waves = machine(1)
        for i, bits in enumerate(given):
            fill(waves, 2 * i, bits)
        Decoder(GFX942).step(inst)(waves)
        for lane in range(LANES):
            registers = {"S0": int(given[0][lane]), "S1": int(given[second // 2][lane]), "OPSEL": select, "D0": 0}
            # the suffix of the sources there is that of half a pair
            pseudocode.run(
                text.replace("S0.u32", "S0.u64").replace("S1.u32", "S1.u64").replace("D0.u32", "D0.u64"),
                Lane(registers),
            )
            assert int(waves.v[out, 0, lane]) | int(waves.v[out + 1, 0, lane]) << 32 == registers["D0"]


@pytest.mark.parametrize(("form", "fnuz"), [(E4M3FNUZ, True), (E4M3FN, False)], ids=["e4m3fnuz", "e4m3fn"])
@pytest.mark.parametrize("saturates", [False, True])
def test_fp8(form: Any, fnuz: bool, saturates: bool) -> None:
    """Every FP8 number, the middles between them and their neighbours, hostile and random numbers."""
    codes = [form.decode(code) for code in range(256)]
    known = sorted({float(x) for x in codes if x == x})
    middles = [(a + b) / 2 for a, b in itertools.pairwise(known)]
    numbers = np.array([*known, *middles, *FLOATS, form.top * 2, 2.0**-20], F32)
    numbers = np.concatenate([numbers, np.nextafter(numbers, F32(np.inf)), np.nextafter(numbers, F32(-np.inf))])
    numbers = np.concatenate([numbers.view(U32), np.array(NANS, U32), operands("f32", "fp8", 2000)]).view(F32)
    have = arithmetic.to_fp8(arithmetic.Context(np.array(saturates), fnuz), numbers, fnuz)
    for number, code in zip(numbers, have, strict=True):
        want = form.encode(F32_FORMAT.decode(int(number.view(U32))), saturates)
        nan = 0x80 if fnuz else 0x7F
        assert code == want or (want & 0x7F == nan & 0x7F and code & 0x7F == nan & 0x7F and want & nan == nan), number


SCALARS = [
    pytest.param(name, family, op, id=name)
    for name in (*SCALAR, *SAVE_EXEC)
    for family in ("SOP1", "SOP2", "SOPC", "SOPK")
    if (op := getattr(getattr(ops, f"{family}Op"), name, None)) is not None
]


@pytest.mark.parametrize(("name", "family", "op"), SCALARS)
def test_scalar(name: str, family: str, op: Any) -> None:
    """Results, SCC and EXEC, for 128 waves with operands of their own."""
    count = 96
    row = SCALAR.get(name)
    kinds = [k for k in row.sources if k not in ("scc", "k", "destination")] if row else ["u64"]
    wide = row.result in ("u64", "i64") if row else True

    def pair(kind: str, at: int) -> Reg:
        return Reg(at, 2 if kind in ("u64", "i64") else 1)

    for immediate in (0, 1, 0x7FFF, 0x8000, 0xFFFF) if family == "SOPK" else (0,):
        fields: dict[str, Any] = {f"ssrc{i}": pair(kind, 4 * i) for i, kind in enumerate(kinds)}
        if family != "SOPC":
            fields["sdst"] = Reg(12, 2 if wide else 1)
        if family == "SOPK":
            fields = {"sdst": Reg(12), "simm16": immediate}
        step = Decoder(GFX942).step(make(family, op, **fields))
        waves = machine(count)
        given = [operands(kind, f"{name} {i}", count) for i, kind in enumerate(kinds)]
        for i, bits in enumerate(given):
            waves.s[4 * i] = bits & bits.dtype.type(0xFFFFFFFF)
            if bits.dtype == U64:
                waves.s[4 * i + 1] = bits >> U64(32)
        old, mask = operands("u64", f"{name} old", count), operands("u64", f"{name} exec", count)
        for at, bits in ((12, old), (EXEC, mask)):
            waves.s[at], waves.s[at + 1] = bits & U64(0xFFFFFFFF), bits >> U64(32)
        waves.scc[:] = np.arange(count) % 2 == 0
        before = waves.scc.copy()
        step(waves)
        result, execs = mask_bits(waves, 12), mask_bits(waves, EXEC)
        for wave in range(count):
            registers: dict[str, Any] = {f"S{i}": int(bits[wave]) for i, bits in enumerate(given)}
            if name.startswith("S_CMPK"):
                registers |= {"S0": int(old[wave]) & 0xFFFFFFFF, "S1": immediate}
            elif family == "SOPK":
                registers["S0"] = immediate
            registers |= {"D0": int(old[wave]), "SCC": int(before[wave]), "EXEC": int(mask[wave])}
            pseudocode.run(pseudocode.text_of(name), Lane(registers))
            bits = 64 if wide else 32
            want = registers["D0"] & ((1 << bits) - 1) | int(old[wave]) >> bits << bits
            assert result[wave] == (want if family != "SOPC" else int(old[wave])), registers
            assert waves.scc[wave] == registers["SCC"] & 1, registers
            assert execs[wave] == registers["EXEC"]


def test_mode_register() -> None:
    """S_SETREG_IMM32_B32, and no other register of hardware."""
    text = pseudocode.text_of("S_SETREG_IMM32_B32")
    for offset, size, literal, old in itertools.product(
        (0, 8, 23), (1, 4, 9), (0, 1, 0xFFFFFFFF), (0, 0x2F0, 0xFFFFFFFF)
    ):
        simm16 = 1 | offset << 6 | (size - 1) << 11
        inst = make("SOPK_LIT", ops.SOPKOp.S_SETREG_IMM32_B32, simm16=simm16, literal=literal)
        waves = machine(1)
        waves.mode[:] = old
        Decoder(GFX942).step(inst)(waves)
        registers = {"SIMM16": simm16, "SIMM32": literal, "HW_REGISTERS": [0, old]}
        pseudocode.run(text, Lane(registers))
        assert waves.mode[0] == registers["HW_REGISTERS"][1] & 0xFFFFFFFF
    with pytest.raises(UnknownInstructionError, match="register 2"):
        Decoder(GFX942).step(make("SOPK_LIT", ops.SOPKOp.S_SETREG_IMM32_B32, simm16=2, literal=0))


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        (name, flags)
        for name in ("S_BRANCH", *(f"S_CBRANCH_{c}" for c in ("SCC0", "SCC1", "VCCZ", "VCCNZ", "EXECZ", "EXECNZ")))
        for flags in (0, 1)
    ],
)
def test_branches(name: str, flags: int) -> None:
    """``branch +1; s_mov s5, 1; s_endpgm``: whether the move is jumped over."""
    code = [
        make("SOPP", getattr(ops.SOPPOp, name), simm16=1),
        make("SOP1", ops.SOP1Op.S_MOV_B32, sdst=Reg(5), ssrc0=1),
        make("SOPP", ops.SOPPOp.S_ENDPGM, simm16=0),
    ]
    program = Program(b"".join(inst.to_bytes() for inst in code), GFX942)
    waves = machine(2)
    waves.scc[:] = flags
    for mask in (VCC, EXEC):
        waves.s[mask : mask + 2] = 0xF0 * flags
    program.run(waves)
    registers = {"PC": 0, "SIMM16": 1, "SCC": flags, "VCCZ": 1 - flags, "EXECZ": 1 - flags}
    pseudocode.run(pseudocode.text_of(name), Lane(registers))
    assert (waves.s[5] == (registers["PC"] == 4)).all()


# DPP: the ISA document's table of DPP_CTRL, lane by lane.
def dpp_source(control: int, lane: int) -> int | None:
    row, place = divmod(lane, 16)
    n = control & 15
    if control < 0x100:
        return (lane & ~3) + ((control >> 2 * (lane & 3)) & 3)
    if 0x100 < control < 0x110:
        return lane + n if place + n <= 15 else None
    if 0x110 < control < 0x120:
        return lane - n if place - n >= 0 else None
    if 0x120 < control < 0x130:
        return row * 16 + ((place - n) & 15)
    if control == 0x130:
        return lane + 1 if lane < 63 else None
    if control == 0x134:
        return (lane + 1) & 63
    if control == 0x138:
        return lane - 1 if lane > 0 else None
    if control == 0x13C:
        return (lane - 1) & 63
    if control == 0x140:
        return row * 16 + (15 - place)
    if control == 0x141:
        return lane ^ 7
    if control == 0x142:
        return row * 16 - 1 if row else None
    if control == 0x143:
        return 31 if lane > 31 else None
    return row * 16 + n


CONTROLS = [
    0x00, 0x1B, 0x4E, 0xB1, 0xE4, 0xFF, *range(0x101, 0x110), *range(0x111, 0x120), *range(0x121, 0x130), 0x130, 0x134,
    0x138, 0x13C, 0x140, 0x141, 0x142, 0x143, *range(0x150, 0x160),
]  # fmt: skip


@pytest.mark.parametrize("bound_control", [0, 1])
@pytest.mark.parametrize("in_place", [False, True])
def test_dpp(bound_control: int, in_place: bool) -> None:
    """Every control, with masks of rows and banks and lanes that are not active. ``in_place``: the register that is
    read is written, as reductions do; every lane reads what was there before."""
    random = np.random.default_rng(3)
    for control, (rows, banks), active in itertools.product(
        CONTROLS, ((15, 15), (0xA, 15), (0xC, 15), (5, 3)), (0xFFFFFFFFFFFFFFFF, 0xFFFF0F0FF0F0AAAA)
    ):
        values, old, other = (random.integers(0, 1 << 32, LANES).astype(U32) for _ in range(3))
        if in_place:
            old = values
        out = 0 if in_place else 6
        inst = make("VOP2_DPP16", ops.VOP2Op.V_ADD_U32_E32, vdst=Reg(256 + out), src0=Reg(250), vsrc1=Reg(258))
        inst.vsrc0 = Reg(256)
        inst.dpp, inst.bc, inst.row_mask, inst.bank_mask = control, bound_control, rows, banks
        waves = machine(1)
        fill(waves, out, old)
        fill(waves, 0, values)
        fill(waves, 2, other)
        waves.s[EXEC], waves.s[EXEC + 1] = active & 0xFFFFFFFF, active >> 32
        Decoder(GFX942).step(inst)(waves)
        for lane in range(LANES):
            source = dpp_source(control, lane)
            valid = source is not None and active >> source & 1
            enabled = active >> lane & 1 and rows >> lane // 16 & 1 and banks >> (lane // 4 & 3) & 1
            want = int(old[lane])
            if enabled and (valid or bound_control):
                moved = int(values[source]) if valid and source is not None else 0
                want = (moved + int(other[lane])) & 0xFFFFFFFF
            assert int(waves.v[out, 0, lane]) == want, (hex(control), lane)


def part_of(bits: int, selection: int, extend: int) -> int:
    """SDWA's selection of a source, by the ISA document: BYTE_0 to BYTE_3, WORD_0, WORD_1, DWORD."""
    names = ["BYTE_0", "BYTE_1", "BYTE_2", "BYTE_3", "WORD_0", "WORD_1", "DWORD"]
    kind, _, index = names[selection].partition("_")
    size = {"BYTE": 1, "WORD": 2, "DWORD": 4}[kind]
    data = bits.to_bytes(4, "little")[int(index or 0) * size :][:size]
    return int.from_bytes(data, "little", signed=bool(extend)) & 0xFFFFFFFF


def test_sdwa() -> None:
    """Every part of sources and of the result, sign extension, what happens to the rest, and scalar sources."""
    a, b, old = (operands("u32", f"sdwa {i}", LANES) for i in range(3))
    for first, second, extend, to, unused in itertools.product(range(7), range(7), (0, 1), range(7), (0, 2)):
        inst = make("VOP2_SDWA", ops.VOP2Op.V_XOR_B32_E32, vdst=Reg(262), src0=Reg(249), vsrc1=Reg(258))
        inst.vsrc0 = Reg(256)
        inst.src0_sel, inst.src1_sel, inst.src0_sext, inst.src1_sext = first, second, extend, extend
        inst.dst_sel, inst.dst_unused = to, unused
        waves = machine(1)
        for at, bits in ((0, a), (2, b), (6, old)):
            fill(waves, at, bits)
        Decoder(GFX942).step(inst)(waves)
        for lane in range((first + second + to) % 8, LANES, 8):
            result = part_of(int(a[lane]), first, extend) ^ part_of(int(b[lane]), second, extend)
            have = int(waves.v[6, 0, lane])
            for byte in range(4):
                inside = {4: (0, 1), 5: (2, 3), 6: (0, 1, 2, 3)}.get(to, (to,))
                if byte in inside:
                    want = result >> 8 * (byte - inside[0]) & 0xFF
                else:
                    want = 0 if unused == 0 else int(old[lane]) >> 8 * byte & 0xFF
                assert have >> 8 * byte & 0xFF == want, (first, second, extend, to, unused, lane)


def test_sdwa_modifiers() -> None:
    """neg and abs act on the sign of the part that is chosen; a source can be a scalar register."""
    halves = operands("f16", "sdwa lower", LANES) | operands("f16", "sdwa upper", LANES) << 16
    text = pseudocode.text_of("V_MAX_F16")
    for first, second, negate, absolute, scalar in itertools.product((4, 5, 6), (4, 5), range(4), range(4), (0, 1)):
        inst = make(
            "VOP2_SDWA", ops.VOP2Op.V_MAX_F16_E32, vdst=Reg(262), src0=Reg(249), vsrc1=Reg(256 + (9 if scalar else 2))
        )
        inst.vsrc0 = Reg(256)
        inst.src0_sel, inst.src1_sel, inst.dst_sel, inst.s1 = first, second, 6, scalar
        inst.src0_neg, inst.src1_neg, inst.src0_abs, inst.src1_abs = (
            negate & 1,
            negate >> 1,
            absolute & 1,
            absolute >> 1,
        )
        waves = machine(1)
        fill(waves, 0, halves)
        fill(waves, 2, halves[::-1])
        waves.s[9] = 0xC0003C00
        Decoder(GFX942).step(inst)(waves)
        for lane in range(LANES):
            registers: dict[str, Any] = {"D0": 0}
            second_bits = 0xC0003C00 if scalar else int(halves[::-1][lane])
            for i, (bits, selection) in enumerate(((int(halves[lane]), first), (second_bits, second))):
                half = part_of(bits, selection, 0) & 0xFFFF
                half &= 0x7FFF if absolute >> i & 1 else 0xFFFF
                registers[f"S{i}"] = half ^ (0x8000 if negate >> i & 1 else 0)
            pseudocode.run(text, Lane(registers))
            assert same(int(waves.v[6, 0, lane]), registers["D0"] & 0xFFFF, "f16", "V_MAX_F16")


def test_vop3_modifiers() -> None:
    """neg after abs, the clamp to [0, 1], and multiples of the result (omod)."""
    a, b = (operands("f32", f"vop3 {i}", LANES) for i in range(2))
    for negate, absolute, omod, clamp in itertools.product(range(4), range(4), range(4), (0, 1)):
        inst = make("VOP3", ops.VOP3Op.V_ADD_F32_E64, vdst=Reg(262), src0=Reg(256), src1=Reg(258))
        inst.neg, inst.abs, inst.omod, inst.clmp = negate, absolute, omod, clamp
        waves = machine(1)
        fill(waves, 0, a)
        fill(waves, 2, b)
        Decoder(GFX942).step(inst)(waves)
        for lane in range(LANES):
            registers: dict[str, Any] = {"D0": 0}
            for i, bits in enumerate((int(a[lane]), int(b[lane]))):
                bits &= 0x7FFFFFFF if absolute >> i & 1 else 0xFFFFFFFF
                registers[f"S{i}"] = bits ^ (0x80000000 if negate >> i & 1 else 0)
            pseudocode.run(pseudocode.text_of("V_ADD_F32"), Lane(registers))
            with np.errstate(all="ignore"):
                want = np.array(registers["D0"] & 0xFFFFFFFF, U32).view(F32) * F32((1.0, 2.0, 4.0, 0.5)[omod])
                if clamp:
                    want = F32(0) if np.isnan(want) else np.clip(want, F32(0), F32(1))
            have = waves.v[6, 0, lane].view(F32)
            assert have == want or (np.isnan(have) and np.isnan(want))


def test_lanes() -> None:
    """V_READLANE, V_READFIRSTLANE, V_WRITELANE, the swaps of halves and DS_BPERMUTE, against the pseudocode."""
    values = [operands("u32", f"lanes {i}", LANES) for i in range(3)]
    for chosen, active in itertools.product((0, 1, 31, 63, 64 + 5), (0xFFFFFFFFFFFFFFFF, 0xFF00, 0)):
        waves = machine(1)
        fill(waves, 0, values[0])
        fill(waves, 2, values[1])
        waves.s[9], waves.s[8] = chosen, 0xABCD
        waves.s[EXEC], waves.s[EXEC + 1] = active & 0xFFFFFFFF, active >> 32
        Decoder(GFX942).step(make("VOP3", ops.VOP3Op.V_READLANE_B32, vdst=Reg(256 + 5), src0=Reg(256), src1=Reg(9)))(
            waves
        )
        first = make("VOP1", ops.VOP1Op.V_READFIRSTLANE_B32_E32, src0=Reg(256), vdst=Reg(256 + 6))
        Decoder(GFX942).step(first)(waves)
        write = make("VOP3", ops.VOP3Op.V_WRITELANE_B32, vdst=Reg(258), src0=Reg(8), src1=Reg(9))
        Decoder(GFX942).step(write)(waves)
        vgprs = [[int(values[0][lane]), 0, int(values[1][lane])] for lane in range(LANES)]
        registers = {"S1": chosen, "SRC0": 0, "D0": 0, "EXEC": active}
        pseudocode.run(pseudocode.text_of("V_READLANE_B32"), Lane(registers, vgprs=vgprs))
        assert waves.s[5, 0] == registers["D0"] & 0xFFFFFFFF
        registers |= {"EXEC": active, "D0": 0}
        pseudocode.run(pseudocode.text_of("V_READFIRSTLANE_B32"), Lane(registers, vgprs=vgprs))
        assert waves.s[6, 0] == registers["D0"] & 0xFFFFFFFF
        registers = {"S0": 0xABCD, "S1": chosen, "VDST": 2}
        pseudocode.run(pseudocode.text_of("V_WRITELANE_B32"), Lane(registers, vgprs=vgprs))
        assert [row[2] for row in vgprs] == waves.v[2, 0].tolist()


@pytest.mark.parametrize("width", [16, 32])
def test_permlane_swap(width: int) -> None:
    name = f"V_PERMLANE{width}_SWAP_B32"
    inst = make("VOP1", getattr(ops.VOP1Op, f"{name}_E32"), vdst=Reg(256), src0=Reg(258))
    a, b = (operands("u32", f"{name} {i}", LANES) for i in range(2))
    waves = machine(1)
    fill(waves, 0, a)
    fill(waves, 2, b)
    Decoder(GFX950).step(inst)(waves)
    vgprs = [[int(a[lane]), 0, int(b[lane])] for lane in range(LANES)]
    pseudocode.run(pseudocode.text_of(name), Lane({"SRC0": 2, "VDST": 0}, vgprs=vgprs))
    assert [row[0] for row in vgprs] == waves.v[0, 0].tolist()
    assert [row[2] for row in vgprs] == waves.v[2, 0].tolist()


def test_bpermute() -> None:
    for offset, active in itertools.product((0, 4, 256), (0xFFFFFFFFFFFFFFFF, 0x0F0F5555FFFF0001)):
        addresses, data, old = (operands("u32", f"bpermute {i}", LANES) for i in range(3))
        inst = make("DS", ops.DSOp.DS_BPERMUTE_B32, vdst=Reg(262), addr=Reg(256), data0=Reg(258))
        inst.offset0, inst.offset1 = offset & 255, offset >> 8
        waves = machine(1)
        for at, bits in ((0, addresses), (2, data), (6, old)):
            fill(waves, at, bits)
        waves.s[EXEC], waves.s[EXEC + 1] = active & 0xFFFFFFFF, active >> 32
        Decoder(GFX942).step(inst)(waves)
        vgprs = [[int(addresses[lane]), 0, int(data[lane]), 0, 0, 0, int(old[lane])] for lane in range(LANES)]
        registers = {"ADDR": 0, "DATA0": 2, "VDST": 6, "OFFSET": offset, "EXEC": active}
        pseudocode.run(pseudocode.text_of("DS_BPERMUTE_B32"), Lane(registers, vgprs=vgprs))
        assert [row[6] for row in vgprs] == waves.v[6, 0].tolist()


def test_swizzle() -> None:
    """Against the ISA document: groups of four by a pattern, or of 32 by and, or and xor masks."""
    data = operands("u32", "swizzle", LANES)
    for offset in (0x80E4, 0x801B, 0x80FF, 0x401F, 0x041F, 0x7C1F, 0x001E, 0x03E0, 0x1234 & 0x7FFF):
        inst = make("DS", ops.DSOp.DS_SWIZZLE_B32, vdst=Reg(262), addr=Reg(256))
        inst.offset0, inst.offset1 = offset & 255, offset >> 8
        waves = machine(1)
        fill(waves, 0, data)
        Decoder(GFX942).step(inst)(waves)
        for lane in range(LANES):
            if offset >> 15:
                source = (lane & ~3) + (offset >> (2 * (lane & 3)) & 3)
            else:
                source = (lane & 32) + ((((lane & 31) & (offset & 31)) | (offset >> 5 & 31)) ^ (offset >> 10 & 31))
            assert waves.v[6, 0, lane] == data[source], (hex(offset), lane)


def memory_names(pattern: str, family: Any) -> list[str]:
    return [op.name for op in family if re.fullmatch(pattern, op.name)]


LDS_NAMES = memory_names(r"DS_(READ|WRITE)2?(ST64)?_[BU](8|16|32|64|96|128)(_D16_HI)?", ops.DSOp)


@pytest.mark.parametrize("name", [n for n in LDS_NAMES if not (n.startswith("DS_READ") and "D16" in n)])
def test_lds(name: str) -> None:
    """Loads and stores of every width, with one offset or two."""
    inst = make("DS", getattr(ops.DSOp, name), addr=Reg(256), data0=Reg(258), data1=Reg(264), vdst=Reg(258))
    inst.offset0, inst.offset1 = (3, 5) if "2" in name.split("_")[1] else (16, 0)
    size = 64 * 1024
    waves = machine(1, lds=size)
    content = np.random.default_rng(1).integers(0, 256, size).astype(np.uint8)
    waves.lds.data[:], waves.lds.writer[:] = content, 0
    addresses = (np.arange(LANES)[::-1] * 16).astype(U32)
    data = [operands("u32", f"{name} {i}", LANES) for i in range(14)]
    for i in range(1, 14):
        fill(waves, i, data[i])
    fill(waves, 0, addresses)
    Decoder(GFX942).step(inst)(waves)
    text = pseudocode.text_of(name)
    memory = dict(enumerate(content.tolist()))
    loads = name.startswith("DS_READ")
    for lane in range(LANES):
        offset = 0 if "ADDR]" in text else 16
        registers = {"ADDR": int(addresses[lane]) + (16 if "MEM[ADDR]" in text else 0), "OFFSET": offset}
        registers |= {"OFFSET0": inst.offset0, "OFFSET1": inst.offset1}
        registers["DATA"] = sum(int(data[2 + i][lane]) << 32 * i for i in range(4))
        registers["DATA2"] = sum(int(data[8 + i][lane]) << 32 * i for i in range(4))
        registers["RETURN_DATA"] = 0
        state = WideLane(registers, memory=memory)
        pseudocode.run(text.replace("MEM[ADDR].b16 = DATA[31 : 16]", "MEM[ADDR].b16 = DATA[31 : 16]"), state)
        if loads:
            count = 1 if "8" in name[-2:] or name.endswith(("16", "32")) else 2
            have = sum(int(waves.v[2 + i, 0, lane]) << 32 * i for i in range(4))
            want = registers["RETURN_DATA"]
            width = max(32, want.bit_length()) if count == 1 else max(64, want.bit_length())
            assert have & ((1 << width) - 1) == want & ((1 << width) - 1), lane
    if not loads:
        assert waves.lds.data.tolist() == [memory[i] for i in range(size)]


class WideLane(Lane):
    """A lane whose data is wider than 64 bits."""


GLOBAL_NAMES = memory_names(r"GLOBAL_(LOAD|STORE)_(DWORD(X[234])?|USHORT|UBYTE|SHORT|BYTE)", ops.GLOBALOp)
BUFFER_NAMES = memory_names(r"BUFFER_(LOAD|STORE)_(DWORD(X[234])?|USHORT|UBYTE|SHORT|BYTE)", ops.MUBUFOp)


@pytest.mark.parametrize("by_scalar", [False, True])
@pytest.mark.parametrize("name", [*GLOBAL_NAMES, *BUFFER_NAMES])
def test_memory(name: str, by_scalar: bool) -> None:
    """Loads and stores of every width, with the address in vector registers or from a scalar base."""
    memory = Memory()
    content = np.random.default_rng(2).integers(0, 256, 4096).astype(np.uint8)
    start = memory.place(len(content), content)
    waves = machine(1, memory=memory)
    offsets = (np.arange(LANES)[::-1] * 16).astype(U32)
    data = [operands("u32", f"{name} {i}", LANES) for i in range(16)]
    for i in range(2, 16):
        fill(waves, i, data[i])
    active = 0xFFFFFFFF0FFFFFF7
    waves.s[EXEC], waves.s[EXEC + 1] = active & 0xFFFFFFFF, active >> 32
    buffer = name.startswith("BUFFER")
    waves.s[8], waves.s[9], waves.s[10], waves.s[11] = start & 0xFFFFFFFF, start >> 32, 900, 0x27000
    waves.s[12] = 0
    extra = 8
    if buffer:
        encoding, op = "MUBUF", getattr(ops.MUBUFOp, name)
        values = {
            "vdata": Reg(260),
            "vaddr": Reg(256),
            "srsrc": Reg(8, 4),
            "soffset": Reg(12),
            "offen": 1,
            "offset": extra,
        }
        fill(waves, 0, offsets)
    else:
        encoding, op = "GLOBAL", getattr(ops.GLOBALOp, name)
        values = {
            "vdst": Reg(260),
            "data": Reg(260),
            "addr": Reg(256),
            "saddr": Reg(8) if by_scalar else Reg(127),
            "offset": extra,
        }
        fill(waves, 0, offsets if by_scalar else offsets.astype(U64) + U64(start))
    Decoder(GFX942).step(make(encoding, op, **values))(waves)
    low = start & 0xFFFFFFFF  # the pseudocode writes addresses with 32 bits
    bytes_of = {low + i: byte for i, byte in enumerate(content.tolist())}
    text = pseudocode.text_of(name)
    for lane in range(LANES):
        address = low + int(offsets[lane]) + extra
        size = {"DWORD": 4, "USHORT": 2, "SHORT": 2, "UBYTE": 1, "BYTE": 1}[re.sub(r"X\d", "", name.split("_")[-1])]
        count = int(match[1]) if (match := re.search(r"X(\d)", name)) else 1
        have = [int(waves.v[4 + i, 0, lane]) for i in range(count)]
        before = [int(data[4 + i][lane]) for i in range(count)]
        if not active >> lane & 1:
            assert have == before
            continue
        if buffer and int(offsets[lane]) + extra >= 900:  # beyond the records: nothing is stored, 0 is loaded
            assert have == ([0] * count if "LOAD" in name else before)
            continue
        registers = {"ADDR": address, "VADDR": address, "VDATA": sum(bits << 32 * i for i, bits in enumerate(before))}
        pseudocode.run(text, Lane(registers, memory=bytes_of))
        if "LOAD" in name:
            wanted = registers["VDATA"] & ((1 << 32 * count) - 1)
            if size < 4:
                wanted &= 0xFFFFFFFF
            assert sum(bits << 32 * i for i, bits in enumerate(have)) == wanted
    if "STORE" in name:
        assert memory.read(start, 4096)[0].tolist() == [bytes_of[low + i] for i in range(4096)]


@pytest.mark.parametrize("name", memory_names(r"S_LOAD_DWORD(X\d+)?", ops.SMEMOp))
def test_scalar_loads(name: str) -> None:
    memory = Memory()
    content = np.random.default_rng(4).integers(0, 256, 4096).astype(np.uint8)
    start = memory.place(len(content), content)
    count = int(match[1]) if (match := re.search(r"X(\d+)", name)) else 1
    for offset in (0, 8, 1024, -16):
        waves = machine(3, memory=memory)
        fields = {"sdata": Reg(16, count), "sbase": Reg(8, 2), "offset": offset & 0x1FFFFF, "imm": 1}
        inst = make("SMEM", getattr(ops.SMEMOp, name), **fields)
        bases = [start + 64 * (wave + 1) for wave in range(3)]
        waves.s[8], waves.s[9] = [b & 0xFFFFFFFF for b in bases], [b >> 32 for b in bases]
        Decoder(GFX942).step(inst)(waves)
        for wave in range(3):
            registers = {"SBASE": (bases[wave] + offset) & 0xFFFFFFFF, "SDATA": 0}
            bytes_of = {(start & 0xFFFFFFFF) + i: byte for i, byte in enumerate(content.tolist())}
            pseudocode.run(pseudocode.text_of(name), Lane(registers, memory=bytes_of))
            assert [int(x) for x in waves.s[16 : 16 + count, wave]] == [
                registers["SDATA"] >> 32 * i & 0xFFFFFFFF for i in range(count)
            ]


# What the emulator reports.


def code_of(*insts: Any) -> Program:
    code = [*insts, make("SOPP", ops.SOPPOp.S_ENDPGM, simm16=0)]
    return Program(b"".join(inst.to_bytes() for inst in code), GFX942)


def wait() -> Any:
    return make("SOPP", ops.SOPPOp.S_WAITCNT, simm16=0)


def lds_store() -> Any:
    return make("DS", ops.DSOp.DS_WRITE_B32, addr=Reg(256), data0=Reg(258))


def lds_load() -> Any:
    return make("DS", ops.DSOp.DS_READ_B32, vdst=Reg(260), addr=Reg(257))


def two_waves(shift: int) -> Waves:
    """Two waves of a workgroup that store a number each lane, and load that of a lane of the other (``shift`` 64)."""
    waves = Waves.make(GFX942, Memory(), Lds(1, 512), np.zeros(2, np.int64), 16)
    at = np.arange(128).reshape(2, LANES)
    waves.v[0], waves.v[1], waves.v[2] = at * 4, (at + shift) % 128 * 4, at
    return waves


def test_a_race_is_reported() -> None:
    barrier = make("SOPP", ops.SOPPOp.S_BARRIER, simm16=0)
    with pytest.raises(FaultError, match="race: wave 0 loads LDS 0x100"):
        code_of(lds_store(), wait(), lds_load(), wait()).run(two_waves(64))
    waves = two_waves(64)
    code_of(lds_store(), wait(), barrier, lds_load(), wait()).run(waves)
    assert (waves.v[4] == (np.arange(128).reshape(2, LANES) + 64) % 128).all()
    code_of(lds_store(), wait(), lds_load(), wait()).run(two_waves(0))  # its own: no race
    other = make("DS", ops.DSOp.DS_WRITE_B32, addr=Reg(257), data0=Reg(258))
    with pytest.raises(FaultError, match="race: wave 0 stores to LDS"):  # what another wave may not have read yet
        code_of(lds_store(), wait(), barrier, lds_load(), wait(), lds_store_of_new()).run(two_waves(64))
    with pytest.raises(FaultError, match="race: wave 0 stores to LDS"):
        code_of(lds_store(), wait(), other).run(two_waves(64))
    with pytest.raises(FaultError, match="a barrier before stores to LDS were waited for"):
        code_of(lds_store(), barrier, lds_load(), wait()).run(two_waves(64))


def lds_store_of_new() -> Any:
    return make("DS", ops.DSOp.DS_WRITE_B32, addr=Reg(256), data0=Reg(257))


def test_a_missing_wait_is_reported() -> None:
    use = make("VOP1", ops.VOP1Op.V_MOV_B32_E32, vdst=Reg(261), src0=Reg(260))
    with pytest.raises(FaultError, match="v4 is used before its load was waited for"):
        code_of(lds_store(), wait(), lds_load(), use).run(two_waves(0))
    code_of(lds_store(), wait(), lds_load(), wait(), use).run(two_waves(0))


def test_wrong_addresses_are_reported() -> None:
    memory = Memory()
    start = memory.place(256, np.zeros(256, np.uint8))
    unwritten = memory.place(256)
    load = make("GLOBAL", ops.GLOBALOp.GLOBAL_LOAD_DWORD, vdst=Reg(260), addr=Reg(256, 2), saddr=Reg(127))
    for base, reason in (
        (start + 4, "out of bounds"),
        (unwritten, "which nothing has written"),
        (8, "out of bounds"),
        (start + 2, "aligned"),
    ):
        waves = machine(1, memory=memory)
        fill(waves, 0, np.arange(LANES).astype(U64) * U64(4) + U64(base))
        with pytest.raises(FaultError, match=reason) as failure:
            code_of(load, wait()).run(waves)
        assert "global_load_dword" in str(failure.value)
    waves = two_waves(64)
    waves.v[1] = 512
    with pytest.raises(FaultError, match="of 512 bytes of LDS"):
        code_of(lds_store(), wait(), lds_load()).run(waves)
    with pytest.raises(FaultError, match="LDS that no wave has written"):
        code_of(lds_load()).run(two_waves(0))


def test_what_is_not_there_fails() -> None:
    """No instruction is passed over."""
    for inst in (
        make(
            "VOP3P_MFMA",
            ops.VOP3POp.V_MFMA_F32_4X4X1_16B_F32,
            vdst=Reg(256, 4),
            src0=Reg(256),
            src1=Reg(256),
            src2=Reg(256, 4),
        ),
        make("VOP3", ops.VOP3Op.V_SAD_U8, vdst=Reg(256), src0=Reg(256), src1=Reg(256), src2=Reg(256)),
        make("SOP1", ops.SOP1Op.S_FF1_I32_B32, sdst=Reg(0), ssrc0=Reg(0)),
    ):
        with pytest.raises(UnknownInstructionError):
            Decoder(GFX942).step(inst)
