"""Steps of attention whose masks are proved, or not, and mutations of masks: what decides which keys a query sees."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx

from support.checked import checked
from support.mutations.operators import Inexecutable, Mutation, alike, calls, other, replace_argument, val
from support.mutations.sources import Base

aten, prims = torch.ops.aten, torch.ops.prims
BATCH, HEADS, KEY_HEADS, SLOTS, DIM = 2, 4, 2, 12, 64
LEAST = torch.finfo(torch.bfloat16).min

Step = Callable[..., tuple[Tensor, ...]]


# ---- the steps: (q, k, v, position, another position, padding) -> results ------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    k, v = (x[:, :, None].expand(BATCH, KEY_HEADS, 2, SLOTS, DIM).reshape(BATCH, HEADS, SLOTS, DIM) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=0.125)


def queries_and_keys(q: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(q.shape[2])[None, None, :, None] + position, torch.arange(SLOTS)[None, None, None]


def causal(q: Tensor, k: Tensor, v: Tensor, p: Tensor, other_p: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
    query, key = queries_and_keys(q, p)
    return attend(q, k, v, key <= query), query + other_p


def windowed(q: Tensor, k: Tensor, v: Tensor, p: Tensor, other_p: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
    query, key = queries_and_keys(q, p)
    return attend(q, k, v, (key <= query) & (key > query - 4)), key + other_p


def padded(q: Tensor, k: Tensor, v: Tensor, p: Tensor, other_p: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
    query, key = queries_and_keys(q, p)
    seen = (key <= query) & padding[:, None, None]
    return attend(q, k, v, seen), query * other_p


def by_least(q: Tensor, k: Tensor, v: Tensor, p: Tensor, other_p: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
    """As transformers masks without PyTorch's call."""
    query, key = queries_and_keys(q, p)
    least, zero = (torch.full((), value, dtype=q.dtype) for value in (LEAST, 0.0))
    return attend(q, k, v, torch.where(key <= query, zero, least).expand(BATCH, 1, -1, -1)), other_p + 1


