"""Match the patterns of ``patterns/language.py`` against FX nodes, by backtracking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from ..arithmetic import DTYPES, cast, step
from ..patterns.language import (
    STEPS,
    VIEWS,
    Attr,
    Call,
    Const,
    Found,
    Named,
    OneOf,
    Pattern,
    Steps,
    Var,
    Views,
    With,
    dtype,
    is_number,
    same_number,
)

CONVERT = torch.ops.prims.convert_element_type.default


@lru_cache(maxsize=None)
def _schema(target: Any) -> tuple[tuple[str, Any], ...]:
    """The (name, default) of every argument; REQUIRED where there is none."""
    return tuple((a.name, a.default_value if a.has_default_value() else REQUIRED) for a in target._schema.arguments)


REQUIRED = object()


def arguments(node: fx.Node) -> list[tuple[Any, bool]]:
    """Every argument of a call in schema order, and whether it is there only as its default."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return [(value, False) for value in (*node.args, *node.kwargs.values())]
    bound = []
    for position, (name, default) in enumerate(_schema(node.target)):
        given = node.args[position] if position < len(node.args) else node.kwargs.get(name, default)
        bound.append((given, type(given) is type(default) and given == default or _equal(given, default)))
    return bound


def _equal(given: Any, default: Any) -> bool:
    """Equality of literals; 1 equals 1.0, but no number equals a bool."""
    if isinstance(given, bool) or isinstance(default, bool):
        return given is default
    if isinstance(given, (int, float)) and isinstance(default, (int, float)):
        return given == default
    return given is default


def step_words(node: fx.Node) -> tuple[str, ...] | None:
    """The words that a node adds to a program: none for a view, None where it is no scalar operation."""
    if node.op != "call_function":
        return None
    if node.target in VIEWS:
        return ()
    if node.target is CONVERT:
        return (cast(node.args[1]),) if node.args[1] in DTYPES.values() else None  # type: ignore[arg-type]
    names = STEPS.get(node.target)  # type: ignore[call-overload]
    if names is None or node.kwargs:
        return None
    numbers = node.args[1:]
    if not numbers and len(names) == 1 and names[0] not in ("mul", "div"):
        return names
    if len(numbers) != len(names) or not all(is_number(node, n) for n in numbers):
        return None
    return tuple(step(name, float(n)) for name, n in zip(names, numbers))  # type: ignore[arg-type]


@dataclass
class Misfit:
    """The deepest node at which matching failed: what to name when nothing explains a value."""

    depth: int = -1
    node: fx.Node | None = None

    def note(self, depth: int, node: Any) -> None:
        if depth > self.depth and isinstance(node, fx.Node):
            self.depth, self.node = depth, node


def match(pattern: Pattern, root: fx.Node, misfit: Misfit | None = None) -> Iterator[Found]:
    """Every way in which ``pattern`` explains the value ``root``."""
    return _match(pattern, root, root, Found(), 0, misfit)


def _match(
    pattern: Pattern, value: Any, consumer: fx.Node, found: Found, depth: int, misfit: Misfit | None
) -> Iterator[Found]:
    match pattern:
        case Var(name):
            if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor):
                known = found.inputs.get(name)
                if known is None:
                    yield replace(found, inputs={**found.inputs, name: value})
                elif known is value:
                    yield found
        case Const(expected):
            if isinstance(expected, bool):
                if value is expected:
                    yield found
            elif is_number(consumer, value) and same_number(value, expected):
                yield found
        case Attr(name, test):
            if not isinstance(value, fx.Node) and test(consumer, value):
                if not name:
                    yield found
                elif name not in found.attributes or found.attributes[name] == value:
                    yield replace(found, attributes={**found.attributes, name: value})
        case Call():
            yield from _match_call(pattern, value, found, depth, misfit)
        case OneOf(options):
            for option in options:
                yield from _match(option, value, consumer, found, depth, misfit)
        case With(of, attributes):
            for inner in _match(of, value, consumer, found, depth, misfit):
                yield replace(inner, attributes={**inner.attributes, **attributes})
        case Named(name, of):
            for inner in _match(of, value, consumer, found, depth, misfit):
                if inner.named.get(name, value) is value:
                    yield replace(inner, named={**inner.named, name: value})
        case Views(of):
            nodes = []
            while isinstance(value, fx.Node) and value.target in VIEWS:
                nodes.append(value)
                value = value.args[0]
            inner = replace(found, nodes=(*found.nodes, *nodes))
            yield from _match(of, value, consumer, inner, depth + len(nodes), misfit)
        case Steps(name, of):
            yield from _match_steps(name, of, value, consumer, found, depth, misfit)
        case _:
            raise TypeError(f"not a pattern: {pattern!r}")


