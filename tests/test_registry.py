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

import cases
import pytest
import test_ops
import torch
from conftest import checked, fused
from torch import Tensor
from torch._subclasses import FakeTensorMode

import aiter_fusion
from aiter_fusion import config
from aiter_fusion.domains import Number, OneOf, Sizes, Tensors
from aiter_fusion.op import OPS
from aiter_fusion.passes.manager import PassManager, compose
from aiter_fusion.patterns import registry
from aiter_fusion.patterns.language import Call, Const, Form, Fusion, Var, aten
from aiter_fusion.providers import PROVIDERS, Provider, Terms, candidates

EXAMPLE = Path(__file__).parent.parent / "examples" / "own_pattern.py"
BF16 = torch.bfloat16


@cache
def example() -> tuple[ModuleType, dict[str, list], tuple[str, ...]]:
    """The example, imported once (PyTorch cannot forget an op), and what it registered; then the registry as it was."""
    spec = spec_from_file_location("own_pattern", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    families = config.FAMILIES
    sys.modules[module.__name__] = module  # where Dynamo looks for it
    spec.loader.exec_module(module)
    registered = {name: getattr(registry, name)[:] for name in ("_forms", "_fusions", "_ops")}
    for name in registered:
        getattr(registry, name).clear()
    known, config.FAMILIES = config.FAMILIES, families
    del OPS[module.FAMILY]
    registry._identity.cache_clear()
    return module, registered, known


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example, registered for one test."""
    module, registered, families = example()
    for name, entries in registered.items():
        monkeypatch.setattr(registry, name, entries[:])
    monkeypatch.setattr(config, "FAMILIES", families)
    monkeypatch.setitem(OPS, module.FAMILY, {frozenset(): module.OP})
    registry._identity.cache_clear()
    yield module
    registry._identity.cache_clear()


def site(own: ModuleType, norm: Callable[..., Tensor] = cases.llama) -> Callable[..., tuple[Tensor, ...]]:
    return lambda x, w: own.quantise(norm(x, w))


@pytest.mark.parametrize("norm", cases.NORMS, ids=lambda n: n.name)
def test_every_norm(norm: cases.NormForm, own: ModuleType) -> None:
    """Bit-equal on hostile rows, of every rank, and one graph serves any number of rows."""
    for dtype in (BF16, torch.float32):
        for sizes in ((6,), (2, 3)):
            result = checked(site(own, norm.call))
            with torch.no_grad():
                for rows in ("normal", "tiny", "huge", "zero"):
                    result.call(*cases.tensors(("x", "w"), sizes, dtype, rows))
            assert result.oracle.identical
            assert result.report.replaced == {"rms_norm_int8": 1}
            assert result.report.unaccounted == 0
            assert result.variants == ["rms_norm_int8:row"]
    result = checked(site(own, norm.call), dynamic=None)
    with torch.no_grad():
        for rows in (6, 1, 9):
            x, w = cases.tensors(("x", "w"), (rows,), BF16, "normal")
            torch._dynamo.maybe_mark_dynamic(x, 0)
            result.call(x, w)
    assert result.oracle.identical
    assert all(report.replaced == {"rms_norm_int8": 1} for report in result.reports)


def test_the_op(own: ModuleType) -> None:
    """The generic tests of ops, on this one."""
    test_ops.test_opcheck(own.OP, "reference")
    test_ops.test_strided_rows_give_the_same_bits(own.OP, "reference")
    test_ops.test_agrees_with_the_reference(own.OP, "reference")
    test_ops.test_schema_is_functional(own.OP)
    for sample in own.OP.samples():
        real = test_ops.call(own.OP, "reference", sample)
        with FakeTensorMode() as mode:
            given = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in sample.items()}
            fake = test_ops.call(own.OP, "reference", given)
        for name in own.OP.outputs:
            for what in ("shape", "dtype", "device"):
                assert getattr(real[name], what) == getattr(fake[name], what)
            assert real[name].stride() == fake[name].stride()


def test_reasons(own: ModuleType) -> None:
    inputs = cases.tensors(("x", "w"), (4,), BF16, "normal")

    def reason(fn: Callable[..., object], **options) -> str:
        return next(s.reason for s in fused(fn, *inputs, **options).report.sites if s.status != "replaced")

    assert reason(site(own), disable="rms_norm_int8") == "disabled: rms_norm_int8 is in 'disable'"
    assert reason(site(own), level=0, enable="act_mul_quant") == "level: needs level 1, this is level 0"
    assert reason(lambda x, w: own.quantise(x * 2)).startswith("producer: its input is aten.mul.Tensor")

    def read_elsewhere(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = cases.llama(x, w)
        return (*own.quantise(y), y)

    assert reason(read_elsewhere) == "overload: no overload of rms_norm_int8 also returns value"

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


def test_a_provider(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel for the op: asked for by name, chosen where it accepts, with its reason where it refuses."""
    monkeypatch.setattr(config, "PROVIDER_NAMES", config.PROVIDER_NAMES)
    monkeypatch.setattr(registry, "_providers", [])
    before, calls = uuid(), []
    tensors, flag = Tensors((BF16,)), OneOf((True, False))
    mine_takes = Terms(
        {"x": tensors, "weight": tensors, "eps": Number(), "offset": OneOf((None,)), "cast_first": flag}
        | {"dtype": OneOf((BF16,))},
        hidden=Sizes(32, 256, multiple=32),
    )

    def kernel(**arguments: object) -> dict[str, Tensor]:
        calls.append(arguments)
        return own.reference(**arguments)

    mine = Provider(
        "mine",
        missing=lambda: None,
        refuse=lambda op, arguments: None,
        run=lambda op: kernel,
        exact=True,
        terms=lambda op: mine_takes if op is own.OP else None,
    )
    monkeypatch.setitem(PROVIDERS, "mine", mine)  # so that it is forgotten after the test
    del PROVIDERS["mine"]
    assert aiter_fusion.register_provider(mine) is mine
    with pytest.raises(ValueError, match="there is a provider 'mine' already"):
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


def test_what_processes_take_jointly(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fusion from outside that all processes must take or none: what one has in its cache, it asks about again."""
    monkeypatch.setattr(registry, "_fusions", [replace(registry._fusions[0], jointly=True)])
    registry._identity.cache_clear()
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


# ---- The cache key -----------------------------------------------------------------------------------------------


def uuid() -> object:
    return compose(None, config.options()).uuid()


def test_the_cache_key_knows_what_is_registered(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [uuid()]
    assert uuid() == seen[0]
    (form,) = registry._forms
    for changed in (
        replace(form, name="other"),
        replace(form, pattern=Call((aten.abs.default,), (Var("x"),))),
        replace(form, complete=lambda root, found: "never"),
    ):
        monkeypatch.setattr(registry, "_forms", [changed])
        registry._identity.cache_clear()
        seen.append(uuid())
    for name in ("_forms", "_fusions", "_ops"):
        monkeypatch.setattr(registry, name, [])
    registry._identity.cache_clear()
    seen.append(uuid())
    assert None not in seen
    assert len(set(map(repr, seen))) == len(seen)


def test_what_a_function_closes_over_counts() -> None:
    def closing(number: int) -> Callable[[], int]:
        return lambda: number

    assert registry._known(closing(1)) == registry._known(closing(1))
    assert registry._known(closing(1)) != registry._known(closing(2))


def test_without_a_source_nothing_is_cached(own: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function typed at a prompt has nothing by which another process could know it."""
    namespace: dict = {}
    exec("def complete(root, found): return 'no'", namespace)
    monkeypatch.setattr(registry, "_forms", [replace(registry._forms[0], complete=namespace["complete"])])
    registry._identity.cache_clear()
    assert registry.identity() is None
    assert uuid() is None


IDENTITY = """
import runpy, sys
runpy.run_path(sys.argv[1])
from aiter_fusion.patterns import registry
print(registry.identity())
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

ABS = Call((aten.abs.default,), (Var("x"),))


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
            "there is a form 'no_weight' of kind 'rms_norm' already",
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
            "rms_norm_int8 of rms_norm -> int8_quant is registered already",
        ),
        (lambda own: aiter_fusion.fused_op(own.OP), ValueError, "aiter_fusion::rms_norm_int8 is declared already"),
    ],
)
def test_mistakes(register: Callable, error: type, message: str, own: ModuleType) -> None:
    before = registry.forms(registry.fusions()), registry.fusions(), config.FAMILIES
    with pytest.raises(error, match=message):
        register(own)
    assert (registry.forms(registry.fusions()), registry.fusions(), config.FAMILIES) == before


def test_a_family_is_unknown_until_it_is_registered() -> None:
    with pytest.raises(ValueError, match="no fusion is called 'rms_norm_int8'"):
        aiter_fusion.Backend(expect={"rms_norm_int8": 1})


def test_a_form_alone_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its records are bare, and counted."""
    monkeypatch.setattr(registry, "_forms", [])
    aiter_fusion.register_form(Form("absolute", "abs", Call((aten.mul.Tensor,), (ABS, Const(2))), "value"))
    result = fused(lambda x: x.abs() * 2, torch.ones(3))
    assert [(s.family, s.status) for s in result.report.sites] == [("absolute", "bare")]
    registry._identity.cache_clear()
