"""The mutations: each changes a graph at random and says what it did."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from aiter_fusion.patterns.fx_facts import same_shape

aten, prims = torch.ops.aten, torch.ops.prims
CONVERT = prims.convert_element_type.default
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


# ---- what mutations are made of ------------------------------------------------------------------------------


class Inexecutable(Exception):  # noqa: N818 (no error: a mutation need not make sense)
    """The mutated graph does not execute."""


def val(node: fx.Node) -> Any:
    return node.meta["val"]


def alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors have one shape."""
    return same_shape(val(a).shape, val(b).shape)


def symbolic(graph: fx.Graph, arguments: Any) -> Any:
    """Arguments in which symbolic sizes are the graph's nodes."""

    def node(value: Any) -> Any:
        if not isinstance(value, torch.SymInt):
            return value
        sizes = [n for n in graph.nodes if n.op == "placeholder" and isinstance(val(n), torch.SymInt)]
        same = [n for n in sizes if val(n).node.expr == value.node.expr]
        if not same:
            raise Inexecutable(f"no node is {value}")
        return same[0]

    return map_aggregate(arguments, node)


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def tensors(graph: fx.Graph) -> list[fx.Node]:
    """Inputs and inner values, in order."""
    return [node for node in graph.nodes if node.op != "output" and is_tensor(node)]


def calls(graph: fx.Graph, *targets: Any) -> list[fx.Node]:
    """The calls of these targets, or all."""
    return [n for n in graph.nodes if n.op == "call_function" and (not targets or n.target in targets)]


def edges(graph: fx.Graph) -> list[tuple[fx.Node, int]]:
    """Every (call, position of an argument) at which it reads a tensor."""
    return [
        (node, position)
        for node in calls(graph)
        for position, value in enumerate(node.args)
        if isinstance(value, fx.Node) and is_tensor(value)
    ]


def later(graph: fx.Graph, node: fx.Node, rng: random.Random) -> fx.Node:
    """A call after ``node``, or the output: a place to insert before. Often the first or the last that there is."""
    places = [n for n in graph.nodes if node < n and n.op != "placeholder"]
    return rng.choice([places[0], places[-1], rng.choice(places), rng.choice(places)])


def add_outputs(graph: fx.Graph, *nodes: fx.Node) -> None:
    output = graph.output_node()
    (returned,) = output.args
    assert isinstance(returned, (tuple, list))
    output.args = ((*returned, *nodes),)


def outputs(graph: fx.Graph) -> list[fx.Node]:
    (returned,) = graph.output_node().args
    assert isinstance(returned, (tuple, list))
    return [node for node in returned if isinstance(node, fx.Node)]


def other(rng: random.Random, pool: Sequence[Any], current: Any) -> Any:
    return rng.choice([value for value in pool if value != current])


def replace_argument(node: fx.Node, position: int, value: Any) -> str:
    before = node.args[position]
    node.update_arg(position, value)
    return f"argument {position} of {node}: {before} -> {value}"


Mutation = Callable[[fx.Graph, random.Random], str | None]
MUTATIONS: list[Mutation] = []


def mutation(function: Mutation) -> Mutation:
    """Register a mutation: it changes the graph and says what it did, or returns None where it does not apply."""
    MUTATIONS.append(function)
    return function


# ---- mutations of literals -----------------------------------------------------------------------------------

REDUCTIONS = (aten.mean.dim, aten.amax.default, aten.max.dim, aten.sum.dim_IntList)


@mutation
def reduction_axis(graph: fx.Graph, rng: random.Random) -> str | None:
    found = calls(graph, *REDUCTIONS)
    if not found:
        return None
    node = rng.choice(found)
    pool: list[Any] = [0, 1, -1, -2] if node.target is aten.max.dim else [[0], [1], [-1], [-2], [0, 1], [-2, -1], []]
    return replace_argument(node, 1, other(rng, pool, node.args[1]))


@mutation
def keepdim(graph: fx.Graph, rng: random.Random) -> str | None:
    found = calls(graph, *REDUCTIONS)
    if not found:
        return None
    node = rng.choice(found)
    kept = len(node.args) > 2 and bool(node.args[2])
    node.args = (*node.args[:2], not kept)
    return f"keepdim of {node} is {not kept}"


