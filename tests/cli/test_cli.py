"""Every command answers or fails in one clear line, and the benchmarks' parts are right, as far as they need no GPU."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchao
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import aiter_fusion
from aiter_fusion import cli, machine
from aiter_fusion.bench import model, ops, timing
from aiter_fusion.bench.ops import Case, Result, Row
from aiter_fusion.bench.timing import Conditions, Refused
from aiter_fusion.cli import info, options
from aiter_fusion.registry import REGISTRY
from aiter_fusion.report import REPLACED, SKIPPED, FusionReport, Site
from aiter_fusion.tables import plain
from support import models
from support.command import fails, run

RESULT = Result(
    conditions=Conditions("GPU", "2.11.0", "3.6.0", "0.1.0", "2026-11-21T10:00:00+00:00", "aiter-fusion bench ops"),
    copy_rate=4e12,
    rows=(
        Row("rms_norm_quant", "add+token", 4096, 1, 40_000, 2.0, 2.5),
        Row("rms_norm_quant", "add+token", 4096, 16384, 400_000_000, 110.0, 220.0, 200.0),
    ),
    refused=("rms_norm_quant token hidden 4096 rows 1: ours and Inductor's q are 3 codes apart",),
    seconds=12.0,
)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def saved(tmp_path: Path) -> str:
    path = tmp_path / "result.json"
    path.write_text(RESULT.to_json())
    return str(path)


# ---- info --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        [],
        *([name] for name in cli.COMMANDS),
        *(["bench", kind] for kind in ("ops", "model", "linear", "attention", "allreduce")),
    ],
    ids=" ".join,
)
def test_help_has_an_example(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Whose words the command takes."""
    with pytest.raises(SystemExit):
        cli.main([*words, "--help"])
    (example,) = re.findall(r"^example:\n  aiter-fusion (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert example.startswith(" ".join(words))
    assert callable(cli._parser().parse_args(shlex.split(example)).run)


@pytest.mark.usefixtures("no_gpu")
def test_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AITER_FUSION_DISABLE", "act_mul_quant")
    monkeypatch.setenv("AITER_FUSION_LINEAR", "0")
    status, out, err = run("info", capsys=capsys)
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    rows = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line)
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["torch"] == f"{torch.__version__}, built for {machine.build()}"
    assert rows["device"] == rows["native FP8"] == "none: PyTorch sees no GPU"
    assert rows["provider reference"] == "can run"
    assert rows["preferred level"] == "3 (default)"
    assert rows["preferred disable"] == "act_mul_quant (AITER_FUSION_DISABLE)"
    assert rows["preferred linear"] == "off (AITER_FUSION_LINEAR)"
    assert "preferred moe" not in rows, "it is about AITER, which cannot run here"
    assert rows["fusion rms_norm_quant"] == "on, by reference"
    assert rows["fusion act_mul_quant"] == "off: disabled: act_mul_quant is in 'disable'"
    assert rows["note"].startswith("plain PyTorch computes the fused ops here")


@pytest.mark.usefixtures("no_gpu")
def test_info_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AITER_FUSION_LEVEL", "1")
    status, out, _ = run("info", "--json", capsys=capsys)
    found = json.loads(out)
    assert status == 0
    assert (found["torch"], found["device"], found["native_fp8"]) == (torch.__version__, None, None)
    assert found["aiter"] is None or isinstance(found["aiter"], str)
    assert found["aiter_supported"] is False
    assert found["aiter_reason"]
    assert found["providers"]["reference"] is None
    assert found["providers"]["triton"]
    assert found["preferences"]["level"] == {"value": 1, "from": "AITER_FUSION_LEVEL"}
    assert found["preferences"]["provider"] == {"value": "auto", "from": "default"}
    assert found["preferences"]["numerics"] == {"value": "exact", "from": "level 1"}
    assert found["fusions"]["rms_norm_quant"] is None
    assert found["fused_by"]["rms_norm_quant"] == ["reference"]
    for family in ("all_reduce_rms_norm", "fp8_linear", "decode_attention"):
        assert found["fusions"][family] == "level: needs level 3, this is level 1"
        assert found["fused_by"][family] == []
    assert found["backend_by_name"] is True


