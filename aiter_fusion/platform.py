"""What this machine can run: PyTorch, ROCm, AITER, FP8. Reads no environment variable: that is preference.

AITER is looked for without importing it: its import builds kernels, touches every GPU and fails off ROCm. Where it is
found, ``load_aiter`` imports it when a kernel of it is first wanted.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

OLDEST_TORCH = (2, 11)
NEWEST_TESTED_TORCH = (2, 15)


@dataclass(frozen=True)
class Architecture:
    """What AITER has for an architecture of AMD's (its own tables, and what its sources leave out).

    fp8:            the native format.
    experimental:   AITER calls it so: it is used there only if it is asked for by name.
    hip_converts:   whether its HIP kernels' conversion to FP8 is written; where it is not, they write zeros.
    all_reduces:    whether its fused all-reduces are written.
    """

    fp8: torch.dtype
    experimental: bool = True
    hip_converts: bool = True
    all_reduces: bool = True


# gfx942 has e4m3fnuz, everything after it e4m3fn.
ARCHITECTURES = {
    "gfx942": Architecture(torch.float8_e4m3fnuz, experimental=False),
    "gfx950": Architecture(torch.float8_e4m3fn, experimental=False),
    "gfx1100": Architecture(torch.float8_e4m3fn, hip_converts=False),
    "gfx1151": Architecture(torch.float8_e4m3fn, hip_converts=False),
    "gfx1201": Architecture(torch.float8_e4m3fn),
    "gfx1250": Architecture(torch.float8_e4m3fn, all_reduces=False),
}
SUPPORTED = tuple(name for name, known in ARCHITECTURES.items() if not known.experimental)


def require_torch(version: str = torch.__version__) -> None:
    """Raise a RuntimeError if PyTorch is older than this package can work with."""
    if release(version) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise RuntimeError(
            f"aiter_fusion needs torch >= {oldest}, found {version}: pip install --upgrade 'torch>={oldest}'"
        )


def why_untested(version: str = torch.__version__) -> str | None:
    """What to say about a PyTorch newer than any that this package was tested with, or None if it is not."""
    if release(version) <= NEWEST_TESTED_TORCH:
        return None
    oldest, newest = (".".join(map(str, release)) for release in (OLDEST_TORCH, NEWEST_TESTED_TORCH))
    return (
        f"torch {version} is newer than those that aiter_fusion was tested with, {oldest} to {newest}; verify=True "
        "compares every fused op with the nodes it replaces; please report what goes wrong to aiter_fusion's issue "
        "tracker, with both versions"
    )


def release(version: str) -> tuple[int, ...]:
    """(2, 13) of 2.13.0+cpu."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def architecture(device: int = 0) -> str | None:
    """The ROCm architecture of a device, e.g. ``gfx942``; None without ROCm or without a device."""
    if torch.version.hip is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]


ABSENT, UNRELATED, BROKEN, READY = "not installed", "unrelated library", "import failed", "ready"

# Not "pip install amd-aiter": of that, PyPI has a pre-release of 0.1.7 alone, which lacks most of what is called here.
_INSTALL = "install a wheel from https://github.com/ROCm/aiter/releases, or build it from https://github.com/ROCm/aiter"


@dataclass(frozen=True)
class Aiter:
    """What was found of AMD's AITER.

    answer:  ``ABSENT``; ``UNRELATED``: what is installed under its name is another library; ``BROKEN``: it is
             installed, and its import failed in this process; ``READY``: installed, and its import has not failed.
    detail:  what is wrong and what to do about it; empty where it is ready.
    version: where it is ready, from the distribution's metadata or its ``_version.py``; None if neither tells.
    """

    answer: str
    detail: str = ""
    version: str | None = None


