"""What the provider ``aiter`` declares (``known.py``): AMD's AITER, called by contract.

Importing this module imports no AITER; ``missing`` does, once AITER is found on a machine that can run it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ... import config, machine
from ...domains import ANYTHING
from ...formats import FP8
from ...op import FusedOp, Implementation
from ..architectures import ARCHITECTURES, RUNS_ON
from ..terms import Terms
from . import all_reduce, candidates, decode, fused, installation, linear
from .all_reduce import state as state
from .bridge import ADAPTERS

DEVICE = "cuda"  # PyTorch's name for an AMD GPU
# The fused ops that are not made of stages: modules with terms, refusals and the computation.
WHOLE: Mapping[str, Any] = {"decode_attention": decode, "fp8_linear": linear}


def native_fp8(device: int = 0) -> torch.dtype | None:
    """The FP8 format of a GPU, or None if it has none, or AITER does not know its architecture.

    Args:
        device: index of the GPU.
    """
    row = ARCHITECTURES.get(machine.architecture(device) or "")
    return row.fp8 if row is not None else None


@functools.cache
def missing() -> str | None:
    """Why AITER cannot run on this machine, or None. Imports AITER if nothing else speaks against it."""
    reason = installation.why_no_aiter()
    if reason is not None:
        return reason
    try:
        loaded = installation.load_aiter()
    except RuntimeError as error:
        return str(error)
    theirs, ours = getattr(getattr(loaded, "dtypes", None), "fp8", None), native_fp8()
    if ours is not None and theirs is not None and theirs != ours:
        return f"AITER takes this GPU's FP8 format for {theirs}, and {machine.architecture()} has {ours}"
    return None


def unwanted(op: FusedOp, arguments: Mapping[str, Any]) -> str | None:
    """Why a call does not choose AITER unless AITER is asked for by name, or None."""
    experimental = installation.why_experimental()
    if experimental is not None:
        return f"{experimental}: ask for provider='aiter' by name to use them"
    return "; ".join(config.against(op.family)) or None


def terms(op: FusedOp) -> Terms | None:
    """The calls of an op that AITER might take. Of the bridge's ops these are all calls, because an adapter's
    conditions list every objection, and terms stop at the first."""
    if op.family in ADAPTERS:
        return Terms(dict.fromkeys(op.arguments, ANYTHING), op.features)
    if op.family in WHOLE:
        return WHOLE[op.family].TERMS
    return candidates.terms((*fused.PATHS, *all_reduce.PATHS), op)


def _elsewhere(arguments: Mapping[str, Any]) -> str | None:
    """Why AITER can compute nothing where the tensors are, or None."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    first = next(iter(tensors.values()))
    tensors.pop("eps_tensor", None)  # refused wherever it is
    for name, tensor in tensors.items():
        if tensor.device.type != DEVICE:
            return f"{name} is on {tensor.device.type}, and its kernels are for AMD GPUs"
        if tensor.device != first.device:
            return f"{name} is on {tensor.device}, {next(iter(tensors))} on {first.device}"
    arch = _architecture(arguments)
    return None if arch in ARCHITECTURES else f"AITER does not know {arch}"


def _architecture(arguments: Mapping[str, Any]) -> str:
    first = next(value for value in arguments.values() if isinstance(value, Tensor))
    return machine.architecture(first.device.index or 0) or "unknown"


def refuse(op: FusedOp, arguments: Mapping[str, Any]) -> str | None:
    """Why AITER cannot compute a call that its terms allow (tensors may be fakes), or None."""
    if (why := _elsewhere(arguments)) is not None:
        return why
    arch = _architecture(arguments)
    native = ARCHITECTURES[arch].fp8
    if op.family in ADAPTERS:
        found = (_lacking(op, arch), ADAPTERS[op.family].why_not(arguments, native))
        return "; ".join(why for why in found if why is not None) or None
    if op.family in WHOLE:
        return WHOLE[op.family].refuse(op, arguments, native)
    if arguments.get("quant_dtype") in FP8 and native is None:
        return f"{arch} computes with no FP8"
    if arguments.get("quant_dtype") in FP8 and arguments["quant_dtype"] != native:
        return f"the quantiser's format is {arguments['quant_dtype']}, and this GPU's FP8 format is {native}"
    if op.family in all_reduce.FAMILIES:
        return all_reduce.refuse(op, arguments)
    chosen = fused.choose(op, arguments)
    return chosen if isinstance(chosen, str) else None


def _lacking(op: FusedOp, arch: str) -> str | None:
    """Why AITER has no kernel of an op of the bridge on an architecture, or None."""
    known = RUNS_ON[op.family]
    return None if arch in known else f"the GPU is {arch}, and AITER's {op.family} is for {', '.join(known)}"


def routes(op: FusedOp, arguments: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """AITER's functions for an op of the bridge, in the order in which they are asked, each with why it does not take a
    call, or None."""
    paths = ADAPTERS[op.family].paths
    why = missing() or _elsewhere(arguments) or _lacking(op, _architecture(arguments))
    if why is not None:
        return [(str(path.entry), why) for path in paths]
    native = ARCHITECTURES[_architecture(arguments)].fp8
    return [(str(path.entry), path.why_not(arguments, native)) for path in paths]


def run(op: FusedOp) -> Implementation:
    """The implementation of an op."""
    return functools.partial(_on_its_device, op)


def _on_its_device(op: FusedOp, **arguments: Any) -> dict[str, Tensor]:
    # AITER launches on the current device, wherever the tensors are
    with torch.cuda.device_of(next(value for value in arguments.values() if isinstance(value, Tensor))):
        return _computed(op, arguments)


def _computed(op: FusedOp, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    if op.family in ADAPTERS:
        native = ARCHITECTURES[_architecture(arguments)].fp8
        return ADAPTERS[op.family].path(arguments, native).run(op, arguments)
    if op.family in WHOLE:
        return WHOLE[op.family].compute(op, arguments)
    if arguments.get("column_major"):
        # copied, as the graph would have: AITER's own transposed scales come in three layouts under one flag
        outputs = _computed(op, {**arguments, "column_major": False})
        return {**outputs, "scale": op.allocate(**arguments)["scale"].copy_(outputs["scale"])}
    return (all_reduce if op.family in all_reduce.FAMILIES else fused).compute(op, arguments)
