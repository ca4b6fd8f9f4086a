"""Nothing is lost at Dynamo's limits: equal backends share what is compiled, and ``explain`` leaves no trace."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo import config as dynamo_config
from torch._dynamo import pgo

import aiter_fusion
from aiter_fusion import dynamo
from aiter_fusion.report import FusionReport
from support import cases

BF16 = torch.bfloat16
LIMIT = 2
ATTEMPTS = LIMIT + 2


@pytest.fixture(autouse=True)
def _low_limit() -> Iterator[None]:
    """Dynamo's own is 8: too many compilations for a test."""
    with dynamo_config.patch(recompile_limit=LIMIT):
        yield


class Layer(nn.Module):
    """All of it becomes one fused op: nothing is left to generate code for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(cases.tensors(("w",), (4,), BF16, "normal")[0])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return cases.q3(cases.llama(x, self.weight))


def half(x: Tensor) -> Tensor:
    y = x * 2
    torch._dynamo.graph_break()
    return y + 1


class Broken(nn.Module):
    """Two graphs of two functions each, none of them inlined."""

    def forward(self, x: Tensor) -> Tensor:
        return half(x) * 3


def x() -> Tensor:
    return cases.tensors(("x",), (4,), BF16, "normal")[0]


def entries(*functions: Callable[..., Any]) -> list[Any]:
    return [entry for fn in functions for entry in _debug_get_cache_entry_list(fn.__code__)]


class Counting:
    """Runs graphs as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return gm.forward


def facts(made: FusionReport) -> tuple[Any, ...]:
    return made.replaced, made.sites, made.records, made.note


@torch.no_grad()
def test_equal_backends_share_what_is_compiled() -> None:
    assert aiter_fusion.Backend(level=2) == aiter_fusion.Backend(level=2) != aiter_fusion.Backend(level=1)
    assert len({aiter_fusion.Backend(), aiter_fusion.Backend(), aiter_fusion.Backend(strict=True)}) == 2
    layers = [Layer() for _ in range(ATTEMPTS)]
    for layer in layers:
        layer.compile(backend=aiter_fusion.Backend())
        layer(x())
    (made,) = aiter_fusion.reports()
    assert made.replaced == {"rms_norm_quant": 1}


@torch.no_grad()
def test_explain_as_often_as_one_likes() -> None:
    """More often than Dynamo compiles a function, also under strict and expect; before and after the user compiles."""
    layer = Layer()
    options: dict[str, Any] = {"strict": True, "expect": {"rms_norm_quant": 1}}
    made = [aiter_fusion.explain(layer, (x(),), **options) for _ in range(ATTEMPTS)]
    assert {str(facts(report)) for report in made} == {str(facts(made[0]))}
    assert made[0].replaced == {"rms_norm_quant": 1}
    assert not entries(Layer.forward, cases.llama)
    aiter_fusion.reset()
    compiled = torch.compile(layer, backend="aiter_fusion")
    compiled(x())
    assert [report.replaced for report in aiter_fusion.reports()] == [{"rms_norm_quant": 1}]
    held = [entry.guard_manager for entry in entries(Layer.forward)]
    for given in (layer, compiled, layer.forward):
        assert aiter_fusion.explain(given, (x(),)).replaced == {"rms_norm_quant": 1}
    assert [entry.guard_manager for entry in entries(Layer.forward)] == held
    with dynamo_config.patch(error_on_recompile=True):
        compiled(x())


