"""Waves of 64 lanes that execute CDNA's instructions, all waves of many workgroups at once.

Registers are numpy arrays over waves and lanes. Waves at the same instruction execute it together, so a grid whose
waves take the same path costs little more than one wave. A wave that is ahead of others waits at a barrier, or where
its path joins theirs.

Not modelled: time, caches, hazards between instructions that ``s_nop`` keeps apart, and the hardware's own
approximations of ``rcp``, ``rsq``, ``exp``, ``log`` and ``sqrt``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from .arithmetic import (
    DTYPES,
    F16,
    F32,
    I32,
    MIXED,
    PACKED,
    SAVE_EXEC,
    SCALAR,
    U32,
    U64,
    VECTOR,
    Array,
    Context,
    Operation,
    maximum,
    table_of_three,
    to_bf16,  # noqa: F401  (part of the instruction set's arithmetic)
)
from .memory import FaultError, Lds, Memory

LANES = 64
VCC, M0, EXEC, SCC = 106, 124, 126, 253
MODE = 1  # the hardware register
FP16_OVFL = 1 << 23
Step = Callable[["Waves"], None]


class UnknownInstructionError(NotImplementedError):
    """An instruction, or a form of one, that the emulator does not have."""


@dataclass(frozen=True)
class Target:
    """What differs between GPUs: the FP8 format that ``v_cvt_pk_fp8_f32`` makes."""

    name: str
    fnuz: bool


GFX942, GFX950 = Target("gfx942", True), Target("gfx950", False)


@dataclass
class Waves:
    """The state of all waves, and which of them (``at``) execute now.

    v:        vector registers ``[register, wave, lane]``.
    s:        scalar registers ``[register, wave]``; scc, mode: ``[wave]``.
    group:    the workgroup of each wave; barriers: how many it has passed.
    pc:       the next instruction of each, an index into the program; -1: ended.
    pending:  vector registers that a load has yet to write: register -> (counter, number of the load by wave).
    issued:   memory operations by counter ("vm", "lgkm") and wave; done: those known to be complete.
    """

    target: Target
    memory: Memory
    lds: Lds
    group: Array
    v: Array
    s: Array
    scc: Array
    mode: Array
    pc: Array
    barriers: Array
    issued: dict[str, Array]
    done: dict[str, Array]
    pending: dict[int, tuple[str, Array]]
    stores: Array
    ulps: dict[str, int]
    flushes: bool = False
    infinite: bool = True
    at: Any = field(default_factory=lambda: slice(None))
    executed: int = 0

    @classmethod
    def make(cls, target: Target, memory: Memory, lds: Lds, group: Array, registers: int = 256) -> Waves:
        n = len(group)
        waves = cls(
            target,
            memory,
            lds,
            group,
            np.zeros((registers, n, LANES), U32),
            np.zeros((128, n), U32),
            np.zeros(n, bool),
            np.zeros(n, U32),
            np.zeros(n, np.int64),
            np.zeros(n, np.int64),
            {name: np.zeros(n, np.int64) for name in ("vm", "lgkm")},
            {name: np.zeros(n, np.int64) for name in ("vm", "lgkm")},
            {},
            np.zeros(n, np.int64),
            {},
        )
        waves.s[EXEC : EXEC + 2] = 0xFFFFFFFF
        return waves

    @property
    def indices(self) -> Array:
        return np.arange(len(self.group))[self.at]

    def context(self, name: str = "") -> Context:
        saturates = (self.mode[self.at] & FP16_OVFL != 0)[:, None]
        return Context(saturates, self.target.fnuz, self.ulps.get(name, 0), self.flushes, self.infinite)

    # masks of lanes in pairs of scalar registers

    def mask(self, register: int) -> Array:
        """Bits ``[wave, lane]`` of a pair of scalar registers."""
        pair = np.ascontiguousarray(self.s[register : register + 2, self.at].T)
        return np.unpackbits(pair.view(np.uint8), axis=1, bitorder="little").astype(bool)

    def set_mask(self, register: int, mask: Array) -> None:
        packed = np.packbits(mask, axis=1, bitorder="little").view(U32)
        self.s[register, self.at], self.s[register + 1, self.at] = packed[:, 0], packed[:, 1]

    # registers

    def ready(self, register: int) -> None:
        """Check that no load is on its way to a vector register (256 and up: scalar register, less 256)."""
        found = self.pending.get(register)
        if found is None:
            return
        counter, number = found
        if (number[self.at] > self.done[counter][self.at]).any():
            name = f"v{register}" if register >= 0 else f"s{-1 - register}"
            raise FaultError(f"{name} is used before its load was waited for")
        if not (number > self.done[counter]).any():
            del self.pending[register]

    def vector(self, register: int) -> Array:
        if self.pending:
            self.ready(register)
        return self.v[register][self.at]

    def scalar(self, register: int) -> Array:
        if self.pending:
            self.ready(-1 - register)
        return self.s[register][self.at]

    def set_vector(self, register: int, value: Array, mask: Array | None) -> None:
        if self.pending:
            self.ready(register)
        if mask is None:
            self.v[register][self.at] = value
        elif isinstance(self.at, slice):
            np.copyto(self.v[register], value, where=mask)
        else:
            self.v[register][self.at] = np.where(mask, value, self.v[register][self.at])

    def set_scalar(self, register: int, value: Array) -> None:
        if self.pending:
            self.ready(-1 - register)
        self.s[register][self.at] = value

    def active(self) -> Array | None:
        """EXEC as a mask, or None if all lanes are active."""
        low, high = self.s[EXEC][self.at], self.s[EXEC + 1][self.at]
        return None if (low & high == 0xFFFFFFFF).all() else self.mask(EXEC)

    def issue(self, counter: str, registers: Sequence[int], in_order: bool = True) -> None:
        self.issued[counter][self.at] += 1
        for register in registers:
            number = self.pending.get(register, (counter, np.zeros(len(self.group), np.int64)))[1].copy()
            number[self.at] = self.issued[counter][self.at] if in_order else 1 << 60
            self.pending[register] = counter, number

    def wait(self, counter: str, left: int) -> None:
        self.done[counter][self.at] = np.maximum(self.done[counter][self.at], self.issued[counter][self.at] - left)
        if left == 0:  # also what may arrive in any order
            for register, (kind, number) in list(self.pending.items()):
                if kind == counter:
                    number[self.at] = 0
                    if not number.any():
                        del self.pending[register]


# Operands. A source is read as bits: [wave, 1 or lane] of uint32, or uint64 for pairs.

FLOAT_CONSTANTS = (0.5, -0.5, 1.0, -1.0, 2.0, -2.0, 4.0, -4.0, 1 / (2 * np.pi))


def constant(code: int, kind: str) -> int | None:
    """The bits of an inline constant as a type has them, or None if the code is none."""
    width = {"f16": 16, "u16": 16, "i16": 16, "f64": 64, "u64": 64, "i64": 64}.get(kind, 32)
    if 128 <= code <= 208:
        value = code - 128 if code <= 192 else 192 - code
        return value & ((1 << width) - 1)
    if 240 <= code <= 248:
        number = FLOAT_CONSTANTS[code - 240]
        form = {16: (F16, np.uint16), 32: (F32, U32), 64: (np.float64, U64)}[width]
        return int(np.array(number, form[0]).view(form[1]))
    return None


Source = Callable[[Waves], Array]


def source(code: int, kind: str, literal: int | None) -> Source:
    """The bits of an operand, of a type that has 32 bits or fewer, or 64."""
    wide = kind in ("u64", "i64", "f64")
    fixed = constant(code, kind)
    if code == 255:
        if literal is None:
            raise UnknownInstructionError("a literal that is not there")
        fixed = literal << 32 if kind == "f64" else literal
        if kind == "i64" and literal >> 31:
            fixed |= 0xFFFFFFFF << 32
    if fixed is not None:
        value = np.array([[fixed]], U64 if wide else U32)
        return lambda waves: value
    if code >= 256:
        if not wide:
            return lambda waves: waves.vector(code - 256)
        return lambda waves: waves.vector(code - 256).astype(U64) | waves.vector(code - 255).astype(U64) << U64(32)
    if code == 124 or code <= 107 or code in (126, 127):
        if not wide:
            return lambda waves: waves.scalar(code)[:, None]
        return lambda waves: (waves.scalar(code).astype(U64) | waves.scalar(code + 1).astype(U64) << U64(32))[:, None]
    raise UnknownInstructionError(f"source operand {code}")


def typed(bits: Array, kind: str) -> Array:
    """Bits as a type: halves are the low ones."""
    dtype = DTYPES[kind]
    if kind in ("f16", "u16", "i16"):
        return bits.astype(np.uint16).view(dtype)
    return bits.view(dtype)


def is_float(kind: str) -> bool:
    return kind[0] == "f"


def modified(value: Array, negate: int, absolute: int) -> Array:
    """abs, then neg, of floating-point numbers: on the sign alone, NaN too."""
    if not negate and not absolute:
        return value
    unsigned = np.dtype(f"u{value.dtype.itemsize}")
    sign = unsigned.type(1 << (8 * value.dtype.itemsize - 1))
    bits = value.view(unsigned)
    if absolute:
        bits = bits & ~sign
    if negate:
        bits = bits ^ sign
    return bits.view(value.dtype)


def untyped(value: Array) -> Array:
    """The bits of a result, in 32 or 64."""
    if value.dtype.itemsize == 2:
        return value.view(np.uint16).astype(U32)
    return value.view(U64 if value.dtype.itemsize == 8 else U32)


def clamped(value: Array) -> Array:
    """Floating-point results with the clamp modifier: between 0 and 1, NaN becomes 0 (DX10_CLAMP)."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isnan(value), 0, np.clip(value, 0, 1)).astype(value.dtype)


