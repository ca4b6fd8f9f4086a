"""The memory of all-reduces: symmetric memory, which every rank of a group can read and write.

A ``Channel`` is registered once for a group and a size class, when a call first needs it, and kept. Registering is a
collective call and waits for the GPU. All channels of a group take at most 548 MiB on each GPU; calls that need more
run in pieces.

A rank that stops is noticed by the other ranks' kernels: they poll for at most ``AITER_FUSION_TIMEOUT`` seconds, or
twice as long, then write its number to host memory and end. The next call raises, and so does ``aiter_fusion.check()``,
to be called after replaying a CUDA graph. Everything computed since is wrong; the group's channels refuse further use.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .... import agreement, config
from ...collective import MIB, StreamOrder, outside_graph_pools, process_group

logger = logging.getLogger("aiter_fusion")

# Sizes of one half of a channel's data, in bytes. A channel has two halves, which epochs use in turn.
CLASSES = (2 * MIB, 16 * MIB, 256 * MIB)
# Bytes before the data; the same constant stands in the kernel.
HEADER = 128


class LateRankError(RuntimeError):
    """A rank did not take part in a fused all-reduce within ``AITER_FUSION_TIMEOUT`` seconds.

    All results since then are wrong, and the group can do no more fused all-reduces.
    """


@dataclass
class Channel:
    """Memory of one size class.

    half:   bytes of one half.
    peers:  ``[world]`` int64 on the GPU, the address of every rank's memory.
    epoch:  ``[1]`` int32 on the GPU. The low 16 bits count the blocks that have started in this epoch (a launch); the
            17th is the half that the epoch uses.
    memory: what keeps the memory registered.
    """

    half: int
    peers: Tensor
    epoch: Tensor
    memory: Any = None


@dataclass
class Communicator:
    """The channels of a group on a GPU.

    late:     ``[1]`` int32 in pinned host memory, the late rank's position in the group plus 1, or 0.
    failed:   ``[1]`` int32 on the GPU, 1 once a kernel has missed a rank; later kernels then wait for nothing.
    cores:    multiprocessors of the GPU. As many blocks are sure to run at the same time.
    channels: by size class; None where a rank could not register it.
    """

    group: str
    process_group: Any
    device: torch.device
    rank: int
    ranks: list[int]
    late: Tensor
    failed: Tensor
    cores: int
    channels: dict[int, Channel | None] = field(default_factory=dict)
    order: StreamOrder = field(default_factory=StreamOrder)

    def check(self) -> None:
        """Look whether a kernel that has ended missed a rank; does not wait for the GPU.

        Raises:
            LateRankError: one has.
        """
        late = int(self.late[0])
        if late:
            raise LateRankError(
                f"rank {self.ranks[late - 1]} did not take part in an all-reduce of group {self.group!r} within "
                f"{config.timeout():g} s (AITER_FUSION_TIMEOUT): it has stopped, or does something else. All results "
                "since then are wrong, and this group can do no more fused all-reduces: end all of its processes"
            )

    def channel(self, nbytes: int) -> Channel | None:
        """The smallest channel with halves of ``nbytes``, or the largest there is; None if it cannot be registered.

        Raises:
            RuntimeError: it would be registered while a CUDA graph is captured.
        """
        half = next((size for size in CLASSES if size >= nbytes), CLASSES[-1])
        if half not in self.channels:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "memory for an all-reduce would be registered while a CUDA graph is captured: call "
                    "aiter_fusion.warmup, or the op once with as many rows, before"
                )
            self.channels[half] = self._registered(half)
        return self.channels[half]

    def _registered(self, half: int) -> Channel | None:
        channel, problem = None, None
        try:
            channel = outside_graph_pools(_allocated, self.group, self.device, self.rank, len(self.ranks), half)
        except RuntimeError as error:  # no peer access, or no memory: all ranks are told, and take the fallback
            problem = str(error).splitlines()[0]
        why = agreement.joint(f"{self.group}/{half}", self.ranks, problem)
        if why is not None:
            logger.warning("aiter_fusion: no memory for fused all-reduces, which PyTorch does instead: %s", why)
        return channel if why is None else None


def _allocated(group: str, device: torch.device, rank: int, world: int, half: int) -> Channel:
    import torch.distributed._symmetric_memory as symmetric

    size = HEADER + 2 * half
    # An allocation of its own, because a part of a pool may have another offset on another rank.
    memory = symmetric._SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)  # type: ignore[arg-type]
    memory[:HEADER].zero_()
    memory[HEADER:].fill_(0xFF)  # the kernel's EMPTY in every element
    epoch = torch.zeros(1, dtype=torch.int32, device=device)
    torch.cuda.synchronize(device)  # the rendezvous comes after it, so that no rank sends before all memory is empty
    handle = symmetric.rendezvous(memory, group)  # type: ignore[arg-type]
    addresses = [handle.get_buffer(peer, (size,), torch.uint8).data_ptr() for peer in range(world)]
    if addresses[rank] != memory.data_ptr() or handle.rank != rank:
        raise RuntimeError("symmetric memory has another address than its tensor")
    return Channel(half, torch.tensor(addresses, dtype=torch.int64, device=device), epoch, (memory, handle))


_communicators: dict[tuple[str, torch.device], Communicator] = {}


def communicator(group: str, device: torch.device) -> Communicator:
    """The communicator of a group on a GPU; a new one where another process group has taken the name."""
    found = process_group(group)
    known = _communicators.get((group, device))
    if known is None or known.process_group is not found:
        known = outside_graph_pools(_created, group, found, device)
        _communicators[group, device] = known
    return known


def _created(group: str, found: Any, device: torch.device) -> Communicator:
    import torch.distributed as dist

    failed = torch.zeros(1, dtype=torch.int32, device=device)
    torch.cuda.synchronize(device)
    return Communicator(
        group,
        found,
        device,
        dist.get_rank(found),
        dist.get_process_group_ranks(found),
        torch.zeros(1, dtype=torch.int32, pin_memory=True),
        failed,
        torch.cuda.get_device_properties(device).multi_processor_count,
    )


def check() -> None:
    """Wait for the GPU, then look whether a rank was late for a fused all-reduce. To be called after replaying CUDA
    graphs, which run no host code.

    Raises:
        LateRankError: a rank was late; the message names it.
    """
    for known in _communicators.values():
        torch.cuda.synchronize(known.device)
        known.check()
