"""What the tests share: compiling a function so that the original graph is the oracle."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from aiter_double import Double
from torch import Tensor

import aiter_fusion
from aiter_fusion import config
from aiter_fusion.passes.oracle import Oracle
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
    return result


def pytest_configure(config: pytest.Config) -> None:
    """Neither what hypothesis tries nor whether it is content depends on the clock, or on earlier runs."""
    if config.pluginmanager.hasplugin("hypothesispytest"):
        from hypothesis import HealthCheck, settings

        slow = [HealthCheck.too_slow]
        settings.register_profile("suite", deadline=None, derandomize=True, database=None, suppress_health_check=slow)
        settings.load_profile("suite")


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