def dpp_lanes(control: int) -> Array:
    """The lane that each lane reads, -1 where there is none (the ISA document's table of DPP_CTRL)."""
    lane = np.arange(LANES)
    row, place = lane // 16 * 16, lane % 16
    if control <= 0xFF:  # quad_perm: two bits for each of four lanes
        return lane // 4 * 4 + (control >> (2 * (lane % 4)) & 3)
    amount = control & 15
    if 0x101 <= control <= 0x10F:  # row_shl: from the lane so many above
        return np.where(place + amount < 16, lane + amount, -1)
    if 0x111 <= control <= 0x11F:  # row_shr
        return np.where(place >= amount, lane - amount, -1)
    if 0x121 <= control <= 0x12F:  # row_ror
        return row + (place - amount) % 16
    shifts = {
        0x130: np.where(lane + 1 < LANES, lane + 1, -1),  # wave_shl:1
        0x134: (lane + 1) % LANES,  # wave_rol:1
        0x138: lane - 1,  # wave_shr:1
        0x13C: (lane - 1) % LANES,  # wave_ror:1
        0x140: row + 15 - place,  # row_mirror
        0x141: lane // 8 * 8 + 7 - lane % 8,  # row_half_mirror
        0x142: np.where(row > 0, row - 1, -1),  # row_bcast:15: each row's last lane to the next row
        0x143: np.where(lane >= 32, 31, -1),  # row_bcast:31: lane 31 to the upper half
    }
    if control in shifts:
        return shifts[control]
    if 0x150 <= control <= 0x15F:  # row_newbcast
        return row + amount
    raise UnknownInstructionError(f"DPP control {control:#x}")


