"""The examples run, and print what they promise."""

from __future__ import annotations

import copy
import importlib.machinery
import importlib.util
import json
import os
import pickle
import re
import runpy
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

import aiter_fusion
from support import cases, models
from support.checked import checked

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run an example as ``python`` does, but in this process, which has PyTorch; what it prints."""

    def of(name: str, *arguments: str | Path) -> str:
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return of


def started(name: str, *arguments: str | Path, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """An example in a process of its own."""
    command = [sys.executable, EXAMPLES / name, *arguments]
    env = os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == status, done.stderr
    return done


def shown_report(text: str) -> str:
    """A report without its time and what fills its lines up."""
    return re.sub(r"[\d.]+ ms| +$", "", text, flags=re.MULTILINE)


@pytest.mark.slow  # CI runs it itself, twice
def test_quickstart(tmp_path: Path) -> None:
    models.need_scaled_rows()
    out = started("quickstart.py", TMPDIR=str(tmp_path)).stdout
    readme = (EXAMPLES.parent / "README.md").read_text()
    (shown,) = re.findall(r"^```\n(replaced .*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert shown_report(shown) in shown_report(out)
    for graph, counts in {
        "prefill": "30 of 30 sites (rms_norm_quant 9, fp8_linear 17, act_mul_quant 4)",
        "decode": "34 of 34 sites (rms_norm_quant 9, fp8_linear 17, decode_attention 4, act_mul_quant 4)",
    }.items():
        assert f"{graph}: replaced {counts}; 0 skipped; 4 bare; 29 products in 17 launches; provider " in out
    assert re.search(r"^bare +4 +fp8_quant .* producer: its input is aten.permute.default", out, re.MULTILINE)
    assert [int(count) for count in re.findall(r"^(\d+) records, 0 unaccounted for", out, re.MULTILINE)] == [79, 83]
    assert "interpreted: bit-identical logits (9 calls)" in out
    assert re.search(r"aiter_fusion to eager: +max \|difference\| \d", out)
    dump = re.search(r"depyf dump: (.*)", out)
    assert dump is not None
    named = [p for p in Path(dump[1]).glob("*AFTER_POST_GRAD*") if "aiter_fusion.rms_norm_quant.add" in p.read_text()]
    assert len(named) == 2


def test_torch_nn_block(tmp_path: Path, run: Callable[..., str]) -> None:
    out = run("torch_nn_block.py", tmp_path / "report.html")
    assert "replaced 3 of 3 sites (rms_norm_quant 2, act_mul_quant 1); 0 skipped; 1 bare; provider " in out
    assert "producer: its input is aten.permute.default" in out
    assert "8 records, 0 unaccounted for" in out
    page = (tmp_path / "report.html").read_text()
    assert "torch_nn_block.py:" in page, "the lines of the model"


def test_depyf_dump(tmp_path: Path, run: Callable[..., str]) -> None:
    out = run("depyf_dump.py", tmp_path)
    assert "replaced 1 of 1 sites (rms_norm_quant 1)" in out
    assert re.findall(r"AITER_FUSION_(\d)_(\w+)\.0\.py (- names the fused op)?$", out, re.MULTILINE) == [
        ("0", "before", ""),
        ("1", "after_fusions", "- names the fused op"),
    ]
    assert (tmp_path / "dump" / "index.md").read_text() in out


@pytest.mark.slow
def test_aot_inductor(tmp_path: Path) -> None:
    out = started("aot_inductor.py", tmp_path / "made").stdout
    assert "replaced 2 of 2 sites (rms_norm_quant 2); 0 skipped; 0 bare; provider " in out
    assert "another process, which imports aiter_fusion: the same bits for (6, 1, 33) rows" in out
    assert (
        "another process, which does not: exit status 1\n    RuntimeError: Could not find schema for aiter_fusion::"
        in out
    )
    assert (tmp_path / "made" / "block.pt2").exists()


def test_torchao_configurations(run: Callable[..., str]) -> None:
    models.need_scaled_rows()
    lines = run("torchao_configs.py").splitlines()
    assert all(line.endswith("same bits") for line in lines)
    fused = "rms_norm_quant 1, fp8_linear 2, act_mul_quant 1"
    assert [fused in line for line in lines] == [True, True, False, False, False]
    assert [" nothing " in line for line in lines] == [False, False, True, True, True]


def test_a_lower_count(run: Callable[..., str]) -> None:
    """Each cause has the reason, or the advice, that its title promises."""
    models.need_scaled_rows()
    parts = run("lower_count.py").split("\n## ")[1:]
    signs = (
        "4 of 4 sites",
        "nothing was fused: no activation is",
        "producer: its input is",
        "boundary: it",
        "level: needs",
    )
    for part, sign in zip(parts, signs, strict=True):
        assert sign in part


@pytest.mark.slow  # every test with an oracle compares the rewritten graphs' bits
def test_accuracy(run: Callable[..., str]) -> None:
    models.need_scaled_rows()
    out = run("accuracy.py")
    assert "rewritten graphs give the original's bits: True" in out
    errors = [float(error) for error in re.findall(r"relative difference at most (\S+)", out)]
    assert len(errors) == 2
    assert all(0 <= error < 0.05 for error in errors)


def test_cuda_graphs(run: Callable[..., str]) -> None:
    models.need_scaled_rows()
    out = run("cuda_graphs.py")
    assert "replaced 8 of 8 sites" in out, "for both shapes"
    assert re.search(r"captured [02] CUDA graphs; compiled since warmup: 0$", out, re.MULTILINE)


@pytest.mark.slow  # models/test_decode.py has static caches, without code generation
def test_fp8_checkpoint(run: Callable[..., str]) -> None:
    models.need_scaled_rows()
    out = run("fp8_checkpoint.py")
    assert "loaded: Float8Tensor weights" in out
    (tokens,) = re.findall(r"^tokens: (.*)", out, re.MULTILINE)
    assert len(tokens.split(",")) == 4
    assert re.search(r"^prompt: replaced (\d+) of \1 sites ", out, re.MULTILINE)
    assert re.search(r"^further tokens: replaced (\d+) of \1 sites .*decode_attention 1", out, re.MULTILINE)


def test_diffusion_transformer(run: Callable[..., str]) -> None:
    pytest.importorskip("diffusers", reason="needs diffusers")
    models.need_scaled_rows()
    out = run("diffusion_transformer.py")
    assert "the same bits as the original graphs: True" in out
    assert ", 0 unaccounted for" in out


def test_own_pattern() -> None:
    """In a process of its own: PyTorch cannot forget an op."""
    out = started("own_pattern.py").stdout
    assert "replaced 1 of 1 sites (rms_norm_int8 1)" in out
    assert "the same bits as the original graph: True" in out
    assert "opcheck: aiter_fusion::rms_norm_int8" in out


def test_the_table_lists_every_example() -> None:
    table = (EXAMPLES / "README.md").read_text()
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(re.findall(r"^\| `(\w+\.py)` \|", table, re.MULTILINE))


# ---- vLLM's contract, without vLLM -------------------------------------------------------------------------------


class InductorPass(CustomGraphPass):
    """In the place of vLLM's class, which its pass manager demands."""


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The names of vLLM that the example uses; then the example, imported beside them."""

    def config(**given: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(**given)

    contents = {
        "vllm": {},
        "vllm.compilation": {},
        "vllm.compilation.passes": {},
        "vllm.compilation.passes.inductor_pass": {"InductorPass": InductorPass},
        "vllm.config": {"CompilationConfig": config, "PassConfig": config},
        "vllm.platforms": {"current_platform": config(pass_key="post_grad_custom_post_pass")},
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "vllm_pass", raising=False)
    return importlib.import_module("vllm_pass")


def test_the_pass_for_vllm(vllm: types.ModuleType) -> None:
    """Its pass manager demands its own class, a uuid for JSON, and copies it and sends it to other processes."""
    made = vllm.FusionPass(level=2)
    assert made.is_applicable_for_range(None)
    assert isinstance(made, InductorPass)
    key = made.uuid()
    assert json.loads(json.dumps(key)) == key
    for copied in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert copied.uuid() == key
    assert vllm.FusionPass(level=1).uuid() != key

    original = checked(lambda x, w: cases.q3(cases.llama(x, w)), disable="rms_norm_quant")
    with torch.no_grad():
        original.call(*cases.tensors(("x", "w"), (4,), torch.bfloat16, "normal"))
    (captured,) = original.oracle.graphs
    graph = captured.before.graph
    made(graph)
    graph.lint()
    assert [str(n.target) for n in graph.nodes if "aiter_fusion" in str(n.target)] == [
        "aiter_fusion.rms_norm_quant.default"
    ]
    (report,) = aiter_fusion.reports()
    assert report.replaced == {"rms_norm_quant": 1}


def test_the_configuration_for_vllm(vllm: types.ModuleType) -> None:
    made = vllm.compilation_config(level=1)
    (own,) = made.inductor_passes.items()
    assert own[0] == "post_grad_custom_post_pass"
    assert own[1].fusions.options.level == 1
    assert not made.pass_config.fuse_norm_quant


def test_without_vllm() -> None:
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("needs an environment without vLLM")
    assert started("vllm_pass.py", status=1).stderr.startswith("this example needs vLLM: ")


def test_availability(run: Callable[..., str]) -> None:
    out = run("availability.py")
    assert re.search(r"^AITER: +(not installed|unrelated library|import failed|ready)", out)
    assert "preferences (AITER_FUSION_<name>): AITER=on" in out


@pytest.mark.slow  # tests/providers/triton/test_all_reduce.py has such models on two ranks, without code generation
def test_tensor_parallel_llama() -> None:
    out = started("tp_llama.py").stdout
    assert "replaced 7 of 7 sites (all_reduce_rms_norm 5, act_mul_quant 2); 0 skipped; 2 bare" in out
    assert "reports of 2 processes: identical" in out
    apart = re.search(r"to the quantised model in one process: relative (\S+)", out)
    assert apart is not None
    assert float(apart[1]) < 0.25  # two quantised models, whose scales belong to other parts of the tensors
