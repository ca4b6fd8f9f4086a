"""The provider ``aiter``: AMD's AITER, by contract.

Importing this package imports no AITER; ``missing`` does, once it has been found on a machine that can run it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ... import config, platform
from ...domains import ANYTHING
from ...op import FusedOp, Implementation
from ..terms import Terms
from . import all_reduce, fused, library
from .all_reduce import state as state

DEVICE = "cuda"  # what PyTorch calls an AMD GPU


def native_fp8(device: int = 0) -> torch.dtype | None:
    """The FP8 format of a GPU, by its live architecture; None if AITER does not know it."""
    known = platform.ARCHITECTURES.get(platform.architecture(device) or "")
    return known.fp8 if known is not None else None


@functools.cache
def missing() -> str | None:
    """Why AITER cannot run on this machine, or None. Imports it where only its import is left to try."""
    reason = platform.why_no_aiter()
    if reason is not None:
        return reason
    try:
        loaded = platform.load_aiter()
    except RuntimeError as error:
        return str(error)
    theirs = getattr(getattr(loaded, "dtypes", None), "fp8", None)
    if theirs is not None and theirs != native_fp8():
        return f"AITER takes this GPU's FP8 format for {theirs}, and {platform.architecture()} has {native_fp8()}"
    return None


def unwanted(op: FusedOp, arguments: Mapping[str, Any]) -> str | None:
    """Why AITER is not to be chosen for a call unless it is asked for by name, or None."""
    experimental = platform.why_experimental()
    if experimental is not None:
        return f"{experimental}: ask for provider='aiter' by name to use them"
    off = config.against(op.family)
    return "; ".join(off) or None


def terms(op: FusedOp) -> Terms | None:
    """What AITER can compute of an op: of the bridge's, ``library`` asks every call for all that it must be."""
    if op.family in library.BRIDGES:
        return Terms(dict.fromkeys(op.arguments, ANYTHING), op.features)
    return fused.terms((*fused.PATHS, *all_reduce.PATHS), op)


def refuse(op: FusedOp, arguments: Mapping[str, Any]) -> str | None:
    """Why AITER cannot compute a call that its terms allow (tensors may be fakes), or None."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    first = next(iter(tensors.values()))
    tensors.pop("eps_tensor", None)  # refused wherever it is
    for name, tensor in tensors.items():
        if tensor.device.type != DEVICE:
            return f"its kernels are for AMD's GPUs, and {name} is on {tensor.device.type}"
        if tensor.device != first.device:
            return f"{name} is on {tensor.device}, {next(iter(tensors))} on {first.device}"
    native = native_fp8(first.device.index or 0)
    if native is None:
        return f"AITER does not know {platform.architecture(first.device.index or 0)}"
    if op.family in library.BRIDGES:
        return library.refuse(op, arguments, native)
    if arguments.get("quant_dtype", native) != native:
        return f"this GPU's FP8 format is {native}, not {arguments['quant_dtype']}"
    if op.family in all_reduce.FAMILIES:
        return all_reduce.refuse(op, arguments)
    chosen = fused.choose(op, arguments)
    return chosen if isinstance(chosen, str) else None


def run(op: FusedOp) -> Implementation:
    """What computes a call."""
    return functools.partial(_run, op)


def _run(op: FusedOp, **arguments: Any) -> dict[str, Tensor]:
    # AITER launches on the device that is current, wherever the tensors are
    with torch.cuda.device_of(next(value for value in arguments.values() if isinstance(value, Tensor))):
        return _there(op, arguments)


def _there(op: FusedOp, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    if op.family in library.BRIDGES:
        return library.run(op, arguments)
    if arguments.get("column_major"):
        # copied, as the graph would have: AITER's own transposed scales come in three layouts under one flag
        outputs = _there(op, {**arguments, "column_major": False})
        return {**outputs, "scale": op.allocate(**arguments)["scale"].copy_(outputs["scale"])}
    return (all_reduce if op.family in all_reduce.FAMILIES else fused).run(op, arguments)