def selected(bits: Array, selection: int, extend: int) -> Array:
    """SDWA's part of a source: byte 0 to 3, word 0 or 1, or all; with its sign or zeros above."""
    if selection == 6:
        return bits
    if selection > 6:
        raise UnknownInstructionError(f"SDWA selection {selection}")
    width, at = (8, 8 * selection) if selection < 4 else (16, 16 * (selection - 4))
    part = bits >> at & ((1 << width) - 1)
    if extend:
        part = (part.astype(U32) << (32 - width)).view(I32) >> (32 - width)
    return part.view(U32) if part.dtype == I32 else part.astype(U32)


def _immediate(value: Array, waves: Waves) -> Array:
    return value


def _signed_scalar(register: int, waves: Waves) -> Array:
    return waves.scalar(register)[:, None].view(I32)


class Decoder:
    """Instructions as tinygrad decodes them, as steps."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def step(self, inst: Any) -> Step:
        """What an instruction does to waves, except for those that choose the next instruction (``Program``)."""
        encoding = type(inst).__name__
        name = re.sub(r"_(E32|E64)$", "", inst.op.name)
        kinds: dict[str, Callable[[Any, str], Step]] = {
            "SOP1": self.scalar,
            "SOP2": self.scalar,
            "SOPC": self.scalar,
            "SOPK": self.scalar,
            "SMEM": self.scalar_load,
            "VOP1": self.vector,
            "VOP2": self.vector,
            "VOP3": self.vector,
            "VOP3SD": self.vector,
            "VOPC": self.vector,
            "VOP3P": self.packed,
            "DS": self.lds,
            "GLOBAL": self.global_memory,
            "MUBUF": self.buffer,
        }
        family = re.sub(r"_(LIT|DPP16|SDWA|SDST|SDWA_SDST)$", "", re.sub(r"_SDWA_SDST$", "", encoding))
        if family not in kinds:
            raise UnknownInstructionError(f"{inst.op.name} ({encoding})")
        return kinds[family](inst, name)

    # scalar instructions

    def scalar(self, inst: Any, name: str) -> Step:
        literal = getattr(inst, "literal", None)
        if name == "S_SETREG_IMM32_B32":
            return self.set_mode(inst.simm16, literal)
        if name in SAVE_EXEC:
            read, compute, out = source(inst.ssrc0.offset, "u64", literal), SAVE_EXEC[name], inst.sdst.offset

            def save(waves: Waves) -> None:
                given = read(waves)[:, 0]
                old = waves.s[EXEC][waves.at].astype(U64) | waves.s[EXEC + 1][waves.at].astype(U64) << U64(32)
                new = compute(given, old)
                for register, value in ((out, old), (EXEC, new)):
                    waves.set_scalar(register, value.astype(U32))
                    waves.set_scalar(register + 1, (value >> U64(32)).astype(U32))
                waves.scc[waves.at] = new != 0

            return save
        if name not in SCALAR:
            raise UnknownInstructionError(inst.op.name)
        row = SCALAR[name]
        fields = iter(("ssrc0", "ssrc1"))
        reads: list[Source] = []
        for kind in row.sources:
            if kind == "scc":
                reads.append(lambda waves: waves.scc[waves.at][:, None])
            elif kind == "k":
                reads.append(partial(_immediate, np.array([[inst.simm16]], np.uint16).view(np.int16).astype(I32)))
            elif kind == "destination":
                reads.append(partial(_signed_scalar, inst.sdst.offset))
            else:
                read = source(getattr(inst, next(fields)).offset, kind, literal)
                reads.append(lambda waves, read=read, kind=kind: typed(read(waves), kind))
        out = inst.sdst.offset if row.result else None
        wide = row.result in ("u64", "i64")

        def run(waves: Waves) -> None:
            result = row.compute(*(read(waves) for read in reads))
            if row.scc == "given":
                result, scc = result if row.result else (None, result)
                waves.scc[waves.at] = np.broadcast_to(scc, (len(waves.indices), 1))[:, 0]
            if out is None:
                return
            value = untyped(result)[:, 0]
            waves.set_scalar(out, value.astype(U32))
            if wide:
                waves.set_scalar(out + 1, (value >> U64(32)).astype(U32))
            if row.scc == "nonzero":
                waves.scc[waves.at] = value != 0

        return run

    def set_mode(self, simm16: int, literal: int | None) -> Step:
        register, offset, size = simm16 & 63, simm16 >> 6 & 31, (simm16 >> 11) + 1
        if register != MODE or literal is None:
            raise UnknownInstructionError(f"S_SETREG of hardware register {register}")
        mask = U32(((1 << size) - 1) << offset)
        value = U32(literal << offset & int(mask))

        def run(waves: Waves) -> None:
            waves.mode[waves.at] = waves.mode[waves.at] & ~mask | value

        return run

    def scalar_load(self, inst: Any, name: str) -> Step:
        match = re.fullmatch(r"S_LOAD_DWORD(?:X(\d+))?", name)
        if match is None or inst.soffset_en or not inst.imm:
            raise UnknownInstructionError(f"{inst!r}")
        count, base, out = int(match[1] or 1), inst.sbase.offset, inst.sdata.offset
        offset = (inst.offset ^ 1 << 20) - (1 << 20)

        def run(waves: Waves) -> None:
            address = waves.scalar(base).astype(U64) | waves.scalar(base + 1).astype(U64) << U64(32)
            loaded = waves.memory.load(address + np.array(offset, np.int64).view(U64), 4 * count)
            for i in range(count):
                waves.set_scalar(out + i, loaded[:, i])
            waves.issue("lgkm", [-1 - out - i for i in range(count)], in_order=False)

        return run

    # vector instructions

    def vector(self, inst: Any, name: str) -> Step:
        special = {
            "V_READFIRSTLANE_B32": self.read_lane,
            "V_READLANE_B32": self.read_lane,
            "V_WRITELANE_B32": self.write_lane,
            "V_PERMLANE16_SWAP_B32": partial(self.swap_lanes, 16),
            "V_PERMLANE32_SWAP_B32": partial(self.swap_lanes, 32),
            "V_NOP": lambda inst: lambda waves: None,
        }
        if name in special:
            return special[name](inst)
        encoding = type(inst).__name__
        if name in ("V_BITOP3_B32", "V_BITOP3_B16"):
            kind = "u" + name[-2:]
            row = Operation(kind, (kind,) * 3, table_of_three(inst.omod << 6 | inst.abs << 3 | inst.neg))
            return self.arithmetic(inst, name, row, negate=0, absolute=0, omod=0)
        if name not in VECTOR:
            raise UnknownInstructionError(f"{inst.op.name} ({encoding})")
        row = VECTOR[name]
        if "SDWA" in encoding or "DPP" in encoding:
            negate = inst.src0_neg | inst.src1_neg << 1
            absolute = inst.src0_abs | inst.src1_abs << 1
        else:
            negate, absolute = getattr(inst, "neg", 0), getattr(inst, "abs", 0)
        return self.arithmetic(inst, name, row, negate, absolute, getattr(inst, "omod", 0))

    def arithmetic(self, inst: Any, name: str, row: Operation, negate: int, absolute: int, omod: int) -> Step:
        encoding = type(inst).__name__
        sdwa, dpp = "SDWA" in encoding, "DPP" in encoding
        literal = getattr(inst, "literal", None)
        opsel = getattr(inst, "opsel", 0)
        out = inst.vdst.offset - 256 if hasattr(inst, "vdst") and row.result != "mask" else -1
        fields = iter(
            (
                "vsrc0" if sdwa or dpp else "src0",
                "vsrc1" if "VOP2" in encoding or "VOPC" in encoding else "src1",
                "src2",
            )
        )
        reads: list[Callable[[Waves], Array]] = []
        numbers = iter(range(3))
        for kind in row.sources:
            if kind == "carry":
                reads.append(self.carry(inst, encoding))
                continue
            if kind == "literal":
                fixed = np.array([[literal]], U32).view(F32)
                reads.append(lambda waves, fixed=fixed: fixed)
                continue
            if kind == "old":
                reads.append(lambda waves: waves.vector(out).view(F32))
                continue
            number = next(numbers)
            code = getattr(inst, next(fields)).offset
            if sdwa and number == 0 and inst.s0:
                code -= 256
            if sdwa and number == 1 and inst.s1:
                code -= 256
            reads.append(
                self.operand(
                    source(code, kind, literal),
                    kind,
                    negate >> number & 1,
                    absolute >> number & 1,
                    high=opsel >> number & 1 and not sdwa,
                    selection=(inst.src0_sel, inst.src0_sext)
                    if sdwa and number == 0
                    else (inst.src1_sel, inst.src1_sext)
                    if sdwa and number == 1
                    else None,
                    lanes=inst if dpp and number == 0 else None,
                    constant=128 <= code <= 255,
                )
            )
        clamp = getattr(inst, "clmp", 0)
        if (clamp or omod) and not is_float(row.result):
            raise UnknownInstructionError(f"clamp or omod of {name}")
        carry_out = self.carry_out(inst, encoding, row)
        write = self.writer(inst, name, row, out, opsel)

        def run(waves: Waves) -> None:
            sources = [read(waves) for read in reads]
            result = row.compute(waves.context(name), *sources) if row.wants_context else row.compute(*sources)
            active = waves.active()
            if carry_out is not None:
                value, mask = result if row.carries else (None, result)
                mask = np.broadcast_to(mask, (len(waves.indices), LANES))
                waves.set_mask(carry_out, mask if active is None else mask & active)
                if value is None:
                    return
                result = value
            if omod:
                with np.errstate(all="ignore"):
                    result = result * F32({1: 2.0, 2: 4.0, 3: 0.5}[omod])
            if clamp:
                result = clamped(result)
            write(waves, result, active)

        return run

    def carry(self, inst: Any, encoding: str) -> Callable[[Waves], Array]:
        if "VOP3" in encoding and hasattr(inst, "src2"):
            register = inst.src2.offset if not inst.op.name.startswith("V_DIV_FMAS") else VCC
        else:
            register = VCC
        if register < 128:
            return lambda waves: waves.mask(register)
        raise UnknownInstructionError(f"a mask in operand {register}")

    def carry_out(self, inst: Any, encoding: str, row: Operation) -> int | None:
        """The pair of scalar registers that a bit for each lane goes to."""
        if row.result == "mask":
            if "SDWA" in encoding:
                return inst.sdst.offset if inst.sd else VCC
            return inst.vdst.offset if encoding == "VOP3_SDST" else VCC
        if not row.carries:
            return None
        return inst.sdst.offset if encoding == "VOP3SD" else VCC

    def operand(
        self,
        read: Source,
        kind: str,
        negate: int,
        absolute: int,
        high: int = 0,
        selection: tuple[int, int] | None = None,
        lanes: Any = None,
        constant: bool = False,
    ) -> Callable[[Waves], Array]:
        if high and (kind not in ("f16", "u16", "i16") or constant):
            raise UnknownInstructionError(f"the upper half of an operand of type {kind}")
        if (negate or absolute) and not is_float(kind):
            raise UnknownInstructionError(f"neg or abs of an operand of type {kind}")

        def run(waves: Waves) -> Array:
            bits = read(waves)
            if lanes is not None:
                bits = self.from_lanes(waves, lanes, bits)
            if selection is not None:
                bits = selected(bits, *selection)
            if high:
                bits = bits >> 16
            return modified(typed(bits, kind), negate, absolute)

        return run

    def from_lanes(self, waves: Waves, inst: Any, bits: Array) -> Array:
        """DPP: the first source from other lanes; 0 where there is none (which lanes are written: ``writer``)."""
        from_lane = dpp_lanes(inst.dpp)
        moved = np.broadcast_to(bits, (len(waves.indices), LANES))[:, np.maximum(from_lane, 0)]
        return np.where(self.valid(waves, from_lane), moved, U32(0))

    def valid(self, waves: Waves, from_lane: Array) -> Array:
        """Whether the lane that is read exists and is active."""
        active = waves.active()
        exists = from_lane >= 0
        return exists if active is None else exists & active[:, np.maximum(from_lane, 0)]

    def writer(self, inst: Any, name: str, row: Operation, out: int, opsel: int) -> Callable[[Waves, Array, Any], None]:
        encoding = type(inst).__name__

        def plain(waves: Waves, result: Array, active: Array | None) -> None:
            bits = untyped(result)
            if bits.dtype == U64:
                waves.set_vector(out, (bits & U64(0xFFFFFFFF)).astype(U32), active)
                waves.set_vector(out + 1, (bits >> U64(32)).astype(U32), active)
            else:
                waves.set_vector(out, bits, active)

        def halved(waves: Waves, result: Array, active: Array | None) -> None:
            old = waves.vector(out)
            bits = untyped(result)
            bits = old & 0xFFFF | bits << 16 if opsel & 8 else old & U32(0xFFFF0000) | bits
            waves.set_vector(out, bits, active)

        def sub_dword(waves: Waves, result: Array, active: Array | None) -> None:
            bits = untyped(result)
            if inst.dst_sel != 6:
                width, at = (8, 8 * inst.dst_sel) if inst.dst_sel < 4 else (16, 16 * (inst.dst_sel - 4))
                mask = ((1 << width) - 1) << at
                bits = bits << at & U32(mask)
                if inst.dst_unused == 2:  # preserve
                    bits = bits | waves.vector(out) & U32(~mask & 0xFFFFFFFF)
                elif inst.dst_unused == 1:
                    raise UnknownInstructionError("SDWA's sign extension of a result")
            waves.set_vector(out, bits, active)

        def by_rows(waves: Waves, result: Array, active: Array | None) -> None:
            lane = np.arange(LANES)
            mask = (inst.row_mask >> (lane // 16) & 1).astype(bool) & (inst.bank_mask >> (lane // 4 % 4) & 1).astype(
                bool
            )
            if not inst.bc:  # without bound_ctrl, a lane with nothing to read keeps what it has
                mask = mask & self.valid(waves, dpp_lanes(inst.dpp))
            mask = np.broadcast_to(mask, (len(waves.indices), LANES))
            plain(waves, result, mask if active is None else mask & active)

        if "SDWA" in encoding:
            return sub_dword
        if "DPP" in encoding:
            return by_rows
        if row.result == "half":
            return halved
        if opsel & 8:
            raise UnknownInstructionError(f"op_sel of the result of {name}")
        return plain

    def read_lane(self, inst: Any) -> Step:
        code = inst.src0.offset
        if code < 256:
            raise UnknownInstructionError(f"{inst!r}")
        out, register = inst.vdst.offset & 0xFF if inst.vdst.offset >= 256 else inst.vdst.offset, code - 256
        first = "FIRST" in inst.op.name
        read = None if first else source(inst.src1.offset, "u32", None)

        def run(waves: Waves) -> None:
            values = waves.vector(register)
            if read is None:
                active = waves.active()
                lane = np.zeros(len(values), np.int64) if active is None else active.argmax(1)
            else:
                lane = np.broadcast_to(read(waves)[:, 0] & 63, len(values)).astype(np.int64)
            waves.set_scalar(out, values[np.arange(len(values)), lane])

        return run

    def write_lane(self, inst: Any) -> Step:
        value, lane = source(inst.src0.offset, "u32", None), source(inst.src1.offset, "u32", None)
        out = inst.vdst.offset - 256

        def run(waves: Waves) -> None:
            new = waves.vector(out).copy()
            new[np.arange(len(new)), np.broadcast_to(lane(waves)[:, 0] & 63, len(new)).astype(np.int64)] = value(waves)[
                :, 0
            ]
            waves.set_vector(out, new, None)

        return run

    def swap_lanes(self, width: int, inst: Any) -> Step:
        """The upper half of each pair of ``width`` lanes of the destination, for the lower half of the source."""
        one, other = inst.vdst.offset - 256, inst.src0.offset - 256

        def run(waves: Waves) -> None:
            if waves.active() is not None:
                raise UnknownInstructionError("V_PERMLANE_SWAP with lanes that are not active")
            shape = (len(waves.indices), LANES // (2 * width), 2, width)
            a, b = waves.vector(one).reshape(shape).copy(), waves.vector(other).reshape(shape).copy()
            a[:, :, 1], b[:, :, 0] = b[:, :, 0].copy(), a[:, :, 1].copy()
            waves.set_vector(one, a.reshape(shape[0], LANES), None)
            waves.set_vector(other, b.reshape(shape[0], LANES), None)

        return run

    def packed(self, inst: Any, name: str) -> Step:
        low, high = inst.opsel, inst.opsel_hi | inst.opsel_hi2 << 2
        codes = [inst.src0.offset, inst.src1.offset, inst.src2.offset]
        out = inst.vdst.offset - 256
        if inst.clmp:
            raise UnknownInstructionError(f"clamp of {name}")
        if name in MIXED:
            return self.mixed(inst, name, codes, out, low, high)
        if name == "V_PK_MOV_B32":
            halves = [self.half_of_pair(codes[i], low >> i & 1, "u32") for i in range(2)]

            def move(waves: Waves) -> None:
                values, active = [half(waves).copy() for half in halves], waves.active()
                for i, value in enumerate(values):
                    waves.set_vector(out + i, value, active)

            return move
        if name == "V_PK_MAXIMUM3_F16":
            row = Operation("f16", ("f16",) * 3, lambda a, b, c: _maximum_of_halves(a, b, c))
        elif name in PACKED:
            row = PACKED[name]
        else:
            raise UnknownInstructionError(inst.op.name)
        (kind,) = set(row.sources)
        if (inst.neg or inst.neg_hi) and not is_float(kind):
            raise UnknownInstructionError(f"neg of {name}")
        of = self.half_of_pair if kind == "f32" else self.half_of_dword
        parts = []
        for choice, negate in ((low, inst.neg), (high, inst.neg_hi)):
            reads = [of(codes[i], choice >> i & 1, kind) for i in range(len(row.sources))]
            parts.append([(read, negate >> i & 1) for i, read in enumerate(reads)])

        def run(waves: Waves) -> None:
            active, results = waves.active(), []
            for part in parts:
                sources = [modified(typed(read(waves), kind), negate, 0) for read, negate in part]
                given = [waves.context()] if row.wants_context else []
                results.append(untyped(row.compute(*given, *sources)))
            if kind == "f32":
                waves.set_vector(out, results[0], active)
                waves.set_vector(out + 1, results[1], active)
            else:
                waves.set_vector(out, results[0] | results[1] << 16, active)

        return run

    def half_of_pair(self, code: int, high: int, kind: str) -> Source:
        """The lower or the upper register of a pair. An inline constant has a lower half alone."""
        if constant(code, kind) is not None:
            if high:
                raise UnknownInstructionError("the upper half of an inline constant")
            return source(code, kind, None)
        return source(code + high, kind, None)

    def half_of_dword(self, code: int, high: int, kind: str) -> Source:
        if (fixed := constant(code, kind)) is not None and high and fixed:
            raise UnknownInstructionError("the upper half of an inline constant")
        read = source(code, kind, None)
        return (lambda waves: read(waves) >> 16) if high else read

    def mixed(self, inst: Any, name: str, codes: list[int], out: int, low: int, high: int) -> Step:
        """Sources are float32, or a half of a register where op_sel_hi says so; neg_hi is abs here."""
        kind, compute = MIXED[name]
        reads = []
        for i, code in enumerate(codes):
            half = high >> i & 1
            read = self.half_of_dword(code, low >> i & 1, "f16") if half else source(code, "f32", None)
            if half and constant(code, "f16") is not None and low >> i & 1:
                raise UnknownInstructionError("the upper half of an inline constant")
            reads.append((read, "f16" if half else "f32", inst.neg >> i & 1, inst.neg_hi >> i & 1))

        def run(waves: Waves) -> None:
            sources = [modified(typed(read(waves), of), n, a).astype(F32) for read, of, n, a in reads]
            bits, active = untyped(compute(waves.context(), *sources)), waves.active()
            if kind != "f32":
                old = waves.vector(out)
                bits = old & U32(0xFFFF0000) | bits if kind == "low" else old & 0xFFFF | bits << 16
            waves.set_vector(out, bits, active)

        return run

    # memory

    def lds(self, inst: Any, name: str) -> Step:
        if inst.gds or inst.acc:
            raise UnknownInstructionError(f"{inst!r}")
        out, address = inst.vdst.offset - 256, inst.addr.offset - 256
        data = (inst.data0.offset - 256, inst.data1.offset - 256)
        offset = inst.offset0 | inst.offset1 << 8
        if name == "DS_SWIZZLE_B32":
            return self.exchange(out, lambda waves: swizzle_lanes(offset), address)
        if name == "DS_BPERMUTE_B32":
            return self.exchange(
                out, lambda waves: ((waves.vector(address) + U32(offset)) >> 2 & 63).astype(np.int64), data[0]
            )
        match = re.fullmatch(r"DS_(READ|WRITE)(2?)(ST64)?_([BUI])(\d+)(_D16_HI)?", name)
        if match is None:
            raise UnknownInstructionError(inst.op.name)
        loads, twice, far, sign, width, upper = match.groups()
        size = int(width) // 8
        if (sign == "I" and size < 4) or (upper and loads == "READ"):
            raise UnknownInstructionError(inst.op.name)
        count = max(1, size // 4)
        if twice:
            step = size * (64 if far else 1)
            offsets = (inst.offset0 * step, inst.offset1 * step)
        else:
            offsets = (offset,)

        def places(waves: Waves, active: Array) -> tuple[Array, Array, Array]:
            wave = np.broadcast_to(waves.indices[:, None], active.shape)[active]
            return waves.group[wave], wave, waves.barriers[wave]

        def load(waves: Waves) -> None:
            active = everyone(waves)
            where = places(waves, active)
            base = waves.vector(address)[active].astype(np.int64)
            for i, more in enumerate(offsets):
                found = waves.lds.load(*where, base + more, size)
                words = np.zeros((len(found), 4 * count), np.uint8)
                words[:, :size] = found
                put(waves, active, out + i * count, words.view(U32))
            waves.issue("lgkm", range(out, out + count * len(offsets)))

        def store(waves: Waves) -> None:
            active = everyone(waves)
            where = places(waves, active)
            base = waves.vector(address)[active].astype(np.int64)
            for i, more in enumerate(offsets):
                words = np.stack([waves.vector(data[i] + j)[active] for j in range(count)], 1)
                if upper:
                    words = words >> 16
                waves.lds.store(*where, base + more, words.view(np.uint8)[:, :size])
            waves.issue("lgkm", ())
            waves.stores[waves.at] = waves.issued["lgkm"][waves.at]

        return load if loads == "READ" else store

    def exchange(self, out: int, lanes: Callable[[Waves], Array], data: int) -> Step:
        """Data of other lanes through LDS's crossbar; 0 from lanes that are not active."""

        def run(waves: Waves) -> None:
            active, values = everyone(waves), waves.vector(data)
            from_lane = np.broadcast_to(lanes(waves), active.shape)
            taken = np.take_along_axis(np.where(active, values, U32(0)), from_lane, 1)
            waves.set_vector(out, taken, active)
            waves.issue("lgkm", (out,))

        return run

    def global_memory(self, inst: Any, name: str) -> Step:
        if inst.acc or inst.sve:
            raise UnknownInstructionError(f"{inst!r}")
        base = None if inst.saddr.offset in (124, 127) else inst.saddr.offset
        offset = np.int64((inst.offset ^ 1 << 12) - (1 << 12))
        at = inst.addr.offset - 256

        def addresses(waves: Waves, active: Array) -> Array:
            if base is None:
                low, high = waves.vector(at)[active], waves.vector(at + 1)[active]
                address = low.astype(U64) | high.astype(U64) << U64(32)
            else:
                start = waves.scalar(base).astype(U64) | waves.scalar(base + 1).astype(U64) << U64(32)
                address = (start[:, None] + waves.vector(at).astype(U64))[active]
            return address.view(np.int64) + offset

        return self.access(inst, name, addresses, inst.vdst.offset - 256, inst.data.offset - 256)

    def buffer(self, inst: Any, name: str) -> Step:
        """Raw buffers: an offset in bytes from a base; a load beyond the number of records gives 0, a store nothing."""
        if inst.acc or inst.idxen or inst.lds:
            raise UnknownInstructionError(f"{inst!r}")
        resource, at = inst.srsrc.offset, inst.vaddr.offset - 256
        more = source(inst.soffset.offset, "u32", None)

        def addresses(waves: Waves, active: Array) -> tuple[Array, Array]:
            start = waves.scalar(resource).astype(U64) | (waves.scalar(resource + 1) & 0xFFFF).astype(U64) << U64(32)
            if (waves.scalar(resource + 1) >> 16).any():
                raise UnknownInstructionError("a buffer with a stride")
            offsets = (waves.vector(at) if inst.offen else np.zeros((1, LANES), U32)).astype(np.int64) + inst.offset
            offsets = np.broadcast_to(offsets, active.shape)
            inside = offsets < waves.scalar(resource + 2)[:, None].astype(np.int64)
            address = start[:, None].astype(np.int64) + offsets + more(waves).astype(np.int64)
            return address, inside

        data = inst.vdata.offset - 256
        return self.access(inst, name, addresses, data, data, ranged=True)

    def access(
        self, inst: Any, name: str, addresses: Callable[..., Any], out: int, data: int, ranged: bool = False
    ) -> Step:
        match = re.fullmatch(
            r"(?:GLOBAL|BUFFER)_(LOAD|STORE)_(DWORD|USHORT|UBYTE|SHORT|BYTE)(?:X(\d))?(_D16_HI)?", name
        )
        if match is None:
            raise UnknownInstructionError(inst.op.name)
        loads, unit, times, upper = match.groups()
        count = int(times or 1)
        size = count * {"DWORD": 4, "USHORT": 2, "UBYTE": 1, "SHORT": 2, "BYTE": 1}[unit]
        if upper and loads == "LOAD":
            raise UnknownInstructionError(inst.op.name)

        def reached(waves: Waves) -> tuple[Array, Array, Array]:
            """(active lanes, those that reach memory, their addresses)."""
            active = everyone(waves)
            if not ranged:
                return active, active, addresses(waves, active)
            found, inside = addresses(waves, active)
            return active, active & inside, found[active & inside]

        def load(waves: Waves) -> None:
            active, inside, where = reached(waves)
            found = waves.memory.load(where, size).astype(U32)
            if ranged:
                for i in range(count):
                    waves.set_vector(out + i, U32(0), active)
            put(waves, inside, out, found)
            waves.issue("vm", range(out, out + count))

        def store(waves: Waves) -> None:
            _, inside, where = reached(waves)
            words = np.stack([waves.vector(data + i)[inside] for i in range(count)], 1)
            if upper:
                words = words >> 16
            waves.memory.store(where, words.astype(f"u{min(size, 4)}"), size)
            waves.issue("vm", ())

        return load if loads == "LOAD" else store


