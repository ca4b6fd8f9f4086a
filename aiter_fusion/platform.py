"""What this machine can run: PyTorch, ROCm, AITER, FP8. Reads no environment variable: that is preference.

AITER is looked for without importing it: its import builds kernels, touches every GPU and fails off ROCm.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

OLDEST_TORCH = (2, 11)
NEWEST_TESTED_TORCH = (2, 15)

# Native FP8 by architecture (AITER's own table): gfx94x has e4m3fnuz, everything after it e4m3fn.
SUPPORTED_ARCHITECTURES = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}


def require_torch(version: str = torch.__version__) -> None:
    """Raise a RuntimeError if PyTorch is older than this package can work with."""
    if _release(version) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise RuntimeError(
            f"aiter_fusion needs torch >= {oldest}, found {version}: pip install --upgrade 'torch>={oldest}'"
        )


def why_untested(version: str = torch.__version__) -> str | None:
    """What to say about a PyTorch newer than any that this package was tested with, or None if it is not."""
    if _release(version) <= NEWEST_TESTED_TORCH:
        return None
    oldest, newest = (".".join(map(str, release)) for release in (OLDEST_TORCH, NEWEST_TESTED_TORCH))
    return (
        f"torch {version} is newer than those that aiter_fusion was tested with, {oldest} to {newest}; verify=True "
        "compares every fused op with the nodes it replaces; please report what goes wrong to aiter_fusion's issue "
        "tracker, with both versions"
    )


def _release(version: str) -> tuple[int, ...]:
    """(2, 13) of 2.13.0+cpu."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def architecture(device: int = 0) -> str | None:
    """The ROCm architecture of a device, e.g. ``gfx942``; None without ROCm or without a device."""
    if torch.version.hip is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]


def is_aiter_found() -> bool:
    """Whether AMD's AITER is installed (whether or not this machine can run it)."""
    return _why_aiter_not_found() is None


def is_aiter_found_and_supported() -> bool:
    """Whether AMD's AITER is installed and this machine has a GPU that it supports."""
    return why_no_aiter() is None


def if_aiter_supported(fn: Callable[P, R]) -> Callable[P, R | None]:
    """Wrap ``fn`` so that it is not called, and None returned, where AITER cannot run."""

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return fn(*args, **kwargs) if is_aiter_found_and_supported() else None

    return wrapper


def why_no_aiter() -> str | None:
    """Why AITER cannot run here and what to do about it, or None if it can."""
    reason = _why_aiter_not_found()
    if reason is not None:
        return reason
    if torch.version.hip is None:
        return f"AITER needs a ROCm build of PyTorch; this is {torch.__version__}"
    arch = architecture()
    if arch is None:
        return "AITER needs an AMD GPU, and PyTorch sees none"
    if arch not in SUPPORTED_ARCHITECTURES:
        return f"AITER is supported on {', '.join(SUPPORTED_ARCHITECTURES)}; this GPU is {arch}"
    return None


def _why_aiter_not_found() -> str | None:
    spec = importlib.util.find_spec("aiter")
    if spec is None or spec.origin is None:
        return "AMD's AITER is not installed: build it from https://github.com/ROCm/aiter, or pip install amd-aiter"
    if not (Path(spec.origin).parent / "jit").is_dir():
        return (
            "the installed package 'aiter' is an unrelated library: pip uninstall aiter, then install AMD's AITER "
            "from https://github.com/ROCm/aiter, or pip install amd-aiter"
        )
    return None


def aiter_version() -> str | None:
    """The version of the installed AITER distribution, or None."""
    for distribution in ("amd-aiter", "aiter"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def triton_version() -> str | None:
    """The version of the installed Triton, under whichever name ROCm or CUDA ships it, or None."""
    for distribution in ("triton", "pytorch-triton-rocm", "pytorch-triton"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
