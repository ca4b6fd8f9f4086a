"""Families whose ops are not made of stages: each has calls, launches and rules in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from ...op import FusedOp
from ...scaled_product import FAMILY as LINEAR
from ..terms import Terms
from .attention import calls as attention
from .launch import Launches
from .linear import calls as linear


class Calls(Protocol):
    """What ``calls.py`` of a family has; what it declares is what a provider does (``provider.Provider``), of one op.

    is_known: whether the launches of a call are the same whatever its symbolic sizes are.
    of:       those launches.
    has_site: whether a compiled graph may call a site where they are not.
    site:     what it calls there: the op without the dispatcher, for one place of the graph.
    """

    TERMS: Terms

    def refuse(self, arguments: Mapping[str, Any]) -> str | None: ...
    def slower(self, arguments: Mapping[str, Any]) -> str | None: ...
    def unmeasured(self, arguments: Mapping[str, Any]) -> str | None: ...
    def is_known(self, arguments: Mapping[str, Any]) -> bool: ...
    def of(self, arguments: Mapping[str, Any]) -> Launches: ...
    def has_site(self, arguments: Mapping[str, Any]) -> bool: ...
    def site(self, op: FusedOp) -> Callable[..., Any]: ...
    def run(self, op: FusedOp, **arguments: Any) -> dict[str, Tensor]: ...


WHOLE: Mapping[str, Calls] = {LINEAR: linear, attention.FAMILY: attention}
