"""The provider ``triton``: kernels of this project's own, for GPUs of NVIDIA and AMD.

Importing this package imports no triton; ``kernels`` does, when a call is compiled or run.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ... import platform
from ...op import FusedOp, Implementation, width_of
from ...stages.quantise import granularity
from . import all_reduce, launches
from .terms import terms as terms
from .tuned import state as state


def missing() -> str | None:
    """Why the kernels cannot run on this machine, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: builds of PyTorch for CUDA and ROCm bring their own"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    return None


@functools.cache
def native_fp8(device: int) -> torch.dtype | None:
    """The FP8 format that a GPU converts to in hardware: what its cast saturates in, or None if it has none."""
    if torch.version.hip is not None:
        arch = platform.architecture(device)
        return platform.ARCHITECTURES[arch].fp8 if arch in platform.SUPPORTED else None
    return torch.float8_e4m3fn if torch.cuda.get_device_capability(device) >= (8, 9) else None


def refuse(op: FusedOp, arguments: Mapping[str, Any]) -> str | None:
    """Why the kernels cannot compute a call that their terms allow (tensors may be fakes), or None."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    first = next(iter(tensors.values()))
    if first.device.type != "cuda":
        return f"its kernels are for GPUs, and the tensors are on {first.device.type}"
    native = native_fp8(first.device.index or 0)
    if arguments.get("quant_dtype", native) != native:
        return f"this GPU converts to {native}, not to {arguments['quant_dtype']}"
    for name, tensor in tensors.items():
        if name == "eps_tensor" and tensor.device.type == "cpu":
            continue
        if tensor.device != first.device:
            return f"{name} is on {tensor.device}, {next(iter(tensors))} on {first.device}"
        if name in ("scale", "eps_tensor"):
            continue
        if not isinstance(tensor.shape[-1], int):
            return f"the width of {name} is known only at run time"
        if not statically_known_true(tensor.stride(-1) == 1):
            return f"the columns of {name} are {tensor.stride(-1)} elements apart"
        if launches.rows_of(tensor) is None:
            return f"the rows of {name} are not evenly spaced (strides {tuple(tensor.stride())})"
    return all_reduce.refuse(op, arguments) if op.is_collective else None


def slower(op: FusedOp, arguments: Mapping[str, Any]) -> str | None:
    """Why Inductor's own code is faster for a call, as measured; of a symbolic number of rows its example counts."""
    first = next(value for value in arguments.values() if isinstance(value, Tensor))
    if op.is_collective:
        return None
    width = width_of(op, first)
    rows = launches.hint((launches.rows_of(first) or (1, width))[0], launches.rules.FEW)
    scales = granularity(op, arguments, width)
    major, minor = torch.__version__.split(".")[:2]
    for calls in launches.rules.INDUCTOR_FASTER:
        if scales and calls.covers(op.family, op.features, scales.name, width, rows, (int(major), int(minor))):
            return calls.why
    return None


def run(op: FusedOp) -> Implementation:
    """What computes a call outside a compiled graph."""
    if op.is_collective:
        return functools.partial(all_reduce.run, op, nvidia())
    return functools.partial(_run, op)


def _run(op: FusedOp, **arguments: Any) -> dict[str, Tensor]:
    outputs = op.allocate(**arguments)
    first = next(iter(v for v in arguments.values() if isinstance(v, Tensor)))
    plan = launches.of(op, arguments, nvidia())
    scratch = {name: first.new_empty(sizes, dtype=dtype) for name, (sizes, dtype) in plan.scratch.items()}
    known = {**arguments, **scratch, **outputs}
    known["eps_tensor"] = launches.number_or_pointer(arguments.get("eps_tensor"))
    if "scale" in arguments:
        known["scale"] = arguments["scale"]
    with torch.cuda.device(first.device), compiling_nothing() if capturing() else nullcontext():
        for launch in plan.launches:
            given = {n: known[v.name] if isinstance(v, launches.Ref) else v for n, v in launch.arguments.items()}
            kernel(launch.kernel)[(launch.grid,)](**given, num_warps=launch.warps)
    return outputs


def capturing() -> bool:
    """Whether the current stream records a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextmanager
def compiling_nothing() -> Iterator[None]:
    """Where a kernel would have to be compiled, raise instead."""
    runtime = import_module("triton").knobs.runtime

    def refuse(**about: Any) -> bool:
        raise RuntimeError(
            "a kernel would be compiled while a CUDA graph is captured: call aiter_fusion.warmup, or the op once with "
            "tensors of these dtypes and this width, before"
        )

    with runtime.scope():
        runtime.jit_cache_hook = refuse
        yield


def prepare() -> None:
    """Make Inductor launch the kernels itself in the graphs that it compiles from now on."""
    from .lowering import register

    register()


def nvidia() -> bool:
    """Whether kernels are for GPUs of NVIDIA, where they may hold PTX, and where Triton's cast to FP8 turns what is too
    large into the largest number."""
    return torch.version.hip is None


def kernel(name: str) -> Any:
    """The JIT function called ``name``."""
    return getattr(import_module(f".kernels.{name}", __name__), f"{name}_kernel")
