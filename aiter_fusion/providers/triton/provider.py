"""What the provider ``triton`` declares (``known.py``): this project's own kernels, for GPUs of NVIDIA and AMD."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ... import machine
from ...formats import FP8
from ...op import FusedOp, Implementation, width_of
from ...stages.quantise import granularity
from ..shapes import hint, rows_of
from . import eager, launches, rules
from .all_reduce import calls
from .jit import native_fp8, nvidia
from .terms import terms as terms
from .tuned import state as state
from .whole import WHOLE


def missing() -> str | None:
    """Why the kernels cannot run on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: builds of PyTorch for CUDA and ROCm bring their own"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    return None


def refuse(op: FusedOp, arguments: Mapping[str, Any]) -> str | None:
    """Why the kernels cannot compute a call that their terms allow (tensors may be fakes), or None."""
    if op.family in WHOLE:
        return WHOLE[op.family].refuse(arguments)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    first = next(iter(tensors.values()))
    if first.device.type != "cuda":
        return f"the tensors are on {first.device.type}, and its kernels are for GPUs"
    native = native_fp8(first.device.index or 0)
    if arguments.get("quant_dtype") in FP8 and arguments["quant_dtype"] != native:
        return f"the quantiser's format is {arguments['quant_dtype']}, and this GPU converts to {native}"
    for name, tensor in tensors.items():
        if name == "eps_tensor" and tensor.device.type == "cpu":
            continue
        if tensor.device != first.device:
            return f"{name} is on {tensor.device}, {next(iter(tensors))} on {first.device}"
        if name in ("scale", "eps_tensor") or tensor.dim() == 0:  # one number, which has no rows
            continue
        if not isinstance(tensor.shape[-1], int):
            return f"the hidden size of {name} is known only at run time"
        if not statically_known_true(tensor.stride(-1) == 1):
            return f"the columns of {name} are {tensor.stride(-1)} elements apart, and its kernels need 1"
        if rows_of(tensor) is None:
            return f"the rows of {name} are not evenly spaced (strides {tuple(tensor.stride())})"
    joined = launches.spans(arguments, width_of(op, arguments))
    if joined > 1 and (op.once or op.is_collective or op.stages[0].kind in launches.ACTIVATING):
        return f"a scale is for {joined} rows, and its kernels compute that for norms that nothing modulates"
    return calls.refuse(op, arguments) if op.is_collective else None


def slower(op: FusedOp, arguments: Mapping[str, Any]) -> str | None:
    """Why Inductor's code is faster for a call, by recorded measurements, or None. A symbolic number of rows counts as
    the number that the graph was captured with."""
    if op.family in WHOLE:
        return WHOLE[op.family].slower(arguments)
    first = next(value for value in arguments.values() if isinstance(value, Tensor))
    if op.is_collective:
        return None
    width = width_of(op, arguments)
    rows = hint((rows_of(first) or (1, width))[0], rules.FEW)
    scales = granularity(op, arguments, width)
    version = machine.release(torch.__version__)
    for row in rules.INDUCTOR_FASTER:
        if scales and row.covers(op.family, op.features, scales.name, width, rows, version):
            return row.why
    return None


def unmeasured(op: FusedOp, arguments: Mapping[str, Any]) -> str | None:
    """Why nothing is known about the speed of a call on its GPU, or None."""
    return WHOLE[op.family].unmeasured(arguments) if op.family in WHOLE else None


def run(op: FusedOp) -> Implementation:
    """The implementation of calls outside a compiled graph; inside one, ``lowering.py`` replaces it."""
    if op.family in WHOLE:
        return functools.partial(WHOLE[op.family].run, op)
    if op.is_collective:
        return functools.partial(calls.run, op, nvidia())
    return functools.partial(eager.run, op)


def prepare() -> None:
    """Make Inductor launch the kernels itself in the graphs that it compiles from now on."""
    from .lowering import register  # not before: it imports Inductor

    register()
