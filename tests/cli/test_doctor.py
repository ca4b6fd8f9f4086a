"""``doctor`` tries every op and says what came of it, whatever a call does to the process that makes it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aiter_fusion.cli import doctor
from aiter_fusion.doctor import examine as examining
from aiter_fusion.doctor.calls import AGREES, FAILED, GRANULARITIES, Case, arguments, attempt, cases, choose, nearness
from aiter_fusion.doctor.examine import examine, ranks
from aiter_fusion.doctor.team import Failed, Team, cause, public
from aiter_fusion.op import FusedOp
from aiter_fusion.providers import PROVIDERS
from aiter_fusion.registry import REGISTRY
from support import mishaps
from support.command import run

STATIC = Case("act_mul_quant", ("static",))


class Here:
    """A team of this process."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world = world

    def ask(self, function: Callable[..., Any], *given: Any) -> list[Any]:
        try:
            return [function(*given)]
        except Exception as error:
            raise Failed(cause(error)) from error

    def close(self) -> None:
        pass


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examining, "Team", Here)


@pytest.fixture
def broken(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Callable[[FusedOp, dict[str, Tensor]], dict[str, Tensor]]], None]:
    """Let the reference's results of the static quantiser be what a function makes of them."""

    def install(change: Callable[[FusedOp, dict[str, Tensor]], dict[str, Tensor]]) -> None:
        def run(op: FusedOp) -> Callable[..., dict[str, Tensor]]:
            if op.features != {"static"}:
                return op.reference
            return lambda **given: change(op, op.reference(**given))

        monkeypatch.setitem(PROVIDERS, "reference", replace(PROVIDERS["reference"], run=run))

    return install


def rows_of(report: str) -> dict[str, list[str]]:
    """The rows of the table of calls, by variant."""
    lines = report.partition("\nCalls\n")[2].splitlines()
    return {" ".join(line.split()[:2]): line.split() for line in lines if line.startswith("act_mul_quant")}


# ---- The command -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own; the file has what was printed, and says nothing of who wrote it."""
    path = tmp_path / "report.md"
    status, out, err = run("doctor", "--only", "act_mul_quant packed+static", "--output", str(path), capsys=capsys)
    assert (status, err) == (0, "")
    assert rows_of(out)["act_mul_quant packed+static"][2:4] == ["reference", "yes"]
    assert out.count("agrees  same bits") == 2
    assert "agrees: replaced 1 of 1 sites (rms_norm_quant 1)" in out
    assert "cannot run: AITER needs a ROCm build of PyTorch" in out
    assert "2 of 2 calls that graphs take agree with the reference; " in out.splitlines()[-1]
    assert path.read_text().startswith("# aiter-fusion doctor\n\n## Machine\n\n| name")
    assert "| act_mul_quant | packed+static+value | reference | yes   |" in path.read_text()
    for text in (out, path.read_text()):
        assert str(Path.home()) not in text
        assert str(tmp_path) not in text


@pytest.mark.gpu
@pytest.mark.skipif(PROVIDERS["triton"].missing() is not None, reason="needs a GPU and Triton")
def test_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """All ops, by all providers that can run."""
    status, out, _ = run("doctor", capsys=capsys)
    assert status == 0, out
    assert "Triton compiles for" in out


