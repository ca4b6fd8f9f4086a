"""Compare our kernels with the code that another torch's Inductor generated (see write.py), on this machine's GPU.

    python tests/bench/other_inductor/measure.py FOLDER --json inductor.json
    python tests/bench/other_inductor/measure.py FOLDER --compile      # for an H200, without a GPU

Both run with the torch and the Triton of this machine, in CUDA graphs of many calls in turn, as ``bench ops`` measures,
and results that differ are not compared. Of each generated kernel every launch is measured that Inductor would try,
smaller blocks for kernels that take many registers included, and the fastest taken: without the noise of Inductor's own
search. Prints a table in Markdown. What is not measured, and why, goes to standard error and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton  # type: ignore[import-not-found]  # Triton need not be installed
from torch import Tensor
from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found]
from triton.compiler import ASTSource  # type: ignore[import-not-found]
from triton.runtime.errors import OutOfResources  # type: ignore[import-not-found]

from aiter_fusion import tables
from aiter_fusion.bench.ops import ROUNDS, Case, functions, outputs, verify
from aiter_fusion.bench.timing import Refused, alternate, capture, conditions, need_gpu

TARGET = GPUTarget("cuda", 90, 32)
# Rounds to choose a launch by.
TRIES = 5
# Registers of a multiprocessor, threads on it and multiprocessors of an H200.
REGISTERS, THREADS, PROCESSORS = 65536, 2048, 132
# An assumed rate of copying, in bytes a second: it only says how many calls a graph has.
RATE = 4e12


@dataclass(frozen=True)
class Launch:
    """One way to launch a kernel: compile-time constants, compiler options, grid, and how Inductor halves a block."""

    constants: dict[str, Any]
    options: dict[str, Any]
    grid: list[str | int]
    halve: dict[str, Any] | None

    def halved(self, registers: int) -> Launch | None:
        """The same with half of its largest reduction block, if Inductor would try that, or None.

        It does where the registers that a program takes keep others from running beside it
        (``CachingAutotuner._iter_rblock_scale_candidates``).
        """
        if self.halve is None:
            return None
        name, warps = self.halve["block"], self.options["num_warps"]
        block = self.constants[name]
        at_a_time = max(1, REGISTERS // (registers * 32 * warps)) * PROCESSORS
        if (
            block <= 64
            or registers <= REGISTERS // THREADS
            or self.halve["programs"] <= at_a_time
            or block // 2 < self.halve["least"]
        ):
            return None
        return Launch({**self.constants, name: block // 2}, self.options, self.grid, self.halve)


class Written:
    """What write.py wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = json.loads((folder / "plan.json").read_text())
        self.torch, self.triton = content["torch"], content["triton"]
        self.kernels: dict[str, dict[str, Any]] = content["kernels"]
        self.plans: list[dict[str, Any]] = content["cases"]
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))  # the kernels import inductor_runtime

    def launches(self, kernel: str) -> list[Launch]:
        return [Launch(**launch) for launch in self.kernels[kernel]["launches"]]

    @functools.cache  # noqa: B019 (one object a process)
    def function(self, kernel: str) -> Any:
        spec = importlib.util.spec_from_file_location(kernel, self.folder / "kernels" / f"{kernel}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, self.kernels[kernel]["function"])

    def compile(self, kernel: str, launch: Launch) -> Any:
        about = self.kernels[kernel]
        attributes = {tuple(place): marks for *place, marks in about["attributes"]}
        source = ASTSource(self.function(kernel), about["signature"], launch.constants, attributes)
        return triton.compile(source, target=TARGET, options=launch.options)


class Runner:
    """A compiled kernel with a launch."""

    def __init__(self, written: Written, kernel: str, launch: Launch) -> None:
        function = written.function(kernel)
        self.names: list[str] = function.arg_names
        self.given = [name for place, name in enumerate(self.names) if place not in function.constexprs]
        self.launch = launch
        self.binary = written.compile(kernel, launch)
        self.binary._init_handles()  # loads it; raises OutOfResources

    def __call__(self, given: Sequence[Any]) -> None:
        known = {**self.launch.constants, **dict(zip(self.given, given, strict=True))}
        # the grid is in the generated code's own words: -((xnumel) // -(8))
        grid = [eval(size, {}, known) if isinstance(size, str) else size for size in self.launch.grid]
        self.binary[grid](*(known[name] for name in self.names))


def runners(written: Written, kernel: str) -> list[Runner]:
    """A kernel by every launch that Inductor would try and that this GPU has resources for."""
    found: list[Runner] = []
    waiting = written.launches(kernel)
    while waiting:
        launch = waiting.pop(0)
        if any(runner.launch == launch for runner in found):
            continue
        try:
            found.append(Runner(written, kernel, launch))
        except OutOfResources:  # Inductor goes on without it too
            continue
        if (halved := launch.halved(found[-1].binary.n_regs)) is not None:
            waiting.append(halved)
    if not found:
        raise Refused(f"{kernel} can be launched in no way")
    return found


def generated(plan: dict[str, Any], chosen: Sequence[Runner]) -> Callable[..., tuple[Tensor, ...]]:
    """A plan as a function of the op's tensors, each kernel by the chosen launch."""

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        buffers = list(tensors)
        for sizes, strides, dtype in plan["buffers"]:
            buffers.append(torch.empty_strided(sizes, strides, dtype=getattr(torch, dtype), device="cuda"))
        for runner, (_, arguments) in zip(chosen, plan["launches"], strict=True):
            runner([buffers[a["buffer"]] if isinstance(a, dict) else a for a in arguments])
        return tuple(buffers[n].as_strided(sizes, strides, at) for n, sizes, strides, at in plan["outputs"])

    return call


@dataclass(frozen=True)
class Row:
    """Times of a case in microseconds a call; kernels: of Inductor's; tried: launches of these, in all."""

    op: str
    variant: str
    hidden: int
    rows: int
    kernels: int
    tried: int
    ours_us: float
    inductor_us: float

    @property
    def ratio(self) -> float:
        return self.ours_us / self.inductor_us


def measure(written: Written, plan: dict[str, Any]) -> Row:
    case = Case(*plan["case"])
    count = case.sets(torch.cuda.get_device_properties().L2_cache_size)
    sets = [case.arguments("cuda") for _ in range(count)]
    tensors = [tuple(value for value in given.values() if isinstance(value, Tensor)) for given in sets]
    calls = case.calls(count, RATE)
    ours, _ = functions(case.op, sets[0], "triton")
    choices = [runners(written, kernel) for kernel, _ in plan["launches"]]
    chosen = [choice[0] for choice in choices]
    for place, choice in enumerate(choices):
        tried = [[*chosen[:place], one, *chosen[place + 1 :]] for one in choice]
        for one in tried:
            verify(case.op, outputs(ours(*tensors[0])), generated(plan, one)(*tensors[0]))
        if len(tried) > 1:
            graphs = [capture(generated(plan, one), tensors, calls) for one in tried]
            times = alternate([graph.replay for graph in graphs], TRIES)
            chosen = tried[times.index(min(times))]
    graphs = [capture(call, tensors, calls) for call in (ours, generated(plan, chosen))]
    ours_us, inductor_us = (us / calls for us in alternate([graph.replay for graph in graphs], ROUNDS))
    many = sum(map(len, choices))
    return Row(case.family, case.variant, case.hidden, case.rows, len(choices), many, ours_us, inductor_us)


# What runs in processes beside this one, so that compiling takes less time: Triton keeps what it compiled in files.


def compile_for_h200(folder: Path, kernel: str) -> int:
    """Compile a kernel by every launch of Inductor's list, and say how many; needs no GPU."""
    written = Written(folder)
    launches = written.launches(kernel)
    for launch in launches:
        written.compile(kernel, launch)
    return len(launches)


def compile_kernel(folder: Path, kernel: str) -> None:
    runners(Written(folder), kernel)


def compile_ours(case: tuple[str, str, int, int]) -> None:
    made = Case(*case)
    arguments = made.arguments("cuda")
    functions(made.op, arguments, "triton")[0](*(value for value in arguments.values() if isinstance(value, Tensor)))


def table(written: Written, rows: Sequence[Row]) -> Iterator[str]:
    headers = [
        "op",
        "variant",
        "hidden",
        "rows",
        "kernels of Inductor's",
        "ours, us",
        "Inductor, us",
        "ours / Inductor",
    ]
    cells = [
        (f"`{r.op}`", r.variant, *map(str, (r.hidden, r.rows, r.kernels)))
        + tuple(f"{number:.2f}" for number in (r.ours_us, r.inductor_us, r.ratio))
        for r in sorted(rows, key=lambda r: (r.op, r.rows, r.variant, r.hidden))
    ]
    yield f"Inductor of torch {written.torch}; both compiled by triton {triton.__version__}"
    yield ""
    yield tables.plain(tables.table(headers, cells, left=headers[:2], markdown=True))
    yield ""
    for count in sorted({r.rows for r in rows}):
        ratios = [r.ratio for r in rows if r.rows == count]
        yield (
            f"{count} rows: {len(ratios)} cases, {min(ratios):.2f} to {max(ratios):.2f}, geometric mean "
            f"{statistics.geometric_mean(ratios):.3f}, {sum(ratio > 1 for ratio in ratios)} above 1"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what write.py wrote")
    parser.add_argument("--compile", action="store_true", help="compile everything for an H200, and stop")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count(), help="that compile")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no case is begun")
    arguments = parser.parse_args()
    started = time.perf_counter()
    folder = arguments.folder.absolute()
    written = Written(folder)
    pool = ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn"))
    if arguments.compile:
        many = sum(pool.map(functools.partial(compile_for_h200, folder), written.kernels))
        print(f"{len(written.kernels)} kernels, {many} launches, {time.perf_counter() - started:.0f} s")
        return 0
    need_gpu()
    with pool:
        waiting = [pool.submit(compile_ours, tuple(plan["case"])) for plan in written.plans]
        waiting += [pool.submit(compile_kernel, folder, kernel) for kernel in written.kernels]
        wait(waiting)  # what fails there fails here too, where its case is measured
    print(f"compiled in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    rows: list[Row] = []
    refused = []
    for plan in written.plans:
        case = Case(*plan["case"])
        if time.perf_counter() - started > arguments.seconds:
            refused.append(f"{case}: no time was left")
            continue
        try:
            rows.append(measure(written, plan))
        except Refused as problem:
            refused.append(f"{case}: {problem}")
        else:
            print(f"{case}: {rows[-1].ours_us:.2f} and {rows[-1].inductor_us:.2f} us", file=sys.stderr, flush=True)
    about = conditions(" ".join(["python", *sys.argv]))
    print("\n".join([str(about), *table(written, rows), f"{time.perf_counter() - started:.0f} s in all"]))
    if arguments.json:
        content = {"conditions": asdict(about), "inductor": written.torch, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(content, indent=1))
    for line in refused:
        print(f"not compared: {line}", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
