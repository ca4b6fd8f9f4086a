"""Match the patterns of ``patterns/language.py`` against FX nodes, by backtracking."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import fx

from ..patterns.composed import BY_HEAD, FIRST, WITHIN
from ..patterns.form import Branch
from ..patterns.fx_facts import (
    CHOICES,
    CONVERT,
    STEPS,
    VIEWS,
    arguments,
    dtype,
    is_number,
    readers,
    same_number,
    same_shape,
    shape,
)
from ..patterns.language import (
    Attr,
    Both,
    Call,
    Const,
    Found,
    Items,
    Named,
    OneOf,
    Pattern,
    Same,
    Steps,
    Var,
    Views,
    With,
)
from ..scale_program import DTYPES, WITH_NUMBER, cast, step


class Step(NamedTuple):
    """What a node adds to a program: ``words`` (none for a view), applied to ``value``, by ``nodes``, the node last."""

    value: Any
    words: tuple[str, ...]
    nodes: tuple[fx.Node, ...]


def step_of(node: Any) -> Step | None:
    """A node as a step of a program; None if it is no scalar operation."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node.target is torch.ops.aten.where.self and (choice := _choice(node)) is not None:
        return choice
    if node.target in BY_HEAD:
        return composed(node)
    words = _words(node)
    return None if words is None else Step(node.args[0], words, (node,))


def _words(node: fx.Node) -> tuple[str, ...] | None:
    if node.target in VIEWS:
        return ()
    if node.target is CONVERT:
        return (cast(node.args[1]),) if node.args[1] in DTYPES.values() else None  # type: ignore[arg-type]
    names = STEPS.get(node.target)  # type: ignore[call-overload]
    if names is None or node.kwargs:
        return None
    numbers = node.args[1:]
    if not numbers and len(names) == 1 and names[0] not in WITH_NUMBER:
        return names
    if len(numbers) != len(names) or not all(is_number(node, n) for n in numbers):
        return None
    return tuple(step(name, float(n)) for name, n in zip(names, numbers, strict=True))  # type: ignore[arg-type]


def _choice(node: fx.Node) -> Step | None:
    """``where(value > 0, value, number)`` and the like, the number being a tensor that is full of it."""
    condition, *options = node.args
    if not isinstance(condition, fx.Node) or condition.op != "call_function" or len(condition.args) != 2:
        return None
    value, bound = condition.args
    if not isinstance(value, fx.Node) or not is_number(condition, bound) or bound != 0 or value not in options:
        return None
    position = options.index(value)
    name = CHOICES.get((condition.target, position == 0))  # type: ignore[arg-type]
    constant = options[1 - position]
    if name is None or not isinstance(constant, fx.Node) or constant.target is not torch.ops.aten.full.default:
        return None
    number = constant.args[1]
    # the number is that of the program if nothing but the value's dtype rounds it
    rounded = dtype(constant) in (dtype(value), torch.float32, torch.float64)
    alike = dtype(node) is dtype(value) and same_shape(shape(node), shape(value))
    if not (rounded and alike and is_number(constant, number)):
        return None
    return Step(value, (step(name, float(number)),), (constant, condition, node))  # type: ignore[arg-type]


def composed(node: Any) -> Step | None:
    """A step that takes several calls, of which a node is the last; the value is float32 and keeps its shape."""
    options = BY_HEAD.get(node.target, ()) if isinstance(node, fx.Node) else ()
    for name, pattern in options:
        for found in Matcher().match(pattern, node):
            value = found.inputs["value"]
            if dtype(value) is torch.float32 and same_shape(shape(node), shape(value)):
                return Step(value, (name,), (*(other for other in found.nodes if other is not node), node))
    return None


