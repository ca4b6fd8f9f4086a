"""The executor is as it was when its instructions had been tested, before any kernel ran.

An emulator that is repaired until it agrees with what it runs proves nothing. So a change is made only where the
pseudocode says that the executor is wrong, with an instruction test that shows it and a line in README.md; then
``python -m pytest tests/cdna/test_frozen.py`` prints the digests to write below.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

pytestmark = pytest.mark.cdna

FROZEN = {
    "arithmetic": "c46d618b2a765148",
    "machine": "707207c12e78d1d3",
    "memory": "0f6f8315d4d3e53a",
}


def digest(module: str) -> str:
    return hashlib.sha256((Path(__file__).parent / f"{module}.py").read_bytes()).hexdigest()[:16]


def test_the_executor_is_frozen() -> None:
    assert {module: digest(module) for module in FROZEN} == FROZEN
