"""The executor is as it was when its instructions had been tested, before any kernel ran.

An emulator that is repaired until it agrees with what it runs proves nothing. So a change is made only where the
pseudocode says that the executor is wrong, with an instruction test that shows it and a line in README.md; then
``python -m pytest tests/cdna/test_frozen.py`` prints the digests to write below.
"""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

import pytest

pytestmark = pytest.mark.cdna

FROZEN = {
    "arithmetic": "ea15646d3c20e83a",
    "machine": "506e0741baeb5cdc",
    "memory": "c164402d56c6909e",
}


def digest(module: str) -> str:
    """Of the code alone: comments and layout do not count, docstrings do not either."""
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            del body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def test_the_executor_is_frozen() -> None:
    assert {module: digest(module) for module in FROZEN} == FROZEN