class Matcher:
    """Matches patterns against the nodes of one graph, which must not change meanwhile.

    With ``trace``, ``misfit`` is the deepest node at which matching failed so far, and ``depth`` how many nodes had
    matched before it: what to name when nothing explains a value.
    """

    def __init__(self, trace: bool = False) -> None:
        self._arguments: dict[fx.Node, tuple[list[Any], int]] = {}
        self._steps: dict[fx.Node, Step | None] = {}
        self._trace, self.depth = trace, -1
        self.misfit: fx.Node | None = None

    def match(self, pattern: Pattern, root: fx.Node) -> Iterator[Found]:
        """Every way in which ``pattern`` explains the value ``root``."""
        return self._match(pattern, root, root, Found())

    def step(self, node: fx.Node) -> Step | None:
        """``step_of``, which is asked for a node again and again."""
        if node not in self._steps:
            self._steps[node] = step_of(node)
        return self._steps[node]

    def steps_from(self, value: fx.Node) -> list[Step]:
        """The steps of several calls that begin with a value."""
        if not any(user.target in FIRST for user in value.users):
            return []
        reached, left = set[fx.Node](), [value]
        while left:
            left += (more := {user for user in left.pop().users if user.target in WITHIN} - reached)
            reached |= more
        steps = (self.step(node) for node in sorted(reached) if node.target in BY_HEAD)
        return [step for step in steps if step is not None and step.value is value]

    def _match(self, pattern: Pattern, value: Any, consumer: fx.Node, found: Found) -> Iterator[Found]:
        match pattern:
            case Call():
                yield from self._match_call(pattern, value, found)
            case OneOf():
                known = pattern.by_head.get(value.target) if isinstance(value, fx.Node) else None
                options = pattern.others if known is None else known
                for option in options:
                    yield from self._match(option, value, consumer, found)
                if self._trace and len(options) < len(pattern.options):
                    self._note(value, found)
            case Var():
                if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor):
                    known = found.inputs.get(pattern.name)
                    if known is None:
                        yield found.with_input(pattern.name, value)
                    elif known is value:
                        yield found
            case Const():
                if _is_literal(pattern.value, value):
                    yield found
                elif self._trace:
                    self._note(consumer, found)
            case Attr():
                if not isinstance(value, fx.Node) and pattern.test(consumer, value):
                    yield from _attributed(found, {pattern.name: value} if pattern.name else {})
                elif self._trace:
                    self._note(consumer, found)
            case With():
                for inner in self._match(pattern.of, value, consumer, found):
                    yield from _attributed(inner, pattern.attributes)
            case Named():
                for inner in self._match(pattern.of, value, consumer, found):
                    if inner.named.get(pattern.name, value) is value:
                        yield inner.with_name(pattern.name, value)
            case Same():
                if value is found.named.get(pattern.name):
                    yield found
                elif self._trace:
                    self._note(value, found)
            case Both():
                for inner in self._match(pattern.of, value, consumer, found):
                    yield from self._match(pattern.also, value, consumer, inner)
            case Items():
                if isinstance(value, (list, tuple)) and len(value) == len(pattern.items):
                    yield from self._match_items(pattern.items, value, consumer, found)
            case Views():
                nodes = []
                while isinstance(value, fx.Node) and value.target in VIEWS:
                    nodes.append(value)
                    value = value.args[0]
                yield from self._match(pattern.of, value, consumer, found.with_nodes(nodes) if nodes else found)
            case Steps():
                yield from self._match_steps(pattern, value, consumer, found)
            case _:
                raise TypeError(f"not a pattern: {pattern!r}")

    def _match_call(self, pattern: Call, value: Any, found: Found) -> Iterator[Found]:
        if (
            isinstance(value, fx.Node)
            and (value.target in pattern.targets or (pattern.by_name and _is_named(value.target, pattern.targets)))
            and (pattern.dtype is None or dtype(value) is pattern.dtype)
        ):
            bound = self._arguments.get(value)
            if bound is None:
                bound = self._arguments[value] = arguments(value)
            values, count = bound
            wanted = len(pattern.args)
            if count <= wanted <= len(values):
                start = found.with_nodes((value,))
                orders = [values[:wanted]]
                if pattern.commute and values[0] is not values[1]:
                    orders.append([values[1], values[0], *values[2:wanted]])
                for order in orders:
                    wrong = next(filter(None, map(_wrong_head, pattern.heads, order)), None)
                    if wrong is None:
                        yield from self._match_arguments(pattern, pattern.order, order, value, start)
                    elif self._trace:
                        self._note(wrong, found)
                return
        if self._trace:
            self._note(value, found)

    def _match_arguments(
        self, call: Call, positions: Sequence[int], values: Sequence[Any], consumer: fx.Node, found: Found
    ) -> Iterator[Found]:
        if not positions:
            yield found
            return
        at = positions[0]
        for first in self._match(call.args[at], values[at], consumer, found):
            yield from self._match_arguments(call, positions[1:], values, consumer, first)

    def _match_items(
        self, patterns: Sequence[Pattern], values: Sequence[Any], consumer: fx.Node, found: Found
    ) -> Iterator[Found]:
        if not patterns:
            yield found
            return
        for first in self._match(patterns[0], values[0], consumer, found):
            yield from self._match_items(patterns[1:], values[1:], consumer, first)

    def _match_steps(self, pattern: Steps, value: Any, consumer: fx.Node, found: Found) -> Iterator[Found]:
        walk = [Step(value, (), ())]  # for each value on the way all the steps that follow it
        while isinstance(walk[-1].value, fx.Node) and (last := self.step(walk[-1].value)) is not None:
            walk.append(Step(last.value, (*last.words, *walk[-1].words), (*walk[-1].nodes, *last.nodes)))
        for bottom, words, nodes in reversed(walk):
            start = found.with_nodes(nodes).with_attributes({pattern.name: words})
            yield from self._match(pattern.of, bottom, consumer, start)

    def _note(self, value: Any, found: Found) -> None:
        if isinstance(value, fx.Node) and len(found.nodes) > self.depth:
            self.depth, self.misfit = len(found.nodes), value


