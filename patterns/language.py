"""The vocabulary of patterns: plain data, matched by ``passes/matcher.py``.

A pattern describes a value in an FX graph by the call that computes it. Matching is strict: every argument that a
pattern does not mention must have its schema's default value, so ``add(x, r, alpha=2)`` is not ``add(x, r)``.
How many users a value has never matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import fx

from .fx_facts import Target, aten, is_last_dim, is_number, prims


class Pattern:
    """Anything that can stand for a value: the classes below."""


@dataclass(frozen=True)
class Var(Pattern):
    """Any tensor, captured as the input ``name``; a second occurrence must be the same node."""

    name: str


@dataclass(frozen=True)
class Const(Pattern):
    """A literal. Numbers are compared after rounding to float32, in which every kernel applies them."""

    value: float | bool


@dataclass(frozen=True)
class Attr(Pattern):
    """A literal captured as the attribute ``name`` (or not at all, if empty), if ``test(consumer, value)`` holds."""

    name: str
    test: Callable[[fx.Node, Any], bool]


@dataclass(frozen=True)
class Call(Pattern):
    """A call of one of ``targets`` with these arguments in schema order.

    ``commute`` also tries the first two arguments exchanged; ``dtype`` is demanded of the result. ``order`` is that in
    which the matcher looks at the arguments: literals first, since they fail at once. ``heads`` has, for each argument,
    the calls that it can be (None: any), so that most candidates are turned away by a look at their arguments' calls.
    """

    targets: tuple[Target, ...]
    args: tuple[Pattern, ...]
    commute: bool = False
    dtype: torch.dtype | None = None
    order: tuple[int, ...] = field(init=False, repr=False)
    heads: tuple[frozenset[Target] | None, ...] = field(init=False, repr=False)
    by_name: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        literal = [isinstance(pattern, (Attr, Const)) for pattern in self.args]
        object.__setattr__(self, "order", tuple(sorted(range(len(literal)), key=lambda i: not literal[i])))
        object.__setattr__(self, "heads", tuple(map(_known_heads, self.args)))
        object.__setattr__(self, "by_name", any(isinstance(target, str) for target in self.targets))


@dataclass(frozen=True)
class OneOf(Pattern):
    """Alternatives, tried in order.

    ``by_head`` has those that a value computed by a call can be, for each call that one of them ends in; ``others``
    those that any value can be. Most alternatives differ in their last call, and one look at it turns them away.
    """

    options: tuple[Pattern, ...]
    by_head: Mapping[Target, tuple[Pattern, ...]] = field(init=False, repr=False, compare=False)
    others: tuple[Pattern, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ends = [(option, _known_heads(option)) for option in self.options]
        every = frozenset().union(*(targets for _, targets in ends if targets is not None))
        by_head = {head: tuple(o for o, targets in ends if targets is None or head in targets) for head in every}
        object.__setattr__(self, "by_head", by_head)
        object.__setattr__(self, "others", tuple(option for option, targets in ends if targets is None))


@dataclass(frozen=True)
class With(Pattern):
    """``of``, and these attributes where it matched; no match where one has another value already."""

    of: Pattern
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Named(Pattern):
    """``of``, and the matched node kept as ``name`` for the form's ``complete``."""

    name: str
    of: Pattern


@dataclass(frozen=True)
class Same(Pattern):
    """The node kept as ``name``, which the matcher has met before."""

    name: str


@dataclass(frozen=True)
class Both(Pattern):
    """A value that both explain, such as an input under two names."""

    of: Pattern
    also: Pattern


@dataclass(frozen=True)
class Items(Pattern):
    """A list argument of exactly these items."""

    items: tuple[Pattern, ...]


@dataclass(frozen=True)
class Views(Pattern):
    """``of`` behind any number of views that keep the row-major order of elements (``VIEWS``)."""

    of: Pattern


@dataclass(frozen=True)
class Steps(Pattern):
    """``of`` followed by any number of scalar operations (``STEPS``) and views.

    The longest walk is tried first. The operations are captured as the attribute ``name``, in order, as text.
    """

    name: str
    of: Pattern


