"""Calls of the fused ops outside a compiled graph."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ... import machine
from ...op import FusedOp
from . import launches
from .jit import compiling_nothing, kernel, nvidia
from .launch import Ref


def run(op: FusedOp, **arguments: Any) -> dict[str, Tensor]:
    """Compute a call, whose outputs are all new tensors.

    Raises:
        RuntimeError: a kernel would be compiled while a CUDA graph is captured.
    """
    outputs = op.allocate(**arguments)
    first = next(iter(v for v in arguments.values() if isinstance(v, Tensor)))
    plan = launches.of(op, arguments, nvidia())
    scratch = {name: first.new_empty(sizes, dtype=dtype) for name, (sizes, dtype) in plan.scratch.items()}
    known = {**arguments, **scratch, **outputs}
    known["eps_tensor"] = launches.number_or_pointer(arguments.get("eps_tensor"))
    if "scale" in arguments:  # the argument of that name, where an output has it too
        known["scale"] = arguments["scale"]
    with torch.cuda.device(first.device), compiling_nothing() if machine.is_capturing() else nullcontext():
        for launch in plan.launches:
            given = {n: known[v.name] if isinstance(v, Ref) else v for n, v in launch.arguments.items()}
            kernel(launch.kernel)[(launch.grid,)](**given, num_warps=launch.warps)
    return outputs
