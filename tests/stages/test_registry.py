"""A form, a fusion and an op from outside the package have the guarantees of those inside: the example's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import aiter_fusion
from aiter_fusion import config
from aiter_fusion.domains import Number, OneOf, Sizes, Tensors
from aiter_fusion.op import FusedOp
from aiter_fusion.passes.manager import PassManager, compose
from aiter_fusion.patterns.form import Form, Fusion
from aiter_fusion.patterns.fx_facts import aten
from aiter_fusion.patterns.language import Call, Const, Var
from aiter_fusion.providers import Provider, Terms, candidates
from aiter_fusion.registry import REGISTRY, known
from aiter_fusion.stage import Family
from aiter_fusion.stages.norm import RMS_NORM
from aiter_fusion.stages.residual import INPUT
from support import cases
from support.checked import checked, fused
from support.op_contract import every_promise

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "own_pattern.py"
BF16 = torch.bfloat16
ABS = Call((aten.abs.default,), (Var("x"),))


@cache
def example() -> ModuleType:
    """The example, imported once, since PyTorch cannot forget an op; then what it registered is taken back."""
    spec = spec_from_file_location("own_pattern", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[module.__name__] = module  # where Dynamo looks for it
    spec.loader.exec_module(module)
    aiter_fusion.unregister(module.FAMILY)
    aiter_fusion.unregister(module.FORM)
    return module


@pytest.fixture
def own() -> Iterator[ModuleType]:
    """The example, registered for one test."""
    module, before = example(), list(REGISTRY)
    aiter_fusion.register_form(module.FORM)
    aiter_fusion.register_family(module.FAMILY)
    yield module
    aiter_fusion.unregister(module.FAMILY)
    aiter_fusion.unregister(module.FORM)
    assert list(REGISTRY) == before


def site(own: ModuleType, norm: Callable[..., Tensor] = cases.llama) -> Callable[..., tuple[Tensor, ...]]:
    return lambda x, w: own.quantise(norm(x, w))


@pytest.mark.parametrize(
    "norm",
    [pytest.param(norm, marks=() if norm.name in ("R1", "R3") else pytest.mark.slow) for norm in cases.NORMS],
    ids=lambda n: n.name,
)
def test_every_norm(norm: cases.NormForm, own: ModuleType) -> None:
    """Bit-equal on hostile rows, of every rank, and one graph serves any number of rows."""
    for dtype, sizes in ((BF16, (2, 3)), (torch.float32, (6,))):
        result = checked(site(own, norm.call))
        with torch.no_grad():
            for rows in ("normal", "tiny", "huge", "zero"):
                result.call(*cases.tensors(("x", "w"), sizes, dtype, rows))
        assert result.oracle.identical
        assert result.report.replaced == {"rms_norm_int8": 1}
        assert result.report.unaccounted == 0
        assert result.variants == ["rms_norm_int8:" + ("offset+" if norm.name == "R3" else "") + "row"]
    result = checked(site(own, norm.call), dynamic=None)
    with torch.no_grad():
        for rows in (6, 1, 9):
            x, w = cases.tensors(("x", "w"), (rows,), BF16, "normal")
            torch._dynamo.maybe_mark_dynamic(x, 0)
            result.call(x, w)
    assert result.oracle.identical
    assert all(report.replaced == {"rms_norm_int8": 1} for report in result.reports)


def test_the_ops(own: ModuleType) -> None:
    """The generic tests of ops, on every overload of the family."""
    ops = list(REGISTRY.overloads("rms_norm_int8").values())
    assert [op.overload_name for op in ops] == ["add", "add_value", "default", "value"]
    for op in ops:
        every_promise(op, "reference")


def test_overloads_follow_from_the_stages(own: ModuleType) -> None:
    """The residual before the norm, its sum and the norm's value read elsewhere: nothing was written for these."""

    def call(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        summed = r + x
        value = cases.llama(summed, w)
        return (*own.quantise(value), summed, value)

    result = fused(call, *cases.tensors(("x", "r", "w"), (4,), BF16, "normal"), verify=True)
    assert result.variants == ["rms_norm_int8:add+row+value"]
    (plain,) = fused(call, *cases.tensors(("x", "r", "w"), (4,), BF16, "normal"), level=1).report.sites
    assert plain.reason == "level: needs level 2, this is level 1"


def test_reasons(own: ModuleType) -> None:
    inputs = cases.tensors(("x", "w"), (4,), BF16, "normal")

    def reason(fn: Callable[..., object], **options) -> str:
        return next(s.reason for s in fused(fn, *inputs, **options).report.sites if s.status != "replaced")

    assert reason(site(own), disable="rms_norm_int8") == "disabled: rms_norm_int8 is in 'disable'"
    assert reason(site(own), level=0, enable="act_mul_quant") == "level: needs level 1, this is level 0"
    assert reason(lambda x, w: own.quantise(x * 2)).startswith("producer: its input is aten.mul.Tensor")

    def in_half(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        """The scale is rounded to bf16: another arithmetic, so it is not taken."""
        y = cases.llama(x, w)
        scale = (y.abs().amax(-1, keepdim=True) / 127).float().clamp(min=1e-10)
        return (y.float() / scale).round().clamp(-128, 127).to(torch.int8), scale

    assert reason(in_half).startswith("unquantised: ")


def test_compiled_and_cached(own: ModuleType) -> None:
    x, w = cases.tensors(("x", "w"), (4,), BF16, "normal")
    backend = aiter_fusion.Backend(strict=True, expect={"rms_norm_int8": 1}, verify=True)
    for cached in (False, True):
        torch._dynamo.reset()
        with torch.no_grad():
            q, scale = torch.compile(site(own), backend=backend)(x, w)
            eager = site(own)(x, w)
        assert torch.equal(q, eager[0])
        assert torch.equal(scale, eager[1])
        made = aiter_fusion.reports()[-1]
        assert made.from_cache == cached
        assert made.replaced == {"rms_norm_int8": 1}


def test_a_provider(own: ModuleType) -> None:
    """A kernel for the op: asked for by name, chosen where it accepts, with its reason where it refuses."""
    before, calls = uuid(), []
    plain = REGISTRY.ops["rms_norm_int8", frozenset()]
    tensors, flag = Tensors((BF16,)), OneOf((True, False))
    mine_takes = Terms(
        {"x": tensors, "weight": tensors, "eps": Number(), "eps_tensor": OneOf((None,)), "offset": OneOf((None,))}
        | {"cast_first": flag, "dtype": OneOf((BF16,))},
        hidden=Sizes(32, 256, multiple=32),
    )

    def kernel(**arguments: object) -> dict[str, Tensor]:
        calls.append(arguments)
        return plain.reference(**arguments)

    mine = Provider(
        "mine",
        missing=lambda: None,
        refuse=lambda op, arguments: None,
        run=lambda op: kernel,
        exact=True,
        terms=lambda op: mine_takes if op is plain else None,
    )
    assert aiter_fusion.register_provider(mine) is mine
    with pytest.raises(ValueError, match="providers: mine is registered already"):
        aiter_fusion.register_provider(mine)
    inputs = cases.tensors(("x", "w"), (4,), BF16, "normal")
    (done,) = fused(site(own), *inputs, provider="mine").report.sites
    assert (done.status, done.provider, len(calls)) == ("replaced", "mine", 1)
    (refused,) = fused(lambda x, w: cases.q3(cases.llama(x, w)), *inputs, provider="mine").report.sites
    assert refused.reason == "provider: mine: it declares no kernel for rms_norm_quant"
    (wide,) = fused(
        site(own), torch.ones(4, 512, dtype=BF16), torch.ones(512, dtype=BF16), provider="mine"
    ).report.sites
    assert wide.reason == "provider: mine: hidden size 512 exceeds 256"
    (other,) = fused(site(own), *cases.tensors(("x", "w"), (4,), torch.float32, "normal"), provider="mine").report.sites
    assert other.reason == "provider: mine: x is torch.float32, which is none of torch.bfloat16"
    assert len(calls) == 1
    assert candidates("auto", "cuda")[-1] is mine
    assert [provider.name for provider in candidates("auto", "cpu")] == ["reference"]
    assert uuid() != before
    aiter_fusion.unregister(mine)
    assert uuid() == before
    with pytest.raises(ValueError, match="providers: mine is not registered"):
        aiter_fusion.unregister(mine)


def test_what_processes_take_jointly(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fusion from outside that all processes must take or none: what one has in its cache, it asks about again."""
    aiter_fusion.unregister(own.FAMILY)
    collective = Family("rms_norm_int8", (INPUT, RMS_NORM, replace(own.INT8, collective=True)))
    aiter_fusion.register_family(collective)
    x, w = cases.tensors(("x", "w"), (4,), BF16, "normal")
    for unlike, cached, status in (
        (None, False, "replaced"),
        (None, True, "replaced"),
        ("level is 3", False, "skipped"),
    ):
        monkeypatch.setattr(PassManager, "why_unlike", lambda self, why=unlike: why)
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(site(own), backend="aiter_fusion")(x, w)
        made = aiter_fusion.reports()[-1]
        assert (made.from_cache, [s.status for s in made.sites]) == (cached, [status])
    aiter_fusion.unregister(collective)
    aiter_fusion.register_family(own.FAMILY)  # as the fixture left it


# ---- The cache key -----------------------------------------------------------------------------------------------


def uuid() -> object:
    return compose(None, config.options()).uuid()


def test_the_cache_key_knows_what_is_registered(own: ModuleType) -> None:
    seen = [uuid()]
    assert uuid() == seen[0]
    for changed in (
        Form("mine", "other", own.FORM.pattern, "q"),
        Form("mine", "other", ABS, "q"),
        Form("mine", "other", ABS, "q", complete=lambda root, found: "never"),
        Family("rms_norm_abs", (INPUT, RMS_NORM, own.INT8)),
        Family("rms_norm_abs", (INPUT, RMS_NORM, own.INT8), level=2),
        Family("rms_norm_abs", (INPUT, RMS_NORM, replace(own.INT8, levels={"value": 3}))),
    ):
        aiter_fusion.register_form(changed) if isinstance(changed, Form) else aiter_fusion.register_family(changed)
        seen.append(uuid())
        aiter_fusion.unregister(changed)
        assert uuid() == seen[0]
    assert None not in seen
    assert len(set(map(repr, seen))) == len(seen)


def test_what_a_function_closes_over_counts() -> None:
    def closing(number: int) -> Callable[[], int]:
        return lambda: number

    assert known(closing(1)) == known(closing(1))
    assert known(closing(1)) != known(closing(2))


def test_without_a_source_nothing_is_cached() -> None:
    """A function typed at a prompt has nothing by which another process could know it."""
    namespace: dict = {}
    exec("def complete(root, found): return 'no'", namespace)
    form = aiter_fusion.register_form(Form("mine", "abs", ABS, "value", complete=namespace["complete"]))
    assert REGISTRY.identity() is None
    assert uuid() is None
    aiter_fusion.unregister(form)
    assert uuid() is not None


IDENTITY = """
import runpy, sys
runpy.run_path(sys.argv[1])
from aiter_fusion.registry import REGISTRY
print(REGISTRY.identity())
"""


def test_the_key_is_the_same_in_every_process() -> None:
    keys = set()
    for seed in ("1", "2"):
        command = [sys.executable, "-c", IDENTITY, str(EXAMPLE)]
        env = {**os.environ, "PYTHONHASHSEED": seed}
        keys.add(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)
    assert len(keys) == 1
    assert keys != {"None\n"}


# ---- Mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("register", "error", "message"),
    [
        (lambda own: aiter_fusion.register_form(ABS), TypeError, "register_form takes a Form, not Call"),  # type: ignore[arg-type]
        (lambda own: aiter_fusion.register_fusion(ABS), TypeError, "register_fusion takes a Fusion, not Call"),  # type: ignore[arg-type]
        (lambda own: aiter_fusion.fused_op(ABS), TypeError, "fused_op takes a FusedOp, not Call"),  # type: ignore[arg-type]
        (
            lambda own: aiter_fusion.register_form(Form("k", "any", Var("x"), "y")),
            ValueError,
            "form any can end in any call",
        ),
        (
            lambda own: aiter_fusion.register_form(Form("rms_norm", "no_weight", ABS, "y")),
            ValueError,
            "forms: rms_norm no_weight is registered already: choose another name",
        ),
        (
            lambda own: aiter_fusion.register_fusion(Fusion("nothing", ("rms_norm",), lambda *_: "")),
            ValueError,
            "family 'nothing' has no op: declare one with aiter_fusion.fused_op first",
        ),
        (
            lambda own: aiter_fusion.register_fusion(Fusion("rms_norm_int8", ("norm", "int8"), lambda *_: "")),
            ValueError,
            "no form is of kind 'norm': call aiter_fusion.register_form first; kinds are act_mul, ",
        ),
        (
            lambda own: aiter_fusion.register_fusion(
                Fusion("rms_norm_int8", ("rms_norm", "int8_quant"), lambda *_: "")
            ),
            ValueError,
            "fusions: rms_norm_int8 rms_norm -> int8_quant rms_norm_int8 is registered already",
        ),
        (
            lambda own: aiter_fusion.fused_op(REGISTRY.ops["rms_norm_int8", frozenset()]),
            ValueError,
            "ops: rms_norm_int8 is registered already",
        ),
        (
            lambda own: aiter_fusion.fused_op(
                FusedOp("rms_norm_int8", frozenset(), {}, ("y",), dict, dict, lambda: iter(()))
            ),
            ValueError,
            "which PyTorch cannot forget: choose another family or other features",
        ),
        (
            lambda own: aiter_fusion.register_family(Family("norms", (INPUT, RMS_NORM, RMS_NORM))),
            ValueError,
            "family norms: two of its stages have an argument cast_first, dtype, eps, eps_tensor, offset, weight",
        ),
        (
            lambda own: aiter_fusion.register_family(Family("norms", (RMS_NORM, own.INT8))),
            ValueError,
            "family norms: its first stage, rms_norm, takes a value from a stage before it",
        ),
        (
            lambda own: aiter_fusion.register_family(Family("norms", (INPUT, replace(RMS_NORM, kind="norms")))),
            ValueError,
            "no form is of kind 'norms'",
        ),
    ],
)
def test_mistakes(register: Callable, error: type, message: str, own: ModuleType) -> None:
    before = list(REGISTRY)
    with pytest.raises(error, match=message):
        register(own)
    assert list(REGISTRY) == before


def test_a_family_is_unknown_until_it_is_registered() -> None:
    with pytest.raises(ValueError, match="no fusion is called 'rms_norm_int8'"):
        aiter_fusion.Backend(expect={"rms_norm_int8": 1})


def test_a_form_alone_changes_nothing() -> None:
    """Its records are bare, and counted."""
    form = Form("absolute", "abs", Call((aten.mul.Tensor,), (ABS, Const(2))), "value")
    aiter_fusion.register_form(form)
    result = fused(lambda x: x.abs() * 2, torch.ones(3))
    aiter_fusion.unregister(form)
    assert [(s.family, s.status) for s in result.report.sites] == [("absolute", "bare")]
