"""The backend does as its options say, reports what it did, and fails clearly; with real code generation and caches."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import config as inductor_config

import aiter_fusion
from aiter_fusion import backend, config, machine
from aiter_fusion.passes import identity, recognise
from aiter_fusion.passes.manager import PassManager, compose
from aiter_fusion.passes.verify import MismatchError
from aiter_fusion.report import FusionReport
from support import cases
from support.checked import checked
from support.one_site import UserPass, inputs, site
from support.scripts import SCRIPT, run_script

BF16 = torch.bfloat16


def compiled(fn=site, names: tuple[str, ...] = ("x", "w"), **kwargs) -> FusionReport:
    """Compile by name, call once, return the report."""
    aiter_fusion.reset()
    with torch.no_grad():
        torch.compile(fn, backend=kwargs.pop("backend", "aiter_fusion"), **kwargs)(*inputs(*names))
    (made,) = aiter_fusion.reports()
    return made


def test_by_name() -> None:
    with torch.no_grad():
        q, scale = torch.compile(site, backend="aiter_fusion")(*inputs())
        eager = site(*inputs())
    (made,) = aiter_fusion.reports()
    assert made.replaced == {"rms_norm_quant": 1}
    assert made.sites[0].op == "aiter_fusion::rms_norm_quant"
    assert made.sites[0].provider == "reference"
    assert not made.from_cache
    assert made.milliseconds > 0
    assert torch.equal(q.view(torch.uint8), eager[0].view(torch.uint8))
    assert torch.equal(scale, eager[1])
    aiter_fusion.reset()
    assert aiter_fusion.reports() == []


def test_as_an_object_and_with_inductors_options() -> None:
    assert compiled(backend=aiter_fusion.Backend(strict=True), mode="default").replaced == {"rms_norm_quant": 1}
    torch._dynamo.reset()
    assert compiled(options={"level": 3, "mode": "max-autotune-no-cudagraphs", "epilogue_fusion": False}).replaced
    torch._dynamo.reset()
    assert compiled(mode="max-autotune-no-cudagraphs").replaced
    torch._dynamo.reset()
    assert compiled(backend=aiter_fusion.Backend(), options={"max_autotune": False}).replaced


def test_explain() -> None:
    def two_graphs(x: Tensor, w: Tensor) -> Tensor:
        q, _ = site(x, w)
        torch._dynamo.graph_break()
        return cases.q3(cases.llama(q.to(BF16), w))[0]

    made = aiter_fusion.explain(two_graphs, inputs(), disable=["act_mul_quant"])
    assert made.replaced == {"rms_norm_quant": 2}
    assert len(aiter_fusion.reports()) == 2


def test_explain_a_module_in_training_mode() -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(cases.H, dtype=BF16))

        def forward(self, x: Tensor) -> Tensor:
            q, scale = site(x, self.weight)
            return q.float().sum() + scale.sum()

    x, _ = inputs()
    made = aiter_fusion.explain(Module(), (x,))
    assert [s.reason.split(":")[0] for s in made.skipped] == ["training"]
    torch._dynamo.reset()
    assert aiter_fusion.explain(Module().eval(), (x,)).replaced == {"rms_norm_quant": 1}


# ---- levels and preferences ----------------------------------------------------------------------------------

VALUE = cases.FUSION["norm_value"].call(cases.llama, cases.q3)
GEMMA = cases.FUSION["norm"].call(cases.gemma, cases.q3)


@pytest.mark.parametrize(("fn", "first_level"), [(site, 1), (VALUE, 2), (GEMMA, 2)], ids=["plain", "value", "gemma"])
def test_levels(fn, first_level: int) -> None:
    for level in (1, 2, 3):
        made = checked_report(fn, level=level)
        assert bool(made.replaced) == (level >= first_level)
        if not made.replaced:
            assert [s.reason for s in made.skipped] == [f"level: needs level {first_level}, this is level {level}"]
    static = cases.FUSION["norm"].call(cases.llama, cases.q2_static)
    assert checked_report(static, ("x", "w", "scale"), level=1).replaced == {}
    assert checked_report(static, ("x", "w", "scale"), level=2).replaced


def checked_report(fn, names: tuple[str, ...] = ("x", "w"), **options) -> FusionReport:
    result = checked(fn, **options)
    with torch.no_grad():
        result.call(*inputs(*names))
    assert result.oracle.identical
    return result.report


def test_level_0_is_plain_inductor() -> None:
    made = compiled(options={"level": 0})
    assert (made.replaced, made.sites, made.records) == ({}, (), 0)
    assert "level 0" in made.note


def test_enable_and_disable_win_over_the_level() -> None:
    made = checked_report(VALUE, level=1, enable=["rms_norm_quant"])
    assert made.replaced == {"rms_norm_quant": 1}
    assert compiled(options={"level": 0, "enable": ["rms_norm_quant"]}).replaced == {"rms_norm_quant": 1}
    made = checked_report(site, disable="rms_norm_quant")
    assert [s.reason for s in made.skipped] == ["disabled: rms_norm_quant is in 'disable'"]


def test_environment_is_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AITER_FUSION_LEVEL", "1")
    monkeypatch.setenv("AITER_FUSION_PROVIDER", "reference")
    monkeypatch.setenv("AITER_FUSION_DISABLE", "act_mul_quant, rms_norm_quant")
    assert config.options() == config.Options(1, "reference", disable=frozenset({"act_mul_quant", "rms_norm_quant"}))
    said = config.options(level=2, provider="auto", enable=["rms_norm_quant"])
    assert (said.level, said.provider, said.disable) == (2, "auto", frozenset({"act_mul_quant"}))
    monkeypatch.setenv("AITER_FUSION_LEVEL", " 2 ")
    monkeypatch.setenv("AITER_FUSION_PROVIDER", " Reference ")
    assert (config.options().level, config.options().provider) == (2, "reference")
    for name, value, message in (
        ("LEVEL", "high", "AITER_FUSION_LEVEL='high': levels are 0 "),
        ("LEVEL", "³", "AITER_FUSION_LEVEL='³': levels are 0 "),
        ("PROVIDER", "tritn", "AITER_FUSION_PROVIDER='tritn': no such provider; did you mean 'triton'?"),
        ("DISABLE", "rms_norm", "AITER_FUSION_DISABLE: no fusion is called 'rms_norm'; did you mean 'rms_norm_quant'?"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(f"AITER_FUSION_{name}", value)
            with pytest.raises(ValueError, match=message.replace("?", r"\?")):
                config.options()


# ---- bad input -----------------------------------------------------------------------------------------------

BAD = [
    ({"levle": 3}, "unknown option 'levle'; did you mean 'level'?"),
    ({"max_autotun": True}, "unknown option 'max_autotun'; did you mean 'max_autotune'?"),
    ({"level": 7}, "level=7: levels are 0 (nothing, as plain Inductor), 1 "),
    ({"level": True}, "level=True: levels are"),
    ({"provider": "cuda"}, "provider='cuda': no such provider"),
    ({"numerics": "fast"}, "numerics='fast': no such numerics"),
    ({"strict": "yes"}, "strict='yes': must be True or False"),
    ({"disable": ["silu"]}, "disable: no fusion is called 'silu'"),
    ({"enable": ["act_mul_quant"], "disable": ["act_mul_quant"]}, "act_mul_quant in both 'enable' and 'disable'"),
    ({"expect": {"rms": 1}}, "expect: no fusion is called 'rms'"),
    ({"expect": {"rms_norm_quant": "4"}}, "counts are whole numbers"),
    (
        {"expect": ["rms_norm_quant"]},
        "expect=['rms_norm_quant']: must map families to counts, e.g. {'rms_norm_quant': 9}",
    ),
    ({"expect": 5}, "expect=5: must map families to counts"),
    ({"disable": None}, "disable=None: must be the name of a fusion, or several. Valid: rms_norm_quant, "),
    ({"enable": 5}, "enable=5: must be the name of a fusion, or several. Valid: rms_norm_quant, "),
    ({"disable": [3]}, "disable: no fusion is called 3. Valid: rms_norm_quant, "),
    ({"provider": 5}, "provider=5: no such provider. Valid: auto, aiter, triton, reference."),
    ({"provider": ""}, "provider='': no such provider. Valid: auto, "),
    ({"numerics": True}, "numerics=True: no such numerics. Valid: exact, kernel."),
    ({3: 1}, "unknown option 3. Valid: level, provider, "),
    ({"xyz": 1}, "unknown option 'xyz'. Valid: level, provider, "),
    ({"provider": "aiter"}, "provider='aiter' cannot run here: AITER needs a ROCm build of PyTorch, and this is "),
    ({"provider": "triton"}, "provider='triton' cannot run here: "),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_options(options: dict, message: str) -> None:
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as raised:
        torch.compile(site, backend="aiter_fusion", options=options)(*inputs())
    assert message in str(raised.value)
    if set(options) <= set(config.NAMES):
        with pytest.raises((ValueError, RuntimeError)) as raised_early:
            aiter_fusion.Backend(**options)
        assert message in str(raised_early.value)


def test_our_options_do_not_go_to_an_object() -> None:
    with torch.no_grad(), pytest.raises(Exception, match=r"give level to aiter_fusion.Backend\(...\), not to options="):
        torch.compile(site, backend=aiter_fusion.Backend(), options={"level": 1})(*inputs())


def test_old_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    with pytest.raises(RuntimeError, match=r"needs torch >= 2.11, found 2.10.1\+cpu: pip install --upgrade"):
        aiter_fusion.Backend()
    machine.require_torch("2.11.0a0+git123")


def test_newer_torch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One warning a process, and everything works."""
    assert machine.why_untested("2.15.3+rocm7") is None
    assert machine.why_untested("2.9.1") is None
    monkeypatch.setattr(backend, "_warned", {backend.SLOW})
    monkeypatch.setattr(torch, "__version__", "2.16.0.dev20261121+cpu")
    with caplog.at_level(logging.INFO, logger="aiter_fusion"):
        for _ in range(2):
            assert checked_report(site, verify=True).replaced == {"rms_norm_quant": 1}
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("aiter_fusion: torch 2.16.0.dev20261121+cpu is newer than those that ")
    for part in ("2.11 to 2.15", "verify=True", "issue tracker"):
        assert part in warning
    assert "\n" not in warning


