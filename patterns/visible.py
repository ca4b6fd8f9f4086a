"""What a mask leaves visible, read off the nodes that compute it: which keys a query of attention sees.

Models make their masks in the graph: ``le(arange(S), arange(T) + position)``, with a window, with padding. An integer
tensor of such a graph is a linear function of its indices and of integers that only a run will tell; a comparison of
two is an inequality of one; a mask is a conjunction of inequalities and of what is not understood. An inequality of
the right form says that a query sees no key after its own, or none before a window: then the op needs the position
instead of the mask, and never reads the rest of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .fx_facts import (
    CONVERT,
    FLOATS,
    VIEWS,
    Target,
    arguments,
    aten,
    dtype,
    is_last_dim,
    is_number,
    prims,
    same_size,
    shape,
)

INTEGERS = (torch.int64, torch.int32)
# Numbers are below this, so that no sum of a few of them leaves 32 bits.
LARGE = 2**28


@dataclass(frozen=True)
class Linear:
    """``offset + sum(steps[d] * index of dimension d) + sum(of[n] * the value of node n)``.

    offset: a number, maybe symbolic; steps: the last is for the last dimension, and those before the first are 0;
    of: nodes of one element that no rule explains.
    """

    offset: Any
    steps: tuple[int, ...] = ()
    of: Mapping[fx.Node, int] = field(default_factory=dict)

    def plus(self, other: Linear, times: int = 1) -> Linear:
        """The sum with ``times`` another, the dimensions aligned at the last."""
        rank = max(len(self.steps), len(other.steps))
        pairs = zip(self.padded(rank), other.padded(rank), strict=True)
        of = {node: self.of.get(node, 0) + times * other.of.get(node, 0) for node in {**self.of, **other.of}}
        return Linear(
            self.offset + times * other.offset,
            tuple(a + times * b for a, b in pairs),
            {node: count for node, count in of.items() if count},
        )

    def padded(self, rank: int) -> tuple[int, ...]:
        """The steps of at least so many dimensions."""
        return (0,) * (rank - len(self.steps)) + self.steps


class Conjunction(NamedTuple):
    """A condition: every ``inequality <= 0``, and every one of ``others``, boolean nodes that are broadcast."""

    inequalities: tuple[Linear, ...] = ()
    others: tuple[fx.Node, ...] = ()


class Visible(NamedTuple):
    """Which keys queries see: those that ``mask`` leaves (None: all), and with a position, one integer, of these key j
    only if ``j <= position + t`` for query t, and with a window only if ``j > position + t - window`` too.

    ``nodes`` are those that the masks and positions of the graph are computed by on the way from these to its own mask.
    """

    mask: fx.Node | None
    position: fx.Node | None = None
    window: int = 0
    nodes: frozenset[fx.Node] = frozenset()


class _Reader:
    """Reads nodes by ``RULES``; ``explained`` are those that one explained."""

    def __init__(self) -> None:
        self.explained: set[fx.Node] = set()

    def linear(self, value: Any) -> Linear | None:
        """An integer, a symbolic one, or a tensor of integers; None if it is anything else."""
        if type(value) is int:
            return Linear(value) if abs(value) < LARGE else None
        if not isinstance(value, fx.Node):
            return None
        meta = value.meta.get("val")
        if isinstance(meta, torch.SymInt):
            return Linear(meta)
        if not isinstance(meta, Tensor) or meta.dtype not in INTEGERS:
            return None
        found = self._read(value)
        if isinstance(found, Linear):
            steps = zip(found.padded(meta.dim()), meta.shape, strict=True)
            return Linear(found.offset, tuple(0 if same_size(size, 1) else step for step, size in steps), found.of)
        return Linear(0, (), {value: 1}) if same_size(meta.numel(), 1) else None

    def condition(self, node: fx.Node) -> Conjunction:
        """A boolean tensor."""
        found = self._read(node)
        return found if isinstance(found, Conjunction) else Conjunction(others=(node,))

    def _read(self, node: fx.Node) -> Linear | Conjunction | None:
        rule = RULES.get(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]
        found = None if rule is None else rule(self, node, arguments(node)[0])
        if found is not None:
            self.explained.add(node)
        return found


Rule = Callable[[_Reader, fx.Node, Sequence[Any]], Linear | Conjunction | None]


def _iota(reader: _Reader, node: fx.Node, given: Sequence[Any]) -> Linear | None:
    _, start, step, *_ = given
    first = reader.linear(start)
    return Linear(first.offset, (step,)) if first is not None and type(step) is int and abs(step) < LARGE else None


def _full(reader: _Reader, node: fx.Node, given: Sequence[Any]) -> Linear | Conjunction | None:
    _, value, *_ = given
    if dtype(node) is torch.bool:
        return Conjunction() if value is True else None
    return reader.linear(value)


def _sum(sign: int) -> Rule:
    def rule(reader: _Reader, node: fx.Node, given: Sequence[Any]) -> Linear | None:
        a, b, alpha = given
        left, right = reader.linear(a), reader.linear(b)
        known = left is not None and right is not None and type(alpha) is int and abs(alpha) < LARGE
        return left.plus(right, sign * alpha) if known else None  # type: ignore[union-attr,arg-type]

    return rule


def _compared(larger: int, apart: int) -> Rule:
    """Argument number ``larger`` is larger than the other by at least ``apart``."""

    def rule(reader: _Reader, node: fx.Node, given: Sequence[Any]) -> Conjunction | None:
        small, large = reader.linear(given[1 - larger]), reader.linear(given[larger])
        if small is None or large is None:
            return None
        return Conjunction((small.plus(large, -1).plus(Linear(apart)),))

    return rule


def _and(reader: _Reader, node: fx.Node, given: Sequence[Any]) -> Conjunction | None:
    if any(not isinstance(value, fx.Node) or dtype(value) is not torch.bool for value in given):
        return None
    a, b = (reader.condition(value) for value in given)
    return Conjunction(a.inequalities + b.inequalities, tuple(dict.fromkeys(a.others + b.others)))


def _not(reader: _Reader, node: fx.Node, given: Sequence[Any]) -> Conjunction | None:
    return negated(reader.condition(given[0])) if dtype(given[0]) is torch.bool else None


def negated(condition: Conjunction) -> Conjunction | None:
    """The opposite of one inequality; None of anything else: not (e <= 0) is 1 - e <= 0."""
    if condition.others or len(condition.inequalities) != 1:
        return None
    return Conjunction((Linear(1).plus(condition.inequalities[0], -1),))


def _converted(reader: _Reader, node: fx.Node, given: Sequence[Any]) -> Linear | None:
    return reader.linear(given[0])


def _expanded(reader: _Reader, node: fx.Node, given: Sequence[Any]) -> Linear | Conjunction | None:
    """Dimensions are aligned at the last, and where one is repeated, there was no step."""
    return reader.condition(given[0]) if dtype(node) is torch.bool else reader.linear(given[0])


def _viewed(reader: _Reader, node: fx.Node, given: Sequence[Any]) -> Linear | Conjunction | None:
    """A view that adds or takes away dimensions of one element."""
    before, after = shape(given[0]), shape(node)
    wide = [d for d, size in enumerate(before) if not same_size(size, 1)]
    still = [d for d, size in enumerate(after) if not same_size(size, 1)]
    pairs = zip(wide, still, strict=False)
    if len(wide) != len(still) or not all(same_size(before[a], after[b]) for a, b in pairs):
        return None

    def moved(value: Linear) -> Linear:
        steps, places = value.padded(len(before)), dict(zip(still, wide, strict=True))
        found = tuple(steps[places[d]] if d in places else 0 for d in range(len(after)))
        return Linear(value.offset, found, value.of)

    if dtype(node) is not torch.bool:
        value = reader.linear(given[0])
        return None if value is None else moved(value)
    condition = reader.condition(given[0])
    # what is not understood may not be aligned with the view: the view, which implies it, stands for it
    return Conjunction(tuple(map(moved, condition.inequalities)), (node,) if condition.others else ())


RULES: Mapping[Target, Rule] = {
    prims.iota.default: _iota,
    aten.full.default: _full,
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _sum(1)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _sum(-1)),
    CONVERT: _converted,
    aten.expand.default: _expanded,
    **dict.fromkeys(VIEWS, _viewed),
    **dict.fromkeys((aten.le.Tensor, aten.le.Scalar), _compared(1, 0)),
    **dict.fromkeys((aten.lt.Tensor, aten.lt.Scalar), _compared(1, 1)),
    **dict.fromkeys((aten.ge.Tensor, aten.ge.Scalar), _compared(0, 0)),
    **dict.fromkeys((aten.gt.Tensor, aten.gt.Scalar), _compared(0, 1)),
    **dict.fromkeys((aten.bitwise_and.Tensor, aten.logical_and.default), _and),
    **dict.fromkeys((aten.bitwise_not.default, aten.logical_not.default), _not),
}


class _Choice(NamedTuple):
    """A mask that adds something where a condition holds, and takes keys away where it does not.

    node:   the condition in the graph, None where there is only its opposite.
    added:  what is added, None for 0.
    finite: whether keys are taken away by a number that does so only where another key is left.
    """

    condition: Conjunction
    node: fx.Node | None
    added: fx.Node | None
    finite: bool


def visible(mask: fx.Node, sizes: Sequence[Any], false: Sequence[float]) -> Visible:
    """What a mask, boolean or added to the scores, leaves visible; ``sizes`` are batch, heads, queries, slots.

    A number takes keys away if it is one of ``false``, which PyTorch puts there for False, or the least of the mask's
    dtype. What is found holds for every value of everything else in the graph, but for finite numbers: no two scores of
    a query may be as far apart, and with the least number each query must see a key, as it does by a position from 0 to
    slots - queries.
    """
    _, _, queries, slots = sizes
    reader, covers = _Reader(), _covers(mask)
    choice = _choice(reader, covers[-1], false)
    if choice is None:
        return Visible(mask)
    bounds: list[tuple[int, Any, fx.Node]] = []
    more = False  # whether the condition says more than a position and a window can
    for inequality in choice.condition.inequalities:
        bound = _diagonal(inequality, queries)
        if bound is not None:
            bounds.append(bound)
        elif not _always(inequality, queries, slots):
            more = True
    position = next((node for step, offset, node in bounds if step == 1 and same_size(offset, 0)), None)
    window = 0
    for step, offset, node in bounds:
        if node is position and step == -1 and type(offset) is int and offset <= 0:  # j > node + t - (1 - offset)
            window = min(window or 1 - offset, 1 - offset)
        elif node is not position or step == -1 or not statically_known_true(offset <= 0):
            more = True
    # What the op reads beside the position must not depend on it: a part of the condition, or what is added.
    parts = [*choice.condition.others, *([] if choice.added is None else [choice.added])]
    if not more and not parts:
        found = Visible(None, position, window)
    elif choice.finite:
        return Visible(mask)
    else:
        part = _narrow(parts[0]) if not more and len(parts) == 1 else None
        whole = None if choice.node is None or choice.added is not None else _narrow(choice.node)
        if part is not None and is_mask(part, sizes):
            found = Visible(part, position, window)
        else:
            found = Visible(whole if whole is not None and is_mask(whole, sizes) else mask)
    nodes = _between(mask, found)
    return found._replace(nodes=nodes) if nodes <= reader.explained.union(covers, covers[-1].args) else Visible(mask)


def is_mask(node: fx.Node, sizes: Sequence[Any]) -> bool:
    """Whether a node has four dimensions, of these sizes or of 1, the last of its size."""
    own = shape(node)
    fits = len(own) == 4 and same_size(own[-1], sizes[-1])
    return fits and all(same_size(a, b) or same_size(a, 1) for a, b in zip(own, sizes, strict=True))


def _diagonal(inequality: Linear, queries: Any) -> tuple[int, Any, fx.Node] | None:
    """``(1, offset, node)`` for ``j - t - node + offset <= 0``, of key j and query t; -1 if the signs are others."""
    *outer, t, j = inequality.padded(2)
    if any(outer) or j not in (1, -1) or len(inequality.of) != 1:
        return None
    ((node, count),) = inequality.of.items()
    one = same_size(queries, 1)  # whose index is 0
    return (j, inequality.offset, node) if count == -j and (t == -j or one) else None


def _always(inequality: Linear, queries: Any, slots: Any) -> bool:
    """Whether an inequality holds for all keys and queries, whatever its nodes are."""
    *outer, t, j = inequality.padded(2)
    if any(outer) or inequality.of:
        return False
    return statically_known_true(inequality.offset + max(j, 0) * (slots - 1) + max(t, 0) * (queries - 1) <= 0)


def _covers(mask: fx.Node) -> list[fx.Node]:
    """A mask, and what it is the same numbers as: what it was expanded or rounded from, or padded and cut again."""
    nodes = [mask]
    while True:
        node = nodes[-1]
        rounded = node.target is CONVERT and dtype(node) in FLOATS and dtype(node.args[0]) in FLOATS  # type: ignore[arg-type]
        if rounded or node.target is aten.expand.default:
            nodes.append(node.args[0])  # type: ignore[arg-type]
        elif (padded := _padded(node)) is not None:
            nodes += padded
        else:
            return nodes


def _padded(node: fx.Node) -> list[fx.Node] | None:
    """PyTorch pads masks for its memory-efficient kernel, and passes on a view of their own size."""
    if node.target is not aten.slice.Tensor:
        return None
    (padded, dim, start, _, step), _ = arguments(node)
    if padded.target is not aten.constant_pad_nd.default or start not in (0, None) or step != 1:
        return None
    (source, pads, *_), _ = arguments(padded)
    whole = is_last_dim(node, dim) and len(pads) == 2 and pads[0] == 0 and same_size(shape(source)[-1], shape(node)[-1])
    return [padded, source] if whole else None


def _choice(reader: _Reader, node: fx.Node, false: Sequence[float]) -> _Choice | None:
    if dtype(node) is torch.bool:
        return _Choice(reader.condition(node), node, added=None, finite=False)
    if node.target is not aten.where.self:
        return None
    condition, *options = cast(list[fx.Node], node.args)
    least = torch.finfo(dtype(node)).min
    for gone, kept in ((1, 0), (0, 1)):
        number = _number(options[gone])
        if number is None or not (number in false or number <= least):
            continue
        read = reader.condition(condition)
        read = read if gone == 1 else negated(read)
        if read is None:
            return None
        added = None if _number(options[kept]) == 0 else options[kept]
        return _Choice(read, condition if gone == 1 else None, added, finite=number not in false)
    return None


def _number(node: Any) -> float | None:
    """The number that a tensor is full of."""
    if not isinstance(node, fx.Node) or node.target is not aten.full.default or not is_number(node, node.args[1]):
        return None
    return node.args[1]  # type: ignore[return-value]


def _narrow(node: fx.Node) -> fx.Node:
    """A mask before it was expanded: it is broadcast alike."""
    while node.target is aten.expand.default and len(shape(node.args[0])) == len(shape(node)):  # type: ignore[arg-type]
        node = node.args[0]  # type: ignore[assignment]
    return node


def _between(mask: fx.Node, found: Visible) -> frozenset[fx.Node]:
    """The tensors from a mask up to what the op reads instead."""
    nodes: set[fx.Node] = set()
    pending = [mask]
    while pending:
        node = pending.pop()
        if node not in nodes and node not in (found.mask, found.position) and isinstance(node.meta.get("val"), Tensor):
            nodes.add(node)
            pending += node.all_input_nodes
    return frozenset(nodes)
