"""Calls outside of Inductor's launches, in which little may take time: launches are prepared once for calls of the same
shapes, and then only pointers are filled in."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ...machine import is_capturing
from ...op import FusedOp
from .jit import compiling_nothing, kernel
from .launch import Launch, Launches, Ref, flat

# Bytes that kernels load at a time from where a pointer allows it.
ALIGNMENT = 16
# From the pointers of a call's tensors to its outputs.
Launcher = Callable[[list[int]], dict[str, Tensor]]
# What launches a compiled kernel, its arguments in order, and which of them are which pointers.
Step = tuple[Callable[..., None], list[Any], list[tuple[int, int]]]


def alignment(pointers: Sequence[int]) -> tuple[bool, ...]:
    """What kernels are compiled for: whether each pointer is aligned. Empty if all are, as nearly always."""
    if functools.reduce(operator.or_, pointers) % ALIGNMENT == 0:
        return ()
    return tuple([pointer % ALIGNMENT == 0 for pointer in pointers])


def prepare(op: FusedOp, arguments: Mapping[str, Any], plan: Launches, order: Sequence[str]) -> Launcher:
    """Compile the kernels of a call, for all calls with tensors of the same shapes and alignment.

    Args:
        order: the names of the tensors whose pointers the launcher takes.

    Raises:
        RuntimeError: a kernel would be compiled while a CUDA graph is captured.
    """
    first = next(value for value in arguments.values() if isinstance(value, Tensor))
    device, index = first.device, first.device.index or 0
    outputs = op.allocate(**arguments)
    scratch = {name: first.new_empty(sizes, dtype=kind) for name, (sizes, kind) in plan.scratch.items()}
    tensors = {name: value for name, value in flat(arguments).items() if isinstance(value, Tensor)}
    known = tensors | outputs | scratch
    places = {name: place for place, name in enumerate([*order, *outputs, *scratch])}
    with torch.cuda.device(device), compiling_nothing() if is_capturing() else nullcontext():
        steps = [_step(launch, known, places) for launch in plan.launches]
    made = {name: _like(tensor) for name, tensor in outputs.items()}
    between = [_like(tensor) for tensor in scratch.values()]
    torch_c: Any = torch._C
    empty = torch_c._dynamo.guards._empty_strided_cuda  # Inductor's, on the current device

    def launch(pointers: list[int]) -> dict[str, Tensor]:
        with nullcontext() if torch.cuda.current_device() == index else torch.cuda.device(device):
            results = {name: empty(*like) for name, like in made.items()}
            parts = [empty(*like) for like in between]
            every = pointers + [tensor.data_ptr() for tensor in (*results.values(), *parts)]
            stream = torch._C._cuda_getCurrentRawStream(index)
            for start, template, slots in steps:
                values = template.copy()
                for slot, place in slots:
                    values[slot] = every[place]
                start(*values, stream=stream)
        return results

    return launch


def _like(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def _step(launch: Launch, known: Mapping[str, Tensor], places: Mapping[str, int]) -> Step:
    function = kernel(launch.kernel)
    values = [launch.arguments[name] for name in function.arg_names]
    slots = [(slot, places[value.name]) for slot, value in enumerate(values) if isinstance(value, Ref)]
    options: dict[str, Any] = {"num_warps": launch.warps} | ({"launch_pdl": True} if launch.dependent else {})
    given = [known[value.name] if isinstance(value, Ref) else value for value in values]
    compiled = function.warmup(*given, grid=(launch.grid,), **options)
    template = [None if isinstance(value, Ref) else value for value in values]
    return compiled[launch.grid, 1, 1], template, slots
