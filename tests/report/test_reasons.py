"""Every reason can be provoked, and the table of reasons in ``passes/README.md`` is that of the code."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from aiter_fusion import providers, report
from aiter_fusion.backend import Backend, FusionError, check, reports
from aiter_fusion.config import options
from aiter_fusion.passes import layout
from aiter_fusion.passes import sites as sites_module
from aiter_fusion.passes.manager import PassManager
from aiter_fusion.reasons import CODES, Reason
from aiter_fusion.registry import REGISTRY
from support import cases
from support.checked import checked
from support.hand_built import hand_built

SITE = cases.FUSION["norm"].call(cases.llama, cases.q3)


def sites(fn: Callable[..., object] = SITE, names: tuple[str, ...] = ("x", "w"), **kwargs) -> Iterator[report.Site]:
    dynamic, grad = kwargs.pop("dynamic", None), kwargs.pop("grad", False)
    result = checked(fn, dynamic=dynamic, **kwargs)
    inputs = cases.tensors(names, (4,), torch.bfloat16, "normal")
    inputs[0].requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        result.call(*inputs)
    assert result.oracle.identical
    yield from result.report.sites


def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[report.Site]:
    graph, _ = hand_built("inside")
    yield from PassManager(options()).run(graph.graph, True).sites


def refusing(
    monkeypatch: pytest.MonkeyPatch, numerics: str | None = "exact", **changes: object
) -> Iterator[report.Site]:
    monkeypatch.setitem(providers.PROVIDERS, "reference", replace(providers.PROVIDERS["reference"], **changes))
    yield from sites(numerics=numerics)


def without_overloads(monkeypatch: pytest.MonkeyPatch) -> Iterator[report.Site]:
    returning = [op for features, op in REGISTRY.overloads("rms_norm_quant").items() if "value" in features]
    for op in returning:
        REGISTRY.unregister(op)
    yield from sites(cases.FUSION["norm_value"].call(cases.llama, cases.q3))
    for op in returning:
        REGISTRY.register(op)


def nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[report.Site]:
    monkeypatch.setattr(sites_module, "candidates", lambda choice, device: ())
    yield from sites()


def defective(monkeypatch: pytest.MonkeyPatch) -> Iterator[report.Site]:
    monkeypatch.setattr(layout, "_fit", lambda *_: 1 / 0)
    yield from sites()


def two_kinds(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = cases.llama(x, w)
    return (*cases.q3(y), *cases.q7(128)(y))


def last_row_modulated(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Which row of a modulation a row meets depends on those before it."""
    return cases.q3(cases.modulated(x, w, w)[-1:])


def unknown(x: Tensor) -> tuple[Tensor, ...]:
    scale = torch.sqrt(x.abs().amax(-1, keepdim=True).float())
    return (x.float() / scale).to(cases.FN), scale