def _maximum_of_halves(a: Array, b: Array, c: Array) -> Array:
    a, b, c = (x.astype(F32) for x in (a, b, c))
    return maximum(maximum(a, b), c).astype(F16)


def everyone(waves: Waves) -> Array:
    active = waves.active()
    return np.ones((len(waves.indices), LANES), bool) if active is None else active


def put(waves: Waves, active: Array, register: int, words: Array) -> None:
    """Words ``[n, count]`` of the n active lanes to as many registers."""
    for i in range(words.shape[1]):
        if waves.pending:
            waves.ready(register + i)
        new = waves.v[register + i][waves.at].copy()
        new[active] = words[:, i]
        waves.v[register + i][waves.at] = new


def swizzle_lanes(offset: int) -> Array:
    """DS_SWIZZLE's lane for each lane: within groups of 32 by and, or and xor masks, or within four by a pattern."""
    lane = np.arange(LANES)
    if offset & 0x8000:
        if offset & 0x6000:
            raise UnknownInstructionError(f"DS_SWIZZLE with offset {offset:#x}")
        return lane // 4 * 4 + (offset >> (2 * (lane % 4)) & 3)
    and_mask, or_mask, xor_mask = offset & 31, offset >> 5 & 31, offset >> 10 & 31
    return lane // 32 * 32 + ((lane % 32 & and_mask | or_mask) ^ xor_mask)