def heads(pattern: Pattern) -> frozenset[Target] | None:
    """The calls with which a value of this pattern can end; None if any, or if it is no call."""
    match pattern:
        case Call():
            return frozenset(pattern.targets)
        case With() | Named():
            return heads(pattern.of)
        case Both():
            return heads(pattern.also) or heads(pattern.of)
        case OneOf():
            every = [heads(option) for option in pattern.options]
            known = [targets for targets in every if targets is not None]
            return frozenset().union(*known) if len(known) == len(every) else None
        case _:
            return None


def _known_heads(pattern: Pattern) -> frozenset[Target] | None:
    """``heads``, but None where one of them is a name: a library may register that operator later."""
    ends = heads(pattern)
    return None if ends is None or any(isinstance(target, str) for target in ends) else ends


def first_inputs(pattern: Pattern) -> frozenset[Target] | None:
    """Calls of which a value of this pattern reads at least one; None if it may read none of those it names."""
    match pattern:
        case Call():
            return next((ends for ends in pattern.heads if ends is not None), None)
        case With() | Named() | Both():
            return first_inputs(pattern.of)
        case OneOf():
            every = [first_inputs(option) for option in pattern.options]
            known = [ends for ends in every if ends is not None]
            return frozenset().union(*known) if len(known) == len(every) else None
        case _:
            return None


class Found(NamedTuple):
    """What a pattern captured: input tensors, named nodes, attributes, and the nodes it walked over."""

    inputs: Mapping[str, fx.Node] = MappingProxyType({})
    named: Mapping[str, fx.Node] = MappingProxyType({})
    attributes: Mapping[str, Any] = MappingProxyType({})
    nodes: tuple[fx.Node, ...] = ()

    def with_input(self, name: str, node: fx.Node) -> Found:
        return Found({**self.inputs, name: node}, self.named, self.attributes, self.nodes)

    def with_name(self, name: str, node: fx.Node) -> Found:
        return Found(self.inputs, {**self.named, name: node}, self.attributes, self.nodes)

    def with_attributes(self, attributes: Mapping[str, Any]) -> Found:
        return Found(self.inputs, self.named, {**self.attributes, **attributes}, self.nodes)

    def with_nodes(self, nodes: Iterable[fx.Node]) -> Found:
        return Found(self.inputs, self.named, self.attributes, (*self.nodes, *nodes))


def number(name: str) -> Attr:
    """A number captured under ``name``."""
    return Attr(name, is_number)


def last_dim() -> Attr:
    """The last dimension, as -1 or counted from the front, alone or in a list."""
    return Attr("", is_last_dim)


def anything(name: str = "") -> Attr:
    """Any literal; its effect is checked by the form's ``complete``, on the result's shape or by ``name``."""
    return Attr(name, lambda node, value: True)


def equals(dtype: torch.dtype) -> Attr:
    """This dtype as an argument."""
    return Attr("", lambda node, value: value is dtype)


def convert(of: Pattern, to: torch.dtype) -> Call:
    """A conversion to one dtype."""
    return Call((prims.convert_element_type.default,), (of, equals(to)))


def constant(number: float) -> OneOf:
    """A tensor that is full of a number."""
    full = Call((aten.full.default,), (anything(), Const(number), *[anything()] * 4))
    return OneOf((full, Call((aten.scalar_tensor.default,), (Const(number), *[anything()] * 4))))


def where(condition: Pattern, a: Pattern, b: Pattern) -> Call:
    """a where the condition holds, else b."""
    return Call((aten.where.self,), (condition, a, b))


def convert_to(of: Pattern, name: str, allowed: frozenset[torch.dtype]) -> Call:
    """A conversion to any of the allowed dtypes, captured under ``name``."""
    return Call((prims.convert_element_type.default,), (of, Attr(name, lambda node, value: value in allowed)))


def in_float32(of: Pattern) -> OneOf:
    """``of`` converted to float32, or ``of`` as it is: the consumer's dtype decides which is right."""
    return OneOf((convert(of, torch.float32), of))


def mul(a: Pattern, b: Pattern, dtype: torch.dtype | None = None) -> Call:
    """A product, in either order."""
    return Call((aten.mul.Tensor,), (a, b), commute=True, dtype=dtype)


def add(a: Pattern, b: Pattern, dtype: torch.dtype | None = None) -> Call:
    """A sum, in either order; ``alpha`` must be 1."""
    return Call((aten.add.Tensor, aten.add.Scalar), (a, b), commute=True, dtype=dtype)
