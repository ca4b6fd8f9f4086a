"""All-reduce, residual addition, RMSNorm and FP8 quantisation by AITER's custom all-reduce, in one or two stages.

A communicator (AITER's ``CustomAllreduce``) is created when a group first needs it, which is a collective call, and
kept. AITER's own state of process groups is not used. A call copies its input to the memory that the communicator
registered, in a captured CUDA graph too. The kernels find peers' memory by its address, so a graph registers nothing,
and AITER's ``capture()``, in which it returns zeros, is never entered.

Calls that the kernels do not take, and groups that have no communicator, get the fallback: PyTorch's all-reduce, then
the fused rest. Sizes and what the ranks have agreed on decide this, so all ranks decide alike.

The kernels poll for all ranks without a time limit.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import agreement, machine
from ...op import FusedOp
from ...registry import REGISTRY
from ..architectures import ARCHITECTURES
from ..collective import (
    MIB,
    ONE_STAGE,
    StreamOrder,
    Window,
    all_reduce_by_torch,
    outside_graph_pools,
    process_group,
    refuse_group,
    world_of,
)
from .candidates import Candidate, Limits, first_of
from .entry_points import EntryPoint, Value, call, probe
from .fused import named, presented
from .kernel_call import KernelCall, why_zeros

logger = logging.getLogger("aiter_fusion")

# AITER's communicator reads these when it is created; they limit the sizes that it takes.
ENVIRONMENT = ("AITER_CUSTOM_AR_MAX_SIZE", "AITER_CUSTOM_AR_MIN_SIZE")


def state() -> str:
    """The part of the environment that decides which calls AITER's communicator takes."""
    return " ".join(f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ)


# ---- Which calls -------------------------------------------------------------------------------------------------


class TwoStages(NamedTuple):
    """Sizes of calls that the kernels of two stages take, where every rank sums an equal part of a row.

    least, most: packs of 16 bytes in a row, both included.
    multiple:    that the packs of a row must be a multiple of, besides the number of ranks.
    nbytes:      the most bytes of a rank's tensor.
    """

    least: int
    most: int
    multiple: int
    nbytes: int

    def has(self, world: int, rows: int, width: int, itemsize: int) -> bool:
        """Whether a call of ``rows`` rows of ``width`` elements of ``itemsize`` bytes, on ``world`` ranks, is among
        them."""
        packs, rest = divmod(width * itemsize, 16)
        divided = rest == 0 and packs % math.lcm(self.multiple, world) == 0
        return divided and self.least <= packs <= self.most and rows * width * itemsize <= self.nbytes


@dataclass(frozen=True)
class Collective(Candidate):
    """A function that all ranks call together.

    returns:    the outputs that it returns, in order.
    one_stage:  the sizes for which AITER takes its kernel of one stage.
    two_stages: the sizes that its kernels of two stages can take.
    """

    returns: tuple[str, ...]
    one_stage: Window
    two_stages: TwoStages

    def why_not(self, call: KernelCall) -> str | None:
        if (why := (why_zeros(call) if call.scales != "none" else None) or super().why_not(call)) is not None:
            return why
        if call.scales == "group" and (call.block % 8 or call.block > 512):
            return f"takes groups of up to 512 elements, in multiples of 8, not of {call.block}"
        world = world_of(call["group"])
        if self.stages(world, 1, call.width, call.x.element_size()) is None:
            return (
                f"takes hidden sizes in packs of 8 elements, above 8192 only if {world} ranks can share them, not "
                f"{call.width}"
            )
        return None

    def stages(self, world: int, rows: int, width: int, itemsize: int) -> int | None:
        """The stages of a call, 1 or 2, or None for the fallback; from sizes alone, so it is the same on all ranks."""
        if self.one_stage.has(world, rows, width, itemsize):
            return 1
        return 2 if self.two_stages.has(world, rows, width, itemsize) else None


@dataclass(frozen=True)
class StagedCall:
    """A call with what only the moment of calling knows: the communicator, and the number of stages."""

    found: KernelCall
    communicator: Any
    stages: int

    def __getitem__(self, name: str) -> Any:
        return self.found[name]