@mutation
def exponent(graph: fx.Graph, rng: random.Random) -> str | None:
    found = calls(graph, aten.pow.Tensor_Scalar)
    return replace_argument(rng.choice(found), 1, rng.choice([2.0, 3, 1, 0.5, 4, -2])) if found else None


@mutation
def mean_to_sum(graph: fx.Graph, rng: random.Random) -> str | None:
    found = calls(graph, aten.mean.dim)
    if not found:
        return None
    node = rng.choice(found)
    node.target = aten.sum.dim_IntList
    return f"{node} is a sum"


@mutation
def reduction_dtype(graph: fx.Graph, rng: random.Random) -> str | None:
    found = calls(graph, aten.mean.dim, aten.sum.dim_IntList)
    if not found:
        return None
    node = rng.choice(found)
    node.kwargs = {**node.kwargs, "dtype": rng.choice([F64, F32, BF16])}
    return f"{node} is computed in {node.kwargs['dtype']}"


LITERAL_CALLS = (
    aten.add.Tensor,
    aten.add.Scalar,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.clamp_min.default,
    aten.clamp_max.default,
    aten.clamp.default,
)


@mutation
def literal(graph: fx.Graph, rng: random.Random) -> str | None:
    """Another number: far away, one float32 apart, apart in float64 only, or equal and spelled differently."""
    found = [
        (node, position)
        for node in calls(graph, *LITERAL_CALLS)
        for position, value in enumerate(node.args)
        if type(value) in (int, float)
    ]
    if not found:
        return None
    node, position = rng.choice(found)
    old = node.args[position]
    assert isinstance(old, (int, float))
    up = torch.nextafter(torch.tensor(old, dtype=F32), torch.tensor(math.inf)).item()
    pool = [old * 2, old + 1, -old, old * (1 + 2**-40), up, 0, 1, 1.0, 240.0, 447, 1e-5, math.inf, math.nan]
    return replace_argument(node, position, other(rng, pool, None))


@mutation
def alpha(graph: fx.Graph, rng: random.Random) -> str | None:
    found = calls(graph, aten.add.Tensor, aten.add.Scalar)
    if not found:
        return None
    node, value = rng.choice(found), rng.choice([2, 2, 0.5, 0, 1])
    if node.target is aten.add.Scalar and rng.random() < 0.5:
        node.args = (*node.args, value)
    else:
        node.kwargs = {"alpha": value}
    return f"{node} has alpha={value}"


@mutation
def rounding_mode(graph: fx.Graph, rng: random.Random) -> str | None:
    found = calls(graph, aten.div.Tensor)
    if not found:
        return None
    node = rng.choice(found)
    node.target, node.kwargs = aten.div.Tensor_mode, {"rounding_mode": rng.choice(["floor", "trunc", None])}
    return f"{node} has {node.kwargs}"


DTYPES = (BF16, F16, F32, F64)
FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)


@mutation
def convert_dtype(graph: fx.Graph, rng: random.Random) -> str | None:
    found = calls(graph, CONVERT)
    if not found:
        return None
    node = rng.choice(found)
    pool = FP8 if node.args[1] in FP8 and rng.random() < 0.8 else DTYPES
    return replace_argument(node, 1, other(rng, pool, node.args[1]))


@mutation
def sizes(graph: fx.Graph, rng: random.Random) -> str | None:
    """Other sizes in a reshape: groups of another width, rows that run together, dimensions exchanged."""
    found = calls(graph, aten.reshape.default)
    if not found:
        return None
    node = rng.choice(found)
    old = symbolic(graph, list(val(node).shape))
    shuffled = rng.sample(old, len(old))
    pool = [[-1, width] for width in (32, 64, 128, 256, 512)] + [shuffled, [-1], [*old, 1], [1, *old], [-1, 2, 128]]
    return replace_argument(node, 1, other(rng, pool, node.args[1]))


@mutation
def dimension(graph: fx.Graph, rng: random.Random) -> str | None:
    """Another number in a split, slice, squeeze, unsqueeze or getitem."""
    targets = (
        aten.split.Tensor,
        aten.slice.Tensor,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        getitem,
    )
    found = calls(graph, *targets)
    if not found:
        return None
    node = rng.choice(found)
    if node.target is getitem:
        return replace_argument(node, 1, 1 - int(node.args[1]))  # type: ignore[arg-type]
    position = rng.randrange(1, len(node.args))
    pool = [0, 1, 2, -1, -2, 64, 128, 256, 512]
    return replace_argument(node, position, other(rng, pool, node.args[position]))


