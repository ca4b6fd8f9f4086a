"""All-reduces in general: groups, the sizes for one stage, PyTorch's own all-reduce, the order of calls on streams."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import agreement

Made = TypeVar("Made")
# Numbers of ranks that there are kernels for.
WORLDS = (2, 4, 8)
MIB = 1 << 20


class Window(NamedTuple):
    """Sizes of calls: rows in whole packs of 16 bytes, up to these limits, all included.

    rows:   of a call.
    packs:  of a row.
    nbytes: of a rank's tensor; divided by the number of ranks if ``shared``.
    """

    rows: int
    packs: int
    nbytes: int
    shared: bool = True

    def has(self, world: int, rows: int, width: int, itemsize: int) -> bool:
        """Whether a call of ``rows`` rows of ``width`` elements of ``itemsize`` bytes, on ``world`` ranks, is
        inside."""
        packs, rest = divmod(width * itemsize, 16)
        most = self.nbytes // world if self.shared else self.nbytes
        return rest == 0 and packs <= self.packs and rows <= self.rows and rows * width * itemsize <= most


# AITER's rule for its kernel of one stage (v0.1.20), for 16-bit types: the kernel's limit on packs, AITER's limit on
# bytes, and its limit on rows where it fuses the norms of queries and keys.
ONE_STAGE = Window(rows=80, packs=1024, nbytes=128 * 7168 * 2)


def process_group(name: str) -> Any:
    """The process group that functional collectives call by this name."""
    return import_module("torch.distributed.distributed_c10d")._resolve_process_group(name)


def world_of(name: str) -> int:
    """The number of ranks in a group."""
    return process_group(name).size()


def refuse_group(name: str) -> str | None:
    """Why the ranks of a group cannot share memory, or None; the same answer on all ranks."""
    import torch.distributed as dist

    ranks = dist.get_process_group_ranks(process_group(name))
    if len(ranks) not in WORLDS:
        return f"the group's size is {len(ranks)}, and its all-reduces are for {', '.join(map(str, WORLDS))} ranks"
    if not agreement.on_one_host(ranks):
        return "the ranks of the group are on several hosts, and its all-reduces share memory within one"
    return None


def all_reduce_by_torch(x: Tensor, group: str) -> Tensor:
    """The sum of ``x`` over the ranks by PyTorch; a collective, so every rank must take this path."""
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group))


def outside_graph_pools(make: Callable[..., Made], *given: Any) -> Made:
    """``make(*given)``, which allocates GPU memory that outlives the call, in a thread of its own.

    PyTorch's CUDA graphs warm up with a memory pool that belongs to the thread, and nothing may stay in that pool.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(make, *given).result()


@dataclass
class StreamOrder:
    """The order of calls that share memory: one on another stream waits for the last call's end.

    stream: of the last call; None before the first.
    """

    stream: torch.cuda.Stream | None = None

    def enter(self) -> None:
        """Begin a call on the current stream. While a graph is captured nothing waits: replays are for the caller to
        order."""
        stream = torch.cuda.current_stream()
        if self.stream not in (None, stream) and not torch.cuda.is_current_stream_capturing():
            stream.wait_stream(self.stream)  # type: ignore[arg-type]
        self.stream = stream
