"""Each answer about AITER is given where it is true; all are provoked with throw-away packages."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo

import aiter_fusion
from aiter_fusion import config
from aiter_fusion.providers.aiter import installation

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Make a package called aiter importable, with the given files; forget it and its failure afterwards."""
    monkeypatch.setattr(installation, "_failure", {})
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(**files: str) -> Path:
        for name, text in {"__init__": "", **files}.items():
            path = tmp_path / "aiter" / f"{name.replace('__in__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "aiter"

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
        del sys.modules[name]


AMD = {"jit__in__core": "", "ops__in__rmsnorm": ""}


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation.importlib.util, "find_spec", lambda name: None)
    assert installation.aiter().answer == installation.ABSENT
    assert not aiter_fusion.is_aiter_found()
    monkeypatch.setattr(torch.version, "hip", None)
    assert installation.why_no_aiter() == (  # not that AITER be installed, which would not help
        f"AITER needs a ROCm build of PyTorch, and this is {torch.__version__}: "
        "https://pytorch.org/get-started/locally says how to install one"
    )
    monkeypatch.setattr(torch.version, "hip", "7.2")
    assert installation.why_no_aiter() == (
        "AMD's AITER is not installed: install a wheel from https://github.com/ROCm/aiter/releases, or build it from "
        "https://github.com/ROCm/aiter"
    )


@pytest.mark.parametrize("amd_too", [False, True], ids=["alone", "in AMD's folder"])
def test_the_unrelated_library(install: Install, amd_too: bool) -> None:
    """The one on PyPI, of asynchronous iterators; installed beside AMD's both lie in one folder."""
    install(azip="", join_aiters="", **(AMD if amd_too else {}))
    found = installation.aiter()
    assert found.answer == installation.UNRELATED
    assert "pip uninstall aiter; then install a wheel from https://github.com/ROCm/aiter/releases" in found.detail
    assert not aiter_fusion.is_aiter_found()
    assert "aiter" not in sys.modules


def test_import_failed(install: Install) -> None:
    """Off ROCm its import raises RuntimeError: known once it has been tried, with the cause, and tried once."""
    install(__init__="raise RuntimeError('no hipconfig')", **AMD)
    assert installation.aiter().answer == installation.READY
    for _ in range(2):
        with pytest.raises(RuntimeError, match="its import failed: RuntimeError: no hipconfig") as raised:
            installation.load_aiter()
        assert str(raised.value.__cause__) == "no hipconfig"
    assert installation.aiter().answer == installation.BROKEN
    assert aiter_fusion.is_aiter_found()
    assert not aiter_fusion.is_aiter_found_and_supported()


@pytest.mark.parametrize("version", ["0.1.20.post1", None])
def test_ready(install: Install, version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    written = f"TYPE_CHECKING = False\n__version__ = version = '{version}'\n"
    install(**AMD, **({"_version": written} if version else {}))
    assert installation.aiter() == installation.Aiter(installation.READY, "", version)
    assert "aiter" not in sys.modules, "looking must not import"
    assert "ROCm build of PyTorch" in str(installation.why_no_aiter())
    assert not aiter_fusion.is_aiter_found_and_supported()


def test_the_import_changes_nothing_else(install: Install) -> None:
    install(
        __init__="""
import logging, sys, torch._dynamo
sys.path.insert(0, "/nowhere/aiter/jit/utils")
torch._dynamo.config.ignore_logger_methods = {"everything"}
logging.getLogger("aiter").propagate = False
logging.getLogger("aiter").addHandler(logging.NullHandler())
""",
        **AMD,
    )
    path, ignored = sys.path[:], torch._dynamo.config.ignore_logger_methods
    module = installation.load_aiter()
    assert installation.load_aiter() is module
    assert sys.path == [*path, "/nowhere/aiter/jit/utils"]
    sys.path.remove("/nowhere/aiter/jit/utils")
    assert torch._dynamo.config.ignore_logger_methods is ignored
    assert logging.getLogger("aiter").propagate
    assert logging.getLogger("aiter").handlers == []


def on(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend to have a GPU of AMD's."""
    monkeypatch.setattr(torch.version, "hip", "7.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(gcnArchName=f"{architecture}:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.mark.parametrize("architecture", ["gfx942", "gfx950"])
def test_supported(install: Install, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(**AMD)
    on(architecture, monkeypatch)
    assert aiter_fusion.is_aiter_found_and_supported()
    assert aiter_fusion.if_aiter_supported(lambda x: x + 1)(1) == 2
    for name in config.PREFERENCES:  # availability is not preference
        monkeypatch.setenv(f"AITER_FUSION_{name}", "0")
    assert aiter_fusion.is_aiter_found_and_supported()


@pytest.mark.parametrize("architecture", ["gfx1100", "gfx1151", "gfx1201", "gfx1250"])
def test_experimental(install: Install, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(**AMD)
    on(architecture, monkeypatch)
    assert installation.why_no_aiter() is None
    assert not aiter_fusion.is_aiter_found_and_supported()
    assert "experimental" in str(installation.why_experimental())


@pytest.mark.parametrize("architecture", ["gfx908", "gfx1030"])
def test_refused_architecture(install: Install, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(**AMD)
    on(architecture, monkeypatch)
    assert installation.why_no_aiter() == f"AITER is supported on gfx942, gfx950; this GPU is {architecture}"
    assert aiter_fusion.if_aiter_supported(lambda: 1)() is None


def test_preferences(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.preference("RMSNORM")
    assert not config.preference("LINEAR_HIPBMM")
    for text, value in {"0": False, "off": False, "True": True, " 1 ": True, "": True}.items():
        monkeypatch.setenv("AITER_FUSION_RMSNORM", text)
        assert config.preference("RMSNORM") is value
    assert config.against("rms_norm_quant") == []
    assert config.against("hipb_mm_fp8") == ["AITER_FUSION_LINEAR_HIPBMM is off (set it to 1)"]
    monkeypatch.setenv("AITER_FUSION_RMSNORM", "maybe")
    with pytest.raises(ValueError, match="AITER_FUSION_RMSNORM='maybe': must be one of 1, true"):
        config.preference("RMSNORM")
