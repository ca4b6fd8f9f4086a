"""What the benchmarks share: under which conditions they ran, timing in CUDA graphs, the progress bar."""

from __future__ import annotations

import datetime
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress

from .. import __version__, machine

T = TypeVar("T")
EXTRA = "pip install 'aiter-fusion[bench]'"


class Refused(RuntimeError):  # noqa: N818 (not an error: the comparison would say nothing true)
    """A comparison that is not printed; the message has the reason."""


@dataclass(frozen=True)
class Conditions:
    """Where and when a result was measured; ``date`` is UTC, ``command`` what gave the result."""

    device: str
    torch: str
    triton: str | None
    aiter_fusion: str
    date: str
    command: str

    def __str__(self) -> str:
        versions = f"torch {self.torch}, triton {self.triton}, aiter_fusion {self.aiter_fusion}"
        return f"{self.device}; {versions}; {self.date}\n{self.command}"


def conditions(command: str) -> Conditions:
    """Those of this process."""
    return Conditions(
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
        triton=machine.triton_version(),
        aiter_fusion=__version__,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command,
    )


def need_gpu(instead: str = "") -> None:
    """Raise a RuntimeError if PyTorch sees no GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError(f"benchmarks need a GPU, and PyTorch sees none{instead}")


def need(module: str) -> Any:
    """A module of the extra ``bench``; a RuntimeError names the extra if it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        raise RuntimeError(f"{module} is not installed ({error}): {EXTRA}") from error


def progress(items: Sequence[T], what: str) -> Iterator[T]:
    """The items, with a progress bar on standard error if that is a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield from items
        return
    # Drawn when an item is done: a thread that draws meanwhile would take the host's time from what is measured.
    with Progress(console=Console(file=sys.stderr), auto_refresh=False, redirect_stdout=False) as bar:
        yield from bar.track(items, description=what)


def capture(call: Callable[..., Any], sets: Sequence[tuple[Any, ...]], calls: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``calls`` calls that take the sets of arguments in turn.

    Results live until the same set's turn comes again, so that what is written rotates as what is read does.
    """
    kept = [call(*arguments) for arguments in sets]  # compiles, and tunes, outside the capture
    torch.cuda.synchronize()
    kept[:] = [None] * len(sets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            kept[index % len(sets)] = call(*sets[index % len(sets)])
    return graph


def alternate(runs: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """The median time of each run in microseconds of the GPU's clock.

    All run once in every round; nothing waits in between, so that the GPU does not either.
    """
    for run in runs:
        run()
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
    for index in in_turn(len(runs), rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        runs[index]()
        end.record()
        events[index].append((begin, end))
    torch.cuda.synchronize()
    return [1e3 * statistics.median(begin.elapsed_time(end) for begin, end in pairs) for pairs in events]


def in_turn(count: int, rounds: int) -> Iterator[int]:
    """All indices in every round, in reverse order in every second one: a drifting clock rate hits all alike."""
    for turn in range(rounds):
        yield from range(count) if turn % 2 == 0 else range(count)[::-1]


def check_folder(path: str | None) -> None:
    """Raise a ValueError if a file could not be written there: before measuring, not after."""
    if path and not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{path}: there is no such folder; make it first")
