"""What the tests share: compiling a function so that the original graph is the oracle."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from aiter_double import Double
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher

import aiter_fusion
from aiter_fusion import config
from aiter_fusion.passes.oracle import Oracle, copy_graph
from aiter_fusion.patterns.language import ASSERTIONS
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


def pytest_configure(config: pytest.Config) -> None:
    """Neither what hypothesis tries nor whether it is content depends on the clock, or on earlier runs."""
    if config.pluginmanager.hasplugin("hypothesispytest"):
        from hypothesis import HealthCheck, settings

        slow = [HealthCheck.too_slow]
        settings.register_profile("suite", deadline=None, derandomize=True, database=None, suppress_health_check=slow)
        settings.load_profile("suite")


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests marked ``slow`` out unless they are asked for: by a ``-m`` that names them, or in the environment.

    (A ``-m "not slow"`` in ``addopts`` would be overridden by ``-m gpu``, which then ran the slow ones too.)
    """
    if "slow" in (config.option.markexpr or "") or os.environ.get("AITER_FUSION_SLOW") == "1":
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with AITER_FUSION_SLOW=1 or -m slow"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the rows that tests recorded: counts of model families, times."""
    passed = terminalreporter.getreports("passed")
    rows = [value for report in passed for name, value in report.user_properties if name == "row"]
    if rows:
        terminalreporter.section("recorded rows")
        for row in sorted(rows):
            terminalreporter.line(row)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process: graphs are what they are with several."""
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    yield
    dist.destroy_process_group()


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Double]]:
    """Install doubles of AITER; each takes the place of the one before."""
    made: list[Double] = []

    def install(*args: Any, **kwargs: Any) -> Double:
        made.append(Double(*args, **kwargs))
        return made[-1].install(monkeypatch, tmp_path)

    yield install
    for double in made:
        double.forget()


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No preference from the environment, no reports from other tests, caches of one's own, the logger as found."""
    for name in ("LEVEL", "PROVIDER", "DISABLE", "LOG", *config.PREFERENCES):
        monkeypatch.delenv(f"AITER_FUSION_{name}", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
    torch._dynamo.reset()
    aiter_fusion.reset()
    logger = logging.getLogger("aiter_fusion")
    handlers, level = logger.handlers[:], logger.level
    yield
    logger.handlers[:], logger.level = handlers, level
