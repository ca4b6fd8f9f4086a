"""All-reduce, residual addition, RMSNorm and FP8 quantisation by AITER's custom all-reduce, in one or two stages.

A communicator (AITER's ``CustomAllreduce``) is made of a group when it is first needed, and kept; that is a collective.
AITER's own state of process groups is not used. A call copies its input to memory that was registered then, in a
captured CUDA graph too: the kernels find that memory by its address, so nothing is registered with a graph, and
AITER's ``capture()``, which gives zeros while it warms up, is never entered.

A call that the kernels do not take, or of a group for which no communicator could be made, is PyTorch's all-reduce and
the fused rest. Which it is follows from sizes, from what all ranks have compared, and from what they have agreed on.

The kernels wait for all ranks, without a limit in time.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ... import agreement, platform
from ...op import FusedOp
from ...registry import REGISTRY
from .. import PROVIDERS
from ..collective import MIB, ONE_STAGE, Turns, Window, kept, plainly, process_group, refuse_group, world_of
from ..triton import capturing
from .entry_points import EntryPoint, call, probe
from .fused import Call, Candidate, Limits, first_of, presented, why_zeros

logger = logging.getLogger("aiter_fusion")

# What AITER's communicator reads when it is made: which sizes it takes.
ENVIRONMENT = ("AITER_CUSTOM_AR_MAX_SIZE", "AITER_CUSTOM_AR_MIN_SIZE")


def state() -> str:
    """What of the environment decides which calls AITER's communicator takes."""
    return " ".join(f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ)


# ---- Which calls -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoStages:
    """Rows of ``least`` to ``most`` packs of 16 bytes, a multiple of ``multiple`` and of the ranks, which each sum as
    many of them; and at most ``nbytes`` bytes."""

    least: int
    most: int
    multiple: int
    nbytes: int

    def has(self, world: int, rows: int, width: int, itemsize: int) -> bool:
        packs, rest = divmod(width * itemsize, 16)
        divided = rest == 0 and packs % math.lcm(self.multiple, world) == 0
        return divided and self.least <= packs <= self.most and rows * width * itemsize <= self.nbytes


@dataclass(frozen=True)
class Collective(Candidate):
    """One that all ranks compute together.

    returns: the outputs that it returns, in order.
    one_stage, two_stages: the sizes for which AITER takes its kernel of one stage, and what those of two can take.
    """

    returns: tuple[str, ...]
    one_stage: Window
    two_stages: TwoStages

    def why_not(self, given: Call) -> str | None:
        if (why := (why_zeros(given) if given.scales != "none" else None) or super().why_not(given)) is not None:
            return why
        if given.scales == "group" and (given.block % 8 or given.block > 512):
            return f"takes groups of up to 512 elements, in eights, not of {given.block}"
        world = world_of(given.arguments["group"])
        if self.stages(world, 1, given.width, given.x.element_size()) is None:
            return f"takes rows in packs of 8 elements, more than 1024 if {world} ranks share them, not {given.width}"
        return None

    def stages(self, world: int, rows: int, width: int, itemsize: int) -> int | None:
        """In how many stages calls of this size go; None if not by AITER. From sizes alone, the same on all ranks."""
        if self.one_stage.has(world, rows, width, itemsize):
            return 1
        return 2 if self.two_stages.has(world, rows, width, itemsize) else None