# The next instruction

BRANCHES: dict[str, Callable[[Waves], Array]] = {
    "S_BRANCH": lambda waves: np.ones(len(waves.indices), bool),
    "S_CBRANCH_SCC0": lambda waves: ~waves.scc[waves.at],
    "S_CBRANCH_SCC1": lambda waves: waves.scc[waves.at],
    "S_CBRANCH_VCCZ": lambda waves: _pair(waves, VCC) == 0,
    "S_CBRANCH_VCCNZ": lambda waves: _pair(waves, VCC) != 0,
    "S_CBRANCH_EXECZ": lambda waves: _pair(waves, EXEC) == 0,
    "S_CBRANCH_EXECNZ": lambda waves: _pair(waves, EXEC) != 0,
}


def _pair(waves: Waves, register: int) -> Array:
    return waves.scalar(register) | waves.scalar(register + 1)


class Program:
    """The decoded instructions of a kernel."""

    def __init__(self, text: bytes, target: Target, entry: int = 0) -> None:
        """text: machine code; entry: the offset of the first instruction. Decoding ends after the last ``s_endpgm``
        that code can reach."""
        from tinygrad.renderer.amd import decode_inst

        self.target = target
        self.instructions: dict[int, Any] = {}
        waiting = [entry]
        while waiting:
            at = waiting.pop()
            while at not in self.instructions:
                inst: Any = decode_inst(text[at : at + 16], "cdna")
                self.instructions[at] = inst
                after = at + inst.size()
                if inst.op.name in BRANCHES:
                    waiting.append(self.jump(at, inst))
                if inst.op.name in ("S_BRANCH", "S_ENDPGM"):
                    break
                at = after
        self.offsets = sorted(self.instructions)
        self.index = {offset: i for i, offset in enumerate(self.offsets)}
        self.entry = self.index[entry]
        self.names = [self.instructions[offset].op.name for offset in self.offsets]
        decoder = Decoder(target)
        self.steps: list[Step | None] = [
            None if type(inst).__name__ == "SOPP" else decoder.step(inst)
            for inst in (self.instructions[offset] for offset in self.offsets)
        ]

    def jump(self, at: int, inst: Any) -> int:
        return at + 4 + 4 * int(np.array(inst.simm16, np.uint16).view(np.int16))

    def run(self, waves: Waves, limit: int = 10**7) -> None:
        """Until all waves have ended. ``limit``: instructions, counted once for waves that execute them together."""
        waves.pc[:] = self.entry
        waiting = np.zeros(len(waves.group), bool)
        for _ in range(limit):
            runnable = (waves.pc >= 0) & ~waiting
            if not runnable.any():
                if (waves.pc < 0).all():
                    return
                self.release(waves, waiting)
                continue
            here = int(waves.pc[runnable].min())
            now = runnable & (waves.pc == here)
            waves.at = slice(None) if now.all() else np.flatnonzero(now)
            others = waves.pc[runnable & ~now]
            self.together(waves, here, int(others.min()) if len(others) else len(self.steps), waiting)
        raise FaultError(f"waves have not ended after {limit} turns")

    def together(self, waves: Waves, here: int, meet: int, waiting: Array) -> None:
        """Run the waves that are ``at`` an instruction, until their paths part, or reach that of others (``meet``)."""
        while True:
            name, step = self.names[here], self.steps[here]
            waves.executed += 1
            try:
                if step is not None:
                    step(waves)
                    here += 1
                elif name in BRANCHES:
                    taken = BRANCHES[name](waves)
                    offset = self.offsets[here]
                    there = self.index[self.jump(offset, self.instructions[offset])]
                    waves.pc[waves.at] = np.where(taken, there, here + 1)
                    if taken.all():
                        here = there
                    elif taken.any():
                        return
                    else:
                        here += 1
                elif name == "S_WAITCNT":
                    count = self.instructions[self.offsets[here]].simm16
                    waves.wait("vm", count & 15 | count >> 10 & 0x30)
                    waves.wait("lgkm", count >> 8 & 15)
                    here += 1
                elif name == "S_BARRIER":
                    if (waves.stores[waves.at] > waves.done["lgkm"][waves.at]).any():
                        raise FaultError("a barrier before stores to LDS were waited for")
                    waves.pc[waves.at] = here + 1
                    waiting[waves.at] = True
                    return
                elif name == "S_ENDPGM":
                    waves.pc[waves.at] = -1
                    return
                elif name == "S_NOP":
                    here += 1
                else:
                    raise UnknownInstructionError(name)
            except (FaultError, UnknownInstructionError) as problem:
                place = f"at {self.offsets[here]:#x}: {self.instructions[self.offsets[here]]!r}"
                raise type(problem)(f"{problem}; {place}") from problem
            waves.pc[waves.at] = here
            if here >= meet:
                return

    def release(self, waves: Waves, waiting: Array) -> None:
        """Let workgroups pass their barrier; all waves that have not ended are at one."""
        waves.barriers[waiting] += 1
        waiting[:] = False
