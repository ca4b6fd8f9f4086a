"""The commands ``run`` and ``explain``."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from test_cli import fails, run

import aiter_fusion
from aiter_fusion import cli
from aiter_fusion.report import SKIPPED, FusionReport, Site
from aiter_fusion.run import default_backend, run_script

TESTS = Path(__file__).parent

MODEL = f"""
import sys
import torch
sys.path.append({str(TESTS)!r})
import cases

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(cases.H, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x):
        return cases.q3(cases.llama(x, self.weight))

def build():
    return Block().eval(), (torch.ones(4, cases.H, dtype=torch.bfloat16),)
"""

# An unmodified script: what it prints, its arguments and how it ends are its own.
SCRIPT = (
    MODEL
    + """
model, inputs = build()
compiled = torch.compile(model)
with torch.no_grad():
    q, scale = compiled(*inputs)
print(__name__, sys.argv[1:], q.dtype)
sys.exit(int(sys.argv[1]))
"""
)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a script; what running it changes of this process is undone."""
    monkeypatch.setenv("AITER_FUSION_LEVEL", "3")  # so that what -O sets is undone too
    monkeypatch.chdir(tmp_path)

    def write(body: str, name: str = "script.py") -> str:
        (tmp_path / name).write_text(textwrap.dedent(body))
        return name

    return write


def test_an_unmodified_script(tmp_path: Path, script) -> None:
    """In a process of its own, with the command as it is typed; the script's own arguments look like ours."""
    name = script(SCRIPT)
    command = ["run", "-O3", "--report", "r.json", "--expect", "rms_norm_quant=1", name, "3", "-O0", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "aiter_fusion", *command], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout == "__main__ ['3', '-O0', '--json'] torch.float8_e4m3fn\n"
    assert "aiter-fusion: graphs compiled by aiter_fusion: 1\nreplaced 1 of 1 sites (rms_norm_quant 1)" in done.stderr
    assert json.loads((tmp_path / "r.json").read_text())["replaced"] == {"rms_norm_quant": 1}
    assert "\x1b" not in done.stderr


def test_expect_and_json(script, capsys: pytest.CaptureFixture[str]) -> None:
    name = script(SCRIPT)
    before = (torch.compile, sys.argv, list(sys.path))
    counts = ("--expect", "rms_norm_quant=4", "--expect", "act_mul_quant=0")
    status, out, err = run("run", "--json", *counts, name, "0", capsys=capsys)
    assert status == 1
    assert "error: expected rms_norm_quant=4, found rms_norm_quant=1, act_mul_quant=0" in err
    assert json.loads(out.splitlines()[-1])["replaced"] == {"rms_norm_quant": 1}
    assert (torch.compile, sys.argv, sys.path[: len(before[2])]) == before


def test_only_the_first_rank_reports(
    script, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank checks what was expected."""
    monkeypatch.setenv("RANK", "1")
    command = ("run", "--report", "r.json", "--expect", "rms_norm_quant=1", script("print('hello')"))
    status, out, err = run(*command, capsys=capsys)
    assert (status, out) == (1, "hello\n")
    assert err == "aiter-fusion: error: expected rms_norm_quant=1, found rms_norm_quant=0\n"
    assert not (tmp_path / "r.json").exists()


COMPILES = """
import torch

@torch.compile
def decorated(x): return x + 1

@torch.compile(dynamic=True)
def with_arguments(x): return x + 2

class Module(torch.nn.Module):
    def forward(self, x): return x * 2

module = Module()
module.compile()
seen = []
named = torch.compile(lambda x: x + 3, backend=lambda graph, inputs: seen.append(graph) or graph)
for call in (decorated, with_arguments, module, named, torch.compile(lambda x: x + 4, mode="default")):
    call(torch.ones(3))
assert len(seen) == 1
"""


def test_every_way_to_compile(script) -> None:
    """All but a backend that the script names."""
    graphs = []
    original = torch.compile
    with default_backend(lambda graph, inputs, **_: graphs.append(graph) or graph):
        assert run_script(script(COMPILES), []) == 0
    assert len(graphs) == 4
    assert torch.compile is original


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit('enough')", 1, "enough\n"),
        ("def f():\n    return 1 / 0\nf()", 1, 'script.py", line 3, in <module>\n'),
        ("def f(:", 1, "SyntaxError"),
        ("raise KeyboardInterrupt", 130, ""),
    ],
)
def test_how_a_script_ends(body: str, status: int, said: str, script, capsys: pytest.CaptureFixture[str]) -> None:
    got, _, err = run("run", script(body), capsys=capsys)
    assert got == status
    assert said in err
    assert "another backend was named" in err
    assert "runpy" not in err
    assert "aiter_fusion/run.py" not in err


def test_the_whole_traceback(script, capsys: pytest.CaptureFixture[str]) -> None:
    assert "runpy" in run("run", "--debug", script("1 / 0"), capsys=capsys)[2]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["run"], "script"),
        (["run", "no_script.py"], "there is no script no_script.py"),
        (["run", "-O4", "x.py"], "invalid choice: 4"),
        (["run", "--report", "r.txt", "x.py"], "'r.txt' ends neither in .json nor in .html"),
        (["run", "--report", "/no/folder/r.json", "x.py"], "there is no folder /no/folder"),
        (["run", "--expect", "rms=1", "x.py"], "'rms=1' is not FAMILY=N, where families are rms_norm_quant, "),
        (["run", "--expect", "rms_norm_quant", "x.py"], "is not FAMILY=N"),
        (["explain", "models"], "'models' is not MODULE:CALLABLE"),
        (["explain", "no_such_module:f"], "No module named 'no_such_module'"),
        (["explain", "json:no_such_function"], "has no attribute 'no_such_function'"),
        (["explain", "time:time"], "time:time returned float; it must return (model, args) or (model, args, kwargs)"),
    ],
)
def test_bad_options(argv: list[str], named: str, script, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in fails(*argv, capsys=capsys)


def test_explain(script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script(MODEL, "my_models.py")
    monkeypatch.setattr(sys, "path", sys.path[:])
    status, out, _ = run("explain", "-O1", "my_models:build", "--expect", "rms_norm_quant=1", capsys=capsys)
    assert status == 0
    assert out.startswith("replaced 1 of 1 sites (rms_norm_quant 1)")
    (made,) = aiter_fusion.reports()
    assert [site.family for site in made.sites] == ["rms_norm_quant"]


def test_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """For terminals only, and not where NO_COLOR is set; only status words have one."""

    class Terminal:
        def isatty(self) -> bool:
            return True

    site = Site("rms_norm_quant", "token", "", "", SKIPPED, "level: skipped by level", "layers.0")
    text = str(FusionReport((site,), 1))
    monkeypatch.delenv("NO_COLOR", raising=False)
    painted = cli._painted(text, Terminal())  # type: ignore[arg-type]
    assert painted == text.replace("\nskipped  ", "\n\x1b[33mskipped\x1b[0m  ")
    assert painted != text
    assert "\x1b[31merror:\x1b[0m" in cli._painted("aiter-fusion: error: no", Terminal())  # type: ignore[arg-type]
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli._painted(text, Terminal()) == text  # type: ignore[arg-type]
    monkeypatch.delenv("NO_COLOR")
    assert cli._painted(text, sys.__stdout__) == text or sys.__stdout__.isatty()  # type: ignore[arg-type,union-attr]
