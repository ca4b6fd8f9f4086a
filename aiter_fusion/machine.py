"""The machine: which PyTorch, which Triton, which GPU. Reads no environment variable: that is preference
(``config``)."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from packaging.version import Version

from . import __version__

OLDEST_TORCH = (2, 11)
NEWEST_TESTED_TORCH = (2, 15)


def release(version: str) -> tuple[int, int]:
    """``(2, 13)`` for ``2.13.0+cpu``, and for every build before 2.13.0 too: its code is that of 2.13."""
    parsed = Version(version)
    return parsed.major, parsed.minor


def require_torch(version: str = torch.__version__) -> None:
    """Check that PyTorch is not older than this package works with.

    Raises:
        RuntimeError: it is; the message has the command that upgrades it.
    """
    if release(version) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise RuntimeError(
            f"aiter_fusion needs torch >= {oldest}, found {version}: pip install --upgrade 'torch>={oldest}'"
        )


def why_untested(version: str = torch.__version__) -> str | None:
    """The warning about a PyTorch newer than all that this package was tested with, or None if it is not newer."""
    if release(version) <= NEWEST_TESTED_TORCH:
        return None
    oldest, newest = (".".join(map(str, release)) for release in (OLDEST_TORCH, NEWEST_TESTED_TORCH))
    return (
        f"torch {version} is newer than those that aiter_fusion was tested with, {oldest} to {newest}; verify=True "
        "compares every fused op with the nodes it replaces; please report what goes wrong to aiter_fusion's issue "
        "tracker, with both versions"
    )


def build() -> str:
    """What this PyTorch was built for: ``CUDA 13.0``, ``ROCm 7.0.51831``, or ``CPUs``."""
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda is not None else "CPUs"


def architecture(device: int = 0) -> str | None:
    """The ROCm architecture of a GPU, e.g. ``gfx942``; None without ROCm or without a GPU.

    Args:
        device: index of the GPU.
    """
    if torch.version.hip is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]


def is_capturing() -> bool:
    """Whether the current stream records a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def triton_version() -> str | None:
    """The version of the installed Triton, under whichever name ROCm or CUDA ships it, or None."""
    for distribution in ("triton", "pytorch-triton-rocm", "pytorch-triton"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def software() -> str:
    """What compiled, in one line: this package, PyTorch, Triton and Python, each with its version."""
    triton = triton_version()
    parts = [f"aiter_fusion {__version__}", f"torch {torch.__version__}", f"Triton {triton}" if triton else "no Triton"]
    return ", ".join([*parts, f"Python {platform.python_version()}"])


def device() -> str:
    """What computes, in one line: the current GPU, or the CPU."""
    if not torch.cuda.is_available():
        return f"{platform.machine()} CPU: PyTorch sees no GPU"
    index = torch.cuda.current_device()
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)} ({architecture(index) or f'sm_{major}{minor}'})"
