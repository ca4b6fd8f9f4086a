"""``run`` and ``explain`` leave a program's output, arguments and exit status as they are, and report beside them."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import aiter_fusion
from aiter_fusion import backend, cli, config
from aiter_fusion.journal import keep
from aiter_fusion.report import SKIPPED, FusionReport, Site
from aiter_fusion.run import default_backend, run_script
from support.command import fails, run
from support.scripts import TESTS

MODEL = f"""
import sys
import torch
sys.path.append({str(TESTS)!r})
from support import cases

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
    for name in ("LEVEL", "PROVIDER", "DISABLE"):  # empty is not set; so that what options set is undone too
        monkeypatch.setenv(f"AITER_FUSION_{name}", "")
    monkeypatch.chdir(tmp_path)

    def write(body: str, name: str = "script.py") -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
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
    """Standard output is the script's alone."""
    name = script(SCRIPT)
    before = (torch.compile, sys.argv, list(sys.path))
    counts = ("--expect", "rms_norm_quant=4", "--expect", "act_mul_quant=0")
    status, out, err = run("run", "--json", *counts, name, "0", capsys=capsys)
    assert status == 1
    assert "error: expected rms_norm_quant=4, found rms_norm_quant=1, act_mul_quant=0" in err
    assert out == "__main__ ['0'] torch.float8_e4m3fn\n"
    (line,) = (line for line in err.splitlines() if line.startswith("{"))
    assert json.loads(line)["replaced"] == {"rms_norm_quant": 1}
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
by_name = torch.compile(lambda x: x + 5, backend="aiter_fusion", options={"max_autotune": False})
for call in (decorated, with_arguments, module, named, torch.compile(lambda x: x + 4, mode="default"), by_name):
    call(torch.ones(3))
assert len(seen) == 1
"""


def test_every_way_to_compile(script) -> None:
    """All but another backend that the script names."""
    graphs = []
    original = torch.compile
    with default_backend(lambda graph, inputs, **_: graphs.append(graph) or graph):
        assert run_script(script(COMPILES), []) == 0
    assert len(graphs) == 5
    assert torch.compile is original


def test_options_of_the_scripts_own(script) -> None:
    """They go to the backend of that name, which they describe."""
    body = """
    import torch
    with torch.no_grad():
        torch.compile(lambda x: x.t(), backend="aiter_fusion", options={"level": 0})(torch.ones(2, 3))
    """
    with default_backend(lambda graph, inputs, **_: pytest.fail("another backend was called")):
        assert run_script(script(body), []) == 0
    assert [made.note for made in aiter_fusion.reports()] == ["level 0: plain Inductor"]


def test_every_option(script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They describe the backend; three are preferences too, which hold where another backend object is made."""
    made = []
    original = default_backend
    monkeypatch.setattr("aiter_fusion.run.default_backend", lambda backend: made.append(backend) or original(backend))
    monkeypatch.setenv("AITER_FUSION_DISABLE", "fp8_linear")
    options = ["-O1", "--provider", "reference", "--numerics", "kernel", "--strict", "--verify"]
    options += ["--disable", "rms_norm_quant", "--enable", "act_mul_quant", "--enable", "all_reduce_rms_norm"]
    body = "import os; print([os.environ[f'AITER_FUSION_{n}'] for n in ('LEVEL', 'PROVIDER', 'DISABLE')])"
    status, out, _ = run("run", *options, script(body), capsys=capsys)
    assert (status, out) == (0, "['1', 'reference', 'fp8_linear,rms_norm_quant']\n")
    (backend,) = made
    assert backend.options == config.options(
        level=1,
        provider="reference",
        numerics="kernel",
        strict=True,
        verify=True,
        disable="rms_norm_quant",
        enable=["act_mul_quant", "all_reduce_rms_norm"],
    )


MODULE = """
import os, sys
from . import name
print(__name__, __spec__.name, name, os.path.relpath(sys.argv[0]), sys.argv[1:], sys.path[0] == os.getcwd())
sys.exit(3)
"""


@pytest.mark.parametrize("module", ["package.part", "package"])
def test_a_module(module: str, script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``python -m`` runs it: a package is run by its ``__main__``, and what follows is its own."""
    script("name = 'a package'", "package/__init__.py")
    script(MODULE, "package/part.py")
    script(MODULE, "package/__main__.py")
    before = sys.path[:]
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    status, out, err = run("run", "-O0", "-m", module, "-O1", "--", "--json", capsys=capsys)
    name = "package.part" if module == "package.part" else "package.__main__"
    file = f"package/{name.partition('.')[2]}.py"
    assert out == f"__main__ {name} a package {file} ['-O1', '--', '--json'] True\n"
    assert status == 3, err
    assert sys.path == before


def test_a_module_that_fails(script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script("import no_such_module", "imports.py")
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    status, _, err = run("run", "-m", "imports", capsys=capsys)
    assert status == 1
    assert 'imports.py", line 1, in <module>\n' in err
    assert "ModuleNotFoundError: No module named 'no_such_module'\n" in err
    assert "runpy" not in err


def test_without_standard_error(script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be said there is not said in the script's output."""
    monkeypatch.setattr(sys, "stderr", None)
    command = ["run", "--expect", "rms_norm_quant=1", script("import sys; print('hello'); sys.exit('problem')")]
    assert cli.main(command) == 1
    assert capsys.readouterr().out == "hello\n"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("import sys; sys.exit()", 0, ""),
        ("import sys; sys.exit('enough')", 1, "enough\n"),
        ("def f():\n    return 1 / 0\nf()", 1, 'script.py", line 3, in <module>\n'),
        ("def f(:", 1, "SyntaxError"),
        ("raise KeyboardInterrupt", 130, 'script.py", line 1, in <module>\n'),
    ],
)
def test_how_a_script_ends(body: str, status: int, said: str, script, capsys: pytest.CaptureFixture[str]) -> None:
    got, _, err = run("run", script(body), capsys=capsys)
    assert got == status
    assert said in err
    assert "the script called nothing that torch.compile" in err
    assert "runpy" not in err
    assert "aiter_fusion/run.py" not in err


def test_the_whole_traceback(script, capsys: pytest.CaptureFixture[str]) -> None:
    assert "runpy" in run("run", "--debug", script("1 / 0"), capsys=capsys)[2]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["run"], "error: the following arguments are required: script (see"),
        (["run", "-m", "no_such_module"], "error: ImportError: No module named no_such_module"),
        (["run", "--provider", "cuda", "x.py"], "invalid choice: 'cuda'"),
        (["run", "--provider", "triton", "x.py"], "provider='triton' cannot run here: "),
        (["run", "--disable", "fp8_linear", "--enable", "fp8_linear", "x.py"], "in both 'enable' and 'disable'"),
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


def test_strict_shows_what_was_skipped(
    script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script("def build(): return len, ([],)", "strict_models.py")
    monkeypatch.setattr(sys, "path", sys.path[:])

    def explained(*_: object, strict: bool, **__: object) -> None:
        assert strict
        made = FusionReport((Site("rms_norm_quant", "token", "", "", SKIPPED, "level: no", "layers.0"),), 1)
        error = backend.FusionError(f"strict: 1 sites were skipped\n{keep(made)}")
        raise BackendCompilerFailed(lambda: None, error, None)

    monkeypatch.setattr(backend, "explain", explained)
    status, out, err = run("explain", "--strict", "strict_models:build", capsys=capsys)
    assert status == 1
    assert "layers.0" in out
    assert err.splitlines()[-1] == "aiter-fusion: error: strict: 1 sites were skipped"
