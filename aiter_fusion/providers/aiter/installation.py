"""The installed AITER: found without importing it, imported once.

Importing AITER builds kernels, touches every GPU and fails off ROCm. So it is only looked for; ``load_aiter`` imports
it when one of its kernels is first needed.
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
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, ParamSpec, TypeVar

import torch

from ... import machine
from ..architectures import ARCHITECTURES, SUPPORTED

P = ParamSpec("P")
R = TypeVar("R")

ABSENT, UNRELATED, BROKEN, READY = "not installed", "unrelated library", "import failed", "ready"

# Not "pip install amd-aiter": of that, PyPI has a pre-release of 0.1.7 alone, which lacks most of what is called here.
_INSTALL = "install a wheel from https://github.com/ROCm/aiter/releases, or build it from https://github.com/ROCm/aiter"


class Aiter(NamedTuple):
    """The state of the installed AITER.

    answer:  one of four. ``ABSENT``: not installed. ``UNRELATED``: another library is installed under its name.
             ``BROKEN``: installed, and its import failed in this process. ``READY``: installed, and its import has not
             failed.
    detail:  the problem and its remedy; empty for ``READY``.
    version: for ``READY``, from the distribution's metadata or from ``_version.py``; None if neither has it.
    """

    answer: str
    detail: str = ""
    version: str | None = None


def aiter() -> Aiter:
    """Look for AITER without importing it. Only after ``load_aiter`` can the answer be ``BROKEN``."""
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
    """Import AITER, once a process, and undo the side effects that other code would notice (``_contained``).

    Its environment variables, its import hook for modules that moved, and ``torch.int4`` stay: its kernels need them.

    Raises:
        RuntimeError: AITER cannot be imported. The message is the detail of ``aiter()``; the cause is what the import
            raised.
    """
    if (found := aiter()).answer == READY:
        try:
            with _contained():
                return importlib.import_module("aiter")
        except Exception as error:  # noqa: BLE001 (it raises RuntimeError, KeyError, AssertionError, never ImportError)
            _failure["aiter"] = error
            found = aiter()
    raise RuntimeError(found.detail) from _failure.get("aiter")


@contextmanager
def _contained() -> Iterator[None]:
    """Restore what importing AITER changes for the whole process: Dynamo's ``ignore_logger_methods``, the handlers of
    the logger ``aiter``, and the order of ``sys.path`` (its build needs its folders there, so they move to the end)."""
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
    """Whether AMD's AITER is installed, even if this machine cannot run it."""
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
    """Why AITER cannot run here and the remedy, or None if it can (also on an experimental architecture)."""
    if torch.version.hip is None:  # asked first, because installing AITER would not help
        return (
            f"AITER needs a ROCm build of PyTorch, and this is {torch.__version__}: "
            "https://pytorch.org/get-started/locally says how to install one"
        )
    found = aiter()
    if found.answer != READY:
        return found.detail
    arch = machine.architecture()
    if arch is None:
        return "AITER needs an AMD GPU, and PyTorch sees none"
    if arch not in ARCHITECTURES:
        return f"AITER is supported on {', '.join(SUPPORTED)}; this GPU is {arch}"
    return None


def why_experimental() -> str | None:
    """Why AITER is used here only where it is asked for by name, or None."""
    arch = machine.architecture()
    row = ARCHITECTURES.get(arch or "")
    return f"AITER's kernels for {arch} are experimental" if row is not None and row.experimental else None


def aiter_version() -> str | None:
    """The version of the installed AITER, or None if none is installed or it has no version."""
    return aiter().version
