"""All-reduce fusions over symmetric memory: which calls are taken, by which way, and the memory that they go through.

Memory (a ``Channel``) is registered once for a group and a size class, when first needed, and kept. Registering is a
collective and waits for the device. All of a group's channels take at most 548 MiB on each GPU; what needs more goes in
pieces.

A rank that does not come is noticed by the kernels of the others: after ``AITER_FUSION_TIMEOUT`` seconds, or at most
twice as long, they write its number to host memory and end. The next call raises, and so does ``aiter_fusion.check()``,
which is what to call after replaying a CUDA graph. Nothing computed since is right, and the group's channels refuse
further use.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ... import agreement, config
from ...op import FusedOp
from ...registry import REGISTRY
from ...stages.quantise import granularity
from ..collective import MIB, ONE_STAGE, Turns, kept, plainly, process_group, refuse_group
from . import launches, rules

logger = logging.getLogger("aiter_fusion")

# A channel has two halves of data; these sizes of a half, in bytes.
CLASSES = (2 * MIB, 16 * MIB, 256 * MIB)
HEADER = 128  # bytes before the data, as in the kernel
ROWS = 32768  # of one launch: blocks are numbered in 16 bits


# ---- Which way ---------------------------------------------------------------------------------------------------


# The fastest way, by the number of ranks: (up to so many bytes of a rank's tensor, way). It wins over AITER's rule,
# which leaves out sizes for which one shot is the fastest here, and has in sizes for which two are. "plain", the
# library's all-reduce and one kernel for the rest, never was.
# Measured by ``bench allreduce`` on NVIDIA H200 (NVLink, no multicast; torch 2.11.0+cu130, triton 3.6.0, 2026-11-21) in
# bfloat16, for 1 to 8192 rows of 8192. Of 2 ranks one shot is always the fastest, since as much is sent either way
# (8192 rows: 373 us, two 377); of 4 ranks one for 16 rows (8.1 us, two 8.4), two for 32 (9.2, one 10.4).
MEASURED: Mapping[int, tuple[tuple[float, str], ...]] = {
    2: ((math.inf, "one_shot"),),
    4: ((MIB // 4, "one_shot"), (math.inf, "two_shot")),
}
# Of 8 ranks nothing has been measured: AITER's rule, and beyond it what is the fastest for most of 4.
UNMEASURED = "two_shot"

_forced: str | None = None


@contextlib.contextmanager
def forced(way: str) -> Iterator[None]:
    """Take all calls by this way: to measure it."""
    global _forced
    before, _forced = _forced, way
    try:
        yield
    finally:
        _forced = before


def choose(world: int, rows: int, width: int, itemsize: int) -> str:
    """``one_shot``, ``two_shot`` or ``plain``: from sizes alone, which are the same on all ranks."""
    if _forced is not None:
        return _forced
    if world in MEASURED:
        return next(way for most, way in MEASURED[world] if rows * width * itemsize <= most)
    return "one_shot" if ONE_STAGE.has(world, rows, width, itemsize) else UNMEASURED


def refuse(op: FusedOp, arguments: Mapping[str, Any]) -> str | None:
    """Why no kernel can take a call, from what is the same on all ranks; the rest of ``triton.refuse`` has passed."""
    if torch.version.hip is not None:
        return "its all-reduces have not been run on AMD GPUs"
    return refuse_group(arguments["group"])


# ---- Memory ------------------------------------------------------------------------------------------------------


class LateRankError(RuntimeError):
    """A rank did not take part in a fused all-reduce in time. Results since are wrong; the group is of no more use."""


@dataclass
class Channel:
    """Memory of one class: the ranks' addresses, and this rank's turn, on the device."""

    half: int
    peers: Tensor
    turn: Tensor
    memory: Any = None  # what keeps it registered


@dataclass
class Communicator:
    """The channels of a group on a device, by class; ``None`` where the group could not register one."""

    group: str
    process_group: Any
    device: torch.device
    rank: int
    ranks: list[int]
    late: Tensor  # one number in pinned memory: the late rank of the group, from 1 on, or 0
    failed: Tensor  # on the device: 1 when a kernel has missed a rank
    cores: int  # multiprocessors of the device, on each of which a block runs for certain
    channels: dict[int, Channel | None] = field(default_factory=dict)
    turns: Turns = field(default_factory=Turns)

    def check(self) -> None:
        """Raise a LateRankError if a kernel that has ended missed a rank."""
        late = int(self.late[0])
        if late:
            raise LateRankError(
                f"rank {self.ranks[late - 1]} did not take part in an all-reduce of group {self.group!r} within "
                f"{config.timeout():g} s (AITER_FUSION_TIMEOUT): it has stopped, or does something else. Results since "
                "then are wrong, and this group can do no more fused all-reduces: end all of its processes"
            )

    def channel(self, needed: int) -> Channel | None:
        """The channel for ``needed`` bytes in a half, or the largest; None if there is none and none can be made."""
        half = next((size for size in CLASSES if size >= needed), CLASSES[-1])
        if half not in self.channels:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "memory for an all-reduce would be registered while a CUDA graph is captured: call "
                    "aiter_fusion.warmup, or the op once with as many rows, before"
                )
            self.channels[half] = self._register(half)
        return self.channels[half]

    def _register(self, half: int) -> Channel | None:
        channel, problem = None, None
        try:
            channel = kept(_symmetric, self.group, self.device, self.rank, len(self.ranks), half)
        except RuntimeError as error:  # no peer access, no memory: all ranks are told, and go without
            problem = str(error).splitlines()[0]
        why = agreement.joint(f"{self.group}/{half}", self.ranks, problem)
        if why is not None:
            logger.warning("aiter_fusion: no memory for fused all-reduces, which PyTorch does instead: %s", why)
        return channel if why is None else None


def _symmetric(group: str, device: torch.device, rank: int, world: int, half: int) -> Channel:
    import torch.distributed._symmetric_memory as symmetric

    size = HEADER + 2 * half
    # An allocation of its own: a part of a pool's may begin elsewhere on another rank.
    memory = symmetric._SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)  # type: ignore[arg-type]
    memory[:HEADER].zero_()
    memory[HEADER:].fill_(0xFF)  # empty
    turn = torch.zeros(1, dtype=torch.int32, device=device)
    torch.cuda.synchronize(device)  # nobody sends before all is empty
    handle = symmetric.rendezvous(memory, group)  # type: ignore[arg-type]
    addresses = [handle.get_buffer(peer, (size,), torch.uint8).data_ptr() for peer in range(world)]
    if addresses[rank] != memory.data_ptr() or handle.rank != rank:
        raise RuntimeError("symmetric memory has another address than its tensor")
    return Channel(half, torch.tensor(addresses, dtype=torch.int64, device=device), turn, (memory, handle))


_communicators: dict[tuple[str, torch.device], Communicator] = {}


def communicator(group: str, device: torch.device) -> Communicator:
    """The one of a group and a device; another when the group of that name is another."""
    found = process_group(group)
    known = _communicators.get((group, device))
    if known is None or known.process_group is not found:
        known = kept(_communicator, group, found, device)
        _communicators[group, device] = known
    return known


def _communicator(group: str, found: Any, device: torch.device) -> Communicator:
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
    """Wait for the GPU, and raise if a rank was late for a fused all-reduce: call it after replaying CUDA graphs.

    Raises:
        LateRankError: it names the rank.
    """
    for known in _communicators.values():
        torch.cuda.synchronize(known.device)
        known.check()


# ---- Calls -------------------------------------------------------------------------------------------------------


def _rows(x: Tensor, width: int) -> Tensor:
    """``[rows, width]``; rows begin at multiples of 16 bytes."""
    found = launches.rows_of(x)
    step = x.element_size()
    if found is None or x.stride(-1) != 1 or found[1] * step % 16 or x.data_ptr() % 16:
        return x.reshape(-1, width).clone(memory_format=torch.contiguous_format)
    if x.dim() == 2 and x.stride(0) == found[1]:
        return x
    return x.as_strided((int(found[0]), width), (int(found[1]), 1))


_constants: dict[tuple[Any, ...], dict[str, Any]] = {}


def constants(op: FusedOp, arguments: Mapping[str, Any], width: int, nvidia: bool) -> dict[str, Any]:
    """The kernel's constants, but for those of the way: of tensors they depend on the dtypes alone."""
    given = (value.dtype if isinstance(value, Tensor) else value for value in arguments.values())
    key = (op.family, op.features, width, nvidia, *given)
    if key not in _constants:
        _constants[key] = _found_constants(op, arguments, width, nvidia)
    return _constants[key]