@pytest.mark.parametrize("name", ["passes", "patterns"])
def test_bare_import(name: str) -> None:
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"ImportError: use 'import aiter_fusion.{name}'" in done.stderr


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="'Backnd'; it has Backend, FusionError"):
        aiter_fusion.Backnd  # noqa: B018


# ---- strict, expect, verify, exceptions ----------------------------------------------------------------------


def test_expect() -> None:
    assert compiled(options={"expect": {"rms_norm_quant": 1, "act_mul_quant": 0}}).replaced
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"expected {'rms_norm_quant': 4}, replaced {'rms_norm_quant': 1}"):
        compiled(options={"expect": {"rms_norm_quant": 4}})


def test_an_exception_outside_sites_leaves_the_graph_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["aiter_fusion.passes.plan"], "writes_of", broken)
    made = checked_report(site)
    assert made.sites == ()
    assert made.note == "the graph is left as it was: ZeroDivisionError: a bug in the matcher"


def test_strict() -> None:
    with pytest.raises(Exception, match="strict: 1 sites were skipped"):
        compiled(VALUE, options={"strict": True, "level": 1})


def broken(*_: object) -> None:
    raise ZeroDivisionError("a bug in the matcher")


@pytest.mark.parametrize("where", ["recognise", "plan"])
def test_an_exception_leaves_the_graph_unchanged(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["aiter_fusion.passes.layout"] if where == "plan" else recognise
    monkeypatch.setattr(module, "_fit" if where == "plan" else "_first", broken)
    result = checked(site)
    with torch.no_grad():
        result.call(*inputs())
    graphs = result.oracle.graphs[0]
    assert str(graphs.before.graph) == str(graphs.after.graph)
    assert {site.reason for site in result.report.sites} == {"error: ZeroDivisionError: a bug in the matcher"}
    assert result.report.replaced == {}
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="a bug in the matcher"):
        torch.compile(site, backend="aiter_fusion", options={"strict": True})(*inputs())


