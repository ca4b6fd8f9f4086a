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


def test_tensor_parallel_llama(tmp_path: Path) -> None:
    # headers compiled in advance pay only where many kernels follow
    env = {**os.environ, "TMPDIR": str(tmp_path), "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / "tp_llama.py"], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "replaced 7 of 7 sites (all_reduce_rms_norm 5, act_mul_quant 2); 0 skipped; 2 bare" in done.stdout
    assert "reports of 2 processes: identical" in done.stdout
    apart = re.search(r"to the quantised model in one process: relative (\S+)", done.stdout)
    assert apart is not None
    assert float(apart[1]) < 0.25  # two quantised models, whose scales belong to other parts of the tensors
