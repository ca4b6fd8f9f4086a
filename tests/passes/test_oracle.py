"""The oracle compares every graph, whatever caches hold, and never says what it has not compared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import aiter_fusion
from support import cases

BF16 = torch.bfloat16


def site(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return cases.q3(cases.llama(x, w))


def inputs() -> list[Tensor]:
    return cases.tensors(("x", "w"), (4,), BF16, "normal")


@torch.no_grad()
def test_whatever_the_caches_hold() -> None:
    """AOTAutograd's cache would answer with code that plain Inductor compiled for the same graph."""
    product = torch.mm  # nothing to generate code for
    given = torch.randn(4, 4), torch.randn(4, 4)
    torch.compile(product)(*given)
    for level in (3, 0, 3):
        torch._dynamo.reset()
        oracle = aiter_fusion.Backend(level).oracle()
        torch.compile(product, backend=oracle)(*given)
        assert [graph.calls for graph in oracle.graphs] == [1]
        assert oracle.identical


@torch.no_grad()
def test_what_compared_nothing_is_an_error() -> None:
    oracle = aiter_fusion.Backend().oracle()
    with pytest.raises(RuntimeError, match="compared nothing: it was given no graph that calls anything"):
        oracle.identical  # noqa: B018
    call = torch.compile(site, backend=oracle)
    call(*inputs())
    assert oracle.identical
    oracle.graphs[0].calls = 0
    with pytest.raises(RuntimeError, match="has not compared 1 of 1 graphs: they were compiled, but not called"):
        oracle.identical  # noqa: B018
    oracle.graphs[0].identical = False
    assert not oracle.identical


def dead_code(x: Tensor) -> Tensor:
    x.sin()
    return x


def same_dtype(x: Tensor) -> Tensor:
    return x.to(x.dtype)


@torch.no_grad()
@pytest.mark.parametrize("idle", [dead_code, same_dtype])
def test_graphs_that_call_nothing(idle: Callable[[Tensor], Tensor]) -> None:
    """They return what they are given, alone and after a break, and are not counted."""

    def both(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        q, scale = site(x, w)
        torch._dynamo.graph_break()
        return idle(q), scale

    oracle = aiter_fusion.Backend().oracle()
    x, w = inputs()
    assert torch.equal(torch.compile(idle, backend=oracle)(x), x)
    assert oracle.graphs == []
    q, scale = torch.compile(both, backend=oracle)(x, w)
    expected = site(x, w)
    assert torch.equal(q.view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(scale, expected[1])
    assert len(oracle.graphs) == 1
    assert oracle.identical