def test_verify_on_overlapping_and_unknown_sizes() -> None:
    def expanded(v: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return cases.q3(cases.llama(v.expand(4, cases.H), w))

    result = checked(expanded, verify=True)
    with torch.no_grad():
        result.call(*cases.tensors(("x", "w"), (1,), BF16, "normal"))
    assert result.oracle.identical
    assert result.report.replaced

    def selected(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return cases.q3(cases.llama(x[x[:, 0] > 0], w))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        result = checked(selected, verify=True)
        with torch.no_grad():
            result.call(*inputs())
    assert result.oracle.identical
    if result.report.replaced:
        assert "was not verified: its sizes are known only at run time" in result.report.note


def test_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    assert compiled(options={"verify": True}).replaced
    torch._dynamo.reset()
    state = torch.get_rng_state()
    assert checked_report(site, verify=True).replaced
    assert torch.equal(state, torch.get_rng_state())
    from aiter_fusion.stages import norm

    right = norm.rms_norm
    monkeypatch.setattr(norm, "rms_norm", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    with (
        torch.no_grad(),
        pytest.raises(Exception, match=r"rms_norm_quant token at the top level: .*not bit-identical") as raised,
    ):
        checked(site, verify=True).call(*inputs())
    assert "Mismatch" in repr(raised.value) or isinstance(raised.value, MismatchError)


# ---- the pass in Inductor ------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["options", "config"])
def test_the_users_own_pass_still_runs(route: str) -> None:
    UserPass.calls = 0
    own = UserPass()
    if route == "options":
        made = compiled(options={"post_grad_custom_pre_pass": own})
    else:
        with inductor_config.patch(post_grad_custom_pre_pass=own):
            made = compiled()
            assert inductor_config.post_grad_custom_pre_pass is own
    assert made.replaced == {"rms_norm_quant": 1}
    assert UserPass.calls == 1
    assert inductor_config.post_grad_custom_pre_pass is None


def test_warmup_compiles_everything_once() -> None:
    """Afterwards nothing is left to compile; arguments are given by position or by name."""
    call = torch.compile(cases.q3, backend=aiter_fusion.Backend(provider="reference"), dynamic=False)
    inputs = [torch.randn(rows, 256, dtype=torch.bfloat16) for rows in (2, 5)]
    with torch.no_grad():
        made = aiter_fusion.warmup(call, [(inputs[0],), {"y": inputs[1]}])
        assert len(made.bare) == 2
        known = len(aiter_fusion.reports())
        call(inputs[0])
        call(y=inputs[1])
    assert len(aiter_fusion.reports()) == known


def test_nothing_is_compiled_while_a_cuda_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    backend = aiter_fusion.Backend(provider="reference")
    with pytest.raises(RuntimeError, match=r"aiter_fusion.warmup\(model, inputs\)"):
        backend(torch.fx.symbolic_trace(lambda x: x + 1), [torch.ones(2)])
    with pytest.raises(RuntimeError, match="too late"):
        aiter_fusion.warmup(lambda: None, [()])


def test_uuid() -> None:
    def uuid(user_pass=None, **options):
        return compose(user_pass, config.options(**options)).uuid()

    assert uuid() == uuid()
    different = [uuid(), uuid(level=1), uuid(disable="rms_norm_quant"), uuid(UserPass()), uuid(UserPass("user 2"))]
    assert len({repr(u) for u in different}) == len(different)
    assert uuid(UserPass(None)) is None
    assert uuid(lambda graph: None) is None
    pickle.dumps(uuid())


def test_uuid_sees_all_three_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read.append(self.as_posix()) or original(self))
    identity.source_hash.cache_clear()
    identity.source_hash()
    for name in ("aiter_fusion/backend.py", "passes/plan.py", "patterns/fp8_quant.py"):
        assert sum(path.endswith(name) for path in read) == 1, name


def test_pickle_and_deepcopy() -> None:
    made = PassManager(config.options(level=2, disable="act_mul_quant"))
    for copied in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert copied == made
        assert copied.uuid() == made.uuid()


def test_a_second_process_reports_the_same_from_the_cache(tmp_path: Path) -> None:
    """And a plain script shows the line, without any logging set up."""
    first, second = (run_script(SCRIPT, tmp_path) for _ in range(2))
    cold, warm = json.loads(first.stdout), json.loads(second.stdout)
    assert (cold["from_cache"], warm["from_cache"]) == (False, True)
    assert warm["sites"] == cold["sites"]
    assert warm["replaced"] == cold["replaced"] == {"rms_norm_quant": 1}
    assert warm["unaccounted"] == 0
    line = "aiter_fusion: replaced 1 of 1 sites (rms_norm_quant 1); 0 skipped; 0 bare; provider reference; "
    assert line in first.stderr
    assert line + "from cache" in second.stderr
    assert first.stderr.count("good for checking, but slower") == 1


@pytest.mark.slow  # test_uuid has the key of every option
def test_a_second_process_with_another_option(tmp_path: Path) -> None:
    run_script(SCRIPT, tmp_path)
    third = run_script(SCRIPT, tmp_path, AITER_FUSION_LEVEL="1")
    assert json.loads(third.stdout)["from_cache"] is False, "another option must not reuse the code"
    assert "WARNING" not in third.stderr
    assert "reasons: level: needs level 2, this is level 1 (1)" in third.stderr


@pytest.mark.parametrize(("wanted", "lowest"), [("ERROR", logging.ERROR), ("debug", logging.DEBUG), ("", None)])
def test_log_levels(
    wanted: str, lowest: int | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The environment says what is shown; if it does not, the program's own logging, which here is pytest's."""
    monkeypatch.setenv("AITER_FUSION_LOG", wanted)
    caplog.set_level(logging.WARNING)
    caplog.handler.setLevel(logging.NOTSET)
    compiled(VALUE)
    logger = logging.getLogger("aiter_fusion")
    assert (logger.level, logger.handlers) == (lowest or logging.NOTSET, [])
    lines = [record.getMessage() for record in caplog.records if record.name == "aiter_fusion"]
    detail = "aiter_fusion: replaced rms_norm_quant token+value at ?: aiter_fusion::rms_norm_quant.value (reference)"
    assert (detail in lines) == (lowest == logging.DEBUG)
    assert any("replaced 1 of 1" in line for line in lines) == (lowest == logging.DEBUG)


def test_from_cache_after_a_backward_pass() -> None:
    """Inductor compiles the backward graph later, outside any call of the backend."""
    w = torch.randn(4, requires_grad=True)
    for cached in (False, True):
        torch._dynamo.reset()
        aiter_fusion.reset()
        torch.compile(lambda w: (w * w).sin().sum(), backend="aiter_fusion")(w).backward()
        (made,) = aiter_fusion.reports()
        assert made.from_cache is cached
        assert "training graph" in made.note


def test_the_line_goes_through_the_programs_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="aiter_fusion"):
        compiled()
    lines = [r.getMessage() for r in caplog.records if r.name == "aiter_fusion" and r.levelno == logging.INFO]
    assert len(lines) == 1
    assert lines[0].startswith("aiter_fusion: replaced 1 of 1 sites (rms_norm_quant 1); 0 skipped; 0 bare; ")


def test_report_text_and_json() -> None:
    made = checked_report(cases._value(cases.llama, lambda y: (*cases.q3(y), *cases.q7(64)(y))))
    text = str(made)
    assert "replaced 1 of 2 sites" in text
    assert "starved" in text
    assert "0 unaccounted for" in text
    content = json.loads(made.to_json())
    assert content["replaced"] == {"rms_norm_quant": 1}
    assert {s["status"] for s in content["sites"]} == {"replaced", "skipped"}