_HOME = ("aiter.dist.device_communicators.custom_all_reduce",)
COMMUNICATOR = EntryPoint("CustomAllreduce", _HOME, ("group", "device", "max_size"))
# Bytes of a rank's tensor that AITER's communicator takes, by its own default; less than that by those who call it.
POOL = 64 * MIB
# CudaCommunicator.fused_allreduce_rmsnorm_quant: one stage up to so many bytes, of any number of ranks.
QUANTISED_ONE_STAGE = Window(rows=80, packs=1024, nbytes=MIB // 8, shared=False)


def _path(method: str, scales: str, two_stages: TwoStages, *needs: str, may: tuple[str, ...] = ()) -> Collective:
    features = frozenset({"add", *needs, *may})
    keywords = ("self", "input", "residual_inp", "weight", "eps", "use_1stage")
    keywords += ("gemma_norm",) if "offset" in features else ()
    keywords += ("group_size",) if scales == "group" else ()
    keywords += ("emit_bf16",) if "value" in features else ()
    quantised = scales != "none"
    return Collective(
        "all_reduce_rms_norm" + ("_quant" if quantised else ""),
        EntryPoint(f"CustomAllreduce.{method}", _HOME, keywords),
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


# csrc/include/custom_all_reduce.cuh, v0.1.20: without a quantiser the second stage (local_device_load_rmsnorm) takes 64
# to 2048 packs. With one (allreduce_fusion_kernel_2stage, local_device_load_rmsnorm_quant_naive) it has a thread for
# each of at most 1024, and sums over whole waves of 32 alone. CudaCommunicator calls them up to these sizes.
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
    """Why AITER cannot compute a call, or None; from what is the same on all ranks."""
    if arguments["other"] is not None:
        return "its kernels sum one tensor over the ranks, and this call sums two"
    if "reduced" in op.features:
        return "its kernels do not return the sum of the ranks by itself"
    if "add" not in op.features:  # one of zeros would cost as much memory traffic as the fusion saves
        return "its kernels add a residual, and this call has none"
    arch = platform.architecture(arguments["x"].device.index or 0)
    if arch in platform.ARCHITECTURES and not platform.ARCHITECTURES[arch].all_reduces:
        return f"its fused all-reduces are not written for {arch}"
    if (why := refuse_group(arguments["group"])) is not None:
        return why
    for found in (first_of(PATHS, op, arguments), probe(COMMUNICATOR)):
        if isinstance(found, str):
            return found
    return None


# ---- Communicators -----------------------------------------------------------------------------------------------


@dataclass
class Communicator:
    """AITER's communicator of a group on a device: None where a rank could not make one."""

    process_group: Any
    handle: Any
    turns: Turns = field(default_factory=Turns)


_communicators: dict[tuple[str, torch.device], Communicator] = {}


def communicator(group: str, device: torch.device) -> Communicator:
    """The one of a group and a device; another when the group of that name is another."""
    found = process_group(group)
    known = _communicators.get((group, device))
    if known is None or known.process_group is not found:
        if capturing():
            raise RuntimeError(
                f"AITER's communicator of group {group!r} would be made while a CUDA graph is captured: call "
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
        return call(COMMUNICATOR, group=found, device=device, max_size=POOL)


def _agreed(group: str, found: Any, device: torch.device) -> Any:
    """AITER's communicator, or None if a rank has none; the same on all."""
    import torch.distributed as dist

    ranks = dist.get_process_group_ranks(found)
    handle, problem = None, None
    try:
        handle = kept(_create, found, device)
        if not hasattr(handle, "_IS_CAPTURING"):
            problem = "this version of AITER does not say when it returns zeros"
        elif handle.disabled:
            problem = "AITER has disabled it; its log says why"
    except (AssertionError, OSError, RuntimeError, ValueError) as error:  # all ranks are told, and go without
        problem = (str(error) or repr(error)).splitlines()[0]
    why = agreement.joint(f"{group}/aiter", ranks, problem)
    if why is not None:
        logger.warning("aiter_fusion: no AITER communicator for group %r: PyTorch's all-reduce instead: %s", group, why)
    return handle if why is None else None


# ---- Calls -------------------------------------------------------------------------------------------------------


def run(op: FusedOp, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Compute a call that ``refuse`` does not refuse, but for scales in columns."""
    outputs = op.allocate(**arguments)
    x = arguments["x"]
    if x.numel() == 0:
        return outputs
    chosen = first_of(PATHS, op, arguments)
    if isinstance(chosen, str):
        raise RuntimeError(f"{op.name} by aiter: {chosen}")
    path, given = chosen
    known = communicator(arguments["group"], x.device)
    stages = path.stages(world_of(arguments["group"]), x.numel() // given.width, given.width, x.element_size())
    returned = None
    if known.handle is not None and stages is not None:
        if x.is_cuda:
            known.turns.take()
        returned = _call(path, given, known.handle, stages)
    if returned is None:  # too large for what AITER registered, by its environment: the same on all ranks
        return _plainly(op, arguments)
    return presented(path.entry, returned, outputs)


def _call(path: Collective, given: Call, handle: Any, stages: int) -> dict[str, Tensor] | None:
    if handle._IS_CAPTURING:
        raise RuntimeError(
            f"{path.entry}: the communicator is in its capture(), where AITER returns zeros: leave that, CUDA graphs "
            "are captured without it"
        )
    more = {
        "gemma_norm": "offset" in given.features,
        "emit_bf16": "value" in given.features,
        "group_size": given.block,
    }
    returned = call(
        path.entry,
        self=handle,
        input=_packed(given.x),
        residual_inp=_packed(given.arguments["residual"]),
        weight=_packed(given.arguments["weight"])[0],
        eps=given.arguments["eps"],
        use_1stage=stages == 1,
        **{name: value for name, value in more.items() if name in path.entry.keywords},
    )
    if returned is None:
        return None
    names = path.returns if more["emit_bf16"] or "q" not in path.returns else path.returns[:-1]
    if len(returned) != len(names):
        raise RuntimeError(
            f"{path.entry} returned {len(returned)} tensors, and {len(names)} were expected: this version of AITER is "
            "not supported"
        )
    return dict(zip(names, returned, strict=True))


def _packed(x: Tensor) -> Tensor:
    """Rows without gaps that begin at multiples of 16 bytes, as the kernels load them; copied if they are not."""
    rows = x.reshape(-1, x.shape[-1])
    dense = rows.is_contiguous() and rows.data_ptr() % 16 == 0
    return rows if dense else rows.clone(memory_format=torch.contiguous_format)


def _plainly(op: FusedOp, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """PyTorch's all-reduce, then the rest: by AITER if it has a kernel for it, else by the reference."""
    given = dict(arguments)
    given["x"] = plainly(given["x"], given.pop("group")).reshape(given["residual"].shape)
    if "quant_dtype" in op.arguments:
        rest = REGISTRY.overload("rms_norm_quant", op.features)
    else:
        rest = REGISTRY.overload("add_rms_norm", frozenset())
        if given["offset"] is not None:
            given["weight"] = given["weight"].float() + given["offset"]
    assert rest is not None
    aiter = PROVIDERS["aiter"]
    given = {name: given[name] for name in rest.arguments}
    run = aiter.run(rest) if aiter.why_not(rest, given) is None else rest.reference
    outputs = run(**given)
    return outputs if "quant_dtype" in op.arguments else {"value": outputs["y"], **outputs}
