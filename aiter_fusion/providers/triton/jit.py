"""The kernels as Triton compiles them: loaded by name, for this machine's GPUs, never during graph capture."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from ... import machine
from ..architectures import ARCHITECTURES, SUPPORTED


def nvidia() -> bool:
    """Whether the kernels are compiled for NVIDIA's GPUs. There they may contain PTX, and Triton's cast to FP8
    saturates."""
    return torch.version.hip is None


@functools.cache
def native_fp8(device: int) -> torch.dtype | None:
    """The FP8 format that a GPU converts to in hardware, or None if it has none.

    Args:
        device: index of the GPU.
    """
    if torch.version.hip is not None:
        arch = machine.architecture(device)
        return ARCHITECTURES[arch].fp8 if arch in SUPPORTED else None
    return torch.float8_e4m3fn if torch.cuda.get_device_capability(device) >= (8, 9) else None


def target() -> str:
    """What Triton compiles kernels for on this machine, e.g. ``hip gfx942, 64 threads a warp``. Imports Triton.

    Raises:
        RuntimeError: it has no driver for a GPU of this machine.
    """
    found = import_module("triton.runtime").driver.active.get_current_target()
    return f"{found.backend} {found.arch}, {found.warp_size} threads a warp"


def kernel(name: str) -> Any:
    """The JIT function ``<name>_kernel`` of ``kernels/<name>.py``. Imports Triton."""
    return getattr(import_module(f".kernels.{name}", __package__), f"{name}_kernel")


@contextmanager
def compiling_nothing() -> Iterator[None]:
    """Raise a RuntimeError where a kernel would be compiled: inside a CUDA graph's capture that is an error of CUDA's,
    which would not name the remedy."""
    runtime = import_module("triton").knobs.runtime

    def object_to(**about: Any) -> bool:
        raise RuntimeError(
            "a kernel would be compiled while a CUDA graph is captured: call aiter_fusion.warmup, or the op once with "
            "tensors of these dtypes and this width, before"
        )

    with runtime.scope():
        runtime.jit_cache_hook = object_to
        yield
