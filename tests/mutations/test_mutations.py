"""Wrong rewrites must be impossible: whatever a mutation makes of a matching graph, the pass keeps its bits.

The tests of forms and traps are examples that somebody thought of. Here graphs that do match are changed at random, so
that most are near misses and some still match, and the mutated graph is the oracle: interpreted on ordinary and on
hostile inputs, it and its rewritten copy must agree in every bit. ``AITER_FUSION_MUTATIONS=N`` tries N graphs.
"""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from operator import getitem
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.node import map_aggregate

from aiter_fusion import config
from aiter_fusion.op import NAMESPACE
from aiter_fusion.passes.manager import PassManager
from aiter_fusion.passes.oracle import copy_graph
from aiter_fusion.passes.verify import same_bits
from aiter_fusion.patterns.language import FLOATS, same_shape
from aiter_fusion.report import REASONS, FusionReport
from support import cases
from support.checked import checked

aten, prims = torch.ops.aten, torch.ops.prims
CONVERT = prims.convert_element_type.default
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

EXAMPLES = int(os.environ.get("AITER_FUSION_MUTATIONS", "400"))


# ---- base graphs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A function that compiles to a matching graph, and what to call it with."""

    name: str
    call: Callable[..., tuple[Tensor, ...]] = field(repr=False)
    inputs: tuple[str, ...]
    sizes: tuple[int, ...] = (4,)
    dtype: torch.dtype = BF16
    width: int = cases.H
    sites: int = 1
    dynamic: bool = False  # whether the first dimension is symbolic

    def __str__(self) -> str:
        return self.name + ("-dynamic" if self.dynamic else "")

    def tensors(self, kind: str) -> list[Tensor]:
        """Inputs of a kind; their names are those that ``cases`` uses."""
        known = {
            "x": ((*self.sizes, self.width), self.dtype),
            "r": ((*self.sizes, self.width), self.dtype),
            "r32": ((*self.sizes, self.width), F32),
            "x2": ((*self.sizes, 2 * self.width), self.dtype),
            "w": ((self.width,), self.dtype),
            "w32": ((self.width,), F32),
            "scale": ((1,) * (len(self.sizes) + 1), F32),
        }
        shapes = [known[name] for name in self.inputs]
        made = [tensor(kind, shape, dtype, seed) for seed, (shape, dtype) in enumerate(shapes)]
        for name, x in zip(self.inputs, made, strict=True):
            if self.dynamic and name in ("x", "r", "x2"):
                torch._dynamo.mark_dynamic(x, 0)
        return made


def combined(fusion: str, producer: str, quant: str, weight: str = "w", **shape: Any) -> Source:
    """A fusion, a norm or activation, and a quantiser of ``cases``, by their names."""
    case = next(f for f in cases.NORM_FUSIONS + cases.ACT_FUSIONS if f.name == fusion)
    first = next(p for p in cases.NORMS + cases.ACTS if p.name == producer)
    last = next(q for q in cases.QUANTS if q.name == quant)
    names = tuple(weight if name == "w" else name for name in case.inputs) + (("scale",) if last.static else ())
    return Source(f"{fusion}-{producer}-{quant}", case.call(first.call, last.call), names, **shape)