def early_reader(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """A static scale that is computed from the value that it quantises."""
    y = cases.llama(x, w)
    scale = torch.sqrt(y.float().abs().amax())
    return (y.float() / scale).to(cases.FN), scale


def attended(x: Tensor) -> Tensor:
    heads = x.view(1, 4, 4, -1)
    cache = heads[:, :2].repeat_interleave(2, 1)
    return torch.nn.functional.scaled_dot_product_attention(heads, cache, cache, is_causal=True)


def grouped(x: Tensor) -> Tensor:
    """One expert's rows."""
    weights = x.new_ones(1, x.shape[-1], x.shape[-1])
    return torch.nn.functional.grouped_mm(x, weights, offs=torch.tensor([len(x)], dtype=torch.int32))


def reducing(fn: Callable[[Tensor], Tensor]) -> Iterator[report.Site]:
    """In a group of one process."""
    store = dist.HashStore()  # type: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        yield from sites(fn, ("x",))
    finally:
        dist.destroy_process_group()


def largest(x: Tensor) -> Tensor:
    return cases.llama(funcol.all_reduce(x, "max", dist.group.WORLD), x[0])  # type: ignore[arg-type]


PROVOKE: dict[str, Callable[[pytest.MonkeyPatch], Iterator[report.Site]]] = {
    "producer": lambda patch: sites(lambda x: cases.q3(x * 2), ("x",)),
    "boundary": lambda patch: sites(lambda x: cases.q3(x.view(2, 2, -1)), ("x",)),
    "unquantised": lambda patch: sites(cases.llama),
    "grouped": lambda patch: sites(lambda x: cases.q3(grouped(x)), ("x",)),
    "unnormalised": lambda patch: reducing(lambda x: funcol.all_reduce(x, "sum", dist.group.WORLD)),  # type: ignore[arg-type]
    "collective": lambda patch: reducing(largest),
    "unknown": lambda patch: sites(unknown, ("x",)),
    "attention": lambda patch: sites(attended, ("x",)),
    "rows": lambda patch: sites(last_row_modulated),
    "starved": lambda patch: sites(two_kinds),
    "level": lambda patch: sites(level=1, fn=cases.FUSION["norm"].call(cases.gemma, cases.q3)),
    "disabled": lambda patch: sites(disable="rms_norm_quant"),
    "training": lambda patch: sites(lambda x, w: [t.float().sum() for t in SITE(x, w)], grad=True),
    "numerics": lambda patch: refusing(patch, exact=False),
    "no_kernel": nowhere,
    "provider": lambda patch: refusing(patch, refuse=lambda op, arguments: "rows are too long"),
    "preference": lambda patch: refusing(patch, numerics=None, unwanted=lambda op, arguments: "experimental"),
    "unmeasured": lambda patch: refusing(
        patch, numerics=None, unmeasured=lambda op, arguments: "run aiter-fusion tune"
    ),
    "slower": lambda patch: refusing(patch, numerics=None, slower=lambda op, arguments: "two kernels"),
    "overload": without_overloads,
    "layout": lambda patch: sites(lambda x, w: cases.q3(cases.llama(x.view(2, 2, -1).transpose(0, 1), w))),
    "order": lambda patch: sites(early_reader),
    "mutation": written,
    "error": defective,
}


def test_every_code_is_provoked() -> None:
    assert set(PROVOKE) == CODES


@pytest.mark.parametrize("code", PROVOKE)
def test_reason(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [site for site in PROVOKE[code](monkeypatch) if site.status != report.REPLACED]
    assert code in {site.reason.split(":")[0] for site in found}
    for site in found:
        assert site.reason.split(": ", 1)[1], "a code alone explains nothing"
        assert not site.op
        assert not site.provider


def test_the_table_in_the_readme() -> None:
    readme = (Path(__file__).parent.parent.parent / "passes" / "README.md").read_text()
    for reason in Reason:
        code, sentence = reason.code, reason.sentence
        assert f"| `{code}` | {sentence} |" in readme


def test_a_graph_break_is_a_boundary() -> None:
    """Both halves say that the other is missing, and how to find what cut them apart."""

    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = cases.llama(x, w)
        torch._dynamo.graph_break()
        return cases.q3(y)

    norm, quantiser = sites(fn)
    assert norm.reason == "unquantised: no quantiser in this graph reads it"
    assert quantiser.reason.startswith("boundary: it is arg0_1, an input of this graph; ")
    assert "fullgraph=True" in quantiser.reason


def reported(fn: Callable[..., object], options: dict[str, Any]) -> report.FusionReport:
    inputs = cases.tensors(("x", "w"), (4,), torch.bfloat16, "normal")
    with torch.no_grad():
        torch.compile(fn, backend=Backend(**options))(*inputs)
    return reports()[-1]


@pytest.mark.parametrize(
    ("fn", "options", "advice"),
    [
        (cases.llama, {}, report.QUANTISE),
        (SITE, {"level": 2, "disable": "rms_norm_quant"}, report.ALLOW),
        (SITE, {}, ""),
        (lambda x, w: cases.q3(x), {}, ""),
    ],
    ids=["not quantised", "disabled", "fused", "another producer"],
)
def test_advice(
    fn: Callable[..., object], options: dict[str, Any], advice: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In the table, in JSON and on the page, and once in the log."""
    with caplog.at_level(logging.INFO, logger="aiter_fusion"):
        made = reported(fn, options)
        torch._dynamo.reset()
        reported(fn, options)
    assert made.advice == advice
    said = [record.getMessage() for record in caplog.records if "nothing was fused" in record.getMessage()]
    assert said == ([f"aiter_fusion: nothing was fused: {advice}"] if advice else [])
    assert ("nothing was fused" in str(made)) == bool(advice)


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        ("training", report.TRAIN),
        ("no_kernel", report.INSTALL),
        ("slower", report.NAME),
        ("unmeasured", report.NAME),
        ("layout", ""),  # the reason says all there is to say
    ],
)
def test_advice_on_what_was_skipped(code: str, advice: str) -> None:
    site = report.Site("rms_norm_quant", "token", "", "", report.SKIPPED, f"{code}: why", "norm")
    made = report.FusionReport((site,), 1)
    assert made.advice == advice
    assert json.loads(made.to_json())["advice"] == advice
    assert report.FusionReport((site, replace(site, status=report.REPLACED)), 2).advice == ""


def early_sum(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """The weight is computed from the sum."""
    summed = r + x
    return (*cases.q3(cases.llama(summed, w * summed.amax(0))), summed)


def sum_of_two_norms(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    summed = r + x
    return (*cases.q3(cases.llama(summed, w)), *cases.q3(cases.olmo2(summed, w)))


WITHOUT = {
    "without residual_add: the residual is broadcast": lambda x, r, w: cases.q3(cases.llama(x + w, w)),
    "without residual_add: convert_element_type, which is added, is torch.int32": (
        lambda x, r, w: cases.q3(cases.llama(x + r.int(), w))
    ),
    "without residual_add: order: ": early_sum,
    "without residual_add: starved: ": sum_of_two_norms,
    "": lambda x, r, w: cases.q3(cases.llama(x * r, w)),
}


@pytest.mark.parametrize("reason", WITHOUT)
def test_what_a_replaced_site_goes_without(reason: str) -> None:
    last = [site for site in sites(WITHOUT[reason], ("x", "r", "w")) if site.status == report.REPLACED][-1]
    assert last.variant == "token"
    assert last.reason.startswith(reason)
    assert bool(last.reason) == bool(reason)


NEAR_MISSES = {
    "a sum": ("sum_1", lambda h: h.pow(2).sum(-1, keepdim=True)),
    "a cube": ("pow_1", lambda h: h.pow(3).mean(-1, keepdim=True)),
    "columns": ("mean", lambda h: h.pow(2).mean(0, keepdim=True)),
    "alpha": ("add", lambda h: torch.add(h.pow(2).mean(-1, keepdim=True), torch.ones(()), alpha=2)),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_names_the_first_node_that_does_not_fit(name: str) -> None:
    node, square = NEAR_MISSES[name]

    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        h = x.float()
        return cases.q3(w * (h * torch.rsqrt(square(h) + 1e-6)).to(x.dtype))

    (site,) = sites(fn)
    assert f"almost one of the forms, but {node} (aten." in site.reason


@pytest.mark.parametrize("why", ["slower", "unmeasured", "unwanted"])
def test_what_is_not_chosen_unasked_can_be_asked_for_by_name(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = replace(providers.PROVIDERS["reference"], **{why: lambda op, arguments: "two kernels"})
    monkeypatch.setitem(providers.PROVIDERS, "reference", changed)
    assert [site.status for site in sites(provider="reference")] == [report.REPLACED]


@pytest.mark.parametrize("code", ["slower", "unmeasured", "provider"])
def test_strict_allows_what_speed_decides(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the graph's own code is as fast, nothing is lost."""
    made = report.FusionReport(tuple(PROVOKE[code](monkeypatch)))
    assert [site.code for site in made.skipped] == [code]
    with pytest.raises(FusionError, match="1 sites were skipped") if code == "provider" else nullcontext():
        check(options(strict=True), made)