@mutation
def wider_groups(graph: fx.Graph, rng: random.Random) -> str | None:
    """All groups of a quantiser wider than a row, or narrower; half of the time their scales are not returned."""
    grouped = [node for node in calls(graph, aten.reshape.default) if val(node).dim() > 1]
    grouped = [node for node in grouped if val(node).shape[-1] in (32, 64, 128)]
    if not grouped:
        return None
    old, new = val(grouped[0]).shape[-1], rng.choice([16, 512, 512, 1024])
    for node in grouped:
        if val(node).shape[-1] == old:
            node.args = (node.args[0], [-1, new])
    scales = [node for node in outputs(graph) if val(node).dtype is F32]
    for node in scales:
        if node.target is aten.reshape.default:
            node.args = (node.args[0], [-1])
    alone = rng.random() < 0.5
    if alone:
        graph.output_node().args = (tuple(node for node in outputs(graph) if node not in scales),)
    return f"groups of {new}" + (", no scales" if alone else "")


# ---- mutations of operations ---------------------------------------------------------------------------------


@mutation
def swap_operands(graph: fx.Graph, rng: random.Random) -> str | None:
    targets = (aten.mul.Tensor, aten.add.Tensor, aten.div.Tensor)
    found = [n for n in calls(graph, *targets) if all(isinstance(a, fx.Node) for a in n.args)]
    if not found:
        return None
    node = rng.choice(found)
    node.args = (node.args[1], node.args[0])
    return f"operands of {node} exchanged"


SIBLINGS: dict[Any, tuple[Any, ...]] = {
    aten.div.Tensor: (aten.mul.Tensor, aten.add.Tensor, aten.maximum.default),
    aten.mul.Tensor: (aten.div.Tensor, aten.add.Tensor),
    aten.add.Tensor: (aten.sub.Tensor, aten.mul.Tensor),
    aten.add.Scalar: (aten.sub.Scalar, aten.mul.Scalar),
    aten.rsqrt.default: (aten.reciprocal.default, aten.sqrt.default),
    aten.reciprocal.default: (aten.rsqrt.default, aten.neg.default, aten.exp2.default),
    aten.abs.default: (aten.neg.default, aten.relu.default, aten.alias.default, aten.clone.default),
    aten.clamp_min.default: (aten.clamp_max.default, aten.mul.Scalar),
    aten.clamp_max.default: (aten.clamp_min.default, aten.div.Scalar),
    aten.exp.default: (aten.exp2.default, aten.expm1.default),
    aten.amax.default: (aten.amin.default, aten.mean.dim),
    aten.max.dim: (aten.min.dim,),
    aten.neg.default: (aten.abs.default, aten.alias.default),
    aten.sigmoid.default: (aten.tanh.default, aten.relu.default),
    aten.tanh.default: (aten.sigmoid.default, aten.erf.default),
    aten.erf.default: (aten.tanh.default,),
    aten.mean.dim: (aten.amax.default,),
}


@mutation
def sibling(graph: fx.Graph, rng: random.Random) -> str | None:
    found = calls(graph, *SIBLINGS)
    if not found:
        return None
    node = rng.choice(found)
    before = node.target
    node.target = rng.choice(SIBLINGS[before])
    return f"{node}: {before} -> {node.target}"


@mutation
def bypass(graph: fx.Graph, rng: random.Random) -> str | None:
    """One operation less: its users read its first argument."""
    found = [n for n in calls(graph) if is_tensor(n) and n.args and isinstance(n.args[0], fx.Node)]
    found = [n for n in found if n.args[0] in tensors(graph)]
    if not found:
        return None
    node = rng.choice(found)
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    return f"{node} removed"


Step = tuple[Any, tuple[Any, ...], dict[str, Any]]


