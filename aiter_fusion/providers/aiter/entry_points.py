"""AITER's functions as data: the modules that have them, and a value for each of their keywords.

AITER has no stable interface: functions are renamed and moved, arguments are inserted. So a function is probed by name
and by signature before it is called, and it is called by keyword only. The table ``takes`` of an ``EntryPoint`` is the
one place that names its keywords: the probe, the call and the table of versions (README.md) follow from it.

Source of signatures: ROCm/aiter, v0.1.1 to v0.1.20.post1.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from . import installation
from .releases import known_bad

# The value of a keyword: the name of a tensor or argument of ours, or a function of the call.
Value = str | Callable[[Any], Any]


def same(*names: str) -> dict[str, Value]:
    """Keywords that are called as our arguments are."""
    return {name: name for name in names}


def constant(value: Any) -> Value:
    """The same value in every call."""
    return lambda call: value


@dataclass(frozen=True, eq=False)  # hashed by identity: ``takes`` has no hash
class EntryPoint:
    """A function of AITER's, a class, or a method (``Class.method``, whose first keyword is ``self``).

    name:  its name in AITER.
    homes: the modules that have or had it, newest first.
    takes: keyword -> our value for it, in every call.
    """

    name: str
    homes: tuple[str, ...]
    takes: Mapping[str, Value] = field(default_factory=dict)

    def arguments(self, call: Any) -> dict[str, Any]:
        """The keyword arguments of a call, of which ``call[name]`` is an argument of ours."""
        return {
            keyword: call[value] if isinstance(value, str) else value(call) for keyword, value in self.takes.items()
        }

    def __str__(self) -> str:
        return f"{self.homes[0]}.{self.name}"


def unbound(parameters: Collection[str], required: Collection[str], keywords: Collection[str]) -> str | None:
    """Why a function with these parameters cannot be called with these keywords, or None."""
    if unknown := [name for name in keywords if name not in parameters]:
        return f"takes no argument {', '.join(unknown)}"
    if missing := [name for name in required if name not in keywords]:
        return f"also wants {', '.join(missing)}"
    return None


def _parameters(function: Callable[..., Any], name: str) -> tuple[list[str], list[str]] | None:
    """The parameters of a function, and those of them without a default; None if they cannot be read.

    Most of what AITER exports are wrappers ``(*args, **kwargs)``. The arguments of a wrapper are those of the
    registered operator, but for a leading ``dummy`` where the function takes no tensor first.
    """
    parameters = list(inspect.signature(function).parameters.values())
    if any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters):
        schema = getattr(getattr(getattr(torch.ops.aiter, name, None), "default", None), "_schema", None)
        if schema is None:
            return None
        arguments = [argument for argument in schema.arguments if argument.name != "dummy"]
        return [a.name for a in arguments], [a.name for a in arguments if not a.has_default_value()]
    return [p.name for p in parameters], [p.name for p in parameters if p.default is p.empty]


def _found(entry: EntryPoint) -> Callable[..., Any] | str | None:
    """The function, the reason why its module cannot be imported, or None if this version has no such function."""
    for home in entry.homes:
        try:
            function: Any = import_module(home)
        except ModuleNotFoundError as error:
            if not home.startswith(f"{error.name}"):  # the module is there, and a module that it imports is not
                return f"importing {home} failed: {error}"
            continue
        for part in entry.name.split("."):
            function = getattr(function, part, None)
        if function is not None:
            return function
    return None


@functools.cache
def probe(entry: EntryPoint) -> Callable[..., Any] | str:
    """The function, or why it cannot be called as this package calls it. Imports AITER."""
    installation.load_aiter()
    version = f"AITER {installation.aiter_version() or 'of unknown version'}"
    function = _found(entry)
    if function is None:
        return f"{version} has no {entry}"
    if isinstance(function, str):
        return function
    if (faults := known_bad(entry.name, installation.aiter_version())) is not None:
        return f"{entry} of {version} {faults}: upgrade AITER"
    found = _parameters(function, entry.name)
    if found is None:
        return f"the arguments of {entry} cannot be read"
    why = unbound(*found, entry.takes)
    return function if why is None else f"{entry} of {version} {why}"


def call(entry: EntryPoint, **arguments: Any) -> Any:
    """Call a function with the arguments that ``entry.arguments`` gives.

    Raises:
        RuntimeError: the installed version has no such function, or one with other arguments.
        TypeError: the arguments are not those that the function was probed for.
    """
    function = probe(entry)
    if isinstance(function, str):
        raise RuntimeError(function)
    if arguments.keys() != entry.takes.keys():
        raise TypeError(f"{entry} was probed for {', '.join(entry.takes)}, not for {', '.join(arguments)}")
    return function(**arguments)
