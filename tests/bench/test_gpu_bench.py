"""The benchmarks and the tuner run from end to end on a GPU, here on tiny shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from aiter_fusion import cli
from aiter_fusion.bench import tune
from aiter_fusion.bench.ops import Result
from aiter_fusion.providers.triton import tuned

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


def test_ops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ops.json"
    argv = ["bench", "ops", "--hidden", "256", "--rows", "4", "300", "--only", "add+token"]
    argv += ["--max-autotune", "--reference", "--json"]
    assert cli.main([*argv, str(path)]) == 0
    result = Result.from_json(path.read_text())
    assert [(row.variant, row.hidden, row.rows) for row in result.rows] == [("add+token", 256, n) for n in (4, 300)]
    assert result.refused == ()
    assert result.copy_rate > 1e11
    for row in result.rows:
        for time in (row.ours_us, row.inductor_us, row.max_autotune_us, row.reference_us):
            assert time is not None
            assert 0.1 < time < 1e4
    assert result.conditions.command == f"aiter-fusion {' '.join(argv)} {path}"
    assert json.loads(path.read_text())["conditions"]["device"] == torch.cuda.get_device_name()
    assert "ours / Inductor" in capsys.readouterr().out


def test_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.json"
    argv = ["bench", "model", "--hidden", "512", "--intermediate", "1024", "--layers", "2", "--host"]
    argv += ["--workloads", "decode-1", "prefill-64", "--json"]
    assert cli.main([*argv, str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["sizes"] == {"hidden": 512, "intermediate": 1024, "layers": 2}
    assert [row["workload"] for row in result["rows"]] == ["decode-1", "prefill-64"]
    assert [row["host_us"] is None for row in result["rows"]] == [False, True]
    for row in result["rows"]:
        assert row["replaced"] == {"rms_norm_quant": 5, "act_mul_quant": 2, "fp8_linear": 9}
        assert row["captured"]
        assert row["difference"] < 0.1
        for name in ("gpu_us", "wall_us", "kernels", "peak_bytes"):
            assert all(value > 0 for value in row[name].values())
    assert "rms_norm_quant 5" in capsys.readouterr().out


def test_tune(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is written is one that can be read."""
    monkeypatch.setattr(tune, "THREADS", (64, 128))
    monkeypatch.setattr(tune, "FLAT_ELEMENTS", (512,))
    monkeypatch.setattr(tune, "MANY_ROWS", (300,))
    monkeypatch.setenv("AITER_FUSION_CACHE", str(tmp_path))
    path = tuned.path()
    assert path is not None
    assert cli.main(["tune", "--hidden", "256"]) == 0
    content = json.loads(path.read_text())
    assert content["conditions"]["device"] == torch.cuda.get_device_name()
    assert tuned.choices() == content["launches"]
    assert f"written to {path}" in capsys.readouterr().out
    assert cli.main(["tune", "--hidden", "256", "--rules", "gated_norm", "cat_row"]) == 0
    out = capsys.readouterr().out
    assert "gated_norm 256 256 0" in out
    assert "layer_norm" not in out
    tuned._content.cache_clear()
    tuned.choices.cache_clear()


def test_a_model_in_which_nothing_is_replaced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AITER_FUSION_LEVEL", "0")
    argv = ["bench", "model", "--hidden", "512", "--intermediate", "1024", "--layers", "1", "--workloads", "decode-1"]
    assert cli.main(argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "decode-1: nothing was replaced" in err.splitlines()[-1]
