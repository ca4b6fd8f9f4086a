"""The property: the pass rewrites a mutated graph without a change of any bit, and its report is complete."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_flatten

from aiter_fusion import config
from aiter_fusion.op import NAMESPACE, width_of
from aiter_fusion.passes.manager import PassManager
from aiter_fusion.passes.oracle import copy_graph
from aiter_fusion.passes.verify import same_bits
from aiter_fusion.patterns.fx_facts import FLOATS, same_shape, same_size
from aiter_fusion.reasons import CODES
from aiter_fusion.registry import REGISTRY
from aiter_fusion.report import FusionReport
from support.mutations.operators import Inexecutable, Mutation, calls, val
from support.mutations.sources import Base

ROOT = torch.nn.Module()  # the graphs read no attributes

# For each name of a node: what its value was computed from, and the value.
Known = dict[str, tuple[Any, Any]]


class Annotate(fx.Interpreter):
    """Gives every node the fake of its value, as the tracer would have. A call that ``known`` has with the same
    arguments is not computed again: most of a mutated graph is as it was."""

    def __init__(self, graph: fx.Graph, known: Known) -> None:
        super().__init__(ROOT, garbage_collect_values=False, graph=graph)
        self.known = known

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            value = super().run_node(n)
        else:
            made_of = (n.target, *self.fetch_args_kwargs_from_env(n))
            if n.name not in self.known or not _same(self.known[n.name][0], made_of):
                self.known[n.name] = made_of, super().run_node(n)
            value = self.known[n.name][1]
        n.meta["val"] = value
        return value


def _same(a: Any, b: Any) -> bool:
    """Whether arguments are the same fakes, and equal otherwise."""
    (leaves, structure), (others, other_structure) = tree_flatten(a), tree_flatten(b)
    return structure == other_structure and all(
        x is y or (type(x) is type(y) and not isinstance(x, (Tensor, torch.SymInt)) and x == y)
        for x, y in zip(leaves, others, strict=True)
    )


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


_UNMUTATED: dict[Base, tuple[list[Any], Known]] = {}


def unmutated(of: Base) -> tuple[list[Any], Known]:
    """Fakes for the inputs, and what is known from them. Mutated graphs share them until one of them needs a guard on
    the symbolic size, which is to hold for that graph alone."""
    if of not in _UNMUTATED or mode_of(_UNMUTATED[of][0]).shape_env.guards:
        fakes, known = of.fakes(), {}
        annotate(copy_graph(of.graph), fakes, known)
        _UNMUTATED[of] = fakes, known
    return _UNMUTATED[of]


def mutate(of: Base, mutations: Sequence[tuple[Mutation, int]]) -> tuple[fx.Graph, list[str], ShapeEnv]:
    """A mutated copy with true fakes, what was done to it, and what is known of its sizes."""
    fakes, unchanged = unmutated(of)
    graph, done, known = copy_graph(of.graph), [], dict(unchanged)
    annotate(graph, fakes, known)
    for function, seed in mutations:
        said = function(graph, random.Random(seed))
        if said is not None:
            done.append(f"{function.__name__}: {said}")
            graph.eliminate_dead_code()  # as Inductor does before the pass; keeps what writes
            graph.lint()
            annotate(graph, fakes, known)
    return graph, done, mode_of(fakes).shape_env


def mode_of(fakes: list[Any]) -> Any:
    return next(fake.fake_mode for fake in fakes if isinstance(fake, Tensor))  # type: ignore[attr-defined]


def annotate(graph: fx.Graph, fakes: list[Any], known: Known) -> None:
    try:
        with mode_of(fakes), torch.no_grad():
            Annotate(graph, known).run(*fakes)
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
        assert code in CODES, site
        assert code != "error", site
    fused = [n for n in calls(graph) if getattr(n.target, "namespace", "") == NAMESPACE]
    assert len(fused) == sum(report.replaced.values())
    for node in fused:
        check_arguments(node)


def check_arguments(node: fx.Node) -> None:
    """A fused op gets what its docstrings say; the reference would also broadcast, a kernel reads past the end."""
    op = next(op for op in REGISTRY.ops.values() if op.target is node.target)
    given: dict[str, Any] = dict(zip(op.arguments, node.args, strict=False))
    tensors = {name: val(value) for name, value in given.items() if isinstance(value, fx.Node)}
    known = {name: tensors.get(name, value) for name, value in given.items()}
    first, width = next(iter(tensors.values())), width_of(op, known)
    rows = first.numel() // max(1, first.shape[-1])
    for name, x in tensors.items():
        said = f"{node}: {name} {tuple(x.shape)}"
        if name in ("k", "v"):
            assert x.dtype is first.dtype, f"{said} {x.dtype}"
            assert first.shape[1] % x.shape[1] == 0, said
            assert same_size(x.shape[0], first.shape[0]), said
            assert name == "v" or same_size(x.shape[3], width), said
        elif name == "mask":
            assert x.dtype in (torch.bool, *FLOATS), f"{said} {x.dtype}"
            assert x.shape[-1] == tensors["k"].shape[2], said
            assert all(a in (1, b) for a, b in zip(x.shape[:3], first.shape, strict=False)), said
        elif name in ("weight", "bias"):
            assert same_shape(x.shape, [width]), said
        elif name in ("scale", "position"):
            assert x.numel() == 1, said
        elif name in op.once:
            assert same_size(x.shape[-1], width), said
            assert same_size(rows % (x.numel() // width), 0), said
        else:
            assert same_shape(x.shape[:-1], first.shape[:-1]), said
            assert op.stage("cat") or same_size(x.shape[-1], first.shape[-1]), said
            assert x.dtype in FLOATS, f"{node}: {name} {x.dtype}"
    block = given.get("block") or width
    whole = width % block == 0 or (block % width == 0 and same_size(rows * width % block, 0))
    assert whole, f"{node}: blocks of {block} in {width}"


def check(graph: fx.Graph, of: Base, known: ShapeEnv) -> FusionReport:
    """The pass rewrites a copy of the graph, and the copy gives the same bits; with another number of rows too, where
    the graph holds for any.

    Raises:
        Inexecutable: there is nothing to compare with.
    """
    runs = {kind: of.inputs(kind) for kind in ("normal", "finite", "nonfinite")}
    if not known.guards and of.dynamic:
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
