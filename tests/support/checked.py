"""Compiling a function without code generation, with the original graph as the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher

import aiter_fusion
from aiter_fusion.passes.oracle import Oracle, copy_graph
from aiter_fusion.patterns.fx_facts import ASSERTIONS
from aiter_fusion.report import REPLACED, FusionReport


@dataclass
class Checked:
    """A function compiled without code generation, both graphs interpreted and compared on every call."""

    call: Callable[..., Any]
    oracle: Oracle

    @property
    def report(self) -> FusionReport:
        return self.oracle.report

    @property
    def reports(self) -> list[FusionReport]:
        return [graph.report for graph in self.oracle.graphs]

    @property
    def variants(self) -> list[str]:
        return [f"{site.family}:{site.variant}" for site in self.report.sites if site.status == REPLACED]

    @property
    def targets(self) -> list[str]:
        """The calls of the rewritten graphs, in order."""
        return [str(n.target) for g in self.oracle.graphs for n in g.after.graph.nodes if n.op == "call_function"]


def checked(fn: Callable[..., Any], *, dynamic: bool | None = None, **options: Any) -> Checked:
    """Compile ``fn``, with the pass but without code generation."""
    torch._dynamo.reset()
    oracle = aiter_fusion.Backend(**options).oracle()
    return Checked(torch.compile(fn, backend=oracle, dynamic=dynamic), oracle)


def fused(fn: Callable[..., Any], *inputs: Tensor, **options: Any) -> Checked:
    """Compile and call once under no_grad; the bits must agree."""
    result = checked(fn, **options)
    with torch.no_grad():
        result.call(*inputs)
    assert result.oracle.identical
    assert result.report.unaccounted == 0
    ignores_assertions(result)
    return result


def ignores_assertions(result: Checked) -> None:
    """An assertion about every tensor of the (inference) graphs, where ``torch.export`` leaves them about some, changes
    neither what becomes of the graphs nor what is reported."""
    for captured in result.oracle.graphs:
        graph = copy_graph(captured.before.graph)
        tensors = [node for node in graph.nodes if isinstance(node.meta.get("val"), Tensor)]
        computed = next(node for node in graph.nodes if node.op != "placeholder")
        for node in tensors:
            with graph.inserting_before(computed) if node.op == "placeholder" else graph.inserting_after(node):
                for assertion in ASSERTIONS:
                    graph.call_function(assertion, (node,))  # type: ignore[arg-type]
        with enable_python_dispatcher():  # as while compiling: without it no meta tensor of symbolic sizes is permuted
            made = result.oracle._manager.run(graph, is_inference=True)
        assert made.sites == captured.report.sites
        graph.lint()
        calls, expected = (
            [str(n.target) for n in g.nodes if n.op == "call_function" and n.target not in ASSERTIONS]
            for g in (graph, captured.after.graph)
        )
        assert calls == expected
