"""Functions that compile to matching graphs, and those graphs: what mutations start from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from support import cases
from support.checked import checked

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


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

    @property
    def entries(self) -> tuple[int, ...]:
        """The sizes before the last of what has one row for each batch entry."""
        return (self.sizes[0], *[1] * (len(self.sizes) - 1)) if len(self.sizes) > 1 else (1,)

    def tensors(self, kind: str) -> list[Tensor]:
        """Inputs of a kind; their names are those that ``cases`` uses."""
        known = {
            "x": ((*self.sizes, self.width), self.dtype),
            "r": ((*self.sizes, self.width), self.dtype),
            "r32": ((*self.sizes, self.width), F32),
            "x2": ((*self.sizes, 2 * self.width), self.dtype),
            "w": ((self.width,), self.dtype),
            "w32": ((self.width,), F32),
            "b": ((self.width,), self.dtype),
            **dict.fromkeys(("e", "g", "s"), ((*self.entries, self.width), self.dtype)),
            "gs": ((*self.entries, 2 * self.width), self.dtype),
            "scale": ((1,) * (len(self.sizes) + 1), F32),
        }
        shapes = [known[name] for name in self.inputs]
        made = [tensor(kind, shape, dtype, seed) for seed, (shape, dtype) in enumerate(shapes)]
        for name, x in zip(self.inputs, made, strict=True):
            if self.dynamic and name in ("x", "r", "x2", *(("e", "g", "s", "gs") if len(self.sizes) > 1 else ())):
                torch._dynamo.mark_dynamic(x, 0)
        return made


def combined(fusion: str, producer: str, quant: str, weight: str = "w", **shape: Any) -> Source:
    """A fusion, a norm, activation or other producer, and a quantiser of ``cases``, by their names."""
    first = {**cases.NORM, **cases.ACT, **cases.PRODUCER}[producer]
    call, inputs = cases.built(cases.FUSION[fusion], first, cases.QUANT[quant])
    names = tuple(weight if name == "w" else name for name in inputs)
    return Source(f"{fusion}-{producer}-{quant}", call, names, **shape)


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


def two_modulations(x: Tensor, g: Tensor, s: Tensor, e: Tensor) -> tuple[Tensor, ...]:
    """Of one normalised value, which two sites compute (Stable Diffusion 3.5)."""
    value = cases.layer(x)
    return (*cases.q1_row(value * (1 + g) + s), *cases.q3(value * (1 + e) + g))


def layers(x: Tensor, r: Tensor, e: Tensor, g: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """Of a diffusion model: the second site reads every output of the first, and the third reads the sum again."""
    summed = r + e * x
    q, scale = cases.q1_row(cases.layer(summed) * (1 + g) + s)
    y = (q.float() * scale).to(x.dtype).reshape(x.shape)
    last = summed + g * torch.nn.functional.gelu(y)
    return (*cases.q3(last), last)


# As many rows as columns, so that broadcasting along the wrong axis executes; narrow, so that it takes no time.
SQUARE: dict[str, Any] = {"sizes": (32,), "width": 32}


def several_scales(x: Tensor, r: Tensor, w: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """As AMD Quark quantises for q, k and v."""
    summed = r + x
    value = cases.llama(summed, w)
    return (*(q for n in (1.0, 2.0, 4.0) for q in cases.q2_static(value, scale * n)), summed)


SOURCES = (
    combined("norm", "R1", "Q1r"),
    combined("norm", "R1", "Q3", **SQUARE),
    combined("norm", "R2", "Q1r", sizes=(1,)),
    combined("norm", "R1", "Q1t", dtype=F32),
    combined("norm", "R2'", "Q2_unclamped", weight="w32"),
    combined("norm", "R1'", "Q3_converted_first"),
    combined("norm", "R4", "Q3_tensor"),
    combined("norm", "R1", "I1"),
    combined("norm", "R1", "Q8_by_bits"),
    combined("add_norm", "R1", "X1"),
    combined("act", "S2", "I2"),
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
    combined("produced", "L1", "Q1r", **SQUARE),
    combined("produced", "L1_add", "Q3", sizes=(2, 3)),
    combined("produced", "L2", "Q7_128", dtype=F16),
    combined("produced", "M1", "Q1r", sizes=(2, 3)),
    combined("produced_value", "M1_float32", "Q2", sizes=(2, 3)),
    combined("produced", "M1_chunked", "Q3", sizes=(2, 3)),
    combined("produced", "M2", "Q4", sizes=(2, 3)),
    combined("produced", "G1", "Q1r", sizes=(2, 3)),
    combined("produced", "G1_float32", "Q3", sizes=(2, 3)),
    combined("produced", "G2", "Q7_64"),
    combined("produced", "N1_heads", "Q1r"),
    combined("produced_value", "A1", "Q1r"),
    combined("produced", "A1_new", "Q3", **SQUARE),
    combined("act", "S8", "Q1r", **SQUARE),
    combined("produced", "C1", "Q1r"),
    combined("produced_value", "C1_first", "Q3_tensor"),
    combined("produced", "X2", "Q3", sizes=(2, 3)),
    Source("two_modulations", two_modulations, ("x", "g", "s", "e"), sizes=(2, 3), sites=2),
    Source("layers", layers, ("x", "r", "e", "g", "s"), sizes=(2, 3), sites=2),
    Source("several_scales", several_scales, ("x", "r", "w", "scale")),
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
    combined("produced", "G1", "Q1r", sizes=(3, 2), dynamic=True),
    combined("produced", "N1_heads", "Q1r", dynamic=True),
    Source("two_layers", two_layers, ("x", "r", "w", "w"), sites=2, dynamic=True),
    Source("in_groups", in_groups, ("x", "w"), dynamic=True),
    Source("flat", flat, ("x", "w"), sizes=(3, 2), dynamic=True),
    Source("last_rows", last_rows, ("x", "r", "w"), sizes=(3, 2), dynamic=True),
)


SYMBOL = -1  # in a shape: the symbolic size


@dataclass(frozen=True, eq=False)
class Base:
    """A post-grad graph that matches, and the shapes and dtypes of its inputs; the shape of the size itself is None."""

    graph: fx.Graph
    shapes: Sequence[tuple[tuple[int, ...] | None, torch.dtype]]
    symbol: int  # an example of the symbolic size

    @property
    def dynamic(self) -> bool:
        return None in [shape for shape, _ in self.shapes]

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
    made = Base(graph, shapes, source.sizes[0])
    assert made.dynamic == source.dynamic
    return made


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
