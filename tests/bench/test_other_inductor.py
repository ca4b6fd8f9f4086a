"""Inductor's code can be written out and compiled without a GPU, where this torch is the one to be compared with."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aiter_fusion import machine

HERE = Path(__file__).parent / "other_inductor"
pytestmark = [
    pytest.mark.skipif(machine.release(torch.__version__) < (2, 15), reason="needs torch 2.15"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]


def test_a_norm_and_its_groups_are_one_kernel(tmp_path: Path) -> None:
    """Both halves: what is written names every output, and compiles for the GPU that it was written for."""
    command = [sys.executable, HERE / "write.py", tmp_path, "--hidden", "4096", "--rows", "16"]
    subprocess.run([*command, "--only", "rms_norm_quant add+group128"], check=True, capture_output=True)
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["torch"] == torch.__version__
    (plan,) = content["cases"]
    ((kernel, arguments),) = plan["launches"]
    inputs = 3
    assert {argument["buffer"] for argument in arguments if isinstance(argument, dict)} == set(range(inputs + 3))
    assert [sizes for _, sizes, _, _ in plan["outputs"]] == [[16, 4096], [16, 32], [16, 4096]]
    assert all(number >= inputs for number, *_ in plan["outputs"])
    command = [sys.executable, HERE / "measure.py", tmp_path, "--compile", "--processes", "1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.startswith(f"1 kernels, {len(content['kernels'][kernel]['launches'])} launches")
