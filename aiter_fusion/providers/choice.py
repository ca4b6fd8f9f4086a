"""Which provider computes: chosen at compile time for a fused op, at every call for an op of the bridge."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ..op import FusedOp, Implementation
from .known import BRIDGE_PROVIDERS, PROVIDERS
from .provider import Provider, why_not


def implementation(op: FusedOp, provider: str) -> Implementation:
    """The implementation for a call of ``op`` that was compiled for a provider.

    Raises:
        ValueError: there is no provider of this name.
    """
    if provider not in PROVIDERS:
        raise ValueError(f"unknown provider {provider!r}; known are {', '.join(PROVIDERS)}")
    return PROVIDERS[provider].run(op)


def candidates(choice: str, device_type: str) -> tuple[Provider, ...]:
    """The providers to ask for a site, in order, without those that cannot run on this machine.

    ``auto`` never means the reference on an accelerator: an opaque eager op is slower than the kernels that Inductor
    generates.

    Args:
        choice: the option ``provider``, which may be ``auto``.
        device_type: of the site's tensors, e.g. ``cuda``.
    """
    if choice != "auto":
        return (PROVIDERS[choice],)
    names = ("reference",) if device_type == "cpu" else tuple(name for name in PROVIDERS if name != "reference")
    return tuple(p for p in map(PROVIDERS.__getitem__, names) if p.missing() is None)


def can_be_asked(choice: str, only: frozenset[str] | None) -> bool:
    """Whether the option ``provider`` allows one of the providers ``only`` (None: all), and that one can run."""
    return only is None or choice in only or (choice == "auto" and any(PROVIDERS[n].missing() is None for n in only))


def bridge_implementation(op: FusedOp, provider: str) -> Implementation:
    """The implementation for a call of an op of the bridge, which chooses the provider when it is called.

    Raises:
        ValueError: there is no provider of this name.
    """
    if provider == "auto":
        return functools.partial(_by_first, op)
    if provider not in BRIDGE_PROVIDERS:
        raise ValueError(f"unknown provider {provider!r}; known are auto, {', '.join(BRIDGE_PROVIDERS)}")
    return functools.partial(_by_named, BRIDGE_PROVIDERS[provider], op)


def _by_named(provider: Provider, op: FusedOp, **arguments: Any) -> dict[str, Tensor]:
    reason = why_not(provider, op, arguments)
    if reason is not None:
        raise RuntimeError(f"{op.name} by {provider.name}: {reason}")
    return provider.run(op)(**arguments)


def _by_first(op: FusedOp, **arguments: Any) -> dict[str, Tensor]:
    chosen = next(
        provider
        for provider in BRIDGE_PROVIDERS.values()
        # whether it is wanted comes first: to ask AITER imports it
        if provider.unwanted(op, arguments) is None and why_not(provider, op, arguments) is None
    )
    return chosen.run(op)(**arguments)
