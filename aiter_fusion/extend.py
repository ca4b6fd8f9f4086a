"""Forms, families, fusions, ops and providers from outside the package: public, with the guarantees of those inside.

A new fusion is a form for what is new in it (``patterns/language.py``), and the ops that compute it: a family of stages
(``stage.Family``), some of them the package's own, or an op declared whole (``op.FusedOp``) and a row that says what
it replaces. ``examples/own_pattern.py`` has a family. Kernels are a provider (``providers.Provider``). From then on all
is recognised, planned, refused, counted, verified and cached like the package's own, which is registered in the same
way.
"""

from __future__ import annotations

from typing import Any

from . import families, op
from .op import FusedOp
from .patterns.form import Form, Fusion
from .patterns.fusions import rows
from .providers import Provider, implementation
from .registry import REGISTRY, Entry
from .stage import Family


def register_form(form: Form) -> Form:
    """Recognise one more way to spell a computation. Returns the form.

    Raises:
        TypeError: it is no ``Form``.
        ValueError: its pattern can end in any call, or there is a form of this kind and name already.
    """
    return REGISTRY.register(_demand(form, Form, "register_form"))


def register_family(family: Family) -> Family:
    """Declare the ops of a family of stages, and fuse what they compute. Returns the family.

    ``disable``, ``enable`` and ``expect`` then know its name.

    Raises:
        TypeError: it is no ``Family``.
        ValueError: there is one of this name already, its stages do not go together, or a kind of them has no form.
    """
    families.register_ops(_demand(family, Family, "register_family"))
    try:
        for fusion in rows(family):
            REGISTRY.register(fusion)
    except ValueError:
        unregister(family)
        raise
    return family


def register_fusion(fusion: Fusion) -> Fusion:
    """Fuse one more chain of kinds, and return the row. ``disable``, ``enable`` and ``expect`` then know its family.

    Raises:
        TypeError: it is no ``Fusion``.
        ValueError: its family has no op, a kind of its chain no form, or the chain is there already.
    """
    return REGISTRY.register(_demand(fusion, Fusion, "register_fusion"))


def fused_op(declaration: FusedOp) -> FusedOp:
    """Register one overload of a fused op as ``torch.ops.aiter_fusion.<family>``. Returns the declaration.

    Its reference is what runs on a CPU, and on a GPU with ``provider="reference"``; kernels come from a provider.

    Raises:
        TypeError: it is no ``FusedOp``.
        ValueError: the family has an op with these features already.
    """
    return op.define(_demand(declaration, FusedOp, "fused_op"), implementation)


def register_provider(provider: Provider) -> Provider:
    """Add an implementation of fused ops, of the package's or of one's own, and return it.

    ``provider="<its name>"`` asks for it; ``auto`` asks it on accelerators, after the package's own. Its ``refuse`` is
    asked about every op, so it must refuse those that it does not have, with the reason.

    Raises:
        TypeError: it is no ``Provider``.
        ValueError: there is a provider of this name already.
    """
    return REGISTRY.register(_demand(provider, Provider, "register_provider"))


def unregister(entry: Form | Family | Fusion | FusedOp | Provider) -> None:
    """Take back what was registered; of a family its ops and fusions too. Graphs compiled with it still run.

    Raises:
        ValueError: it is not registered.
    """
    REGISTRY.unregister(entry)
    if isinstance(entry, Family):
        parts: list[Entry] = [fusion for fusion in REGISTRY.fusions.values() if fusion.op == entry.op]
        parts += REGISTRY.overloads(entry.op).values()
        for part in parts:
            REGISTRY.unregister(part)


def _demand(given: Any, kind: type, function: str) -> Any:
    if not isinstance(given, kind):
        raise TypeError(f"aiter_fusion.{function} takes a {kind.__name__}, not {type(given).__name__}")
    return given