def _is_named(target: Any, names: Iterable[Any]) -> bool:
    """Whether one of the names is the target's; ``*`` stands for any text."""
    return any(isinstance(name, str) and fnmatchcase(str(target), name) for name in names)


def _is_literal(expected: float | bool, value: Any) -> bool:
    if isinstance(expected, bool):
        return value is expected
    return type(value) in (int, float) and same_number(value, expected)


def _attributed(found: Found, attributes: Mapping[str, Any]) -> Iterator[Found]:
    """``found`` with these attributes too, unless it has another value for one."""
    if all(name not in found.attributes or found.attributes[name] == value for name, value in attributes.items()):
        yield found.with_attributes(attributes) if attributes else found


def _wrong_head(heads: frozenset[Any] | None, value: Any) -> Any:
    """The value, if it is a call that its pattern cannot end in."""
    return value if heads is not None and (not isinstance(value, fx.Node) or value.target not in heads) else None


def follow(
    matcher: Matcher, branch: Branch, found: Found, root: fx.Node
) -> tuple[fx.Node, str, tuple[fx.Node, ...]] | None:
    """The output of a branch: (node, program, nodes on the way), or None if there is none."""
    inside = {*found.nodes, root}
    source = found.named[branch.source]
    if branch.item is not None:
        items = (user for user in source.users if user.target is getitem and user.args[1] == branch.item)
        item = next(items, None)
        return (item, " ".join(branch.start(found)), (item,)) if item is not None else None
    reached = []
    stack: list[tuple[fx.Node, fx.Node, tuple[str, ...], tuple[fx.Node, ...]]] = [
        (source, source, branch.start(found), ())
    ]
    while stack:
        node, last, steps, nodes = stack.pop()
        program = " ".join(steps)
        if any(reader not in inside for reader in readers(node)) and branch.test(last, program):
            reached.append((last, program, nodes))
            continue
        for user in node.users:
            following = matcher.step(user)
            if following is not None and following.value is node:
                words, passed = following.words, following.nodes
                stack.append((user, user if words else last, (*steps, *words), (*nodes, *passed)))
        for following in matcher.steps_from(node):
            end = following.nodes[-1]
            stack.append((end, end, (*steps, *following.words), (*nodes, *following.nodes)))
    return min(reached, key=lambda r: r[0], default=None)
