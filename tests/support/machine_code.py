"""What AMD's machine code of a launch needs, and how many instructions an element takes: from the code alone.

``python tests/support/machine_code.py`` writes ``machine_code.json`` beside the launch rules, for the Triton that is
installed; entries of other releases stay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from aiter_fusion.bench import attention, linear, ops
from aiter_fusion.bench.ops import ROWS, Case
from aiter_fusion.ops.attention import ATTENTION
from aiter_fusion.ops.linear import LINEAR
from aiter_fusion.providers.triton import launches, rules
from aiter_fusion.providers.triton.attention import launches as of_attention
from aiter_fusion.providers.triton.gpu import Gpu
from aiter_fusion.providers.triton.launch import Launch, Launches, flat
from aiter_fusion.providers.triton.linear import launches as of_linear
from support.compiling import TARGETS, compiled_for, kinds_of

FILE = Path(rules.__file__).parent / "machine_code.json"
AMD = ("gfx942", "gfx950")
LANES = 64
# Rows that are padded to a power of two, and rows that fill one.
WIDTHS = (2880, 8192)


@dataclass(frozen=True)
class MachineCode:
    """Of one launch.

    threads:     of a program.
    lds:         bytes of it.
    vgprs:       vector registers of a thread; sgprs: scalar registers of a wave.
    spilled:     vector registers that are kept in memory, and bytes of scratch of a thread.
    parked:      scalar registers that are kept in lanes of vector registers.
    loads:       instructions that load from global memory; wide: those of them that load 16 bytes a lane.
    stores:      instructions that store to it.
    conversions: instructions that convert to FP8.
    matrix:      instructions that multiply matrices.
    valu:        vector instructions other than of memory and of matrices, for an element of what a program holds at a
                 time; of products and attention, of a thread. (Each is counted once, so code that runs before the rows
                 is in it, and several tiles are not.)
    """

    threads: int
    lds: int
    vgprs: int
    sgprs: int
    spilled: int
    parked: int
    loads: int
    wide: int
    stores: int
    conversions: int
    matrix: int
    valu: float

    def worse(self, than: MachineCode) -> dict[str, tuple[float, float]]:
        """What is worse here: (there, here) by name. Fewer wide loads are worse only for more narrow ones."""
        narrow = {"narrow loads": (than.loads - than.wide, self.loads - self.wide)}
        rising = {
            name: (getattr(than, name), getattr(self, name)) for name in ("lds", "vgprs", "spilled", "parked", "valu")
        }
        software = {name: (-getattr(than, name), 0) for name in ("conversions", "matrix") if not getattr(self, name)}
        return {name: pair for name, pair in (narrow | rising | software).items() if pair[1] > pair[0]}


def read(compiled: Any, elements: int | None) -> MachineCode:
    """From a kernel that Triton has compiled. ``elements``: that a program holds at a time; None: not counted by."""
    assembly = compiled.asm["amdgcn"]
    names = re.findall(r"^\t([a-z]+_[a-z0-9_]+)", assembly, re.MULTILINE)

    def metadata(name: str) -> int:
        return int(re.findall(rf"\.{name}: *(\d+)", assembly)[-1])

    def count(pattern: str) -> int:
        return sum(re.match(pattern, name) is not None for name in names)

    threads = compiled.metadata.num_warps * LANES
    vector = count("v_(?!mfma|smfma)")
    spilled = sum(metadata(name) for name in ("vgpr_spill_count", "private_segment_fixed_size"))
    return MachineCode(
        threads=threads,
        lds=compiled.metadata.shared,
        vgprs=metadata("vgpr_count"),
        sgprs=metadata("sgpr_count"),
        spilled=spilled,
        parked=metadata("sgpr_spill_count"),
        loads=count("(global|buffer)_load"),
        wide=count("(global|buffer)_load_dwordx4"),
        stores=count("(global|buffer)_store"),
        conversions=count("v_cvt_(scalef32_)?pk_fp8"),
        matrix=count("v_s?mfma"),
        valu=vector if elements is None else round(vector * threads / max(elements, threads), 2),
    )


def elements_of(launch: Launch) -> int | None:
    """That a program of a norm or an activation holds at a time; None for other kernels."""
    of = launch.arguments
    return of.get("ROWS", 1) * of["SEGMENTS"] * of["SEGMENT"] if "SEGMENTS" in of else None


# Products of every kernel and granularity; attention of few and of many queries, in parts and whole, of every kind of
# mask, and heads of 64 to 256.
PRODUCTS = (
    *(linear.Case(linear.Size.parse("4096x4096,1024,1024"), rows) for rows in linear.ROWS),
    linear.Case(linear.Size.parse("14336x4096"), 64, fast=False),
    linear.Case(linear.Size.parse("8192x28672,28672"), 16, scales="block"),
    linear.Case(linear.Size.parse("4096x4096"), 1, scales="block"),
    linear.Case(linear.Size.parse("4096x4096"), 16, scales="tensor"),
)
ATTENTIONS = (
    attention.Case(8, 4096),
    attention.Case(1, 16384),
    attention.Case(128, 1024, group=8, size=64),
    attention.Case(8, 4096, size=256, tokens=16, mask="rows", window=512, softcap=50.0),
    attention.Case(8, 1024, group=1, mask="added"),
    attention.Case(1, 4096, tokens=2048),
    attention.Case(4, 4096, tokens=1024, mask="bool", window=512),
    attention.Case(1, 4096, size=256, tokens=200),
)
AnyCase = Case | linear.Case | attention.Case


def cases(target: str, widths: Sequence[int] = WIDTHS, rows: Sequence[int] = ROWS) -> list[Case]:
    """Every variant of norms and activations that a GPU computes: at each width, if groups divide it, for so many
    rows."""
    own = TARGETS[target][1]
    return [case for case in ops.cases(widths, rows) if case.format(own).dtype in (own, torch.int8)]


def every(target: str) -> Sequence[AnyCase]:
    """All that is recorded for a GPU."""
    return (*cases(target), *PRODUCTS, *ATTENTIONS)


def measured(case: AnyCase, target: str) -> Iterator[tuple[str, MachineCode]]:
    """(its name in the file, its code) for every launch of a case."""
    with FakeTensorMode():
        name, made, tensors = _planned(case, target)
    kinds = kinds_of({n: v for n, v in tensors.items() if isinstance(v, Tensor)}, TARGETS[target][2])
    for index, launch in enumerate(made.launches):
        which = f" launch {index + 1}" if len(made.launches) > 1 else ""
        yield f"{name}{which}", read(compiled_for(target, launch, kinds, aligned=True, near=True), elements_of(launch))


def _planned(case: AnyCase, target: str) -> tuple[str, Launches, Mapping[str, Any]]:
    """Its name, its launches, and the tensors that these name."""
    fp8 = TARGETS[target][1]
    if isinstance(case, Case):
        known = case.arguments("cpu", fp8)
        return str(case), launches.of(case.op, known, False), {**flat(known), **case.op.allocate(**known)}
    units = next(machine.units for of, machine in MACHINES.values() if of == target)
    gpu = Gpu(nvidia=False, dependent=False, multiprocessors=units, shared_memory=TARGETS[target][3])
    if isinstance(case, linear.Case):
        known = case.arguments("cpu", fp8=fp8)
        name = f"fp8_linear {case} {case.scales}"
        return name, of_linear.of(known, gpu), {**flat(known), **LINEAR.allocate(**known)}
    known = case.arguments("cpu")
    return f"decode_attention {case}", of_attention.of(known, gpu), {**flat(known), **ATTENTION.allocate(**known)}


@dataclass(frozen=True)
class Machine:
    """Published figures of a GPU: compute units of 64 lanes, clock in Hz, bytes a second from memory."""

    units: int
    clock: float
    memory: float


# Source: AMD's data sheets of Instinct MI300X, MI325X and MI355X (peak engine clock, peak memory bandwidth).
MACHINES = {
    "MI300X": ("gfx942", Machine(304, 2.1e9, 5.3e12)),
    "MI325X": ("gfx942", Machine(304, 2.1e9, 6.0e12)),
    "MI355X": ("gfx950", Machine(256, 2.4e9, 8.0e12)),
}


def bound(case: Case, valu: float, machine: Machine) -> float:
    """The time of a case's vector instructions over that of its bytes, by the published figures: below 1 memory bounds
    it. A model, not a measurement: every instruction takes a cycle of its lanes, and nothing else takes time."""
    instructions = case.rows * case.hidden * valu / (machine.units * LANES * machine.clock)
    return instructions / (case.bytes / machine.memory)


def release() -> str:
    """Major and minor of the Triton that is installed, in which generated code may differ."""
    return ".".join(import_module("triton").__version__.split(".")[:2])


def recorded() -> dict[str, dict[str, dict[str, Any]]]:
    """``{release: {target: {name: MachineCode}}}`` as the file has it."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def main() -> None:
    made: dict[str, dict[str, Any]] = {target: {} for target in AMD}
    for target in AMD:
        for case in every(target):
            for name, code in measured(case, target):
                made[target][name] = asdict(code)
                print(target, name, code, flush=True)
    content = recorded() | {release(): made}
    rows = ",\n".join(
        f'"{triton}": {{\n'
        + ",\n".join(
            f' "{target}": {{\n'
            + ",\n".join(f"  {json.dumps(n)}: {json.dumps(c)}" for n, c in entries.items())
            + "\n }"
            for target, entries in targets.items()
        )
        + "\n}"
        for triton, targets in sorted(content.items())
    )
    FILE.write_text("{\n" + rows + "\n}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
