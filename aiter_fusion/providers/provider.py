"""What a provider declares: the implementations of fused ops that it has, and the calls that they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..op import FusedOp, Implementation
from ..registry import Registry
from .terms import Terms


@dataclass(frozen=True, eq=False)
class Provider:
    """An implementation of fused ops. A reason is one line of text; None stands for no objection.

    name:     how options and reports call it; not ``auto``.
    missing:  () -> the reason why it cannot run on this machine, with the remedy.
    refuse:   (op, arguments by name, whose tensors may be fakes) -> the reason why it cannot compute a call that its
              terms allow. It is about what terms do not express, such as devices and strides.
    run:      op -> its implementation, a function from arguments by name to outputs by name.
    exact:    whether it keeps the graph's sequence of roundings.
    inexact:  families of ops in which it does not, though it is exact.
    reorders: whether it sums the elements of a row in its own order, which changes the statistic's last bits.
    prepare:  called before a graph is compiled in which the provider was chosen.
    state:    () -> the part of the environment that its compiled code depends on; it is part of the cache key.
    slower:   (op, arguments) -> why the graph's own code is faster for this call, by recorded measurements.
    unmeasured: (op, arguments) -> why nobody knows whether it is faster for this call, with the remedy. Like
              ``slower``, it is not asked of a provider that was chosen by name.
    unwanted: (op, arguments) -> why this call does not choose the provider unasked: a preference, or an experimental
              architecture. Like ``slower``, it is not asked of a provider that was chosen by name.
    terms:    op -> the calls that the provider can compute, as data; None: it has no kernel for the op.
    """

    name: str
    missing: Callable[[], str | None]
    refuse: Callable[[FusedOp, Mapping[str, Any]], str | None]
    run: Callable[[FusedOp], Implementation]
    exact: bool
    inexact: frozenset[str] = frozenset()
    reorders: bool = False
    prepare: Callable[[], None] = lambda: None
    state: Callable[[], str] = lambda: ""
    slower: Callable[[FusedOp, Mapping[str, Any]], str | None] = lambda op, arguments: None
    unmeasured: Callable[[FusedOp, Mapping[str, Any]], str | None] = lambda op, arguments: None
    unwanted: Callable[[FusedOp, Mapping[str, Any]], str | None] = lambda op, arguments: None
    terms: Callable[[FusedOp], Terms | None] = lambda op: None
    table: ClassVar[str] = "providers"

    @property
    def key(self) -> str:
        """Its place in the registry."""
        return self.name

    def admit(self, registry: Registry) -> None:
        """Check that the provider can be registered.

        Raises:
            ValueError: its name is ``auto``, which means another thing.
        """
        if self.name == "auto":
            raise ValueError(
                "no provider can be called 'auto', which means the first that can run: choose another name"
            )

    def keeps_roundings(self, op: FusedOp) -> bool:
        """Whether it computes an op with the graph's sequence of roundings."""
        return self.exact and op.family not in self.inexact

    def why_not(self, op: FusedOp, arguments: Mapping[str, Any]) -> str | None:
        """Why the provider cannot compute a call on a machine that it can run on, or None."""
        terms = self.terms(op)
        if terms is None:
            return f"it declares no kernel for {op.family}"
        return terms.why_not(op, arguments) or self.refuse(op, arguments)


def why_not(provider: Provider, op: FusedOp, arguments: Mapping[str, Any]) -> str | None:
    """Why a provider cannot compute a call on this machine, or None."""
    return provider.missing() or provider.why_not(op, arguments)
