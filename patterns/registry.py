"""Forms, fusions, fused ops and providers from outside the package: public, with the guarantees of those inside.

A new fusion is a form for what is new in it (``patterns/language.py``), an op that computes the chain (``op.FusedOp``),
and a row that joins them; ``examples/own_pattern.py`` has all three. Kernels are a provider (``providers.Provider``).
From then on all is recognised, planned, refused, counted, verified and cached like the package's own.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

from .. import config
from .. import op as op_module
from ..op import OPS, FusedOp
from ..providers import PROVIDERS, Provider, implementation
from .fusions import FORMS, FUSIONS, forms_of
from .language import Form, Fusion, heads

_forms: list[Form] = []
_fusions: list[Fusion] = []
_ops: list[FusedOp] = []
_providers: list[Provider] = []


def forms(wanted: Sequence[Fusion]) -> tuple[Form, ...]:
    """The forms that these fusions need, and all from outside, the package's own first: the earlier of two wins where
    both explain a value."""
    return (*forms_of(wanted), *_forms)


def fusions() -> tuple[Fusion, ...]:
    """All fusions, the package's own first: the earlier of two chains of one length wins where both are possible."""
    return (*FUSIONS, *_fusions)


def register_form(form: Form) -> Form:
    """Recognise one more way to spell a computation. Returns the form.

    Raises:
        TypeError: it is no ``Form``.
        ValueError: its pattern can end in any call, or there is a form of this kind and name already.
    """
    _demand(form, Form, "register_form")
    if form.serves is None and heads(form.pattern) is None:
        raise ValueError(f"form {form.name} can end in any call: let its pattern be a Call, or OneOf of them")
    if any((known.kind, known.name) == (form.kind, form.name) for known in (*FORMS, *_forms)):
        raise ValueError(f"there is a form {form.name!r} of kind {form.kind!r} already: choose another name")
    _forms.append(form)
    _identity.cache_clear()
    return form


def register_fusion(fusion: Fusion) -> Fusion:
    """Fuse one more chain of kinds, and return the row. ``disable``, ``enable`` and ``expect`` then know its family.

    Raises:
        TypeError: it is no ``Fusion``.
        ValueError: its family has no op, a kind of its chain no form, or the chain is there already.
    """
    _demand(fusion, Fusion, "register_fusion")
    if fusion.family not in OPS:
        raise ValueError(f"family {fusion.family!r} has no op: declare one with aiter_fusion.fused_op first")
    kinds = {form.kind for form in (*FORMS, *_forms)}
    if unknown := [kind for kind in fusion.chain if kind not in kinds]:
        known = ", ".join(sorted(kinds))
        raise ValueError(f"no form is of kind {unknown[0]!r}: call aiter_fusion.register_form first; kinds are {known}")
    if any((known.family, known.chain) == (fusion.family, fusion.chain) for known in fusions()):
        raise ValueError(f"{fusion.family} of {' -> '.join(fusion.chain)} is registered already")
    if fusion.family not in config.FAMILIES:
        config.FAMILIES = (*config.FAMILIES, fusion.family)
    _fusions.append(fusion)
    _identity.cache_clear()
    return fusion


def fused_op(declaration: FusedOp) -> FusedOp:
    """Register one overload of a fused op as ``torch.ops.aiter_fusion.<family>``. Returns the declaration.

    Its reference is what runs on a CPU, and on a GPU with ``provider="reference"``; kernels come from a provider.

    Raises:
        TypeError: it is no ``FusedOp``.
        ValueError: the family has an op with these features already, or the values of an argument that is text are not
            declared (``domains``).
    """
    _demand(declaration, FusedOp, "fused_op")
    if declaration.features in OPS.get(declaration.family, {}):
        raise ValueError(f"{declaration.name} is declared already: choose another family or other features")
    made = op_module.fused_op(declaration, implementation)
    _ops.append(made)
    _identity.cache_clear()
    return made


def register_provider(provider: Provider) -> Provider:
    """Add an implementation of fused ops, of the package's or of one's own, and return it.

    ``provider="<its name>"`` asks for it; ``auto`` asks it on accelerators, after the package's own. It is asked about
    every op, and refuses what its ``terms`` do not declare: ops, features, and for every argument the values that its
    kernels take, as domains (``aiter_fusion/domains.py``)::

        Terms({"x": Tensors((torch.bfloat16,)), "act": Activations({"silu": ()}), ...}, hidden=Sizes(8, 8192))

    Raises:
        TypeError: it is no ``Provider``.
        ValueError: there is a provider of this name already.
    """
    _demand(provider, Provider, "register_provider")
    if provider.name in config.PROVIDER_NAMES:
        raise ValueError(f"there is a provider {provider.name!r} already: choose another name")
    config.PROVIDER_NAMES = (*config.PROVIDER_NAMES, provider.name)
    PROVIDERS[provider.name] = provider
    _providers.append(provider)
    _identity.cache_clear()
    return provider


def _demand(given: Any, kind: type, function: str) -> None:
    if not isinstance(given, kind):
        raise TypeError(f"aiter_fusion.{function} takes a {kind.__name__}, not {type(given).__name__}")


# ---- What the cache must know --------------------------------------------------------------------------------


class _Anonymous(Exception):  # noqa: N818 (no error: what has no identity is not cached)
    """Something has no source file or value by which another process could know it."""


def identity() -> str | None:
    """A hash of all that was registered, for Inductor's cache key; None if code using it must not be cached.

    Data count by value; functions by their source files, closures and defaults. A helper in another file than the
    functions that use it does not count. Functions without a source file (typed at a prompt) cannot be cached.
    """
    return _identity()


@functools.lru_cache(maxsize=1)
def _identity() -> str | None:
    try:
        text = repr([_known(registered) for registered in (*_forms, *_fusions, *_ops, *_providers)])
    except _Anonymous:
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def _known(value: Any) -> Any:
    """A value as nested tuples whose repr is the same in every process."""
    match value:
        case FunctionType():
            return _known_function(value)
        case functools.partial():
            return "partial", _known(value.func), _known(value.args), _known(value.keywords)
        case Enum() | torch._ops.OpOverload() | torch.dtype():
            return str(value)
        case str() | bytes() | bool() | int() | float() | None:
            return value
        case Mapping():
            return sorted((repr(_known(name)), _known(entry)) for name, entry in value.items())
        case frozenset() | set():
            return sorted(repr(_known(entry)) for entry in value)
        case list() | tuple():
            return [_known(entry) for entry in value]
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__qualname__, [(field.name, _known(getattr(value, field.name))) for field in fields(value)]
    if inspect.isbuiltin(value) or isinstance(value, type):
        return value.__module__, value.__qualname__
    raise _Anonymous(value)


def _known_function(function: FunctionType) -> Any:
    try:
        source = Path(inspect.getsourcefile(function) or "").read_bytes()
    except (OSError, TypeError):
        raise _Anonymous(function) from None
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    place = function.__qualname__, function.__code__.co_firstlineno
    return place, hashlib.sha256(source).hexdigest(), _known(cells), _known(function.__defaults__)
