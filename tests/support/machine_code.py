"""What AMD's machine code of a launch needs, and how many instructions an element takes: from the code alone.

``python tests/support/machine_code.py`` writes ``machine_code.json`` beside the launch rules, for the Triton that is
installed; entries of other releases stay.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from aiter_fusion.bench.ops import ROWS, VARIANTS, Case
from aiter_fusion.providers.triton import launches, rules
from aiter_fusion.providers.triton.launch import Launch, flat
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
    valu:        vector instructions other than of memory, for an element of what a program holds at a time. (Each is
                 counted once, so code that runs before the rows is in it, and several tiles are not.)
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
    valu: float

    def worse(self, than: MachineCode) -> dict[str, tuple[float, float]]:
        """What is worse here: (there, here) by name. Fewer wide loads are worse only for more narrow ones."""
        narrow = {"narrow loads": (than.loads - than.wide, self.loads - self.wide)}
        rising = {
            name: (getattr(than, name), getattr(self, name)) for name in ("lds", "vgprs", "spilled", "parked", "valu")
        }
        software = {"conversions": (-than.conversions, -self.conversions)} if not self.conversions else {}
        return {name: pair for name, pair in (narrow | rising | software).items() if pair[1] > pair[0]}


def read(compiled: Any, elements: int) -> MachineCode:
    """From a kernel that Triton has compiled. ``elements``: that a program holds at a time."""
    assembly = compiled.asm["amdgcn"]
    names = re.findall(r"^\t([a-z]+_[a-z0-9_]+)", assembly, re.MULTILINE)

    def metadata(name: str) -> int:
        return int(re.findall(rf"\.{name}: *(\d+)", assembly)[-1])

    def count(pattern: str) -> int:
        return sum(re.match(pattern, name) is not None for name in names)

    threads = compiled.metadata.num_warps * LANES
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
        valu=round(count("v_") * threads / max(elements, threads), 2),
    )


def elements_of(launch: Launch) -> int:
    """That a program of a norm or an activation holds at a time."""
    of = launch.arguments
    return of.get("ROWS", 1) * of["SEGMENTS"] * of["SEGMENT"]


def cases() -> list[Case]:
    """Every variant at both widths, if a group divides it, of few and of many rows."""
    return [
        Case(family, variant, hidden, rows)
        for family, variant in VARIANTS
        for hidden in WIDTHS
        for rows in ROWS
        if not (variant.endswith("group128") and hidden % 128)
    ]


def measured(case: Case, target: str) -> Iterator[tuple[str, MachineCode]]:
    """(its name in the file, its code) for every launch of a case."""
    with FakeTensorMode():
        known = case.arguments("cpu", TARGETS[target][1])
        outputs = case.op.allocate(**known)
        plan = launches.of(case.op, known, False)
    yield from _of(target, str(case), plan.launches, {**flat(known), **outputs})


def _of(
    target: str, name: str, made: tuple[Launch, ...], tensors: Mapping[str, Any]
) -> Iterator[tuple[str, MachineCode]]:
    kinds = kinds_of({n: v for n, v in tensors.items() if isinstance(v, Tensor)}, TARGETS[target][2])
    for index, launch in enumerate(made):
        which = f" launch {index + 1}" if len(made) > 1 else ""
        yield f"{name}{which}", read(compiled_for(target, launch, kinds, aligned=True, near=True), elements_of(launch))


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
        for case in cases():
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
