"""AITER's own Triton kernels, from a checkout, agree with this project's references."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import support


@pytest.mark.aiter_src
@pytest.mark.skipif(not os.environ.get("AITER_SRC"), reason="needs AITER_SRC, a checkout of github.com/ROCm/aiter")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton (any GPU, or none: interpreted)")
def test_their_triton_kernels(record_property) -> None:
    """In a process of its own: whether Triton interprets is decided when it is imported."""
    script = Path(support.__file__).parent / "aiter_src.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    ran = [line for line in lines if line.endswith(": ok")]
    for entry in ("fused_rms_fp8_group_quant", "fused_rms_fp8_per_tensor_static_quant", "act_mul_and_fp8_group_quant"):
        assert any(line.startswith(entry) for line in ran)
    assert any(line.startswith("gemm_a8w8_blockscale") for line in ran)
    record_property("row", f"{lines[0]}: {len(ran)} of {len(lines) - 1} calls agree, the others need more")