@pytest.mark.usefixtures("no_gpu")
def test_info_where_nothing_can_be_fused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No family is said to be on where the chosen provider cannot run, or where the level leaves all out."""
    monkeypatch.setenv("AITER_FUSION_PROVIDER", "aiter")
    _, out, _ = run("info", "--json", capsys=capsys)
    assert all(why.startswith("no_kernel: aiter: ") for why in json.loads(out)["fusions"].values())
    monkeypatch.delenv("AITER_FUSION_PROVIDER")
    monkeypatch.setenv("AITER_FUSION_LEVEL", "0")
    _, out, _ = run("info", capsys=capsys)
    assert "note" in out
    assert "nothing is fused here: the lines on fusions say why" in out
    assert "on, by" not in out


def test_info_of_a_preference_that_does_not_exist(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AITER_FUSION_PROVIDER", "tritn")
    assert "did you mean 'triton'?" in fails("info", capsys=capsys)


# ---- Errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "<command>"),
        (["bench"], "<what>"),
        (["bench", "op"], "'op'"),
        (["info", "--jso"], "--jso"),
        (["bench", "ops", "--rows", "0"], "'0' is not a whole number above 0"),
        (["bench", "ops", "--only", "norms"], "there are rms_norm_quant add+group128, "),
        (["bench", "ops", "--hidden", "100", "--only", "group128"], "--hidden 100: groups need"),
        (["bench", "ops", "--json", "/no/such/folder/x.json"], "there is no such folder"),
        (["bench", "model", "--hidden", "700"], "must be a multiple of 512"),
        (["bench", "model", "--intermediate", "700"], "must be a multiple of 16"),
        (["bench", "model", "--workloads", "decode"], "must be decode-<rows> or prefill-<tokens>"),
        (["bench", "model", "--workloads", "decode-32", "--host"], "--host measures decode-1"),
        (["bench", "model", "--context", "64"], "--context are for --decode"),
        (["bench", "model", "--decode", "--context", "64"], "--context 64: must be more than 96"),
        (["bench", "model", "--json", "/no/such/folder/x.json"], "there is no such folder"),
        (["bench", "ops", "--from", "/no/such/file.json"], "No such file"),
        (["doctor", "--output", "report.html"], "'report.html' ends neither in .txt nor in .md"),
        (["doctor", "--output", "/no/such/folder/report.md"], "there is no folder /no/such/folder"),
        (["doctor", "--only", "softmax"], "there are calls of rms_norm_quant, act_mul_quant, "),
    ],
)
def test_bad_options(argv: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(*argv, capsys=capsys)
    assert named in line
    assert line.startswith("aiter-fusion")


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert "PyTorch sees none; --from FILE" in fails("bench", "ops", capsys=capsys)
    assert "PyTorch sees none" in fails("bench", "model", capsys=capsys)
    with pytest.raises(RuntimeError, match="PyTorch sees none"):
        cli.main(["bench", "ops", "--debug"])


def test_an_unexpected_error_names_its_type(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "information", lambda: {}["torch"])
    assert fails("info", capsys=capsys) == "aiter-fusion: error: KeyError: 'torch'"


def test_without_matplotlib(saved: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = fails("bench", "ops", "--from", saved, "--plot", "x.png", capsys=capsys)
    assert "pip install 'aiter-fusion[bench]'" in line


def test_what_a_backend_raised_comes_unwrapped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def information() -> None:
        raise BackendCompilerFailed(lambda: None, ValueError("a bad value\nand more"), None)

    monkeypatch.setattr(info, "information", information)
    assert fails("info", capsys=capsys) == "aiter-fusion: error: a bad value"


def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "aiter_fusion", "bench", "ops", "--from", "nothing.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "aiter-fusion: error: [Errno 2] No such file or directory: 'nothing.json'\n"


# ---- Streams -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("which", ["stdout", "stderr"])
def test_a_reader_that_has_gone(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after ``| head``: the command ends as other programs do, without a word, and Python has nothing to flush."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, which, stream)
        command = ["info"] if which == "stdout" else ["bench", "ops"]
        assert cli.main(command) == 128 + signal.SIGPIPE


def test_a_broken_pipe_elsewhere_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def information() -> None:
        raise BrokenPipeError("of another process")

    monkeypatch.setattr(info, "information", information)
    with pytest.raises(BrokenPipeError, match="of another process"):
        cli.main(["info"])


def test_closed_streams(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing goes to the other one instead."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert cli.main(["bench", "ops", "--from", "nothing.json"]) == 2
        patch.setattr(sys, "stdout", None)
        assert cli.main(["info"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", r"gr\xf6\xdfe \ud83d"), ("utf-8", r"größe \ud83d")])
def test_what_an_encoding_lacks(encoding: str, shown: str) -> None:
    report = FusionReport((Site("rms_norm_quant", "token", "", "", SKIPPED, "level: no", "größe \ud83d"),), 1)
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    options.tell(report, Namespace(report=None, json=False), stream)
    stream.seek(0)
    assert shown in stream.read()


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 70 columns, which shows colours."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_a_report_on_a_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statuses have colours, and long cells fold; what does not fold needs more than these 70 columns."""
    site = Site("rms_norm_quant", "token", "", "", SKIPPED, "level: " + "skipped by level " * 9, "layers.0")
    report = FusionReport((site, replace(site, status=REPLACED, reason="")), 2)
    options.tell(report, Namespace(report=None, json=False), terminal)
    written = terminal.getvalue()
    assert "\n\x1b[33mskipped\x1b[0m  " in written
    assert "\n\x1b[32mreplaced\x1b[0m  " in written
    assert written.count("\x1b") == 4
    folded = [line for line in written.splitlines() if "\x1b" not in line]
    assert len(folded) > 4
    assert max(map(len, folded)) < 100 < max(map(len, plain(report).splitlines()))
    monkeypatch.setenv("NO_COLOR", "1")
    options.tell(report, Namespace(report=None, json=False), terminal)
    assert "\x1b" not in terminal.getvalue().removeprefix(written)


