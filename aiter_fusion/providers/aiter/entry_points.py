"""AITER's functions as data: where each lies, and the keywords with which it is called.

AITER has no stable interface: functions are renamed and moved, arguments inserted. So a function is probed by name and
by signature before it is ever called, and called by keyword only. Facts: ROCm/aiter, v0.1.1 to v0.1.20.post1.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from ... import platform


@dataclass(frozen=True)
class EntryPoint:
    """A function of AITER's, a class, or a method (``Class.method``, whose first argument is ``self``).

    name:     what it is called there.
    homes:    the modules that it is or was in, newest first.
    keywords: the arguments that a call gives, all by keyword.
    """

    name: str
    homes: tuple[str, ...]
    keywords: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.homes[0]}.{self.name}"


# Releases whose fused all-reduces, in one stage, let a rank overwrite what another still reads.
_UNFENCED = (
    *("0.1.10.post2", "0.1.10.post3", "0.1.11", "0.1.11.post1", "0.1.12", "0.1.12.post1", "0.1.12.post2"),
    *("0.1.13", "0.1.13.dev0", "0.1.13.post1", "0.1.14", "0.1.14.post1", "0.1.15", "0.1.15.post1", "0.1.15.post2"),
    *("0.1.15.post3", "0.1.16", "0.1.16.post1", "0.1.16.post2", "0.1.16.post3", "0.1.16.post4", "0.1.16.post5"),
    *("0.1.16.post6", "0.1.17", "0.1.18", "0.1.19"),
)
_WHY_UNFENCED = "lets a rank go on while others read its data (ROCm/aiter#4346, in 0.1.19.post1)"

# Releases in which a function binds and is wrong: what is known, by name, with the change that mended it.
KNOWN_BAD: Mapping[str, tuple[tuple[str, ...], str]] = {
    "add_rmsnorm_quant": (
        ("0.1.10.post1", "0.1.10.post2"),
        "returns inexact sums (ROCm/aiter#2011, in 0.1.10.post3)",
    ),
    "rmsnorm2d_fwd_with_add": (("0.1.10.post1",), "returns inexact sums (ROCm/aiter#1965, in 0.1.10.post2)"),
    "CustomAllreduce.custom_fused_ar_rms": (_UNFENCED, _WHY_UNFENCED),
    "CustomAllreduce.custom_fused_ar_rms_quant": (_UNFENCED, _WHY_UNFENCED),
    "CustomAllreduce.custom_fused_ar_rms_per_group_quant": (_UNFENCED, _WHY_UNFENCED),
}


def known_bad(name: str, version: str | None) -> str | None:
    """What is wrong with a function in a release (``0.1.10.post1``, also with a ``v`` or a local part), or None."""
    versions, what = KNOWN_BAD.get(name, ((), ""))
    return what if (version or "").removeprefix("v").partition("+")[0] in versions else None


def unbound(parameters: Collection[str], required: Collection[str], keywords: Collection[str]) -> str | None:
    """Why a function with these parameters cannot be called with these keywords, or None."""
    if unknown := [name for name in keywords if name not in parameters]:
        return f"takes no argument {', '.join(unknown)}"
    if missing := [name for name in required if name not in keywords]:
        return f"also wants {', '.join(missing)}"
    return None


def _parameters(function: Callable[..., Any], name: str) -> tuple[list[str], list[str]] | None:
    """The parameters of a function and those of them without a default; None if it does not tell.

    What AITER exports are mostly wrappers ``(*args, **kwargs)``, whose arguments are those of the registered operator;
    that one has a leading ``dummy`` where the function takes no tensor first.
    """
    parameters = list(inspect.signature(function).parameters.values())
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
        schema = getattr(getattr(getattr(torch.ops.aiter, name, None), "default", None), "_schema", None)
        if schema is None:
            return None
        arguments = [argument for argument in schema.arguments if argument.name != "dummy"]
        return [a.name for a in arguments], [a.name for a in arguments if not a.has_default_value()]
    return [p.name for p in parameters], [p.name for p in parameters if p.default is p.empty]


@functools.cache
def probe(entry: EntryPoint) -> Callable[..., Any] | str:
    """The function, or why it cannot be called as this package calls it. Imports AITER."""
    platform.load_aiter()
    version = f"AITER {platform.aiter_version() or 'of unknown version'}"
    function: Any = None
    for home in entry.homes:
        try:
            function = import_module(home)
        except ModuleNotFoundError as error:
            if not home.startswith(f"{error.name}"):  # not that this home is missing, but something that it needs
                return f"importing {home} failed: {error}"
            continue
        for part in entry.name.split("."):
            function = getattr(function, part, None)
        if function is not None:
            break
    if function is None:
        return f"{version} has no {entry}"
    if (bad := known_bad(entry.name, platform.aiter_version())) is not None:
        return f"{entry} of {version} {bad}: upgrade AITER"
    found = _parameters(function, entry.name)
    if found is None:
        return f"the arguments of {entry} cannot be read"
    why = unbound(*found, entry.keywords)
    return function if why is None else f"{entry} of {version} {why}"


def call(entry: EntryPoint, **arguments: Any) -> Any:
    """Call a function that was probed, with exactly the keywords that it was probed for."""
    function = probe(entry)
    if isinstance(function, str):
        raise RuntimeError(function)
    if set(arguments) != set(entry.keywords):
        raise TypeError(f"{entry} was probed for {', '.join(entry.keywords)}, not for {', '.join(arguments)}")
    return function(**arguments)
