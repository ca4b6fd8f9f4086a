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
from typing import Any, NamedTuple

import torch
from packaging.version import InvalidVersion, Version

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


class Fault(NamedTuple):
    """What is wrong with a function that binds, in the releases from ``first`` on, up to ``mended``, which is right."""

    first: Version
    mended: Version
    what: str
    change: str

    def __str__(self) -> str:
        return f"{self.what} ({self.change}, in {self.mended})"


def _fault(first: str, mended: str, what: str, change: int) -> Fault:
    return Fault(Version(first), Version(mended), what, f"ROCm/aiter#{change}")


_UNFENCED = _fault("0.1.10.post2", "0.1.19.post1", "lets a rank go on while others read its data", 4346)

KNOWN_BAD: Mapping[str, tuple[Fault, ...]] = {
    "add_rmsnorm_quant": (_fault("0.1.10.post1", "0.1.10.post3", "returns inexact sums", 2011),),
    "rmsnorm2d_fwd_with_add": (_fault("0.1.10.post1", "0.1.10.post2", "returns inexact sums", 1965),),
    "hipb_mm": (
        _fault("0.1.6.post1", "0.1.6.post2", "scales all rows and columns by the first one's scales", 1258),
        _fault("0.1.6.post1", "0.1.12", "ends the process where hipBLASLt has no kernel for a shape", 2252),
    ),
    "CustomAllreduce.custom_fused_ar_rms": (_UNFENCED,),
    "CustomAllreduce.custom_fused_ar_rms_quant": (_UNFENCED,),
    "CustomAllreduce.custom_fused_ar_rms_per_group_quant": (_UNFENCED,),
}


def release(version: str | None) -> Version | None:
    """A version as AITER writes it (``v0.1.10.post1``, maybe with a local part), to be compared; None if it is none."""
    try:
        return Version(version or "")
    except InvalidVersion:
        return None


@functools.cache
def installed() -> Version | None:
    """The version of the AITER that is here, or None if it does not tell."""
    return release(platform.aiter_version())


def known_bad(name: str, version: str | None) -> str | None:
    """What is wrong with a function in a release, or None; what was built between two counts as the earlier one."""
    of = release(version)
    faults = [str(fault) for fault in KNOWN_BAD.get(name, ()) if of is not None and fault.first <= of < fault.mended]
    return ", and ".join(faults) or None


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