def extras(x: Tensor) -> list[list[Step]]:
    """Chains of calls that keep the shape of ``x``: of one tensor, the rest of each call's arguments."""

    def step(target: Any, *rest: Any, **named: Any) -> Step:
        return target, rest, named

    chains = [
        [step(aten.neg.default)],
        [step(aten.mul.Tensor, 2)],
        [step(aten.mul.Tensor, 1)],
        [step(aten.mul.Tensor, 0.999)],
        [step(aten.div.Tensor, 3.0)],
        [step(aten.add.Tensor, 1)],
        [step(aten.abs.default)],
        [step(aten.relu.default)],
        [step(aten.reciprocal.default)],
        [step(aten.exp2.default)],
        [step(aten.log2.default)],
        [step(aten.log2.default), step(aten.ceil.default), step(aten.exp2.default)],
        [step(aten.floor.default)],
        [step(aten.clamp.default, -2.0, 2.0)],
        [step(aten.clamp.default, None, 1.5)],
        [step(aten.clamp_min.default, 1e-3)],
        [step(aten.clamp_max.default, 100.0)],
        [step(aten.clone.default)],
        [step(aten.clone.default, memory_format=torch.contiguous_format)],
        [step(aten.alias.default)],
        [step(aten.reshape.default, [-1]), step(aten.reshape.default, list(x.shape))],
        [step(aten.unsqueeze.default, 0), step(aten.squeeze.dim, 0)],
        [step(aten.expand.default, list(x.shape))],
        [step(CONVERT, BF16), step(CONVERT, x.dtype)],
        [step(CONVERT, F16), step(CONVERT, x.dtype)],
        [step(CONVERT, F32), step(CONVERT, x.dtype)],
        [step(CONVERT, x.dtype)],
    ]
    if x.dim() >= 2:
        turn = step(aten.transpose.int, -1, -2)
        chains += [
            [turn, turn],
            [turn, step(aten.clone.default, memory_format=torch.contiguous_format), turn],
            [turn, step(aten.reshape.default, list(x.shape))],
            [step(aten.flip.default, [0])],
            [step(aten.flip.default, [-1])],
        ]
    return chains


def extend(graph: fx.Graph, chain: list[Step], node: fx.Node, before: fx.Node) -> fx.Node:
    """Insert a chain that reads ``node``, in front of ``before``."""
    with graph.inserting_before(before):
        for target, rest, named in chain:
            node = graph.call_function(target, (node, *symbolic(graph, rest)), named)
    return node


@mutation
def extra_operation(graph: fx.Graph, rng: random.Random) -> str | None:
    """On one edge."""
    user, position = rng.choice(edges(graph))
    source = user.args[position]
    assert isinstance(source, fx.Node)
    chain = rng.choice(extras(val(source)))
    replace_argument(user, position, extend(graph, chain, source, user))
    return f"{[str(target) for target, _, _ in chain]} between {source} and {user}"


@mutation
def extra_operation_for_all(graph: fx.Graph, rng: random.Random) -> str | None:
    """Between a value and all its users, the output too."""
    node = rng.choice(tensors(graph))
    chain = rng.choice(extras(val(node)))
    users = list(node.users)
    if not users:
        return None
    end = extend(graph, chain, node, min(users))
    for user in users:
        user.replace_input_with(node, end)
    return f"{[str(target) for target, _, _ in chain]} after {node}"


# ---- mutations of the graph's shape --------------------------------------------------------------------------


@mutation
def other_source(graph: fx.Graph, rng: random.Random) -> str | None:
    """An argument replaced by an earlier value, of the same shape if there is one: x for the residual, one scale for
    another, before a rounding for after it."""
    user, position = rng.choice(edges(graph))
    source = user.args[position]
    assert isinstance(source, fx.Node)
    earlier = [node for node in tensors(graph) if node < user and node is not source]
    fitting = [node for node in earlier if alike(node, source)]
    pool = fitting if fitting and rng.random() < 0.8 else earlier
    return f"{user}: {replace_argument(user, position, rng.choice(pool))}" if pool else None


@mutation
def exchange_sources(graph: fx.Graph, rng: random.Random) -> str | None:
    """Two calls exchange arguments."""
    every = edges(graph)
    user, position = rng.choice(every)
    source = user.args[position]
    assert isinstance(source, fx.Node)
    partners = []
    for partner, at in every:
        theirs = partner.args[at]
        assert isinstance(theirs, fx.Node)
        apart = partner is not user and theirs is not source
        if apart and source < partner and theirs < user and alike(theirs, source):
            partners.append((partner, at, theirs))
    if not partners:
        return None
    partner, at, theirs = rng.choice(partners)
    return f"{replace_argument(user, position, theirs)}, {replace_argument(partner, at, source)}"


@mutation
def second_output(graph: fx.Graph, rng: random.Random) -> str | None:
    node = rng.choice(tensors(graph))
    add_outputs(graph, node)
    return f"{node} is returned"


