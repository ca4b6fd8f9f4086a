"""The calls of an op that a provider can compute, declared as data. All others are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..domains import ANYTHING, Domain, Sizes
from ..op import FusedOp, width_of


class Terms(NamedTuple):
    """The calls of an op that a provider can compute.

    arguments: name -> the values that the argument can have. A call with an argument that has no entry is refused.
    features:  those of an overload that the provider has kernels for.
    hidden:    the hidden sizes; None: any, even one that is known only at run time.
    """

    arguments: Mapping[str, Domain]
    features: frozenset[str] = frozenset()
    hidden: Sizes | None = None

    def why_not(self, op: FusedOp, arguments: Mapping[str, Any]) -> str | None:
        """Why a call (tensors may be fakes) is not among them, with the value and its limit, or None."""
        if unknown := op.features - self.features:
            return f"it declares no kernel for {op.family} with {', '.join(sorted(unknown))}"
        width = width_of(op, arguments)
        for name, value in arguments.items():
            if name not in self.arguments:
                return f"it declares no values of {name}, and this call has {value!r}"
            if (why := self.arguments[name].why_not(name, value, width)) is not None:
                return why
        return None if self.hidden is None else self.hidden.why_not("hidden size", width, width)


def as_defined(op: FusedOp) -> Terms:
    """All calls that an op is defined for, which are those that its reference computes."""
    return Terms({name: op.domains.get(name, ANYTHING) for name in op.arguments}, op.features)