def _found_constants(op: FusedOp, arguments: Mapping[str, Any], width: int, nvidia: bool) -> dict[str, Any]:
    value = op.shape(**arguments)["value"][1]
    if op.stage("fp8_quant"):
        quantiser = launches.quantiser_arguments(op, arguments, width, value, nvidia)
    else:
        quantiser = {"WIDTH": width, "BLOCK": width, "VALUE": launches.dtype_name(value), "GROUPED": False}
        quantiser |= {"SCALE_STEPS": (), "FACTOR_STEPS": (), "VALUE_STEPS": (), "COLUMN_MAJOR": False, "PTX": nvidia}
    names = ("WIDTH", "BLOCK", "VALUE", "GROUPED", "COLUMN_MAJOR", "SCALE_STEPS", "FACTOR_STEPS", "VALUE_STEPS", "PTX")
    return {name: quantiser[name] for name in names} | {
        "EPS": arguments["eps"],
        "OFFSET": arguments["offset"],
        "CAST_FIRST": arguments["cast_first"],
        "SUM": launches.dtype_name(arguments.get("sum_dtype", arguments["x"].dtype)),
        "DTYPE": launches.dtype_name(arguments["dtype"]),
        "SEGMENTS": rules.power_of_two(width // quantiser["BLOCK"]),
        "SEGMENT": rules.power_of_two(quantiser["BLOCK"]),
        "NORM": True,
    }


def launch(constants: Mapping[str, Any], rows: int, cores: int) -> dict[str, int]:
    """How a row's block is launched. While each has a multiprocessor to itself, 8 elements a thread; of more, two of
    8192 elements fit on one, with 16 elements and 64 registers a thread: while one waits, the other works."""
    elements = constants["SEGMENTS"] * constants["SEGMENT"]
    alone = rows <= cores
    threads = rules.threads(rules.MOST_THREADS, elements, each=8 if alone else 16)
    return {"num_warps": max(1, threads // rules.lanes(constants["PTX"])), **({} if alone else {"maxnreg": 64})}


def run(op: FusedOp, nvidia: bool, **arguments: Any) -> dict[str, Tensor]:
    """A call: in two ops if one scale is for the whole tensor, whose maximum is known after all rows are."""
    x = arguments["x"]
    scales = granularity(op, arguments, x.shape[-1])
    if scales is not None and scales.name == "tensor":
        return _then_quantise(op, nvidia, arguments)
    width = x.shape[-1]
    outputs = op.allocate(**arguments)
    tensors = {
        "q": outputs.get("q"),
        "scale_out": outputs.get("scale"),
        "value_out": outputs.get("value"),
        "residual_out": outputs.get("residual_out"),
        "reduced_out": outputs.get("reduced"),
    }
    _reduce(arguments, tensors, constants(op, arguments, width, nvidia))
    return outputs


def _then_quantise(op: FusedOp, nvidia: bool, arguments: dict[str, Any]) -> dict[str, Tensor]:
    from . import run as run_kernels

    given = dict(arguments)
    sizes, dtype, *_ = op.shape(**arguments)["reduced"]
    x, other, group = given.pop("x"), given.pop("other"), given.pop("group")
    reduced = x.new_empty(sizes, dtype=dtype)
    known = constants(op, arguments, x.shape[-1], nvidia) | {"NORM": False, "BLOCK": x.shape[-1], "SEGMENTS": 1}
    known |= {"SEGMENT": rules.power_of_two(x.shape[-1]), "GROUPED": False, "COLUMN_MAJOR": False}
    nothing = dict.fromkeys(("q", "scale_out", "value_out", "residual_out"))
    _reduce({"x": x, "other": other, "group": group, "weight": None}, {**nothing, "reduced_out": reduced}, known)
    quantise = REGISTRY.overload("rms_norm_quant", op.features)
    assert quantise is not None
    return {**run_kernels(quantise)(x=reduced, **given), "reduced": reduced}


def _reduce(arguments: Mapping[str, Any], outputs: Mapping[str, Tensor | None], constants: dict[str, Any]) -> None:
    """Fill the outputs that are tensors, by the way that ``choose`` says."""
    from . import capturing, compiling_nothing

    x, other, width = arguments["x"], arguments["other"], arguments["x"].shape[-1]
    rows = x.numel() // width
    known = communicator(arguments["group"], x.device)
    known.check()
    if rows == 0:
        return
    world, tensors = len(known.ranks), 1 if other is None else 2
    way = choose(world, rows, width, x.element_size())
    row = width * x.element_size()
    channel = known.channel(needed(way, world, rows, tensors) * row) if way != "plain" else None
    with torch.cuda.device(x.device), compiling_nothing() if capturing() else contextlib.nullcontext():
        known.turns.take()
        if channel is None:
            way = "plain"
            x = plainly(x, arguments["group"])
            other = None if other is None else plainly(other, arguments["group"])
        given = _views({**arguments, "x": x, "other": other}, outputs, width)
        most = rows if channel is None else at_once(way, world, tensors, channel.half // row)
        for first in range(0, rows, most):
            count = min(most, rows - first)
            piece = given if count == rows else _part(given, first, count)
            placed = _placed(way, channel, known, count, rows, x)
            _kernel()[(count,)](**piece, **constants, **placed, **launch(constants, count, known.cores))


def needed(way: str, world: int, rows: int, tensors: int) -> int:
    """Rows of memory in a half of a channel: for what every rank sends, and in two shots for sums."""
    if way == "one_shot":
        return world * tensors * rows
    return world * tensors * -(-rows // world) + rows


def at_once(way: str, world: int, tensors: int, memory: int) -> int:
    """Rows that one launch can take with ``memory`` rows in a half."""
    most = memory // (world * tensors) if way == "one_shot" else memory // (tensors + 1) // world * world
    return min(most, ROWS)


WHOLE = ("weight", "scale", "eps")  # tensors without rows


def _part(given: Mapping[str, Any], first: int, count: int) -> dict[str, Any]:
    return {
        name: value[first : first + count] if isinstance(value, Tensor) and name not in WHOLE else value
        for name, value in given.items()
    }


def _views(arguments: Mapping[str, Any], outputs: Mapping[str, Tensor | None], width: int) -> dict[str, Any]:
    """The kernels' tensors as rows, and how far apart these are."""
    rows = {
        name: None if arguments.get(name) is None else _rows(arguments[name], width)
        for name in ("x", "other", "residual")
    }
    strides = {f"{name}_stride": 0 if tensor is None else tensor.stride(0) for name, tensor in rows.items()}
    made = {
        name: None if tensor is None else tensor.view(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor[None]
        for name, tensor in outputs.items()
    }
    eps = launches.number_or_pointer(arguments.get("eps_tensor"))
    return {**rows, **strides, **made, "weight": arguments["weight"], "scale": arguments.get("scale"), "eps": eps}


def _placed(
    way: str, channel: Channel | None, known: Communicator, rows: int, all_rows: int, x: Tensor
) -> dict[str, Any]:
    """The kernel's arguments that say where it runs; without a channel, on its own."""
    return {
        "peers": None if channel is None else channel.peers,
        "turn": None if channel is None else channel.turn,
        "failed": None if channel is None else known.failed,
        "late": None if channel is None else known.late,
        "rank": known.rank,
        "rows": rows,
        "all_rows": all_rows,
        "half": 0 if channel is None else channel.half,
        "limit": int(config.timeout() * 1e9),
        "WAY": way,
        "TICKETS": rows > known.cores,
        "W": 1 if channel is None else len(known.ranks),
        "ITEM": x.element_size(),
    }


def _kernel() -> Any:
    return import_module(".kernels.all_reduce_rms_norm", __package__).all_reduce_rms_norm_kernel