@mutation
def repeated_output(graph: fx.Graph, rng: random.Random) -> str | None:
    node = rng.choice(outputs(graph))
    if is_tensor(node) and rng.random() < 0.5:
        add_outputs(graph, extend(graph, [(aten.reshape.default, ([-1],), {})], node, graph.output_node()))
        return f"a view of {node} is returned as well"
    add_outputs(graph, node)
    return f"{node} is returned twice"


@mutation
def second_use(graph: fx.Graph, rng: random.Random) -> str | None:
    """A reader of an inner value, anywhere after it."""
    node = rng.choice(tensors(graph))
    before = later(graph, node, rng)
    add_outputs(graph, extend(graph, rng.choice(extras(val(node))), node, before))
    return f"{node} is also read, before {before}"


@mutation
def early_reader(graph: fx.Graph, rng: random.Random) -> str | None:
    """An argument that depends on an inner value: the op's last input comes after the reader of an output."""
    user, position = rng.choice(edges(graph))
    source = user.args[position]
    assert isinstance(source, fx.Node)
    earlier = [node for node in tensors(graph) if node < user and alike(node, source)]
    node = rng.choice(earlier)
    with graph.inserting_before(user):
        nothing = graph.call_function(aten.mul.Tensor, (node, 0))
        end = graph.call_function(aten.add.Tensor, (source, nothing))
        same = graph.call_function(CONVERT, (end, val(source).dtype))
    replace_argument(user, position, same)
    return f"{source}, read by {user}, depends on {node}"


@mutation
def duplicate(graph: fx.Graph, rng: random.Random) -> str | None:
    """The last steps of a value's computation a second time, for one of its users or as an output."""
    node = rng.choice([n for n in calls(graph) if is_tensor(n)])
    chain = [node]
    for _ in range(rng.choice([0, 1, 3, 8, 20])):
        above = [n for member in chain for n in member.all_input_nodes if n.op == "call_function" and n not in chain]
        if not above:
            break
        chain.append(max(above))
    copies: dict[fx.Node, fx.Node] = {}
    with graph.inserting_after(node):
        for member in sorted(chain, reverse=True):
            copies[member] = graph.node_copy(member)  # each is inserted before those that read it
    for member in chain:
        copies[member].args, copies[member].kwargs = fx.map_arg(
            (member.args, member.kwargs), lambda n: copies.get(n, n)
        )
    user = rng.choice([*node.users, graph.output_node()])
    if user.op == "output" or rng.random() < 0.3:
        add_outputs(graph, copies[node])
        return f"{len(chain)} steps up to {node} a second time, returned"
    user.replace_input_with(node, copies[node])
    return f"{len(chain)} steps up to {node} a second time, for {user}"


@mutation
def move(graph: fx.Graph, rng: random.Random) -> str | None:
    """A call as early or as late as its arguments and users permit, or in between."""
    node = rng.choice(calls(graph))
    first = max(node.all_input_nodes, default=None)
    last = min(node.users, default=graph.output_node())
    places = [n for n in calls(graph) if (first is None or first < n) and n < last and n is not node]
    if not places:
        return None
    place = rng.choice(places)
    place.prepend(node)
    return f"{node} moved before {place}"


@mutation
def other_weight(graph: fx.Graph, rng: random.Random) -> str | None:
    """A factor of another shape: for each element, each row, or all, or with one more dimension."""
    weights = [(u, p) for u, p in edges(graph) if u.args[p].op == "placeholder" and val(u.args[p]).dim() == 1]  # type: ignore[union-attr]
    if not weights:
        return None
    user, position = rng.choice(weights)
    weight = user.args[position]
    assert isinstance(weight, fx.Node)
    wide = [n for n in tensors(graph) if n < user and val(n).dim() > 1 and val(n).dtype is val(weight).dtype]
    wide = [n for n in wide if same_shape(val(n).shape[-1:], val(weight).shape)]
    chains: list[list[Step]] = [[(aten.unsqueeze.default, (0,), {})], [(aten.slice.Tensor, (0, 0, 1), {})]]
    source = weight
    if wide and rng.random() < 0.7:
        source = rng.choice(wide)
        chains = [[(aten.mul.Tensor, (weight,), {})], [(aten.slice.Tensor, (-1, 0, 1), {})]]
    return replace_argument(user, position, extend(graph, rng.choice(chains), source, user))


