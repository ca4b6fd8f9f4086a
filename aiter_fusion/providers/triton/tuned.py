"""Launch shapes that ``aiter-fusion tune`` measured on this machine. They take precedence over ``rules.py``.

There is one JSON file for each GPU model and version of Triton, in ``$AITER_FUSION_CACHE`` or else in the user's cache
folder as ``platformdirs`` names it (``~/.cache/aiter_fusion`` on Linux). It changes how kernels are launched, not what
they compute; without a file the rules apply.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock
from platformdirs import user_cache_path

from ... import machine

# The fields of a launch shape (``rules.Shape``) that a measurement may choose.
FREE = frozenset({"threads", "run", "segments"})
# Threads of one program that every GPU can launch: CUDA's limit on a block, and AMD's on a workgroup.
MOST_THREADS = 1024

Choice = Mapping[str, int]
_tried: dict[str, Choice] = {}


def path() -> Path | None:
    """The file for the first GPU of this process, which may not exist; None without a GPU or without Triton."""
    version = machine.triton_version()
    if version is None or not torch.cuda.is_available():
        return None
    given = os.environ.get("AITER_FUSION_CACHE")
    folder = Path(given) if given else user_cache_path("aiter_fusion", appauthor=False)
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    return folder / f"launches-{name}-triton-{version}.json"


@functools.cache
def _content() -> str:
    file = path()
    return file.read_text() if file is not None and file.exists() else ""


@functools.cache
def choices() -> Mapping[str, Choice]:
    """The measured choices by the rule's name and arguments (``key``). The file is read once a process.

    Raises:
        ValueError: the file has another content than ``write`` makes, or a launch that no GPU can run.
    """
    content = _content()
    if not content:
        return {}
    try:
        found = json.loads(content)["launches"]
        valid = all(
            choice.keys() <= FREE
            and all(type(n) is int and n > 0 and n & (n - 1) == 0 for n in choice.values())
            and choice.get("threads", 1) <= MOST_THREADS
            for choice in found.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        valid, found = False, {}
    if not valid:
        raise ValueError(f"{path()} is not what 'aiter-fusion tune' writes: delete it, or run that again")
    return found


def state() -> str:
    """A hash of the file, which compiled code depends on; empty if there is no file."""
    content = _content()
    return hashlib.sha256(content.encode()).hexdigest() if content else ""


def key(rule: str, *arguments: int | bool) -> str:
    """The name of a rule with its arguments, as the file has it."""
    return " ".join([rule, *(str(int(argument)) for argument in arguments)])


def choice(rule: str, *arguments: int | bool) -> Choice:
    """The choice that is being tried or was measured for a rule and its arguments; empty if there is none."""
    named = key(rule, *arguments)
    return _tried[named] if named in _tried else choices().get(named, {})


@contextmanager
def trying(candidates: Mapping[str, Choice]) -> Iterator[None]:
    """Use these choices instead of those in the file."""
    known = dict(_tried)
    _tried.update(candidates)
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(known)


def write(file: Path, measured: Mapping[str, Choice], conditions: Mapping[str, str | None]) -> None:
    """Write measured choices to a file, which is created if it does not exist and replaced in one step if it does.

    The file that this process reads (``path``) keeps its other choices, also those that another process writes at the
    same time: a lock beside the file is held from reading to writing.

    Args:
        file: the file; its folder is made.
        measured: choices by ``key``.
        conditions: what the measurement ran on, kept beside the choices.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if file != path():
        _replace(file, measured, conditions)
        return
    with FileLock(file.with_name(f"{file.name}.lock")):
        _forget()
        _replace(file, {**choices(), **measured}, conditions)
    _forget()


def _replace(file: Path, launches: Mapping[str, Choice], conditions: Mapping[str, str | None]) -> None:
    content = {"conditions": conditions, "launches": dict(sorted(launches.items()))}
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(file)


def _forget() -> None:
    """Read the file again when it is needed next."""
    _content.cache_clear()
    choices.cache_clear()