_HOME = ("aiter.dist.device_communicators.custom_all_reduce",)
COMMUNICATOR = EntryPoint(
    "CustomAllreduce",
    _HOME,
    {"group": "group", "device": "device", "max_size": "max_size"},
)
# Bytes of a rank's tensor that AITER's communicator takes, its own default; a tensor must be smaller than this.
POOL = 64 * MIB
# CudaCommunicator.fused_allreduce_rmsnorm_quant takes one stage up to so many bytes, whatever the number of ranks.
QUANTISED_ONE_STAGE = Window(rows=80, packs=1024, nbytes=MIB // 8, shared=False)


def _packed(x: Tensor) -> Tensor:
    """``x`` as ``[M, H]``, a copy unless its rows have no gaps and begin at multiples of 16 bytes: kernels load 16."""
    rows = x.reshape(-1, x.shape[-1])
    dense = rows.is_contiguous() and rows.data_ptr() % 16 == 0
    return rows if dense else rows.clone(memory_format=torch.contiguous_format)


_TAKES: dict[str, Value] = {
    "self": lambda call: call.communicator,
    "input": lambda call: _packed(call["x"]),
    "residual_inp": lambda call: _packed(call["residual"]),
    "weight": lambda call: _packed(call["weight"])[0],
    "eps": "eps",
    "use_1stage": lambda call: call.stages == 1,
}
_OFFSET: dict[str, Value] = {"gemma_norm": lambda call: "offset" in call.found.features}
_GROUP_SIZE: dict[str, Value] = {"group_size": lambda call: call.found.block}
_VALUE: dict[str, Value] = {"emit_bf16": lambda call: "value" in call.found.features}


def _path(method: str, scales: str, two_stages: TwoStages, *needs: str, may: tuple[str, ...] = ()) -> Collective:
    features = frozenset({"add", *needs, *may})
    takes = dict(_TAKES)
    takes |= _OFFSET if "offset" in features else {}
    takes |= _GROUP_SIZE if scales == "group" else {}
    takes |= _VALUE if "value" in features else {}
    quantised = scales != "none"
    return Collective(
        "all_reduce_rms_norm" + ("_quant" if quantised else ""),
        EntryPoint(f"CustomAllreduce.{method}", _HOME, takes),
        Limits(
            frozenset({scales}),
            frozenset({"add", *needs}),
            frozenset(may),
            widest=two_stages.most * 8,
            alike=True,
            powers=frozenset({"group"}),
        ),
        ("q", "residual_out", "scale", "value") if quantised else ("value", "residual_out"),
        QUANTISED_ONE_STAGE if quantised else ONE_STAGE,
        two_stages,
    )


# Source: csrc/include/custom_all_reduce.cuh, v0.1.20. Without a quantiser the second stage (local_device_load_rmsnorm)
# takes 64 to 2048 packs of a row. With one (allreduce_fusion_kernel_2stage, local_device_load_rmsnorm_quant_naive) it
# has one thread for each pack, at most 1024, and its sum is right for whole waves of 32 threads only. The bytes are
# CudaCommunicator's limits.
_PLAIN = TwoStages(least=64, most=2048, multiple=1, nbytes=POOL - 1)
_TOKEN = TwoStages(least=1, most=1024, multiple=32, nbytes=4 * MIB)
_GROUP = TwoStages(least=1, most=1024, multiple=32, nbytes=POOL - 1)
PATHS = (
    _path("custom_fused_ar_rms", "none", _PLAIN),
    _path("custom_fused_ar_rms", "none", _PLAIN, "offset"),
    _path("custom_fused_ar_rms_quant", "token", _TOKEN),
    _path("custom_fused_ar_rms_quant", "token", _TOKEN, "offset"),
    _path("custom_fused_ar_rms_quant", "token", _TOKEN, "value"),
    _path("custom_fused_ar_rms_quant", "token", _TOKEN, "offset", "value"),
    _path("custom_fused_ar_rms_per_group_quant", "group", _GROUP, may=("value",)),
)
FAMILIES = frozenset(path.family for path in PATHS)


def refuse(op: FusedOp, arguments: Mapping[str, Any]) -> str | None:
    """Why AITER cannot compute a call, or None; from facts that are the same on all ranks."""
    if arguments["other"] is not None:
        return "the call sums two tensors over the ranks, and its kernels sum one"
    if "reduced" in op.features:
        return "the all-reduced value is read elsewhere, and its kernels do not return it"
    if "add" not in op.features:  # a residual of zeros would cost as much memory traffic as the fusion saves
        return "the call has no residual, and its kernels add one"
    arch = machine.architecture(arguments["x"].device.index or 0)
    if arch in ARCHITECTURES and not ARCHITECTURES[arch].all_reduces:
        return f"AITER has no fused all-reduces for {arch}"
    if (why := refuse_group(arguments["group"])) is not None:
        return why
    for found in (first_of(PATHS, op, arguments), probe(COMMUNICATOR)):
        if isinstance(found, str):
            return found
    return None


# ---- Communicators -----------------------------------------------------------------------------------------------


@dataclass
class Communicator:
    """AITER's communicator of a group on a GPU.

    handle: AITER's object; None on all ranks if one rank could not create it.
    """

    process_group: Any
    handle: Any
    order: StreamOrder = field(default_factory=StreamOrder)


_communicators: dict[tuple[str, torch.device], Communicator] = {}


def communicator(group: str, device: torch.device) -> Communicator:
    """The communicator of a group on a GPU; a new one where another process group has taken the name.

    Raises:
        RuntimeError: it would be created while a CUDA graph is captured.
    """
    found = process_group(group)
    known = _communicators.get((group, device))
    if known is None or known.process_group is not found:
        if machine.is_capturing():
            raise RuntimeError(
                f"AITER's communicator of group {group!r} would be created while a CUDA graph is captured: call "
                "aiter_fusion.warmup, or the op once, before"
            )
        known = Communicator(found, _agreed(group, found, device))
        _communicators[group, device] = known
    return known


def _create(found: Any, device: torch.device) -> Any:
    import torch.distributed as dist

    if dist.get_backend(found) != "gloo":  # AITER's exchanges addresses between CPUs
        ranks = dist.get_process_group_ranks(found)
        found = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return call(COMMUNICATOR, **COMMUNICATOR.arguments({"group": found, "device": device, "max_size": POOL}))


def _agreed(group: str, found: Any, device: torch.device) -> Any:
    """AITER's communicator, or None on all ranks if one rank has none."""
    import torch.distributed as dist

    ranks = dist.get_process_group_ranks(found)
    handle, problem = None, None
    try:
        handle = outside_graph_pools(_create, found, device)
        if not hasattr(handle, "_IS_CAPTURING"):
            problem = "this version of AITER has no _IS_CAPTURING, which says when it returns zeros"
        elif handle.disabled:
            problem = "AITER has disabled it, its log says why"
    except (AssertionError, OSError, RuntimeError, ValueError) as error:  # all ranks are told, and go without
        problem = (str(error) or repr(error)).splitlines()[0]
    why = agreement.joint(f"{group}/aiter", ranks, problem)
    if why is not None:
        logger.warning("aiter_fusion: no AITER communicator for group %r: PyTorch's all-reduce instead: %s", group, why)
    return handle if why is None else None


# ---- Calls -------------------------------------------------------------------------------------------------------


def compute(op: FusedOp, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Compute a call whose scales are in rows.

    Raises:
        RuntimeError: no path takes it, or AITER returned something else than the op's outputs.
    """
    outputs = op.allocate(**arguments)
    x = arguments["x"]
    if x.numel() == 0:
        return outputs
    chosen = first_of(PATHS, op, arguments)
    if isinstance(chosen, str):
        raise RuntimeError(f"{op.name} by aiter: {chosen}")
    path, found = chosen
    known = communicator(arguments["group"], x.device)
    stages = path.stages(world_of(arguments["group"]), x.numel() // found.width, found.width, x.element_size())
    returned = None
    if known.handle is not None and stages is not None:
        if x.is_cuda:
            known.order.enter()
        returned = _called(path, StagedCall(found, known.handle, stages))
    if returned is None:
        return _fallback(op, arguments)
    return presented(path.entry, returned, outputs)


def _called(path: Collective, staged: StagedCall) -> dict[str, Tensor] | None:
    """What AITER returned, by name; None on all ranks if the tensor is larger than its communicator takes, by its
    environment."""
    if staged.communicator._IS_CAPTURING:
        raise RuntimeError(
            f"{path.entry}: the communicator is in its capture(), where AITER returns zeros: leave that, CUDA graphs "
            "are captured without it"
        )
    returned = call(path.entry, **path.entry.arguments(staged))
    if returned is None:
        return None
    has_value = "q" not in path.returns or "value" in staged.found.features
    return named(path.entry, path.returns if has_value else path.returns[:-1], returned)


def _fallback(op: FusedOp, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """PyTorch's all-reduce, then the rest: by AITER if it has a kernel for that, else by the reference."""
    given = dict(arguments)
    given["x"] = all_reduce_by_torch(given["x"], given.pop("group")).reshape(given["residual"].shape)
    if "quant_dtype" in op.arguments:
        rest = REGISTRY.overload("rms_norm_quant", op.features)
    else:
        rest = REGISTRY.overload("add_rms_norm", frozenset())
        if given["offset"] is not None:
            given["weight"] = given["weight"].float() + given["offset"]
    assert rest is not None
    aiter = REGISTRY.providers["aiter"]
    given = {name: given[name] for name in rest.arguments}
    run = aiter.run(rest) if aiter.why_not(rest, given) is None else rest.reference
    outputs = run(**given)
    return outputs if "quant_dtype" in op.arguments else {"value": outputs["y"], **outputs}
