"""The tables of vLLM's integration in the provider's README name tests that there are, and every op and variable."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from aiter_fusion import config
from aiter_fusion.registry import REGISTRY

HERE = Path(__file__).parent
ROOT = HERE.parent.parent.parent
README = (ROOT / "aiter_fusion" / "providers" / "aiter" / "README.md").read_text()
SECTION = README.partition("## vLLM's integration, row by row\n")[2].partition("\n## ")[0]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in SECTION.splitlines()
    if line.startswith("|") and not line.startswith(("|---", "| vLLM |"))
]
# Rows of its ops and of its three pull requests.
COUNTS = (28, 13, 6, 14)
# What only an engine, or hardware, can show.
SHOWN_BY_NOTHING = (
    "speculative decoding, the scheduler's metadata",
    "accuracy of a whole model on AMD's GPUs",
)


@functools.cache
def functions_of(path: Path) -> frozenset[str]:
    functions = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
    return frozenset(function.name for function in functions)


def test_every_row_is_there() -> None:
    tables = re.findall(r"(?:^\|.*\n)+", SECTION, re.MULTILINE)
    assert tuple(table.count("\n") - 2 for table in tables) == COUNTS
    assert f"{sum(COUNTS)} rows, of which {len(SHOWN_BY_NOTHING)} are shown by nothing" in SECTION


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row(row: list[str]) -> None:
    _, here, shown = row
    named = re.findall(r"`([^`]+)::(\w+)`", shown)
    for path, test in named:
        file = ROOT / path if path.startswith("tests/") else HERE / path
        assert test in functions_of(file), f"{path} has no {test}"
    assert bool(named) != (row[0] in SHOWN_BY_NOTHING)
    assert here


def test_every_op_and_variable_is_in_the_readme() -> None:
    said = set(re.findall(r"`(\w+)", README))
    assert {family for family, _ in REGISTRY.bridge} <= said
    for name in config.PREFERENCES:
        assert f"`AITER_FUSION_{name}`" in README or f"`_{name}`" in README, name
