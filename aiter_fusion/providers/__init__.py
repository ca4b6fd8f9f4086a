"""Implementations of the fused ops: which can run here, which a site gets, and how a call reaches it.

Vendor libraries are imported inside the bodies of the providers' own modules, never here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

from torch import Tensor

from ..op import BridgeOp, FusedOp, Implementation, define
from ..registry import REGISTRY, Registry
from .terms import Terms, as_defined


@dataclass(frozen=True)
class Provider:
    """An implementation of fused ops.

    missing:  why it cannot run on this machine at all (with what to do about it), or None.
    refuse:   why it cannot compute a call that its terms allow (op, arguments by name, tensors being fakes), from what
              terms do not say, such as devices and strides; or None.
    run:      the implementation of an op: takes arguments by name, returns name -> tensor.
    exact:    whether it keeps the graph's sequence of roundings.
    terms:    what it can compute of an op, as data; None: nothing, which is what a provider can that declares nothing.
    reorders: whether it sums the elements of a row in an order of its own; the statistic's last bits depend on it.
    prepare:  called before a graph in which it was chosen is compiled.
    state:    what code compiled with it depends on besides the sources of this package and versions.
    slower:   why the code that Inductor would generate is faster for this call, by recorded measurements, or None.
              Asked unless the provider was chosen by name.
    unwanted: why it is not to be chosen for this call unasked (a preference, an experimental architecture), or None.
              Asked unless the provider was chosen by name.
    """

    name: str
    missing: Callable[[], str | None]
    refuse: Callable[[FusedOp, Mapping[str, Any]], str | None]
    run: Callable[[FusedOp], Implementation]
    exact: bool
    reorders: bool = False
    prepare: Callable[[], None] = lambda: None
    state: Callable[[], str] = lambda: ""
    slower: Callable[[FusedOp, Mapping[str, Any]], str | None] = lambda op, arguments: None
    unwanted: Callable[[FusedOp, Mapping[str, Any]], str | None] = lambda op, arguments: None
    terms: Callable[[FusedOp], Terms | None] = lambda op: None
    table: ClassVar[str] = "providers"

    @property
    def key(self) -> str:
        """Its place in the registry."""
        return self.name

    def admit(self, registry: Registry) -> None:
        """Raise a ValueError if its name means something else."""
        if self.name == "auto":
            raise ValueError(
                "no provider can be called 'auto', which means the first that can run: choose another name"
            )

    def why_not(self, op: FusedOp, arguments: Mapping[str, Any]) -> str | None:
        """Why it cannot compute a call, or None: what it does not declare it refuses."""
        terms = self.terms(op)
        if terms is None:
            return f"it declares no kernel for {op.family}"
        return terms.why_not(op, arguments) or self.refuse(op, arguments)


def _of(module: str, name: str) -> Callable[..., Any]:
    """A function of a provider. Its modules (and sympy with them) load when it is first called: importing the package
    registers the ops, and should take no time."""
    return lambda *given: getattr(import_module(f".{module}", __name__), name)(*given)


for _provider in (
    Provider(
        "aiter",
        missing=_of("aiter", "missing"),
        refuse=_of("aiter", "refuse"),
        run=_of("aiter", "run"),
        terms=_of("aiter", "terms"),
        exact=False,
        state=_of("aiter", "state"),
        unwanted=_of("aiter", "unwanted"),
    ),
    Provider(
        "triton",
        missing=_of("triton", "missing"),
        refuse=_of("triton", "refuse"),
        run=_of("triton", "run"),
        terms=_of("triton", "terms"),
        exact=True,
        reorders=True,
        prepare=_of("triton", "prepare"),
        state=_of("triton", "state"),
        slower=_of("triton", "slower"),
    ),
    Provider(
        "reference",
        missing=lambda: None,
        refuse=lambda op, arguments: None,
        run=lambda op: op.reference,
        terms=as_defined,
        exact=True,
    ),
):
    REGISTRY.register(_provider)
PROVIDERS = REGISTRY.providers


def implementation(op: FusedOp, provider: str) -> Implementation:
    """What runs a call of ``op`` that was compiled for ``provider``."""
    if provider not in PROVIDERS:
        raise ValueError(f"unknown provider {provider!r}; known are {', '.join(PROVIDERS)}")
    return PROVIDERS[provider].run(op)


def candidates(choice: str, device_type: str) -> tuple[Provider, ...]:
    """The providers to ask for a site, in order.

    ``auto`` never means the reference on an accelerator: an opaque eager op in place of generated kernels is slower.
    """
    if choice != "auto":
        return (PROVIDERS[choice],)
    names = ("reference",) if device_type == "cpu" else tuple(name for name in PROVIDERS if name != "reference")
    return tuple(p for p in map(PROVIDERS.__getitem__, names) if p.missing() is None)


def can_be_asked(choice: str, only: frozenset[str] | None) -> bool:
    """Whether any of these providers (None: any at all) may be asked when ``choice`` is."""
    return only is None or choice in only or (choice == "auto" and any(PROVIDERS[n].missing() is None for n in only))


# Who can compute an op of the bridge, in the order in which ``auto`` asks them; the last never refuses.
BRIDGE_PROVIDERS: dict[str, Provider] = {
    "aiter": PROVIDERS["aiter"],
    "torch": Provider(
        "torch",
        missing=lambda: None,
        refuse=_of("native", "refuse"),
        run=_of("native", "run"),
        terms=_of("native", "terms"),
        exact=False,
    ),
    "reference": PROVIDERS["reference"],
}


def why_not(provider: Provider, op: FusedOp, arguments: Mapping[str, Any]) -> str | None:
    """Why a provider that is asked for by name cannot compute a call, or None."""
    return provider.missing() or provider.why_not(op, arguments)


def bridge_implementation(op: FusedOp, provider: str) -> Implementation:
    """What runs a call of an op of the bridge: here providers are chosen when the op is called."""
    if provider == "auto":
        return functools.partial(_by_the_first, op)
    if provider not in BRIDGE_PROVIDERS:
        raise ValueError(f"unknown provider {provider!r}; known are auto, {', '.join(BRIDGE_PROVIDERS)}")
    return functools.partial(_by, BRIDGE_PROVIDERS[provider], op)


def _by(provider: Provider, op: FusedOp, **arguments: Any) -> dict[str, Tensor]:
    reason = why_not(provider, op, arguments)
    if reason is not None:
        raise RuntimeError(f"{op.name} by {provider.name}: {reason}")
    return provider.run(op)(**arguments)


def _by_the_first(op: FusedOp, **arguments: Any) -> dict[str, Tensor]:
    chosen = next(
        provider
        for provider in BRIDGE_PROVIDERS.values()
        if why_not(provider, op, arguments) is None and provider.unwanted(op, arguments) is None
    )
    return chosen.run(op)(**arguments)


def bridge_op(declaration: BridgeOp) -> FusedOp:
    """Register an op of the bridge."""
    return define(declaration, bridge_implementation, unsaid="auto")
