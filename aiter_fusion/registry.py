"""What the package knows by name: fused ops, forms, fusions and providers, its own and those from outside alike.

There is one registry. The package's own entries are registered at import by the call that entries from outside are
registered by, under the same conditions, and whatever is registered can be unregistered.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch

if TYPE_CHECKING:
    from .op import FusedOp
    from .patterns.form import Form, Fusion
    from .providers import Provider
    from .stage import Family


class Entry(Protocol):
    """Something that can be registered.

    table: the table of the registry that it belongs to; key: its place there.
    admit: raises a ValueError, which names the remedy, if it does not go together with what is registered.
    """

    table: ClassVar[str]

    @property
    def key(self) -> Any: ...

    def admit(self, registry: Registry) -> None: ...


E = TypeVar("E", bound=Entry)


class Registry:
    """Tables of entries, each in the order of registration, which is the order in which entries are tried.

    ops:       fused ops by family and features.
    bridge:    ops of the bridge, by the same.
    forms:     forms by kind and name.
    families:  families of fused ops by the name of the op.
    fusions:   fusions by family, chain and op.
    providers: providers by name.
    """

    def __init__(self) -> None:
        self.ops: dict[tuple[str, frozenset[str]], FusedOp] = {}
        self.bridge: dict[tuple[str, frozenset[str]], FusedOp] = {}
        self.forms: dict[tuple[str, str], Form] = {}
        self.families: dict[str, Family] = {}
        self.fusions: dict[tuple[str, tuple[str, ...], str], Fusion] = {}
        self.providers: dict[str, Provider] = {}
        self._overloads: dict[str, dict[frozenset[str], FusedOp]] = {}
        self._identified: tuple[tuple[int, ...], str | None] = ((), None)

    def register(self, entry: E) -> E:
        """Add an entry and return it.

        Raises:
            ValueError: there is one of this name already, or it does not go together with what is registered.
        """
        table = getattr(self, entry.table)
        entry.admit(self)
        if entry.key in table:
            raise ValueError(f"{entry.table}: {_spelled(entry.key)} is registered already: choose another name")
        table[entry.key] = entry
        self._overloads.clear()
        return entry

    def unregister(self, entry: Entry) -> None:
        """Remove an entry.

        Raises:
            ValueError: it is not registered.
        """
        table = getattr(self, entry.table)
        if table.get(entry.key) is not entry:
            raise ValueError(f"{entry.table}: {_spelled(entry.key)} is not registered")
        del table[entry.key]
        self._overloads.clear()

    def __iter__(self) -> Iterator[Any]:
        for table in (self.ops, self.bridge, self.forms, self.families, self.fusions, self.providers):
            yield from table.values()

    @property
    def family_names(self) -> tuple[str, ...]:
        """The families of all fusions: names for options and reports."""
        return tuple(dict.fromkeys(fusion.family for fusion in self.fusions.values()))

    def overloads(self, family: str) -> Mapping[frozenset[str], FusedOp]:
        """The overloads of an op by their features."""
        if family not in self._overloads:
            every = {**self.bridge, **self.ops}
            self._overloads[family] = {features: op for (name, features), op in every.items() if name == family}
        return self._overloads[family]

    def overload(self, family: str, features: frozenset[str]) -> FusedOp | None:
        """The overload of an op with exactly those of ``features`` that its overloads distinguish, if there is one."""
        overloads = self.overloads(family)
        return overloads.get(features & frozenset().union(*overloads))

    def identity(self) -> str | None:
        """A hash of all entries, for Inductor's cache key; None if what is compiled with them must not be cached.

        Data count by value; functions by their source files, closures and defaults. A helper in another file than the
        functions that use it does not count (the package's own files all do: ``passes/manager.py``). Functions without
        a source file (typed at a prompt) cannot be cached.
        """
        entries = tuple(map(id, self))
        if self._identified[0] != entries:
            try:
                text = repr(known(list(self)))
            except Anonymous:
                self._identified = (entries, None)
            else:
                self._identified = (entries, hashlib.sha256(text.encode()).hexdigest())
        return self._identified[1]


def _spelled(key: Any) -> str:
    if isinstance(key, str):
        return key
    texts = (" -> ".join(p) if isinstance(p, tuple) else p if isinstance(p, str) else "+".join(sorted(p)) for p in key)
    return " ".join(filter(None, texts))


class Anonymous(Exception):  # noqa: N818 (no error: what has no identity is not cached)
    """Something has no source file or value by which another process could know it."""


class _Knowing:
    """Values as nested tuples whose repr is the same in every process; shared parts are looked at once."""

    def __init__(self) -> None:
        self._digests: dict[int, str] = {}

    def __call__(self, value: Any) -> Any:
        match value:
            case FunctionType():
                return self._function(value)
            case functools.partial():
                return "partial", self(value.func), self(value.args), self(value.keywords)
            case Enum() | torch._ops.OpOverload() | torch.dtype():
                return str(value)
            case str() | bytes() | bool() | int() | float() | None:
                return value
            case Mapping():
                return sorted((repr(self(name)), self(entry)) for name, entry in value.items())
            case frozenset() | set():
                return sorted(repr(self(entry)) for entry in value)
            case list() | tuple():
                entries = [self(entry) for entry in value]
                return (type(value).__qualname__, entries) if hasattr(value, "_fields") else entries
        if is_dataclass(value) and not isinstance(value, type):
            if id(value) not in self._digests:
                parts = [(field.name, self(getattr(value, field.name))) for field in fields(value) if field.init]
                text = repr((type(value).__qualname__, parts))
                self._digests[id(value)] = hashlib.sha256(text.encode()).hexdigest()
            return self._digests[id(value)]
        if inspect.isbuiltin(value) or isinstance(value, type):
            return value.__module__, value.__qualname__
        raise Anonymous(value)

    def _function(self, function: FunctionType) -> Any:
        try:
            source = _file_digest(function.__code__.co_filename)
        except (OSError, TypeError):
            raise Anonymous(function) from None
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        place = function.__qualname__, function.__code__.co_firstlineno
        return place, source, self(cells), self(function.__defaults__)


def known(value: Any) -> Any:
    """What identifies a value in every process.

    Raises:
        Anonymous: something in it has no source file or value.
    """
    return _Knowing()(value)


@functools.cache
def _file_digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


REGISTRY = Registry()