@torch.no_grad()
def test_explain_regional_compilation() -> None:
    """Layers that are compiled already are compiled anew, and stay compiled."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))

        def forward(self, x: Tensor) -> list[Tensor]:
            return [layer(x)[0] for layer in self.layers]

    model = Model()
    theirs = Counting()
    for layer in model.layers:
        layer.compile(backend=theirs)
    model(x())
    assert theirs.graphs == 1
    for _ in range(2):
        assert aiter_fusion.explain(model, (x(),)).replaced == {"rms_norm_quant": 3}
    with dynamo_config.patch(error_on_recompile=True):
        model(x())
    assert theirs.graphs == 1


@pytest.mark.parametrize("compiled_before", [False, True])
def test_a_call_leaves_no_trace(compiled_before: bool) -> None:
    """Also of functions that are not inlined, and that the user has compiled."""
    model, given = Broken(), torch.randn(4)
    theirs = Counting()
    compiled = torch.compile(model, backend=theirs)
    if compiled_before:
        compiled(given)
    learned = dict(pgo.get_code_state())
    held = [entry.guard_manager for entry in entries(half, Broken.forward)]
    dead = []
    ours = None
    for rows in [4, 5] * (ATTEMPTS // 2):
        ours = Counting()
        dead.append(weakref.ref(ours))
        assert dynamo.call_once(model, (torch.randn(rows),), {}, ours) == ""
        assert ours.graphs == 3
    del ours
    gc.collect()
    assert not any(reference() for reference in dead)
    assert pgo.get_code_state() == learned
    assert [e.guard_manager for e in entries(half, Broken.forward) if e.code is not None] == held
    before = theirs.graphs
    compiled(given)
    assert theirs.graphs == (before if compiled_before else 3)
    compiled(given.to(torch.float64))
    assert theirs.graphs == 3 * LIMIT


def test_a_call_without_graph_breaks_touches_no_function_of_the_users() -> None:
    layer = Layer()
    layer(x())
    names = set(globals()), set(vars(dynamo))
    for _ in range(2):
        dynamo.call_once(layer, (x(),), {}, Counting())
    assert (set(globals()), set(vars(dynamo))) == names
    assert not entries(Layer.forward, cases.llama, cases.q3)


def test_a_call_that_raises_leaves_no_trace() -> None:
    def fail(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        raise ZeroDivisionError

    for _ in range(ATTEMPTS):
        with pytest.raises(Exception, match="ZeroDivisionError"):
            dynamo.call_once(Broken(), (torch.randn(4),), {}, fail)
    assert not entries(half, Broken.forward)


def test_more_compilations_than_a_compiled_model_may_have() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for size in (2, 3, 4):
                x = part(x, str(size))
            return x

    def part(x: Tensor, name: str) -> Tensor:
        torch._dynamo.graph_break()
        return x + int(name)

    ours, theirs = Counting(), Counting()
    note = dynamo.call_once(Model(), (torch.randn(4),), {}, ours)
    torch.compile(Model(), backend=theirs)(torch.randn(4))
    assert (ours.graphs, theirs.graphs) == (3, 2)
    assert note.startswith("Dynamo compiled '")
    assert "3 times for this call, but compiled models stop at its recompile_limit (2)" in note


@torch.no_grad()
def test_explain_what_dynamo_does_not_compile() -> None:
    layer = Layer()

    @torch.compiler.disable
    def excluded(x: Tensor) -> tuple[Tensor, ...]:
        return layer(x)

    made = aiter_fusion.explain(excluded, (x(),))
    assert made.summary().startswith("Dynamo compiled nothing, so the model runs without torch.compile")
    assert "0 of 0" not in str(made)
    for options in ({"strict": True}, {"expect": {"rms_norm_quant": 1}}):
        with pytest.raises(aiter_fusion.FusionError, match="asked for, but Dynamo compiled nothing"):
            aiter_fusion.explain(excluded, (x(),), **options)  # type: ignore[arg-type]


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aiter_fusion", aiter_fusion.Backend()], ids=["name", "object"])
def test_a_warning_where_dynamo_gives_up(backend: Any, caplog: pytest.LogCaptureFixture) -> None:
    """And none where it gives up what others compiled."""

    def other(x: Tensor) -> Tensor:
        return x + 1

    compiled = torch.compile(Layer(), backend=backend, dynamic=False)
    theirs = torch.compile(other, backend=Counting(), dynamic=False)
    with caplog.at_level(logging.WARNING, logger="aiter_fusion"):
        for rows in (1, 2, 3, 4):
            theirs(x()[:rows])
            compiled(x()[:rows])
    assert len(aiter_fusion.reports()) == 2
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "aiter_fusion" and "Dynamo" in r.getMessage()]
    assert warning.startswith("aiter_fusion: Dynamo has compiled 'forward' (")
    assert "as often as torch._dynamo.config.recompile_limit (2) allows: other calls of it now run " in warning


@torch.no_grad()
def test_a_fusion_error_arrives_as_it_is() -> None:
    expecting: Any = {"expect": {"rms_norm_quant": 4}}
    for call in (
        lambda: torch.compile(Layer(), backend="aiter_fusion", options=expecting)(x()),
        lambda: aiter_fusion.explain(Layer(), (x(),), expect={"rms_norm_quant": 4}),
    ):
        with pytest.raises(
            aiter_fusion.FusionError, match=r"expected {'rms_norm_quant': 4}, replaced {'rms_norm_quant"
        ):
            call()
    assert issubclass(aiter_fusion.FusionError, RuntimeError)


def test_arguments_are_not_taken_apart() -> None:
    called = []
    with pytest.raises(TypeError, match=r"as in explain\(model, \(x,\)\), or by name as a mapping; this is a Tensor"):
        aiter_fusion.explain(called.append, x())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="kwargs must map names to arguments; this is a Tensor"):
        aiter_fusion.explain(called.append, (), x())  # type: ignore[arg-type]
    for inputs in (x(), [x()], {"x": x()}, [(x(),), x()]):
        with pytest.raises(TypeError, match=r"as in warmup\(model, \[\(x,\)\]\), or by name as a mapping; this is a "):
            aiter_fusion.warmup(called.append, inputs)  # type: ignore[arg-type]
    assert not called