def aiter() -> Aiter:
    """Look for AITER without importing it; its import counts only if ``load_aiter`` has been called."""
    spec = importlib.util.find_spec("aiter")
    if spec is None or not spec.submodule_search_locations:
        return Aiter(ABSENT, f"AMD's AITER is not installed: {_INSTALL}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    ours = (folder / "jit" / "core.py").is_file() and (folder / "ops").is_dir()
    # "aiter" on PyPI is a library of asynchronous iterators; installed over AMD's, it shares the folder
    if not ours or (folder / "azip.py").is_file():
        both = "lies in the folder of AMD's AITER" if ours else "is an unrelated library"
        return Aiter(UNRELATED, f"the package 'aiter' from PyPI {both}: pip uninstall aiter; then {_INSTALL}")
    if (error := _failure.get("aiter")) is not None:
        return Aiter(BROKEN, f"AITER is installed, but its import failed: {type(error).__name__}: {error}")
    return Aiter(READY, version=_version(folder))


def _version(folder: Path) -> str | None:
    """AITER has no ``__version__``; a source tree has no ``_version.py`` either."""
    try:
        return importlib.metadata.version("amd-aiter")
    except importlib.metadata.PackageNotFoundError:
        written = folder / "_version.py"
        found = re.search(r"""__version__ = .*?['"]([^'"]+)""", written.read_text()) if written.is_file() else None
        return found[1] if found else None


# What the import of AITER raised in this process.
_failure: dict[str, Exception] = {}


def load_aiter() -> ModuleType:
    """Import AITER, which is done once, and put back what that changes for other code: Dynamo's ignored loggers, where
    its own logger's records go, the order of ``sys.path``. Its environment variables, its import hook for modules that
    have moved, and ``torch.int4`` where there is none, stay: it needs them.

    Raises:
        RuntimeError: it cannot be imported; the message is the answer of ``aiter``, its cause what the import raised.
    """
    if (found := aiter()).answer == READY:
        try:
            with _as_it_was():
                return importlib.import_module("aiter")
        except Exception as error:  # noqa: BLE001 (it raises RuntimeError, KeyError, AssertionError, never ImportError)
            _failure["aiter"] = error
            found = aiter()
    raise RuntimeError(found.detail) from _failure.get("aiter")


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Put back what importing AITER changes: Dynamo's list of loggers, where its own logger's records go, and that its
    folders come first on ``sys.path`` (its build needs them there, so they go to the end)."""
    import torch._dynamo

    logger, path = logging.getLogger("aiter"), sys.path[:]
    ignored, propagate, handlers = torch._dynamo.config.ignore_logger_methods, logger.propagate, logger.handlers[:]
    try:
        yield
    finally:
        torch._dynamo.config.ignore_logger_methods = ignored
        logger.propagate, logger.handlers[:] = propagate, handlers
        sys.path[:] = [*path, *(entry for entry in sys.path if entry not in path)]


def is_aiter_found() -> bool:
    """Whether AMD's AITER is installed (whether or not this machine can run it)."""
    return aiter().answer in (READY, BROKEN)


def is_aiter_found_and_supported() -> bool:
    """Whether AMD's AITER is installed and this machine has a GPU that it supports. Does not import it."""
    return why_no_aiter() is None and why_experimental() is None


def if_aiter_supported(fn: Callable[P, R]) -> Callable[P, R | None]:
    """Wrap ``fn`` so that it is not called, and None returned, where AITER cannot run."""

    @functools.wraps(fn)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return fn(*args, **kwargs) if is_aiter_found_and_supported() else None

    return wrapper


def why_no_aiter() -> str | None:
    """Why AITER cannot run here and what to do about it, or None if it can, on an experimental architecture too."""
    if torch.version.hip is None:  # first: to install AITER would not help
        return (
            f"AITER needs a ROCm build of PyTorch, and this is {torch.__version__}: "
            "https://pytorch.org/get-started/locally says how to install one"
        )
    found = aiter()
    if found.answer != READY:
        return found.detail
    arch = architecture()
    if arch is None:
        return "AITER needs an AMD GPU, and PyTorch sees none"
    if arch not in ARCHITECTURES:
        return f"AITER is supported on {', '.join(SUPPORTED)}; this GPU is {arch}"
    return None


def why_experimental() -> str | None:
    """Why AITER is to be used here only if it is asked for by name, or None."""
    arch = architecture()
    known = ARCHITECTURES.get(arch or "")
    return f"AITER's kernels for {arch} are experimental" if known is not None and known.experimental else None


def aiter_version() -> str | None:
    """The version of AMD's AITER, or None if there is none or it does not tell."""
    return aiter().version


def triton_version() -> str | None:
    """The version of the installed Triton, under whichever name ROCm or CUDA ships it, or None."""
    for distribution in ("triton", "pytorch-triton-rocm", "pytorch-triton"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
