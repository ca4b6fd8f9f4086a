"""What the all-reduce fusions of several providers share: groups, sizes, PyTorch's own all-reduce, turns."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import agreement

Made = TypeVar("Made")
WORLDS = (2, 4, 8)
MIB = 1 << 20


@dataclass(frozen=True)
class Window:
    """Calls of at most ``rows`` rows of ``packs`` times 16 bytes, and of ``nbytes`` bytes, or ``nbytes // world`` where
    these are ``shared``."""

    rows: int
    packs: int
    nbytes: int
    shared: bool = True

    def has(self, world: int, rows: int, width: int, itemsize: int) -> bool:
        packs, rest = divmod(width * itemsize, 16)
        most = self.nbytes // world if self.shared else self.nbytes
        return rest == 0 and packs <= self.packs and rows <= self.rows and rows * width * itemsize <= most


# When AITER takes its kernel of one stage (v0.1.20), for 16-bit types: the kernel's packs, the bound on bytes, and the
# rows that it demands where it fuses norms of q and k.
ONE_STAGE = Window(rows=80, packs=1024, nbytes=128 * 7168 * 2)


def process_group(name: str) -> Any:
    """The group of a name, as functional collectives call it."""
    return import_module("torch.distributed.distributed_c10d")._resolve_process_group(name)


def world_of(name: str) -> int:
    """The number of a group's ranks."""
    return process_group(name).size()


def refuse_group(name: str) -> str | None:
    """Why memory cannot be shared by the ranks of a group, or None; the same on all of them."""
    import torch.distributed as dist

    ranks = dist.get_process_group_ranks(process_group(name))
    if len(ranks) not in WORLDS:
        return f"a group of {len(ranks)}; its all-reduces are for {', '.join(map(str, WORLDS))} ranks"
    if not agreement.on_one_host(ranks):
        return "the ranks of the group are on several hosts"
    return None


def plainly(x: Tensor, group: str) -> Tensor:
    """The sum of every rank's ``x`` by PyTorch, which every rank's call must then ask of it."""
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))


def kept(make: Callable[..., Made], *given: Any) -> Made:
    """What a function returns that allocates memory to be kept.

    In a thread of its own: PyTorch's CUDA graphs warm up with a pool of memory for the thread, in which nothing may be
    left.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(make, *given).result()


@dataclass
class Turns:
    """Memory that calls share, one after the other: a call on another stream begins when the last has ended."""

    stream: torch.cuda.Stream | None = None

    def take(self) -> None:
        """Begin a call on the current stream."""
        stream = torch.cuda.current_stream()
        if self.stream not in (None, stream) and not torch.cuda.is_current_stream_capturing():
            stream.wait_stream(self.stream)  # type: ignore[arg-type]
        self.stream = stream