@pytest.mark.usefixtures("here")
def test_an_op_that_fails(broken: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its row has the cause, the others go on, and the exit status is 1."""

    def fail(op: FusedOp, made: dict[str, Tensor]) -> dict[str, Tensor]:
        raise ValueError("no such kernel in /opt/somewhere/kernels.so\nand more")

    broken(fail)
    path = tmp_path / "report.txt"
    status, out, _ = run("doctor", "--only", "act_mul_quant static", "--output", str(path), capsys=capsys)
    assert status == 1
    rows = rows_of(out)
    assert " ".join(rows["act_mul_quant static"][2:]) == (
        "reference yes failed ValueError: no such kernel in .../kernels.so"
    )
    assert rows["act_mul_quant static+value"][-3:] == ["agrees", "same", "bits"]
    assert "1 of 2 calls that graphs take agree" in out
    assert path.read_text() == out


@pytest.mark.usefixtures("here")
def test_an_op_that_is_wrong(
    broken: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where graphs do not take it, that is no failure of this machine's."""
    broken(lambda op, made: {name: tensor.roll(1) for name, tensor in made.items()})
    status, out, _ = run("doctor", "--only", "act_mul_quant static", capsys=capsys)
    assert status == 1
    assert "differs  q: not bit-identical" in out
    monkeypatch.setenv("AITER_FUSION_DISABLE", "act_mul_quant")
    status, out, _ = run("doctor", "--only", "act_mul_quant static", capsys=capsys)
    assert status == 0
    assert rows_of(out)["act_mul_quant static"][3] == "no"
    assert "act_mul_quant static, act_mul_quant static+value  disabled: act_mul_quant is in 'disable'" in out
    assert "0 of 0 calls that graphs take agree with the reference, 1 of 2 others; " in out
    assert "preferred disable" in out


@pytest.mark.usefixtures("here")
def test_a_call_that_cannot_be_prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody knows who would take it, so it counts."""
    op = STATIC.op

    def out_of_memory(setting: Any) -> dict[str, Any]:
        raise MemoryError

    monkeypatch.setitem(REGISTRY.ops, op.key, replace(op, typical=out_of_memory))
    found = examine([STATIC], tmp_path, lambda what: None)
    assert [(row.provider, row.outcome.status, row.outcome.said) for row in found.rows] == [("", FAILED, "MemoryError")]
    assert not found.is_well


@pytest.mark.usefixtures("here")
def test_all_reduces_need_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, expected in ((1, 0), (2, 2), (3, 2), (8, 8), (16, 8)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert ranks()[0] == expected
    monkeypatch.setattr(examining, "ranks", lambda: (0, "its ranks need 2, 4, 8 GPUs, and PyTorch sees 1"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    case = Case("all_reduce_rms_norm", ("add",))
    found = examine([case], tmp_path, lambda what: None)
    assert found.untried == ((case, "its ranks need 2, 4, 8 GPUs, and PyTorch sees 1"),)
    assert not found.rows


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with doctor._progress(2) as tell:
        tell("the backend")
        tell("fp8_linear")
    assert "fp8_linear" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()


# ---- Calls -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_every_op_is_called() -> None:
    """Once, and those of a family that compute scales with every granularity among them."""
    called = cases()
    assert [case.op.key for case in called] == list(REGISTRY.ops)
    assert all(list(arguments(case)) == list(case.op.arguments) for case in called)
    assert len(set(map(str, called))) == len(called)
    scales = {case.granularity for case in called if case.family == "rms_norm_quant"}
    assert scales == {*GRANULARITIES, ""}
    assert {str(case) for case in cases("act_mul_quant packed+static")} == {
        "act_mul_quant packed+static",
        "act_mul_quant packed+static+value",
    }


@pytest.mark.usefixtures("alone")
def test_a_collective() -> None:
    case = Case("all_reduce_rms_norm", ("add",))
    assert "reference" in choose(case).able
    assert attempt(case, "reference").status == AGREES


def test_nearness() -> None:
    q = torch.tensor([1.0, 2.0, 3.0, 4.0]).to(torch.float8_e4m3fn)
    other = (q.view(torch.uint8) + torch.tensor([0, 1, 0, 0], dtype=torch.uint8)).view(q.dtype)
    want: Mapping[str, Tensor] = {"q": q, "scale": torch.tensor([1.0, 0.0])}
    assert nearness(want, {"q": other, "scale": torch.tensor([1.0, 1e-3])}) == (
        "1 of 4 codes differ, by 1; scale is 1e-03 apart"
    )
    assert nearness(want, want) == "same bits"


# ---- Processes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def team(tmp_path: Path) -> Iterator[Team]:
    made = Team(1, tmp_path)
    yield made
    made.close()


def test_a_team_survives_its_members(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception ends nothing, what kills a process costs that process, and so does what takes too long."""
    with pytest.raises(Failed) as failed:
        team.ask(mishaps.fail)
    assert str(failed.value) == "ValueError: y is no pointer (.../x.py:3:5: error: failed to legalize operation)"
    (process,) = team._processes
    assert team.ask(mishaps.answer) == ["well"]
    assert team._processes == [process]
    with pytest.raises(Failed, match=r"^the process died, signal SIGABRT: Memory .* GPU node-1, in \.\.\./x\.so$"):
        team.ask(mishaps.abort)
    assert team.ask(mishaps.answer) == ["well"]
    team._processes[0].kill()  # between two calls
    team._processes[0].join()
    with pytest.raises(Failed, match=r"^the process died, signal SIGKILL"):
        team.ask(mishaps.answer)
    team.ask(mishaps.answer)
    monkeypatch.setattr(team, "_patience", 0.5)
    with pytest.raises(Failed, match=r"^no answer within 0\.5 s$"):
        team.ask(mishaps.wait)
    assert not team._processes


def test_ranks(tmp_path: Path) -> None:
    """They are one group; of one that fails, the others are not waited for."""
    team = Team(2, tmp_path)
    try:
        assert team.ask(mishaps.number) == [20, 21]
        with pytest.raises(Failed, match=r"^rank 1: ValueError: y is no pointer"):
            team.ask(mishaps.fail_on_the_second)
        assert not team._processes
    finally:
        team.close()


def test_causes() -> None:
    with pytest.raises(RuntimeError, match="compiling failed") as raised:
        mishaps.fail()
    assert cause(raised.value) == "ValueError: y is no pointer"
    assert cause(KeyError()) == "KeyError"
    with pytest.raises(RuntimeError) as raised:
        torch.compile(lambda x: STATIC.op.target(x), fullgraph=True)(torch.ones(2))
    assert "missing value for argument 'up'" in cause(raised.value)
    assert cause(OSError("in /home/me/x/y.py\nand more")) == "OSError: in .../y.py"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/home/me/.cache/x.py:3: no", ".../x.py:3: no"),
        ("in ~/models/a b", "in .../a b"),
        ("https://pytorch.org/get-started/locally", "https://pytorch.org/get-started/locally"),
        ("sizes 3/4 and a/b/c", "sizes 3/4 and a/b/c"),
        ("'/tmp/x_me/y/z'", "'.../z'"),
    ],
)
def test_public(text: str, said: str) -> None:
    assert public(text) == said
