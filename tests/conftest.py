"""Hooks and fixtures of every test: what is left out, what is recorded, and a process as if no test had run before."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Two workers, and processes of theirs, share the cores; threads that wait for the next small tensor would take them.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import pytest
import torch
import torch.distributed as dist

import aiter_fusion
from aiter_fusion import config

if TYPE_CHECKING:
    from support.aiter_double import Double

pytest.register_assert_rewrite("support")  # so nothing of it is imported above


def pytest_configure(config: pytest.Config) -> None:
    """Neither what hypothesis tries nor whether it is content depends on the clock, or on earlier runs."""
    if config.pluginmanager.hasplugin("hypothesispytest"):
        from hypothesis import HealthCheck, settings

        slow = [HealthCheck.too_slow]
        settings.register_profile("suite", deadline=None, derandomize=True, database=None, suppress_health_check=slow)
        settings.load_profile("suite")


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
    from support.aiter_double import Double

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
