"""A stage and a row are all that a fusion takes: a toy activation, declared in this file alone, through the registry.

``softsign`` is no activation of the package's. With the package's own quantisers after it, it has every overload, fake,
sample, count, reason, report and place in the cache key that a family of the package's has.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import aiter_fusion
from aiter_fusion import config
from aiter_fusion.op import FusedOp, Spec
from aiter_fusion.passes.manager import compose
from aiter_fusion.patterns.form import Completion, Form
from aiter_fusion.patterns.fx_facts import FLOATS, aten, dtype
from aiter_fusion.patterns.language import Call, Const, Var, add
from aiter_fusion.providers import PROVIDERS
from aiter_fusion.registry import REGISTRY
from aiter_fusion.stage import Family, Sample, Stage, Value
from aiter_fusion.stages.quantise import DYNAMIC, QUANTISE
from support import cases
from support.checked import checked, fused
from support.op_contract import every_promise

BF16, F32 = torch.bfloat16, torch.float32


def softsign(x: Tensor) -> Tensor:
    return x / (x.abs() + 1)


# ---- All that the package is told --------------------------------------------------------------------------------


def complete(root: Any, found: Any) -> Completion | str:
    x = found.inputs["x"]
    return Completion() if dtype(x) in FLOATS else f"softsign of {dtype(x)}"


FORM = Form(
    "softsign",
    "softsign",
    Call((aten.div.Tensor,), (Var("x"), add(Call((aten.abs.default,), (Var("x"),)), Const(1)))),
    output="value",
    complete=complete,
)


def compute(value: None, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return softsign(x).contiguous(), {}


def spec(value: None, x: Tensor) -> tuple[Value, dict[str, Spec]]:
    return Value(x.shape, x.dtype), {}


def samples(sample: Sample) -> Sequence[dict[str, Any]]:
    return [{"x": sample.rows()}]


SOFTSIGN = Stage(
    "softsign", {"x": "Tensor"}, compute, spec, samples, follows=False, returns="value", levels={"value": 2}
)
FAMILY = Family("softsign_quant", (SOFTSIGN, QUANTISE))


# ---- What it has ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    before = list(REGISTRY)
    aiter_fusion.register_form(FORM)
    aiter_fusion.register_family(FAMILY)
    yield
    aiter_fusion.unregister(FAMILY)
    aiter_fusion.unregister(FORM)
    assert list(REGISTRY) == before


def site(quantise: Callable[..., tuple[Tensor, ...]], returned: bool = False) -> Callable[..., tuple[Tensor, ...]]:
    def call(x: Tensor, *scale: Tensor) -> tuple[Tensor, ...]:
        value = softsign(x)
        return (*quantise(value, *scale), *([value] if returned else []))

    return call


def ops() -> dict[str, FusedOp]:
    return {op.overload_name: op for op in REGISTRY.overloads("softsign_quant").values()}


@pytest.mark.parametrize("overload", ["default", "static", "value", "static_value"])
def test_every_overload(overload: str) -> None:
    """Schema, opcheck, fake against real, and strides, as of every op."""
    op = ops()[overload]
    every_promise(op, "reference")


@pytest.mark.parametrize("returned", [False, True])
def test_every_quantiser_after_it(returned: bool) -> None:
    """Counts, variants and bits, with the value read elsewhere and without."""
    names = [("x", "scale") if quant.static else ("x",) for quant in cases.QUANTS]
    calls = [site(quant.call, returned) for quant in cases.QUANTS]

    def each(*inputs: Tensor) -> list[tuple[Tensor, ...]]:
        left = iter(inputs)
        return [call(*itertools.islice(left, len(of))) for call, of in zip(calls, names, strict=True)]

    result = fused(each, *(x for of in names for x in cases.tensors(of, (4,), BF16, "normal")))
    after = "+value" if returned else ""
    assert sorted(result.variants) == sorted(f"softsign_quant:{quant.granularity}{after}" for quant in cases.QUANTS)


def test_hostile_rows_and_any_number_of_them() -> None:
    result = checked(site(cases.q3), dynamic=None, verify=True)
    with torch.no_grad():
        for rows, number in zip(("normal", "tiny", "huge", "zero"), (6, 1, 9, 4), strict=True):
            (x,) = cases.tensors(("x",), (number,), BF16, rows)
            torch._dynamo.maybe_mark_dynamic(x, 0)
            result.call(x)
    assert result.oracle.identical
    assert all(report.replaced == {"softsign_quant": 1} for report in result.reports)


def test_options_know_it() -> None:
    inputs = cases.tensors(("x",), (4,), BF16, "normal")

    def reason(returned: bool = False, **options: Any) -> str:
        return next(s.reason for s in fused(site(cases.q3, returned), *inputs, **options).report.skipped)

    assert reason(disable="softsign_quant") == "disabled: softsign_quant is in 'disable'"
    assert reason(returned=True, level=1) == "level: needs level 2, this is level 1"
    assert fused(site(cases.q3), *inputs, expect={"softsign_quant": 1}).report.replaced == {"softsign_quant": 1}


def test_providers_that_do_not_know_the_stage_refuse_it() -> None:
    """Triton's kernels are declared by stage, AITER's by op."""
    op = ops()["default"]
    for name in ("aiter", "triton"):
        assert PROVIDERS[name].why_not(op, next(op.samples())) == "it declares no kernel for softsign_quant"


def test_the_cache_key_knows_it() -> None:
    with_it = compose(None, config.options()).uuid()
    aiter_fusion.unregister(FAMILY)
    without = compose(None, config.options()).uuid()
    aiter_fusion.register_family(FAMILY)
    assert with_it == compose(None, config.options()).uuid()
    assert with_it != without


def test_it_is_forgotten() -> None:
    aiter_fusion.unregister(FAMILY)
    with pytest.raises(ValueError, match="no fusion is called 'softsign_quant'"):
        aiter_fusion.Backend(disable="softsign_quant")
    inputs = cases.tensors(("x",), (4,), BF16, "normal")
    assert [s.status for s in fused(site(cases.q3), *inputs).report.sites] == ["bare"] * 2
    aiter_fusion.register_family(FAMILY)


def test_stages_of_one_family_may_be_of_another() -> None:
    """The package's quantiser is one stage, wherever it stands."""
    assert all(DYNAMIC in op.stages for op in (ops()["default"], REGISTRY.ops["rms_norm_quant", frozenset()]))
