"""The examples run, and print what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import models

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_quickstart(tmp_path: Path) -> None:
    models.need_scaled_rows()
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, EXAMPLES / "quickstart.py"], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout
    for graph in ("prefill", "decode"):
        counts = "replaced 13 of 13 sites (rms_norm_quant 9, act_mul_quant 4); 0 skipped; 4 bare; provider "
        assert f"{graph}: {counts}" in out
    assert re.search(r"^bare +4 +fp8_quant .* producer: its input is aten.permute.default", out, re.MULTILINE)
    assert out.count("50 records, 0 unaccounted for") == 2
    assert "interpreted: bit-identical logits (9 calls)" in out
    assert re.search(r"aiter_fusion to eager: +max \|difference\| \d", out)
    dump = re.search(r"depyf dump: (.*)", out)
    assert dump is not None
    named = [p for p in Path(dump[1]).glob("*AFTER_POST_GRAD*") if "aiter_fusion.rms_norm_quant.add" in p.read_text()]
    assert len(named) == 2


def test_availability() -> None:
    done = subprocess.run([sys.executable, EXAMPLES / "availability.py"], capture_output=True, text=True, check=True)
    assert re.search(r"^AITER: +(not installed|unrelated library|import failed|ready)", done.stdout)
    assert "preferences (AITER_FUSION_<name>): AITER=on" in done.stdout
