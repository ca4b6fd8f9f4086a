"""How the package is put together: imports, their direction, dependencies, formatting, types."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"aiter_fusion": ROOT / "aiter_fusion", "passes": ROOT / "passes", "patterns": ROOT / "patterns"}

# Everything may import what stands to its left, nothing to its right.
ORDER = (
    {"agreement", "arithmetic", "config", "platform", "record", "page", "report", "domains", "op"},
    {"providers"},
    {"ops"},
    {"patterns", "bridge"},
    {"passes", "prepared"},
    {"backend"},
    {"bench", "dumping", "run"},
    {"cli"},
    {"__main__"},
)


def sources() -> list[tuple[str, Path]]:
    """(layer, file) for every module of the three packages; links are not followed."""
    found = []
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).parts
            if package == "aiter_fusion" and parts[0] not in ("passes", "patterns"):
                found.append((parts[0].removesuffix(".py"), path))
            elif package != "aiter_fusion":
                found.append((package, path))
    return found


def imported(path: Path, layer: str) -> set[str]:
    """The layers that a file imports from, at module level or inside functions."""
    below = path.relative_to(PACKAGES.get(layer, PACKAGES["aiter_fusion"])).parts
    depth = len(below) + (layer in ("passes", "patterns"))
    layers = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            layers |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return layers - {layer, "__version__"}


def test_import_direction() -> None:
    rank = {layer: position for position, layers in enumerate(ORDER) for layer in layers}
    checked = 0
    for layer, path in sources():
        if layer == "__init__":
            continue
        for other in imported(path, layer):
            assert other in rank, f"{path}: what is {other}?"
            assert rank[other] <= rank[layer], f"{path} ({layer}) imports {other}"
            checked += 1
    assert checked > 20


def test_vendor_imports_are_inside_bodies() -> None:
    """But for the kernels, which are themselves imported inside bodies only."""
    vendors = {"triton", "aiter", "transformers", "torchao", "matplotlib", "tqdm"}
    for _, path in sources():
        if path.parent.name == "kernels":
            continue
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & vendors, path


IMPORT = """
import json, sys, time, torch
before, start = set(sys.modules), time.process_time()
import aiter_fusion
seconds, new = time.process_time() - start, set(sys.modules) - before
print(json.dumps([seconds, torch.cuda.is_initialized(), sorted(new)]))
"""


def test_importing(record_property) -> None:
    """It takes next to nothing on top of torch: no vendor library, no Inductor, no sympy, no GPU."""
    done = [subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True) for _ in "123"]
    found = [json.loads(process.stdout) for process in done]
    _, initialized, modules = found[0]
    assert not initialized
    unwanted = {"triton", "aiter", "transformers", "torchao", "depyf", "sympy", "jinja2"}
    assert not {name.split(".")[0] for name in modules} & unwanted
    assert not any(name.startswith("torch._inductor") for name in modules)
    seconds = min(seconds for seconds, *_ in found)
    record_property("row", f"import aiter_fusion: {seconds * 1e3:.0f} ms on top of torch")
    assert seconds < 0.15


def test_torch_may_import_it_while_being_imported() -> None:
    """TORCH_LOGS=+aiter_fusion does that."""
    code = "import torch, aiter_fusion; print(aiter_fusion.Backend().options.level)"
    env = {**os.environ, "TORCH_LOGS": "+aiter_fusion"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "3"


def test_every_package_is_installed() -> None:
    """What setuptools is not told of is missing from every installation but an editable one."""
    listed = (ROOT / "pyproject.toml").read_text()
    for package, folder in PACKAGES.items():
        for path in folder.rglob("__init__.py"):
            parts = path.parent.relative_to(folder).parts
            if not {"passes", "patterns"} & set(parts[:1]):
                name = ".".join(["aiter_fusion", *([package] if package != "aiter_fusion" else []), *parts])
                assert f'"{name}",' in listed, name


def test_dependencies() -> None:
    required = importlib.metadata.requires("aiter-fusion") or []
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in required}
    assert not names & {"triton", "aiter", "amd-aiter"}
    assert {"torch", "sympy", "depyf"} <= names
    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="aiter_fusion")
    assert entry.value == "aiter_fusion.backend:aiter_fusion"


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["pyright"]], ids=" ".join
)
def test_clean(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