def _match_call(pattern: Call, value: Any, found: Found, depth: int, misfit: Misfit | None) -> Iterator[Found]:
    if (
        not isinstance(value, fx.Node)
        or value.target not in pattern.targets
        or (pattern.dtype is not None and dtype(value) is not pattern.dtype)
    ):
        if misfit is not None:
            misfit.note(depth, value)
        return
    bound = arguments(value)
    count = len(pattern.args)
    if len(bound) < count or not all(is_default for _, is_default in bound[count:]):
        if misfit is not None:
            misfit.note(depth, value)
        return
    values = [v for v, _ in bound[:count]]
    orders = [values]
    if pattern.commute and values[0] is not values[1]:
        orders.append([values[1], values[0], *values[2:]])
    start = replace(found, nodes=(*found.nodes, value))
    for order in orders:
        yield from _match_arguments(pattern.args, order, value, start, depth + 1, misfit)


def _match_arguments(
    patterns: tuple[Pattern, ...],
    values: list[Any],
    consumer: fx.Node,
    found: Found,
    depth: int,
    misfit: Misfit | None,
) -> Iterator[Found]:
    if not patterns:
        yield found
        return
    for first in _match(patterns[0], values[0], consumer, found, depth, misfit):
        yield from _match_arguments(patterns[1:], values[1:], consumer, first, depth, misfit)


def _match_steps(
    name: str, of: Pattern, value: Any, consumer: fx.Node, found: Found, depth: int, misfit: Misfit | None
) -> Iterator[Found]:
    walk: list[tuple[Any, tuple[str, ...]]] = [(value, ())]  # a value, and the words that follow it
    while isinstance(value, fx.Node) and (words := step_words(value)) is not None:
        walk.append((value.args[0], (*words, *walk[-1][1])))
        value = value.args[0]
    for length in reversed(range(len(walk))):
        bottom, words = walk[length]
        start = replace(
            found,
            attributes={**found.attributes, name: words},
            nodes=(*found.nodes, *(node for node, _ in walk[:length])),
        )
        yield from _match(of, bottom, consumer, start, depth + length, misfit)


def branch_output(
    found: Found, root: fx.Node, source: fx.Node, test: Callable[[fx.Node, str], bool]
) -> tuple[fx.Node, str, tuple[fx.Node, ...]] | None:
    """The first accepted value forward from ``source`` that something outside reads: (node, program, nodes)."""
    inside = {*found.nodes, root}
    reached = []
    stack: list[tuple[fx.Node, fx.Node, tuple[str, ...], tuple[fx.Node, ...]]] = [(source, source, (), ())]
    while stack:
        node, last, steps, nodes = stack.pop()
        read_outside = False
        for user in node.users:
            words = step_words(user) if user.args and user.args[0] is node else None
            if words is not None:
                stack.append((user, user if words else last, (*steps, *words), (*nodes, user)))
            elif user not in inside:
                read_outside = True
        program = " ".join(steps)
        if read_outside and test(last, program):
            reached.append((last, program, nodes))
    return min(reached, key=lambda r: r[0], default=None)

