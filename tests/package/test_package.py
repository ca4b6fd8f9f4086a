"""The package imports in one direction and costs little, is complete when it is distributed, and is clean and typed."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from packaging.version import Version

import aiter_fusion

ROOT = Path(__file__).parent.parent.parent
PACKAGES = {"aiter_fusion": ROOT / "aiter_fusion", "passes": ROOT / "passes", "patterns": ROOT / "patterns"}

# Everything may import what stands to its left, nothing to its right.
ORDER = (
    {
        "reasons",
        "registry",
        "formats",
        "scale_program",
        "scaled_product",
        "side_by_side",
        "domains",
        "machine",
        "graph_text",
        "page",
        "tables",
    },
    {"agreement", "config", "report", "op", "dynamo"},
    {"journal"},
    {"stage"},
    {"stages"},
    {"providers"},
    {"ops", "families"},
    {"patterns", "bridge"},
    {"passes", "prepared"},
    {"extend"},
    {"backend"},
    {"bench", "doctor", "dumping", "run"},
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
    """The layers that a file imports from, at module level or inside functions; what only names types is left out."""
    below = path.relative_to(PACKAGES.get(layer, PACKAGES["aiter_fusion"])).parts
    depth = len(below) + (layer in ("passes", "patterns"))
    layers = set()
    tree = ast.parse(path.read_text())
    for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    unread = {inner for block in for_types for inner in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == depth and node not in unread:
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


def modules() -> dict[tuple[str, ...], Path]:
    """Dotted name within the package, in parts -> file."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if package != "aiter_fusion":
                parts = (package, *parts)
            found[parts[:-1] if parts[-1] == "__init__" else parts] = path
    return found


def test_no_import_cycles() -> None:
    """Between modules, at module level or inside functions; what only names types is left out."""
    known = modules()
    graph: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for name, path in known.items():
        package = name if path.name == "__init__.py" else name[:-1]
        tree = ast.parse(path.read_text())
        for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
        unread = {inner for block in for_types for inner in ast.walk(block)}
        graph[name] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level and node not in unread:
                home = (*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else ()))
                named = {(*home, alias.name) for alias in node.names}
                graph[name] |= {each if each in known else home for each in named} - {name, ()}
    assert len(graph) > 50
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError that names the modules


def test_vendor_imports_are_inside_bodies() -> None:
    """But for the kernels, which are themselves imported inside bodies only."""
    vendors = {"triton", "aiter", "transformers", "torchao", "matplotlib"}
    for _, path in sources():
        if path.parent.name == "kernels":
            continue
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & vendors, path


IMPORT = """
import contextlib, io, json, sys, time
start = time.process_time()
import torch
torch_took, before, start = time.process_time() - start, set(sys.modules), time.process_time()
import aiter_fusion
took, new = time.process_time() - start, set(sys.modules) - before
touched = torch.cuda.is_initialized()
before, said = set(sys.modules), io.StringIO()
with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
    from aiter_fusion.cli import main
    main(["--version"])
shares = [took / torch_took, (time.process_time() - start) / torch_took]
print(json.dumps([shares, touched, sorted(new), said.getvalue(), sorted(set(sys.modules) - before)]))
"""


def test_importing(record_property) -> None:
    """It takes next to nothing on top of torch: no vendor library, no Inductor, no sympy, no GPU. So does a version."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
    (share, share_of_command), initialized, modules, version, of_command = json.loads(done.stdout)
    assert not initialized
    unwanted = {"triton", "aiter", "transformers", "torchao", "depyf", "sympy", "jinja2", "rich"}
    assert not {name.split(".")[0] for name in modules + of_command} & unwanted
    assert not any(name.startswith(("torch._inductor", "torch._dynamo")) for name in modules + of_command)
    record_property("row", f"import aiter_fusion: {100 * share:.0f} % of importing torch")
    assert share < 0.15
    assert share_of_command < 0.2
    commands = {name for name in of_command if name.startswith("aiter_fusion.cli.")}
    assert commands == {"aiter_fusion.cli.parser", "aiter_fusion.cli.streams"}  # and the module of no command
    assert version == f"{aiter_fusion.__version__}\n"


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


def test_without_symbolic_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As git checks them out with core.symlinks=false: files with the link's target as text."""
    folder = tmp_path / "without_links"
    folder.mkdir()
    (folder / "__init__.py").write_text((ROOT / "aiter_fusion" / "__init__.py").read_text())
    (folder / "passes").write_text("../passes")
    (folder / "patterns").write_text("../patterns")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"symbolic links.* 'git config core.symlinks true && git checkout "):
        importlib.import_module("without_links")


BUILD = "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])"
# What the repository has and the package is not made from.
DEVELOPMENT = (".*", "build", "dist", "dump", "*.egg-info", "__pycache__")


def test_the_source_distribution_has_all_that_the_tests_need(tmp_path: Path) -> None:
    """And in the place of links what they stand for."""
    tree, target = tmp_path / "tree", tmp_path / "dist"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*DEVELOPMENT))
    needed = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    needed |= {
        f"aiter_fusion/{path.relative_to(tree)}" for name in ("passes", "patterns") for path in (tree / name).iterdir()
    }
    done = subprocess.run([sys.executable, "-c", BUILD, target], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = target.iterdir()
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    assert needed <= held, sorted(needed - held)
    assert not any("__pycache__" in name for name in held)


def test_what_builds_it() -> None:
    """Setuptools takes the licence as an SPDX expression from 77.0.3 on, and would fail before."""
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^license = "', text, re.MULTILINE)
    required = re.search(r'^requires = \["setuptools>=([\d.]+)"\]', text, re.MULTILINE)
    assert required is not None
    assert Version(required[1]) >= Version("77.0.3")


def test_dependencies() -> None:
    required = importlib.metadata.requires("aiter-fusion") or []
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in required}
    assert not names & {"triton", "aiter", "amd-aiter"}
    assert {"torch", "sympy", "depyf"} <= names
    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="aiter_fusion")
    assert entry.value == "aiter_fusion.backend:aiter_fusion"


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["pyright", "--pythonpath", sys.executable]],
    ids=["ruff check", "ruff format", "pyright"],
)
def test_clean(command: list[str]) -> None:
    """Also where the environment of the tests is not the one that is activated."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