def biased(q: Tensor, k: Tensor, v: Tensor, p: Tensor, other_p: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
    query, key = queries_and_keys(q, p)
    bias = (key * -0.25).to(q.dtype)
    never = torch.full((), -math.inf, dtype=q.dtype)
    return attend(q, k, v, torch.where(key > query, never, bias)), query - other_p


def sliding(q: Tensor, k: Tensor, v: Tensor, p: Tensor, other_p: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
    """A full window, whose positions are numbers: all keys count."""
    query, key = torch.arange(q.shape[2])[None, None, :, None] + 40, torch.arange(SLOTS)[None, None, None] + 29
    return attend(q, k, v, ((key <= query) & (key > query - SLOTS)).expand(BATCH, 1, -1, -1)), p + other_p


def updated(q: Tensor, k: Tensor, v: Tensor, p: Tensor, other_p: Tensor, padding: Tensor) -> tuple[Tensor, ...]:
    """After the new keys and values are written into the cache, and the position moves on."""
    query, key = queries_and_keys(q, p)
    places = torch.arange(q.shape[2]) + p
    for x in (k, v):
        x.index_copy_(2, places.clamp(max=SLOTS - 1), x[:, :, : q.shape[2]] * 0.5 + 1)
    y = attend(q, k, v, ~(key > query))
    p.add_(q.shape[2])
    return y, other_p * 2


@dataclass(frozen=True)
class Attention:
    """A step, and of how many queries it is."""

    step: Step
    queries: int

    def __str__(self) -> str:
        return f"{self.step.__name__}-{self.queries}"


SOURCES = tuple(
    Attention(step, queries)
    for step in (causal, windowed, padded, by_least, biased, sliding, updated)
    for queries in (1, 3)
    if (step, queries) != (sliding, 3)  # of several queries the first do not see the last key
)


class AttentionBase(Base):
    """Its positions are within the cache. The queries alone hold NaN and infinities: in the cache they would spoil the
    graph's result, and not the op's, where a mutation makes a position that leaves no slot filled."""

    def inputs(self, kind: str, symbol: int | None = None) -> list[Any]:
        return [self._input(kind, list(shape or ()), dtype, seed) for seed, (shape, dtype) in enumerate(self.shapes)]

    def _input(self, kind: str, shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
        last = SLOTS - next(sizes[2] for sizes, _ in self.shapes if sizes is not None and sizes[1:2] == (HEADS,))
        if dtype is torch.int64:
            return torch.tensor({"normal": 5, "finite": 0, "nonfinite": last}[kind] + (seed % 2) * (kind == "normal"))
        generator = torch.Generator().manual_seed(seed)
        if dtype is torch.bool:
            return torch.rand(shape, generator=generator) < 0.7
        values = torch.randn(shape, generator=generator)
        if kind == "finite":
            values *= 30
            values[:, 0, 0] = 0
        elif kind == "nonfinite" and shape[1] == HEADS:
            values[0, 0, 0, seed] = math.nan
            values[1, 1, 0, seed] = math.inf
        return values.to(dtype)


@cache
def base(source: Attention) -> AttentionBase:
    """Captured once in a process."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((BATCH, HEADS, source.queries, DIM), (BATCH, KEY_HEADS, SLOTS, DIM), (BATCH, KEY_HEADS, SLOTS, DIM))
    tensors = [torch.randn(size, generator=generator).bfloat16() for size in sizes]
    result = checked(source.step)
    with torch.no_grad():
        result.call(*tensors, torch.tensor(5), torch.tensor(3), torch.ones(BATCH, SLOTS, dtype=torch.bool))
    assert result.report.replaced == {"decode_attention": 1}
    assert result.oracle.identical
    (comparison,) = result.oracle.graphs
    graph = comparison.before.graph
    values = [val(node) for node in graph.nodes if node.op == "placeholder"]
    return AttentionBase(graph, [(tuple(value.shape), value.dtype) for value in values], 1)


# ---- the mutations -------------------------------------------------------------------------------------------

MASKS: list[Mutation] = []
COMPARISONS = tuple(
    getattr(getattr(aten, name), kind) for name in ("le", "lt", "ge", "gt", "eq", "ne") for kind in ("Tensor", "Scalar")
)
SUMS = (aten.add.Tensor, aten.sub.Tensor)
BOTH = (aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor)


def mask_mutation(function: Mutation) -> Mutation:
    """Register a mutation of masks."""
    MASKS.append(function)
    return function


def of_dtype(graph: fx.Graph, *dtypes: torch.dtype) -> list[fx.Node]:
    tensors = [node for node in calls(graph) if isinstance(node.meta.get("val"), Tensor)]
    return [node for node in tensors if val(node).dtype in dtypes]


def attention(graph: fx.Graph) -> fx.Node | None:
    return next(iter(calls(graph, aten._scaled_dot_product_flash_attention_for_cpu.default)), None)


def check_call(graph: fx.Graph) -> None:
    """PyTorch's kernel checks little, since its caller does: it would divide by zero, or read past the end.

    Raises:
        Inexecutable: its caller would not call it.
    """
    for node in calls(graph, aten._scaled_dot_product_flash_attention_for_cpu.default):
        q, k, v = map(val, cast(list[fx.Node], node.args[:3]))
        alike = q.dim() == k.dim() == 4 and k.shape == v.shape and (k.shape[0], k.shape[3]) == (q.shape[0], q.shape[3])
        if not alike or q.numel() * k.numel() == 0 or q.shape[1] % k.shape[1] or not q.dtype == k.dtype == v.dtype:
            raise Inexecutable(f"attention of {q.shape}, {k.shape} and {v.shape}")
        mask = cast(fx.Node | None, node.kwargs.get("attn_mask"))
        sizes = (*q.shape[:3], k.shape[2])
        if mask is not None and any(a not in (1, b) for a, b in zip(val(mask).shape[::-1], sizes[::-1], strict=False)):
            raise Inexecutable(f"a mask of {val(mask).shape}")


def instead(graph: fx.Graph, node: fx.Node, target: Any, *args: Any) -> str:
    """What reads a node reads a call on it."""
    users = list(node.users)
    with graph.inserting_after(node):
        made = graph.call_function(target, (node, *args))
    for user in users:
        user.replace_input_with(node, made)
    return f"{target}({node}, {args}) for {node}"


@mask_mutation
def comparison(graph: fx.Graph, rng: random.Random) -> str | None:
    found = calls(graph, *COMPARISONS)
    if not found:
        return None
    node = rng.choice(found)
    kind = node.target._overloadname  # type: ignore[union-attr]
    node.target = other(rng, [t for t in COMPARISONS if t._overloadname == kind], node.target)
    return f"{node} is {node.target}"


@mask_mutation
def exchanged_operands(graph: fx.Graph, rng: random.Random) -> str | None:
    found = calls(graph, aten.sub.Tensor, *(t for t in COMPARISONS if t._overloadname == "Tensor"))
    if not found:
        return None
    node = rng.choice(found)
    a, b = node.args
    if not isinstance(b, fx.Node):
        return None
    node.args = (b, a)
    return f"{node}{node.args}"


@mask_mutation
def whole_number(graph: fx.Graph, rng: random.Random) -> str | None:
    """A number in the arithmetic of positions."""
    found = [n for n in calls(graph, *SUMS, *COMPARISONS) if type(n.args[1]) is int]
    found += calls(graph, prims.iota.default)
    if not found:
        return None
    node = rng.choice(found)
    if node.target is prims.iota.default:
        name, pool = rng.choice([("start", [-1, 1, 2, 5]), ("step", [-1, 0, 2])])
        value = rng.choice(pool)
        node.kwargs = {**node.kwargs, name: value}
        return f"{name} of {node} is {value}"
    return replace_argument(node, 1, node.args[1] + rng.choice([-SLOTS, -2, -1, 1, 2, SLOTS]))  # type: ignore[operator]


@mask_mutation
def sum_or_difference(graph: fx.Graph, rng: random.Random) -> str | None:
    found = [node for node in calls(graph, *SUMS) if val(node).dtype is torch.int64]
    if not found:
        return None
    node = rng.choice(found)
    if rng.random() < 0.5:
        node.target = other(rng, SUMS, node.target)
    else:
        node.kwargs = {"alpha": rng.choice([2, -1, 0])}
    return f"{node} is {node.target} {node.kwargs}"


@mask_mutation
def another_condition(graph: fx.Graph, rng: random.Random) -> str | None:
    found = calls(graph, *BOTH)
    if not found:
        return None
    node = rng.choice(found)
    if rng.random() < 0.6:
        node.target = other(rng, BOTH, node.target)
        return f"{node} is {node.target}"
    return replace_argument(node, rng.randrange(2), node.args[rng.randrange(2)])


@mask_mutation
def another_choice(graph: fx.Graph, rng: random.Random) -> str | None:
    found = calls(graph, aten.where.self)
    if not found:
        return None
    node = rng.choice(found)
    condition, a, b = node.args
    node.args = rng.choice([(condition, b, a), (condition, a, a), (condition, b, b)])
    return f"{node}{node.args}"


@mask_mutation
def another_number(graph: fx.Graph, rng: random.Random) -> str | None:
    found = [node for node in calls(graph, aten.full.default) if val(node).is_floating_point()]
    pool = [-math.inf, math.inf, math.nan, LEAST, -1e9, -65504.0, -1e4, -1.0, -0.0, 0, 1.0]
    return replace_argument(rng.choice(found), 1, rng.choice(pool)) if found else None


@mask_mutation
def opposite(graph: fx.Graph, rng: random.Random) -> str | None:
    found = of_dtype(graph, torch.bool)
    target = rng.choice([aten.logical_not.default, aten.bitwise_not.default])
    return instead(graph, rng.choice(found), target) if found else None


@mask_mutation
def other_integers(graph: fx.Graph, rng: random.Random) -> str | None:
    """What is computed from integers on the way."""
    found = [node for node in of_dtype(graph, torch.int64) if node.users]
    if not found:
        return None
    target, *args = rng.choice(
        [
            (aten.mul.Tensor, 2),
            (aten.neg.default,),
            (aten.abs.default,),
            (aten.clamp.default, 1, 6),
            (aten.remainder.Scalar, 5),
            (prims.convert_element_type.default, torch.int32),
            (prims.convert_element_type.default, torch.int8),
            (prims.convert_element_type.default, torch.uint8),
            (prims.convert_element_type.default, torch.float32),
            (prims.convert_element_type.default, torch.bool),
        ]
    )
    return instead(graph, rng.choice(found), target, *args)


@mask_mutation
def other_places(graph: fx.Graph, rng: random.Random) -> str | None:
    """The elements of an integer tensor or of a condition in other places."""
    found = [n for n in of_dtype(graph, torch.int64, torch.bool) if val(n).dim() and n.users]
    if not found:
        return None
    node = rng.choice(found)
    rank, sizes = val(node).dim(), list(val(node).shape)
    order = rng.sample(range(rank), rank)
    target, *args = rng.choice(
        [
            (aten.flip.default, [rng.randrange(rank)]),
            (aten.permute.default, order),
            (aten.reshape.default, rng.sample(sizes, rank)),
            (aten.roll.default, [1], [rng.randrange(rank)]),
            (aten.unsqueeze.default, rng.randrange(-rank - 1, rank + 1)),
            (aten.clone.default,),
            (aten.expand.default, [rng.choice([size, 3, SLOTS]) for size in sizes]),
        ]
    )
    return instead(graph, node, target, *args)


@mask_mutation
def other_tensor(graph: fx.Graph, rng: random.Random) -> str | None:
    """An integer tensor, or a condition, for another, such as one position for the other."""
    pool = [
        n for n in graph.nodes if isinstance(n.meta.get("val"), Tensor) and val(n).dtype in (torch.int64, torch.bool)
    ]
    node = rng.choice(pool)
    before = [
        n for n in pool if n < node and val(n).dtype is val(node).dtype and (alike(n, node) or rng.random() < 0.3)
    ]
    users = [user for user in node.users if user.target is not aten.copy_.default]
    if not before or not users:
        return None
    taken, user = rng.choice(before), rng.choice(users)
    user.replace_input_with(node, taken)
    return f"{user} reads {taken} for {node}"


@mask_mutation
def dimension(graph: fx.Graph, rng: random.Random) -> str | None:
    """Of an unsqueeze, such as that before the heads are repeated."""
    found = calls(graph, aten.unsqueeze.default)
    if not found:
        return None
    node = rng.choice(found)
    rank = val(node.args[0]).dim()  # type: ignore[arg-type]
    return replace_argument(node, 1, rng.randrange(-rank - 1, rank + 1))


@mask_mutation
def repeated_sizes(graph: fx.Graph, rng: random.Random) -> str | None:
    found = [n for n in calls(graph, aten.expand.default, aten.reshape.default) if val(n).is_floating_point()]
    if not found:
        return None
    node = rng.choice(found)
    sizes = list(node.args[1])  # type: ignore[arg-type]
    return replace_argument(node, 1, rng.sample(sizes, len(sizes)))


@mask_mutation
def attention_argument(graph: fx.Graph, rng: random.Random) -> str | None:
    node = attention(graph)
    if node is None:
        return None
    kind = rng.choice(["scale", "no scale", "causal", "no mask", "exchanged", "values"])
    q, k, v = node.args[:3]
    match kind:
        case "scale":
            node.kwargs = {**node.kwargs, "scale": 0.3}
        case "no scale":
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != "scale"}
        case "causal":
            node.args = (q, k, v, 0.0, True)
            node.kwargs = {"scale": 0.125}
        case "no mask":
            node.kwargs = {"scale": 0.125}
        case "exchanged":
            node.args = (q, v, k)
        case "values":
            node.args = (q, k, k)
    return f"{kind} of {node}"


@mask_mutation
def other_mask(graph: fx.Graph, rng: random.Random) -> str | None:
    """The mask itself, changed as a whole."""
    node = attention(graph)
    mask = node.kwargs.get("attn_mask") if node is not None else None
    if not isinstance(mask, fx.Node):
        return None
    target, *args = rng.choice(
        [
            (aten.mul.Tensor, 2),
            (aten.neg.default,),
            (aten.add.Tensor, 1),
            (aten.flip.default, [-1]),
            (aten.roll.default, [1], [-1]),
            (aten.clone.default,),
            (aten.expand.default, [BATCH, HEADS, -1, -1]),
            (aten.expand.default, [BATCH, 1, -1, -1]),
            (prims.convert_element_type.default, torch.float32),
            (aten.constant_pad_nd.default, [0, -1]),
            (aten.transpose.int, 0, 1),
        ]
    )
    return instead(graph, mask, target, *args)
