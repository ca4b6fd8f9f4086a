"""The package's own providers. Their modules load when a function of theirs is first called, so that importing the
package, which registers the fused ops, loads neither sympy nor a vendor's library."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from ..registry import REGISTRY
from .provider import Provider
from .terms import as_defined


def _body(provider: str, function: str) -> Callable[..., Any]:
    """A function of ``<provider>/provider.py``, which is imported at the first call."""
    return lambda *given: getattr(import_module(f".{provider}.provider", __package__), function)(*given)


AITER = REGISTRY.register(
    Provider(
        "aiter",
        missing=_body("aiter", "missing"),
        refuse=_body("aiter", "refuse"),
        run=_body("aiter", "run"),
        terms=_body("aiter", "terms"),
        exact=False,
        state=_body("aiter", "state"),
        unwanted=_body("aiter", "unwanted"),
    )
)
TRITON = REGISTRY.register(
    Provider(
        "triton",
        missing=_body("triton", "missing"),
        refuse=_body("triton", "refuse"),
        run=_body("triton", "run"),
        terms=_body("triton", "terms"),
        exact=True,
        # sums products in an order, and of a precision, of its own
        inexact=frozenset({"fp8_linear", "decode_attention"}),
        reorders=True,
        prepare=_body("triton", "prepare"),
        state=_body("triton", "state"),
        slower=_body("triton", "slower"),
        unmeasured=_body("triton", "unmeasured"),
    )
)
REFERENCE = REGISTRY.register(
    Provider(
        "reference",
        missing=lambda: None,
        refuse=lambda op, arguments: None,
        run=lambda op: op.reference,
        terms=as_defined,
        exact=True,
    )
)
# Not registered: it computes ops of the bridge alone, which graphs call by name.
NATIVE = Provider(
    "torch",
    missing=lambda: None,
    refuse=_body("native", "refuse"),
    run=_body("native", "run"),
    terms=_body("native", "terms"),
    exact=False,
)

# In the order of registration, which is the order in which ``auto`` asks them.
PROVIDERS = REGISTRY.providers
# The providers of ops of the bridge, in the order in which ``auto`` asks them; the last never refuses.
BRIDGE_PROVIDERS = {provider.name: provider for provider in (AITER, NATIVE, REFERENCE)}
