"""Norms between a reduce-scatter and an all-gather are fused, and nothing moves across a collective."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from support import cases
from support.checked import Checked, fused

QUANTS = [q for q in cases.QUANTS if q.name in ("Q1r", "Q3", "Q7_128")]


pytestmark = pytest.mark.usefixtures("alone")


def scatter(x: Tensor) -> Tensor:
    return funcol.reduce_scatter_tensor(x, "sum", 0, dist.group.WORLD)  # type: ignore[arg-type]


def gather(x: Tensor) -> Tensor:
    bits = x.view(torch.uint8) if x.dtype is cases.FN else x  # gloo knows no FP8
    return funcol.all_gather_tensor(bits, 0, dist.group.WORLD)  # type: ignore[arg-type]


def run(fn: Callable[..., tuple[Tensor, ...]]) -> Checked:
    return fused(fn, *cases.tensors(("x", "r", "w"), (16,), torch.bfloat16, "normal"))


def order(targets: list[str]) -> list[str]:
    """The collectives and fused ops among the calls."""
    found = [t for t in targets if t.startswith(("_c10d_functional", "aiter_fusion"))]
    return [t.partition(".")[2].removesuffix(".default") for t in found]


@pytest.mark.parametrize("quant", QUANTS, ids=lambda q: q.name)
def test_quantised_before_the_gather(quant: cases.QuantForm) -> None:
    """One op between the wait and the gathers of all three consumers, which each quantise for themselves."""

    def block(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        summed = r + scatter(x)
        value = cases.llama(summed, w)
        parts = [part for _ in range(3) for part in quant.call(value)]
        return (*map(gather, parts), summed)

    result = run(block)
    assert result.variants == [f"rms_norm_quant:add+{quant.granularity}"]
    assert result.report.skipped == result.report.bare == ()
    seen = order(result.targets)
    assert seen[:3] == ["reduce_scatter_tensor", "wait_tensor", "rms_norm_quant.add"]
    assert sorted(seen[3:]) == ["all_gather_into_tensor"] * 6 + ["wait_tensor"] * 6


@pytest.mark.parametrize("quant", QUANTS, ids=lambda q: q.name)
def test_quantised_after_the_gather(quant: cases.QuantForm) -> None:
    """Left as it is: to fuse these would move the quantiser across the collective."""

    def block(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        summed = r + scatter(x)
        return (*quant.call(gather(cases.llama(summed, w))), summed)

    result = run(block)
    (graphs,) = result.oracle.graphs
    assert str(graphs.before.graph) == str(graphs.after.graph)
    reasons = {site.family: site.reason for site in result.report.bare}
    assert reasons == {
        "rms_norm": "unquantised: no quantiser in this graph reads it",
        "fp8_quant": "producer: its input is _c10d_functional.wait_tensor.default",
    }