@pytest.mark.usefixtures("no_gpu")
def test_info_on_a_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", terminal)
    assert cli.main(["info"]) == 0
    assert "\x1b[32mcan run\x1b[0m\n" in terminal.getvalue()
    assert "\x1b[33mcannot run\x1b[0m: " in terminal.getvalue()
    assert max(len(line) for line in terminal.getvalue().splitlines() if "\x1b" not in line) <= 70


def test_an_error_on_a_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one line, however long, for whoever copies a path from it."""
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(["bench", "ops", "--from", "nothing" * 20]) == 2
    assert terminal.getvalue().startswith("aiter-fusion: \x1b[31merror:\x1b[0m [Errno 2] No such file")
    assert terminal.getvalue().count("\n") == 1


def test_progress(terminal: Terminal, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar is for terminals, and leaves standard output alone."""
    assert list(timing.progress("abc", "bench")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", terminal)
    for item in timing.progress("abc", "bench"):
        print(item)
    assert capsys.readouterr().out == "a\nb\nc\n"
    assert "bench" in terminal.getvalue()
    assert "100%" in terminal.getvalue()


# ---- A saved result ----------------------------------------------------------------------------------------------


def test_a_saved_result_is_shown(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run("bench", "ops", "--from", saved, capsys=capsys)
    assert status == 0
    assert err == f"not compared: {RESULT.refused[0]}\n"
    assert out.startswith("GPU; torch 2.11.0, triton 3.6.0, aiter_fusion 0.1.0; 2026-11-21T10:00:00+00:00\n")
    assert "copy rate 4.00 TB/s" in out
    lines = [line.split() for line in out.splitlines() if line.startswith("rms_norm_quant")]
    assert lines[0][2:] == ["4096", "1", "0.040", "2.00", "2.50", "200.00", "0.800"]
    assert lines[1][2:] == ["4096", "16384", "400.000", "110.00", "220.00", "200.00", "1.10", "0.500"]
    assert "max-autotune us" in out
    assert "reference us" not in out  # nobody measured it
    assert out.endswith("geometric mean: 1 rows 0.800, 16384 rows 0.500\n")


def test_json_round_trip(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = tmp_path / "again.json"
    assert run("bench", "ops", "--from", saved, "--json", str(again), capsys=capsys)[0] == 0
    assert Result.from_json(again.read_text()) == RESULT


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"conditions": 1}'])
def test_json_of_something_else(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    assert "not a result that 'bench ops --json' wrote" in fails("bench", "ops", "--from", str(path), capsys=capsys)


def test_a_result_without_rows_is_shown() -> None:
    assert "copy rate" in str(replace(RESULT, rows=()))


def test_plot(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "result.png"
    assert run("bench", "ops", "--from", saved, "--plot", str(path), capsys=capsys)[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")


# ---- Cases -------------------------------------------------------------------------------------------------------


def test_the_default_cases() -> None:
    made = ops.cases()
    grouped = [variant for _, variant in ops.VARIANTS if variant.endswith("group128")]
    assert len(set(made)) == len(made) == 8 * len(ops.VARIANTS) - 2 * len(grouped)  # 128 does not divide 2880
    assert {case.variant for case in made} - {case.variant for case in made if case.hidden == 2880} == set(grouped)
    every = {op.family for op in REGISTRY.ops.values() if op.stages and not op.is_collective}
    assert {case.op.family for case in made} == every
    acts = {case.arguments("meta")["act"] for case in ops.cases([256], [1], "act_")}
    assert acts == {"silu", "sigmoid", "gelu_tanh", "gelu", "squared_relu"}
    formats = {"add+int8+token", "add+mxfp8+group32"}
    assert {c.variant for c in ops.cases([256], [1], "rms_norm_quant add+")} == {"add+group128", "add+token", *formats}


@pytest.mark.parametrize(
    ("family", "variant", "bytes"),
    [
        # bf16 in and out, a weight, codes, float32 scales
        ("rms_norm_quant", "add+group128", 10 * 256 * (2 + 2 + 2 + 1) + 256 * 2 + 10 * 2 * 4),
        ("rms_norm_quant", "token", 10 * 256 * (2 + 1) + 256 * 2 + 10 * 4),
        ("rms_norm_quant", "tensor", 10 * 256 * (2 + 1) + 256 * 2 + 4),
        ("rms_norm_quant", "static", 10 * 256 * (2 + 1) + 256 * 2 + 4),
        ("act_mul_quant", "group128", 10 * 256 * (4 + 1) + 10 * 2 * 4),
        ("act_mul_quant", "packed+token", 10 * 256 * (4 + 1) + 10 * 4),
    ],
)
def test_bytes_moved(family: str, variant: str, bytes: int) -> None:
    assert Case(family, variant, 256, 10).bytes == bytes


def test_few_rows_stay_in_the_cache_and_many_exceed_it() -> None:
    few, many, most = (Case("rms_norm_quant", "token", 4096, rows) for rows in (32, 1024, 16384))
    assert few.sets(50_000_000) == 1
    assert many.sets(50_000_000) == 12
    assert many.sets(50_000_000) * many.bytes > 150_000_000
    assert most.sets(50_000_000) == 1
    assert few.calls(1, 4e12) == ops.GRAPH_CALLS
    assert many.calls(12, 4e12) % 12 == 0
    assert most.calls(1, 4e12) * most.bytes / 4e12 == pytest.approx(ops.GRAPH_TIME, rel=0.1)
    assert replace(most, rows=1 << 21).calls(1, 4e12) == 1


@pytest.mark.parametrize(
    ("family", "variant", "fp8"),
    [
        *((*each, torch.float8_e4m3fn) for each in ops.VARIANTS),
        ("rms_norm_quant", "add+token", torch.float8_e4m3fnuz),
        ("act_mul_quant", "packed+token", torch.float8_e4m3fnuz),
    ],
)
def test_the_arguments_fit_the_op(family: str, variant: str, fp8: torch.dtype) -> None:
    """The op takes them, its reference gives what its shape function says, and Dynamo traces both in one graph."""
    case = Case(family, variant, 256, 3)
    arguments = case.arguments("cpu", fp8)
    assert list(arguments) == list(case.op.arguments)
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    fused, reference = ops.functions(case.op, arguments, "reference")
    specs = case.op.shape(**arguments)
    for function in (fused, reference):
        given: Any = torch.compile(function, backend="eager", fullgraph=True, dynamic=False)(*tensors)
        outputs = ops.outputs(given)
        for name, output in zip(case.op.outputs, outputs, strict=True):
            assert (tuple(output.shape), output.dtype) == (tuple(specs[name][0]), specs[name][1])


def test_different_results_are_not_compared() -> None:
    case = Case("rms_norm_quant", "token", 256, 3)
    result = case.op.reference(**case.arguments("cpu"))
    codes, scale = result["q"], result["scale"]
    flipped = (codes.view(torch.uint8) ^ 128).view(codes.dtype)
    with pytest.raises(Refused, match=r"q: \d+ codes apart"):
        ops.verify(case.op, (codes, scale), (flipped, scale))
    with pytest.raises(Refused, match="scale: more than"):
        ops.verify(case.op, (codes, scale), (codes, scale * 2))
    with pytest.raises(Refused, match="scale is torch"):
        ops.verify(case.op, (codes, scale), (codes, scale.double()))


# ---- bench model -------------------------------------------------------------------------------------------------


def test_workloads() -> None:
    assert [(w.batch, w.length) for w in map(model.Workload.parse, model.WORKLOADS)] == [
        (1, 1),
        (32, 1),
        (128, 1),
        (1, 2048),
        (1, 16384),
    ]


def test_the_model_is_one_graph_and_all_of_it_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    models.need_scaled_rows()
    monkeypatch.setattr(torchao.quantization.quant_api, "_check_hardware_support", lambda granularity: None)
    oracle = aiter_fusion.Backend(strict=True).oracle()
    seen = []

    def eager(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(graph)
        return graph

    with torch.no_grad():
        llama = model.build(model.Sizes(512, 1024, 1), "cpu")
        # two backends of one module, called in turn, as the benchmark does
        ours, other = model.compiled(llama, oracle), model.compiled(llama, eager)
        for tokens in (torch.tensor([[1], [2]]), torch.tensor([[1, 2, 3]])):
            for call in (ours, other, ours, other):
                assert call(tokens).shape == (*tokens.shape, model.VOCABULARY)
    assert len(oracle.graphs) == len(seen) == 2
    assert oracle.identical
    assert [graph.calls for graph in oracle.graphs] == [2, 2]
    both = {"rms_norm_quant": 3, "fp8_linear": 5, "act_mul_quant": 1}
    decode, prefill = (graph.report.replaced for graph in oracle.graphs)
    assert (decode, prefill) == ({**both, "decode_attention": 1}, both)


def test_nothing_replaced_is_no_comparison() -> None:
    site = Site("rms_norm_quant", "token", "", "", SKIPPED, "no_kernel: triton: PyTorch sees no GPU", "layers.0")
    with pytest.raises(Refused, match=r"decode-1: nothing was replaced.* no_kernel: triton"):
        model.check(model.Workload.parse("decode-1"), FusionReport((site,)))
    with pytest.raises(Refused, match="level 0: plain Inductor"):
        model.check(model.Workload.parse("decode-1"), FusionReport(note="level 0: plain Inductor"))
    model.check(model.Workload.parse("decode-1"), FusionReport((replace(site, status=REPLACED, reason=""),)))


@pytest.mark.parametrize("host", [None, model.Pair(500.0, 400.0)], ids=["", "host"])
def test_the_table_of_a_model(host: model.Pair | None) -> None:
    row = model.Row(
        workload="decode-1",
        replaced={"rms_norm_quant": 16, "act_mul_quant": 8},
        skipped=0,
        gpu_us=model.Pair(450.0, 500.0),
        wall_us=model.Pair(480.0, 600.0),
        captured=host is None,
        kernels=model.Pair(120.0, 136.0),
        peak_bytes=model.Pair(2.5e9, 2.75e9),
        difference=0.012,
        host_us=host,
    )
    result = model.Result(RESULT.conditions, model.Sizes(), (row,), 60.0)
    lines = str(result).splitlines()
    (line,) = (line for line in lines if line.startswith("decode-1"))
    star = "" if host is None else "*"
    cells = ["450.0", "500.0", "0.900", f"480.0{star}", f"600.0{star}", "0.800", "120", "136", "2.500", "2.750"]
    cells += [] if host is None else ["500.0", "400.0", "1.250"]
    assert line.split()[1:] == ["rms_norm_quant", "16,", "act_mul_quant", "8", "0", *cells, "1.2e-02"]
    assert ("host us" in str(result)) == (host is not None)
    assert lines[-1].startswith("*") == (host is not None)
    assert json.loads(result.to_json())["rows"][0]["gpu_us"] == {"ours": 450.0, "inductor": 500.0}
