"""Kernels as Triton compiles them, run on the emulator: code object, arguments, workgroups."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aiter_fusion.op import FusedOp, dense
from aiter_fusion.passes.verify import difference, same_bits
from aiter_fusion.providers import PROVIDERS
from aiter_fusion.providers.triton import launches
from support.compiling import TARGETS, compiled_for, kinds_of

from .arithmetic import U32, Array
from .machine import GFX942, GFX950, Program, Target, Waves
from .memory import FaultError, Lds, Memory

EMULATED: Mapping[str, Target] = {"gfx942": GFX942, "gfx950": GFX950}
LANES = 64
# Waves that run at once: 256 vector registers of them take 16 MiB.
TOGETHER = 256
# MODE as the descriptor sets it: subnormal numbers are kept, IEEE and DX10_CLAMP are on.
INITIAL_MODE = 0x3F0


@dataclass(frozen=True)
class Argument:
    """One of a kernel's arguments: where it lies, and what it is in AMD's metadata."""

    offset: int
    size: int
    kind: str


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    program:   its instructions.
    arguments: in order, the hidden ones last; room: bytes of all.
    lds:       bytes of a workgroup.
    waves:     of a workgroup.
    scalars:   how many scalar registers are set before it begins; preloaded: (first dword, dwords) of its arguments
               that are among them.
    """

    program: Program
    arguments: tuple[Argument, ...]
    room: int
    lds: int
    waves: int
    scalars: int
    preloaded: tuple[int, int]

    @classmethod
    def load(cls, compiled: Any, target: Target, preload: bool = True) -> Kernel:
        """A kernel that Triton has compiled.

        preload: begin where hardware that puts arguments into registers does; otherwise at the code before, which loads
        them.
        """
        from tinygrad.runtime.autogen.amdgpu_kd import llvm_amdhsa_kernel_descriptor_t
        from tinygrad.runtime.support.elf import elf_loader

        sections = {section.name: section for section in elf_loader(compiled.asm["hsaco"])[1]}
        text, constants = sections[".text"], sections[".rodata"]
        descriptor = llvm_amdhsa_kernel_descriptor_t.from_buffer_copy(constants.content[:64])
        if descriptor.private_segment_fixed_size:
            raise FaultError(f"the kernel spills {descriptor.private_segment_fixed_size} bytes a lane")
        cls._check(descriptor)
        entry = constants.header.sh_addr + descriptor.kernel_code_entry_byte_offset - text.header.sh_addr
        count, first = descriptor.kernarg_preload & 0x7F, descriptor.kernarg_preload >> 7
        if count and preload:  # the code before, which loads them, has 256 bytes
            entry += 256
        assembly = compiled.asm["amdgcn"]
        (listed,) = re.findall(
            r"^ *(?:- )?\.args:\n(.*?)^    \.group_segment_fixed_size", assembly, re.MULTILINE | re.DOTALL
        )
        arguments = tuple(
            Argument(int(offset), int(size), kind)
            for offset, size, kind in re.findall(r"\.offset: +(\d+)\n +\.size: +(\d+)\n +\.value_kind: +(\w+)", listed)
        )
        scalars = descriptor.compute_pgm_rsrc2 >> 1 & 31
        preloaded = (first, count) if preload else (0, 0)
        program = Program(text.content, target, entry)
        return cls(
            program,
            arguments,
            descriptor.kernarg_size,
            compiled.metadata.shared,
            compiled.metadata.num_warps,
            scalars,
            preloaded,
        )

    @staticmethod
    def _check(descriptor: Any) -> None:
        """That a wave begins with what ``run`` gives it: the address of its arguments, and its workgroup's number."""
        properties, first, second = (
            descriptor.kernel_code_properties,
            descriptor.compute_pgm_rsrc1,
            descriptor.compute_pgm_rsrc2,
        )
        denormals, ieee, rounding = first >> 16 & 15, first >> 23 & 1, first >> 12 & 15
        if properties & 0x7F != 1 << 3 or (denormals, ieee, rounding) != (15, 1, 0) or second >> 7 & 7 != 1:
            raise FaultError("the kernel wants registers or modes to begin with that the emulator does not set")

    def run(self, memory: Memory, values: list[int], grid: int, target: Target, **variation: Any) -> int:
        """Run a grid of workgroups. ``values``: the arguments, as bits. ``variation``: fields of ``Waves``, such as
        ``ulps``. Returns the instructions that were executed, counted once for waves that execute them together."""
        packed = bytearray(self.room)
        given = iter(values)
        hidden = {
            "hidden_block_count_x": grid,
            "hidden_block_count_y": 1,
            "hidden_block_count_z": 1,
            "hidden_group_size_x": self.waves * LANES,
            "hidden_group_size_y": 1,
            "hidden_group_size_z": 1,
            "hidden_grid_dims": 1,
        }
        for argument in self.arguments:
            value = hidden.get(argument.kind, 0) if argument.kind.startswith("hidden") else next(given)
            packed[argument.offset : argument.offset + argument.size] = value.to_bytes(argument.size, "little")
        left = list(given)
        if left:
            raise ValueError(f"the kernel takes {len(values) - len(left)} arguments, and was given {len(values)}")
        address = memory.place(len(packed), np.frombuffer(bytes(packed), np.uint8))
        words = np.frombuffer(bytes(packed), U32)
        executed = 0
        at_once = max(1, TOGETHER // self.waves)
        for begin in range(0, grid, at_once):
            groups = np.arange(begin, min(begin + at_once, grid))
            waves = Waves.make(
                target, memory, Lds(len(groups), self.lds), np.repeat(np.arange(len(groups)), self.waves)
            )
            waves.mode[:] = INITIAL_MODE
            waves.s[0], waves.s[1] = address & 0xFFFFFFFF, address >> 32
            first, count = self.preloaded
            waves.s[2 : 2 + count] = words[first : first + count, None]
            waves.s[self.scalars] = np.repeat(groups, self.waves)
            waves.v[0] = np.tile(np.arange(self.waves)[:, None] * LANES + np.arange(LANES), (len(groups), 1))
            for name, value in variation.items():
                setattr(waves, name, value)
            self.program.run(waves)
            executed += waves.executed
        return executed


def bytes_of(tensor: Tensor) -> Array:
    """The memory from a tensor's first element to its last."""
    if not tensor.numel():
        return np.zeros(0, np.uint8)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    start = tensor.storage_offset() * tensor.element_size()
    return whole.numpy()[start : start + (last + 1) * tensor.element_size()]


def bits_of(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


class Call:
    """A call of a fused op, compiled for a GPU that need not be here.

    preload: see ``Kernel.load``; near: whether its tensors are said to have less than 2 GiB, as they have.
    """

    def __init__(
        self, op: FusedOp, known: Mapping[str, Any], target: str, preload: bool = True, near: bool = True
    ) -> None:
        self.op, self.known, self.target = op, dict(known), target
        self.plan = launches.of(op, self.known, False)
        _, _, fp8, _ = TARGETS[target]
        tensors = {n: v for n, v in self.known.items() if isinstance(v, Tensor)} | op.allocate(**self.known)
        kinds = kinds_of(tensors, fp8)
        self.kernels = [
            Kernel.load(compiled_for(target, launch, kinds, aligned=True, near=near), EMULATED[target], preload)
            for launch in self.plan.launches
        ]

    def run(self, **variation: Any) -> dict[str, Tensor]:
        """The outputs, each byte of which a kernel has written."""
        memory, target = Memory(), EMULATED[self.target]
        outputs = self.op.allocate(**self.known)
        scratch = {name: dense(spec, torch.empty) for name, spec in self.plan.scratch.items()}
        places: dict[str, int] = {}
        for name, tensor in {**self.known, **scratch, **outputs}.items():
            if isinstance(tensor, Tensor) and not (
                name == "scale" and "scale" in self.known and tensor is not self.known[name]
            ):
                fresh = name in scratch or name in outputs
                places[name] = memory.place(len(bytes_of(tensor)), None if fresh else bytes_of(tensor))
        number = launches.number_or_pointer(self.known.get("eps_tensor"))
        for kernel, launch in zip(self.kernels, self.plan.launches, strict=True):
            values = list(self._values(launch, places, number))
            kernel.run(memory, [*values, 0, 0], int(launch.grid), target, **variation)  # and Triton's two for scratch
        for name, tensor in outputs.items():
            content, written = memory.read(places[name], tensor.numel() * tensor.element_size())
            if not written.all():
                raise FaultError(f"{int((~written).sum())} of {len(written)} bytes of {name} are not written")
            bytes_of(tensor)[:] = content
        return outputs

    def _values(self, launch: launches.Launch, places: Mapping[str, int], number: Any) -> Iterator[int]:
        from aiter_fusion.providers.triton import jit

        for parameter in jit.kernel(launch.kernel).params:
            value = launch.arguments[parameter.name]
            if value is None or parameter.is_constexpr:
                continue
            if isinstance(value, launches.Ref) and value.name == "eps_tensor":
                double = self.known["eps_tensor"].dtype is torch.float64
                yield struct.unpack("<Q", struct.pack("<d", number))[0] if double else bits_of(number)
            elif isinstance(value, launches.Ref):
                yield places[value.name]
            else:
                yield bits_of(value) if isinstance(value, float) else int(value) & 0xFFFFFFFF


def as_on_gpus(known: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with divisions by numbers as products with their float32 reciprocals, as PyTorch's GPU kernels
    compute them and ours do."""

    def translate(program: str) -> str:
        return re.sub(r"\bdiv=(\S+)", lambda m: f"mul={float(np.float32(1.0 / np.float32(float(m[1]))))!r}", program)

    names = ("scale_steps", "factor_steps", "value_steps")
    return {name: translate(value) if name in names else value for name, value in known.items()}


# What a result can owe its difference from the reference to, from the nearest to the farthest.
HOW = SAME, ZERO, RECIPROCAL, OVERFLOW, RSQ, ORDER, FUNCTION = (
    "same bits",
    "sign of zero",
    "reciprocal",
    "overflow",
    "rsq",
    "order of sums",
    "function",
)
# Relative differences of float32 results that the last two explain: a row of 64 to 8192 squares in another order moves
# the statistic by an ulp or two, and a function of another library its result by up to four; each is followed by two
# or three roundings. Half precision is not moved by so little but where it rounds.
ORDERS, FUNCTIONS = 2.0**-21, 2.0**-20
ACTS = frozenset({"act", "first_act", "second_act"})


def explained(call: Call) -> dict[str, str]:
    """Run a call, and say for each output how it compares with the reference.

    same bits:     as the reference, which runs on the CPU.
    reciprocal:    as the reference with products by reciprocals for divisions by numbers, as on every GPU.
    sign of zero:  as one of these but for zeros, of which a maximum of -0 and 0 may be either.
    overflow:      as one of these but for rows, or scales for all rows, with a number that is too large for float16,
                   which becomes the largest one, where elsewhere it is infinity; or that a LayerNorm adds up to more
                   than float32 has, and PyTorch's does not.
    rsq:           as one of these, if V_RSQ_F32, which is only known to an ulp, gives its neighbour.
    order of sums: results of a norm, whose sums are in another order, within ``ORDERS``.
    function:      results of an activation by another library's exp, erf or tanh, within ``FUNCTIONS``.

    Raises:
        AssertionError: none of them.
        FaultError: a race, a wrong address, a load of what was not written, a missing wait.
    """
    op = call.op
    have = call.run()
    references = {SAME: op.reference(**call.known), RECIPROCAL: op.reference(**as_on_gpus(call.known))}
    found = {
        name: next((how for how, want in references.items() if same_bits(value, want[name])), "")
        for name, value in have.items()
    }
    for name, value in have.items():
        if not found[name] and any(same_bits(_unsigned(value), _unsigned(want[name])) for want in references.values()):
            found[name] = ZERO
        lost = _lost(call, value, references[SAME])
        if not found[name] and lost is not None:
            kept = ~lost
            agrees = any(same_bits(value[kept], want[name][kept]) for want in references.values())
            found[name] = OVERFLOW if agrees else ""
    norm = any(stage.kind in launches.NORMS for stage in op.stages)
    if norm and not all(found.values()):
        for ulps in (-1, 1):
            moved = call.run(ulps={"V_RSQ_F32": ulps})
            for name, value in moved.items():
                if not found[name] and any(same_bits(value, want[name]) for want in references.values()):
                    found[name] = RSQ
    reasons = {ORDER: ORDERS} if norm else {}
    reasons |= {FUNCTION: FUNCTIONS} if ACTS & set(op.arguments) else {}
    for name, value in have.items():
        if not found[name]:
            want, lost = references[RECIPROCAL][name], _lost(call, value, references[SAME])
            if lost is not None:
                value, want = value[~lost], want[~lost]
            found[name] = next((how for how, limit in reasons.items() if _is_near(op, name, value, want, limit)), "")
            assert found[name], f"{name} of {op.name}"
    return found


def _unsigned(x: Tensor) -> Tensor:
    """In float32, zeros without their sign."""
    return x.float() + 0.0


def _lost(call: Call, value: Tensor, want: Mapping[str, Tensor]) -> Tensor | None:
    """The elements of an output in rows with a value in float16 that is infinite or NaN, or whose sum in float32 is, of
    a LayerNorm; None if there are none."""
    lost = [~tensor.isfinite() for tensor in want.values() if tensor.dtype is torch.float16 and tensor.dim()]
    if call.op.stage("layer_norm"):
        lost.append(~want.get("residual_out", call.known["x"]).float().sum(-1, keepdim=True).isfinite())
    if not lost:
        return None
    rows = torch.stack([each.any(-1, keepdim=True) for each in lost]).any(0)
    rows = rows.expand_as(value) if value.dim() == rows.dim() else rows.any().expand_as(value)
    return rows if rows.any() else None


def _is_near(op: FusedOp, name: str, value: Tensor, want: Tensor, limit: float) -> bool:
    """Whether values, or the statistic of a row, differ by no more than ``limit``, or by a last bit of what they are
    rounded to. Where the mean is subtracted, or a sum follows a rounding, it is a share of the row's largest value."""
    if name == "q":
        return difference(op, PROVIDERS["triton"], name, want, value) is None
    limit = max(limit, torch.finfo(value.dtype).eps)
    near = torch.isclose(value.double(), want.double(), rtol=limit, atol=0.0, equal_nan=True)
    if op.cancels or op.stage("layer_norm"):
        size = want.double().abs().nan_to_num(0.0, 0.0).amax(-1, keepdim=True) if want.numel() else want.double()
        near |= (value.double() - want.double()).abs() <= limit * size
    return bool(near.all())