def two_weights(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Two sites that share all but the weight; the second reads an output of the first."""
    summed = r + x
    return (*cases.q3(cases.llama(summed, w)), *cases.q1_row(cases.llama(summed, v)), summed)


def two_layers(x: Tensor, r: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Two sites, of which the second reads every output of the first."""
    summed = r + x
    q, scale = cases.q3(cases.llama(summed, w))
    again = summed + (q.float() * scale).to(x.dtype)
    return (*cases.q7(128)(cases.olmo2(again, v)), again)


def norm_and_activation(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Both families; the norm's value is read by the activation as well."""
    value = cases.llama4(x, w)
    q, scale = cases.q4(value)
    activated = torch.nn.functional.silu((q.float() * scale).to(x.dtype)) * value
    return cases.q1_row(activated)


def two_quantisers(x: Tensor, w: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """Of one value, which only one of them can be fused with."""
    value = cases.llama(x, w)
    return (*cases.q2_static(value, scale), *cases.q7(64)(value))


def returned_twice(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Equal quantisers, of which one op serves both; their results must stay tensors of their own."""
    value = cases.llama(x, w)
    return (*cases.q3(value), *cases.q3(value))


def permuted(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """All but the weight in another order of rows than their indices', and so are the results."""
    summed = r.transpose(0, 1) + x.transpose(0, 1)
    value = cases.llama(summed, w)
    return (*cases.q3_tensor(value), value, summed)


def permuted_and_copied(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return cases.q1_row(cases.gemma(x.transpose(0, 1), w))


def in_groups(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Quantised, and returned, with a dimension for the groups."""
    groups = cases.llama(x, w).unflatten(-1, (2, -1))
    return cases.q3(groups)


def flat(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Normalised in three dimensions, quantised in two."""
    return cases.q3(cases.olmo2(x, w).flatten(0, 1))


def last_rows(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Normed are the rows that are quantised."""
    return cases.q1_row(cases.llama(r + x, w)[:, -1:])


def one_for_zero(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return cases.q3_one_for_zero(cases.llama(x, w))


# As many rows as columns, so that broadcasting along the wrong axis executes; narrow, so that it takes no time.
SQUARE: dict[str, Any] = {"sizes": (32,), "width": 32}

SOURCES = (
    combined("norm", "R1", "Q1r"),
    combined("norm", "R1", "Q3", **SQUARE),
    combined("norm", "R2", "Q1r", sizes=(1,)),
    combined("norm", "R1", "Q1t", dtype=F32),
    combined("norm", "R2'", "Q2_unclamped", weight="w32"),
    combined("norm", "R1'", "Q3_converted_first"),
    combined("norm", "R4", "Q3_tensor"),
    combined("add_norm", "R1", "Q1r"),
    combined("add_norm", "R2", "Q2"),
    combined("add_norm", "R1", "Q4", dtype=F32),
    combined("add_norm", "R3", "Q5", sizes=(2, 2), dtype=F16),
    combined("add_norm_dead_residual", "R1", "Q7_128"),
    combined("norm_value", "R1'", "Q5_unclamped"),
    combined("add_norm_value", "R2'", "Q1b"),
    combined("add_norm_float32_sum", "R1'", "Q3"),
    combined("add_norm_float32_residual", "R4", "Q1r", dtype=F16),
    combined("norm_thrice", "R3", "Q4"),
    combined("norm_thrice", "R1", "Q2_half"),
    combined("act", "S1", "Q3", **SQUARE),
    combined("act", "S1_gelu", "Q3_view_after_abs"),
    combined("act", "S2", "Q1r"),
    combined("act", "S2_rounded_late", "Q1t"),
    combined("act", "S4", "Q2_product"),
    combined("act", "S6", "Q3"),
    combined("act", "S6_rounded_late", "Q4", dtype=F16),
    combined("act_value", "S7", "Q1r", dtype=F32),
    combined("act_value", "S1_swish", "Q3_fnuz"),
    combined("act_value", "S3_gelu_tanh", "Q7_64"),
    Source("two_weights", two_weights, ("x", "r", "w", "w"), sites=2),
    Source("two_layers", two_layers, ("x", "r", "w", "w"), sites=2),
    Source("norm_and_activation", norm_and_activation, ("x", "w"), sites=2),
    Source("returned_twice", returned_twice, ("x", "w")),
    Source("permuted", permuted, ("x", "r", "w"), sizes=(2, 3)),
    Source("permuted_and_copied", permuted_and_copied, ("x", "w"), sizes=(2, 3)),
    Source("two_quantisers", two_quantisers, ("x", "w", "scale")),
    Source("last_rows", last_rows, ("x", "r", "w"), sizes=(2, 3)),
    Source("one_for_zero", one_for_zero, ("x", "w")),
    combined("add_norm", "R1", "Q1r", dynamic=True),
    combined("norm_value", "R2", "Q1t", sizes=(3, 2), dynamic=True),
    combined("norm_thrice", "R3", "Q1b", sizes=(3, 2), dynamic=True),
    combined("act", "S4", "Q7_128", dynamic=True),
    Source("two_layers", two_layers, ("x", "r", "w", "w"), sites=2, dynamic=True),
    Source("in_groups", in_groups, ("x", "w"), dynamic=True),
    Source("flat", flat, ("x", "w"), sizes=(3, 2), dynamic=True),
    Source("last_rows", last_rows, ("x", "r", "w"), sizes=(3, 2), dynamic=True),
)


SYMBOL = -1  # in a shape: the symbolic size


@dataclass(frozen=True)
class Base:
    """A post-grad graph that matches, and the shapes and dtypes of its inputs; the shape of the size itself is None."""

    graph: fx.Graph
    shapes: Sequence[tuple[tuple[int, ...] | None, torch.dtype]]
    symbol: int  # an example of the symbolic size

    def inputs(self, kind: str, symbol: int | None = None) -> list[Any]:
        """Values for the placeholders, with another symbolic size if that is given."""
        size = self.symbol if symbol is None else symbol
        return [
            size if shape is None else tensor(kind, [size if n == SYMBOL else n for n in shape], dtype, seed)
            for seed, (shape, dtype) in enumerate(self.shapes)
        ]

    def fakes(self) -> list[Any]:
        """For a graph of its own: what a mutation makes of symbols stays there."""
        mode = FakeTensorMode(shape_env=ShapeEnv())
        made = [
            self._fake(mode, seed, value) if isinstance(value, Tensor) else None
            for seed, value in enumerate(self.inputs("normal"))
        ]
        sizes = [n for fake in made if fake is not None for n in fake.shape if isinstance(n, torch.SymInt)]
        return [sizes[0] if fake is None else fake for fake in made]

    def _fake(self, mode: FakeTensorMode, seed: int, value: Tensor) -> Tensor:
        shape, _ = self.shapes[seed]
        dynamic = [DimDynamic.DUCK if n == SYMBOL else DimDynamic.STATIC for n in shape or ()]
        context = StatelessSymbolicContext(dynamic_sizes=dynamic, constraint_sizes=[None] * len(dynamic))
        return mode.from_tensor(value, symbolic_context=context, source=ConstantSource(f"input{seed}"))


@cache
def base(source: Source) -> Base:
    """Captured once in a process: compiling takes longer than everything else here."""
    result = checked(source.call)
    with torch.no_grad():
        result.call(*source.tensors("normal"))
    assert len(result.variants) == source.sites
    (comparison,) = result.oracle.graphs
    graph = comparison.before.graph
    values = [n.meta["val"] for n in graph.nodes if n.op == "placeholder"]
    shapes = [
        (tuple(SYMBOL if isinstance(n, torch.SymInt) else n for n in value.shape), value.dtype)
        if isinstance(value, Tensor)
        else (None, torch.int64)
        for value in values
    ]
    assert source.dynamic == (None in [shape for shape, _ in shapes])
    return Base(graph, shapes, source.sizes[0])


def tensor(kind: str, shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    """An input. Apart from ``normal`` ones, activations have a row each of zeros, tiny and huge values, or NaN and
    infinities; rows stay apart, so that a hostile one does not hide what happens to the others."""
    if math.prod(shape) == 1:
        return torch.full(tuple(shape), 0.0 if kind == "nonfinite" else 0.02, dtype=dtype)
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if kind == "normal" or len(shape) == 1:
        return values.to(dtype)
    rows = values.view(-1, shape[-1])
    if kind == "finite":
        rows[-1] *= torch.finfo(dtype).max / 8
        rows[-2:-1] *= 1e-7 if dtype is F16 else 1e-30
        rows[-3:-2] *= torch.where(rows[-3:-2] < 0, -0.0, 0.0)
    else:
        rows[-1, 3 + seed] = math.nan
        rows[-2:-1, 5 + seed], rows[-2:-1, 7] = math.inf, -math.inf
        rows[-3:-2, 9] = -math.inf
    return values.to(dtype)


# ---- what mutations are made of ------------------------------------------------------------------------------


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


# ---- the property --------------------------------------------------------------------------------------------


class Inexecutable(Exception):  # noqa: N818 (no error: a mutation need not make sense)
    """The mutated graph does not execute."""


class Annotate(fx.Interpreter):
    """Gives every node the fake of its value, as the tracer would have."""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["val"] = value
        return value


class CheckFakes(fx.Interpreter):
    """Compares the fakes with real values: ``wrong`` are the nodes whose shape, strides or dtype is not true."""

    def __init__(self, module: torch.nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.wrong: list[str] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor):
            fake = n.meta["val"]
            if layout(fake) != layout(value):
                self.wrong.append(f"{n}: {layout(fake)}, in truth {layout(value)}")
        return value


def layout(x: Tensor) -> tuple[Any, ...]:
    """What decides which element is where; the stride of one element is arbitrary. Symbols are their examples."""
    sizes, strides = ([n if isinstance(n, int) else n.node.hint for n in known] for known in (x.shape, x.stride()))
    return tuple(sizes), tuple(stride for size, stride in zip(sizes, strides, strict=True) if size > 1), x.dtype


ROOT = torch.nn.Module()  # the graphs read no attributes


def mutate(of: Base, mutations: Sequence[tuple[Mutation, int]]) -> tuple[fx.Graph, list[str], ShapeEnv]:
    """A mutated copy with true fakes, what was done to it, and what is known of its sizes."""
    graph, done, fakes = copy_graph(of.graph), [], of.fakes()
    annotate(graph, fakes)
    for function, seed in mutations:
        said = function(graph, random.Random(seed))
        if said is not None:
            done.append(f"{function.__name__}: {said}")
            graph.eliminate_dead_code()  # as Inductor does before the pass; keeps what writes
            graph.lint()
            annotate(graph, fakes)
    return graph, done, mode_of(fakes).shape_env


def mode_of(fakes: list[Any]) -> Any:
    return next(fake.fake_mode for fake in fakes if isinstance(fake, Tensor))  # type: ignore[attr-defined]


def annotate(graph: fx.Graph, fakes: list[Any]) -> None:
    try:
        with mode_of(fakes), torch.no_grad():
            Annotate(ROOT, garbage_collect_values=False, graph=graph).run(*fakes)
    except Exception as error:
        raise Inexecutable from error


def interpret(interpreter: fx.Interpreter, inputs: list[Any]) -> list[Tensor]:
    """The outputs, and the inputs as they are afterwards."""
    given = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
    with torch.no_grad():
        returned = interpreter.run(*given)
    return [x for x in (*returned, *given) if isinstance(x, Tensor)]


def shared(tensors: list[Tensor]) -> set[tuple[int, int]]:
    """The pairs of tensors that live in one storage."""
    storages = [x.untyped_storage().data_ptr() for x in tensors]
    return {(a, b) for a, b in combinations(range(len(tensors)), 2) if storages[a] == storages[b] != 0}


def check_report(report: FusionReport, graph: fx.Graph) -> None:
    """The report is about this graph, complete, and nothing failed on the way."""
    assert report.unaccounted == 0
    assert report.note == ""
    for site in (*report.skipped, *report.bare):
        code = site.reason.split(":")[0]
        assert code in REASONS, site
        assert code != "error", site
    fused = [n for n in calls(graph) if getattr(n.target, "namespace", "") == NAMESPACE]
    assert len(fused) == sum(report.replaced.values())
    for node in fused:
        check_arguments(node)


def check_arguments(node: fx.Node) -> None:
    """A fused op gets what its docstrings say; the reference would also broadcast, a kernel reads past the end."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given: dict[str, Any] = dict(zip(names, node.args, strict=False))
    tensors = {name: val(value) for name, value in given.items() if isinstance(value, fx.Node)}
    first = next(iter(tensors.values()))
    width = first.shape[-1] // 2 if "gate_up" in tensors else first.shape[-1]
    for name, x in tensors.items():
        match name:
            case "weight":
                assert same_shape(x.shape, [width]), f"{node}: weight {tuple(x.shape)}"
            case "scale":
                assert x.numel() == 1, f"{node}: scale {tuple(x.shape)}"
            case _:
                assert same_shape(x.shape, first.shape), f"{node}: {name} {tuple(x.shape)}"
                assert x.dtype in FLOATS, f"{node}: {name} {x.dtype}"
    assert not given.get("block") or width % given["block"] == 0, f"{node}: blocks of {given['block']} in {width}"


def check(graph: fx.Graph, of: Base, known: ShapeEnv) -> FusionReport:
    """The pass rewrites a copy of the graph, and the copy gives the same bits; with another number of rows too, where
    the graph holds for any.

    Raises:
        Inexecutable: there is nothing to compare with.
    """
    runs = {kind: of.inputs(kind) for kind in ("normal", "finite", "nonfinite")}
    if not known.guards and None in [shape for shape, _ in of.shapes]:
        runs["other sizes"] = of.inputs("normal", of.symbol + 3)
    want = {}
    for kind, inputs in runs.items():
        original = CheckFakes(ROOT, graph)
        try:
            want[kind] = interpret(original, inputs)
        except Exception as error:
            raise Inexecutable from error
        if original.wrong and kind != "other sizes":
            raise Inexecutable(original.wrong)
    rewritten = copy_graph(graph)
    any_size = not known.guards
    report = PassManager(config.options()).run(rewritten, True)
    assert not (any_size and known.guards)
    rewritten.lint()
    check_report(report, rewritten)
    if not report.replaced:
        assert str(rewritten) == str(graph)
    for kind, inputs in runs.items():
        interpreter = CheckFakes(ROOT, rewritten)
        have = interpret(interpreter, inputs)
        assert kind == "other sizes" or interpreter.wrong == []
        assert len(have) == len(want[kind])
        for index, (a, b) in enumerate(zip(want[kind], have, strict=True)):
            assert layout(a) == layout(b), f"result {index} on {kind} inputs"
            assert same_bits(a, b), f"result {index} differs on {kind} inputs"
        assert shared(have) <= shared(want[kind]), "results share memory that did not"
    return report


MUTATED = st.tuples(
    st.sampled_from(SOURCES),
    st.lists(st.tuples(st.sampled_from(MUTATIONS), st.integers(0, 10**6)), min_size=1, max_size=3),
)


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_unmutated(source: Source) -> None:
    """What the mutations start from is replaced."""
    of = base(source)
    graph, _, known = mutate(of, [])
    assert sum(check(graph, of, known).replaced.values()) == source.sites
    assert not known.guards  # so that a dynamic graph was run with other sizes


@pytest.mark.parametrize("function", [wider_groups, other_weight, other_summand], ids=lambda f: f.__name__)
def test_what_a_pattern_cannot_express(function: Mutation) -> None:
    """These break a condition on the shapes and dtypes of a match that is otherwise complete, on every source."""
    tried = 0
    for source in SOURCES:
        seen = set()
        for seed in range(10):
            try:
                graph, done, known = mutate(base(source), [(function, seed)])
                if done and done[0] not in seen:
                    seen.add(done[0])
                    check(graph, base(source), known)
                    tried += 1
            except Inexecutable:
                continue
            except AssertionError as error:
                raise AssertionError(f"{source}, {function.__name__}, {seed}: {error}") from error
    assert tried > 20


def test_mutated_graphs_keep_their_bits(record_property: Callable[[str, object], None]) -> None:
    """Both kinds must be frequent: a pass that refuses everything is no evidence, nor are harmless mutations."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(MUTATED)
    def keeps_its_bits(mutated: tuple[Source, list[tuple[Mutation, int]]]) -> None:
        source, mutations = mutated
        of = base(source)
        done: list[str] = []
        try:
            graph, done, known = mutate(of, mutations)
            report = check(graph, of, known)
        except Inexecutable:
            seen["discarded"] += 1
            reject()
        except AssertionError as error:
            raise AssertionError(f"{source}, {'; '.join(done)}: {error}") from error
        if not done:
            reject()
        seen["tried"] += 1
        seen["replaced" if report.replaced else "refused"] += 1
        seen["dynamic"] += source.dynamic

    keeps_its_bits()
    tried, replaced, refused = seen["tried"], seen["replaced"], seen["refused"]
    counts = f"{tried} graphs ({seen['dynamic']} dynamic), {replaced} with a fused op, {refused} refused, none wrong"
    record_property("row", f"mutations: {counts}")
    assert min(replaced, refused) >= tried / 10
