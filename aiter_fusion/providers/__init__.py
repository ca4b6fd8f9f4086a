"""Implementations of the fused ops: which can run here, which a site gets, and how a call reaches it.

Vendor libraries are imported inside the bodies of the providers' own modules, never here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .. import platform
from ..op import FusedOp, Implementation
from . import triton as triton_kernels


@dataclass(frozen=True)
class Provider:
    """An implementation of fused ops.

    missing:  why it cannot run on this machine at all (with what to do about it), or None.
    refuse:   why it cannot compute this call (op, arguments by name, tensors being fakes), or None.
    run:      the implementation of an op: takes arguments by name, returns name -> tensor.
    exact:    whether it keeps the graph's sequence of roundings.
    reorders: whether it sums the elements of a row in an order of its own; the statistic's last bits depend on it.
    prepare:  called before a graph in which it was chosen is compiled.
    state:    what code compiled with it depends on besides the sources of this package and versions.
    slower:   why the code that Inductor would generate is faster for this call, by recorded measurements, or None.
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


def _no_kernels(op: FusedOp) -> Implementation:
    raise NotImplementedError(f"{op.name} has no kernel in this version; use provider='reference'")


PROVIDERS: dict[str, Provider] = {
    "aiter": Provider(
        "aiter",
        missing=lambda: platform.why_no_aiter() or "this version of aiter_fusion does not call AITER's kernels yet",
        refuse=lambda op, arguments: "no kernel",
        run=_no_kernels,
        exact=False,
    ),
    "triton": Provider(
        "triton",
        missing=triton_kernels.missing,
        refuse=triton_kernels.refuse,
        run=triton_kernels.run,
        exact=True,
        reorders=True,
        prepare=triton_kernels.prepare,
        state=triton_kernels.tuned.state,
        slower=triton_kernels.slower,
    ),
    "reference": Provider(
        "reference",
        missing=lambda: None,
        refuse=lambda op, arguments: None,
        run=lambda op: op.reference,
        exact=True,
    ),
}


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
    names = ("reference",) if device_type == "cpu" else ("aiter", "triton")
    return tuple(p for p in map(PROVIDERS.__getitem__, names) if p.missing() is None)