@mutation
def other_summand(graph: fx.Graph, rng: random.Random) -> str | None:
    """One side of a sum in another dtype, or broadcast."""
    sums = [(u, p) for u, p in edges(graph) if u.target is aten.add.Tensor and len(u.all_input_nodes) == 2]
    if not sums:
        return None
    user, position = rng.choice(sums)
    source = user.args[position]
    assert isinstance(source, fx.Node)
    chains: list[list[Step]] = [[(CONVERT, (dtype,), {})] for dtype in (F32, F16, BF16) if dtype != val(source).dtype]
    if val(source).dim() > 1:
        chains += [[(aten.slice.Tensor, (dim, 0, 1), {})] for dim in (0, -1)]
        chains += [[(aten.select.int, (0, 0), {})]]
    return replace_argument(user, position, extend(graph, rng.choice(chains), source, user))


# ---- mutations that write to tensors -------------------------------------------------------------------------


def views(x: Tensor) -> list[list[Step]]:
    """Chains of calls that give a view of all or of a part of ``x``."""
    chains: list[list[Step]] = [
        [],
        [],
        [(aten.alias.default, (), {})],
        [(aten.reshape.default, ([-1],), {})],
        [(aten.unsqueeze.default, (0,), {})],
        [(aten.view.default, (list(x.shape),), {}), (aten.alias.default, (), {})],
    ]
    if x.dim():
        chains += [[(aten.select.int, (0, 0), {})], [(aten.slice.Tensor, (-1, 0, 1), {})]]
    if x.dim() >= 2:
        chains += [[(aten.transpose.int, (0, 1), {})]]
    return chains


def insert_write(graph: fx.Graph, node: fx.Node, before: fx.Node, rng: random.Random) -> fx.Node:
    """A call that writes to ``node``, in front of ``before``."""
    kind = rng.choice(["mul", "mul", "add", "copy", "zero", "foreach"])
    with graph.inserting_before(before):
        if kind == "mul":
            return graph.call_function(aten.mul_.Tensor, (node, 2))
        if kind == "add":
            return graph.call_function(aten.add_.Tensor, (node, 1))
        if kind == "copy":
            other_node = rng.choice([n for n in tensors(graph) if n < before])
            return graph.call_function(aten.copy_.default, (node, other_node))
        if kind == "zero":
            return graph.call_function(aten.zero_.default, (node,))
        return graph.call_function(aten._foreach_mul_.Scalar, ([node], 2))


@mutation
def write(graph: fx.Graph, rng: random.Random) -> str | None:
    """To an input, an inner value or a view of it, anywhere after it."""
    given = [node for node in tensors(graph) if node.op == "placeholder"]
    node = rng.choice(given if rng.random() < 0.4 else tensors(graph))
    before = later(graph, node, rng)
    target = extend(graph, rng.choice(views(val(node))), node, later_until(graph, node, before, rng))
    call = insert_write(graph, target, before, rng)
    if target is node and call.target is not aten._foreach_mul_.Scalar and rng.random() < 0.3:
        readers = [user for user in node.users if call < user]
        for user in readers:  # as reinplacing does: what was written is read from the call
            user.replace_input_with(node, call)
    return f"{call.target} writes to {node} through {target}, before {before}"


def later_until(graph: fx.Graph, node: fx.Node, end: fx.Node, rng: random.Random) -> fx.Node:
    """A place after ``node`` and not after ``end``."""
    return rng.choice([n for n in graph.nodes if node < n and not end < n and n.op != "placeholder"])


@mutation
def write_behind_an_alias(graph: fx.Graph, rng: random.Random) -> str | None:
    """The users of a value read a view of it, and the value itself is written to."""
    node = rng.choice([n for n in tensors(graph) if n.users])
    users = list(node.users)
    chain: list[Step] = rng.choice(
        [
            [(aten.alias.default, (), {})],
            [(aten.reshape.default, (list(val(node).shape),), {})],
            [(aten.unsqueeze.default, (0,), {}), (aten.squeeze.dim, (0,), {})],
        ]
    )
    view = extend(graph, chain, node, min(users))
    for user in users:
        user.replace_input_with(node, view)
    before = later(graph, view, rng)
    call = insert_write(graph, node, before, rng)
    return f"{view} is read for {node}, to which {call.target} writes before {before}"
