"""Fused ops of permuted and regrouped tensors keep the bits, shapes and strides of what they replace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx

from aiter_fusion import config
from aiter_fusion.passes.manager import PassManager
from aiter_fusion.report import FusionReport
from support import cases
from support.checked import Checked, checked, ignores_assertions

HEADS = 4
BF16 = torch.bfloat16
SCALE = torch.full((1, 1, 1, 1), 0.02)


def heads(x: Tensor) -> Tensor:
    """[batch, sequence, heads * H] -> [batch, heads, sequence, H], a view."""
    return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)


def static(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return cases.q2_static(cases.gemma(heads(x), w), SCALE)


def static_value(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = cases.torch_nn(heads(x), w)
    return (*cases.q2_static(y, SCALE), y)


def add_value(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    summed = heads(r) + heads(x)
    y = cases.llama(summed, w)
    return (*cases.q3_tensor(y), y, summed)


def residual_in_another_layout(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """The sum lies as its first operand does."""
    permuted = heads(x)
    summed = permuted + r.view(permuted.shape)
    return (*cases.q2_static(cases.llama(summed, w), SCALE), summed)


def float32_sum(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    summed = heads(x).float() + heads(r).float()
    return (*cases.q3_tensor(cases.llama4(summed, w).to(BF16)), summed.to(BF16))


def flattened(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Values and scales leave as rows in the order of the indices, as linear layers want them."""
    return cases.q1_row(cases.llama(heads(x), w))


def flattened_twice(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """One contiguous copy each, which the op's result can be, but not for both."""
    y = cases.llama(heads(x), w)
    q, scale = cases.q3(y)
    return q.reshape(-1, cases.H), q.reshape(-1), scale, *cases.q3(y)[0].reshape(-1, 128)[:1]


def flattened_value(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = cases.llama(heads(x), w)
    return (*cases.q1_row(y), y.reshape(-1))


def flattened_before(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return cases.q7(128)(cases.llama(heads(x), w))


def split_into_groups(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = cases.llama(heads(x), w)
    groups = y.view(*y.shape[:-1], 2, 128)
    return (*cases.q2_static(groups, SCALE.view(1, 1, 1, 1, 1)), y)


def activation(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = F.silu(heads(x)) * heads(r)
    return (*cases.q3_tensor(y), y)


def packed(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return cases.q2_static(cases.gpt_oss(heads(x)), SCALE)


def heads_joined(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Rows are heads; the quantiser sees batch and sequence again, two sizes that no tensor of rows shows."""
    y = cases.llama(x.reshape(-1, cases.H), w)
    return cases.q3_tensor(y.reshape(x.shape))


def scale_by_columns(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """As block-scaled matrix products want it: the scale in memory column after column."""
    q, scale = cases.q7(128)(cases.llama(x, w.repeat(HEADS)))
    return q, scale.reshape(-1, scale.shape[-1]).t().contiguous().t()


def scale_by_columns_twice(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Two copies, which stay two tensors: the caller may write to them."""
    summed = r + x
    q, scale = cases.q7(64)(cases.llama(summed, w.repeat(HEADS)))
    scale = scale.reshape(-1, scale.shape[-1])
    return q, scale.t().contiguous(), scale.t().contiguous(), summed


def scale_both_ways(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """The rows are wanted too, so they are copied."""
    q, scale = cases.q7(128)(cases.sliced(x))
    return q, scale.reshape(-1, scale.shape[-1]).t().contiguous().t(), scale


def scale_of_rows(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return cases.q3(cases.llama(heads(x), w))


def value_of_flattened(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = cases.llama(heads(x), w)
    return (*cases.q1_row(y), y)


TAKEN: dict[Callable[..., tuple[Tensor, ...]], str] = {
    static: "offset+static",
    static_value: "static+value",
    add_value: "add+tensor+value",
    residual_in_another_layout: "add+static",
    float32_sum: "add+tensor",
    flattened: "token",
    flattened_twice: "token",
    flattened_value: "token+value",
    flattened_before: "group128",
    split_into_groups: "static+value",
    activation: "tensor+value",
    packed: "packed+static",
    heads_joined: "tensor",
    scale_by_columns: "group128",
    scale_by_columns_twice: "add+group64",
    scale_both_ways: "packed+group128",
}


def inputs(batch: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch * length)
    x, r = (torch.randn(batch, length, HEADS * cases.H, generator=generator).to(BF16) for _ in "xr")
    return [x, r, torch.randn(cases.H, generator=generator).to(BF16)]


def compare(result: Checked) -> None:
    """The strides, and that no copy was added: the oracle has compared the bits."""
    for graph in result.oracle.graphs:
        size = {n.meta["val"].node.expr: 3 + 2 * i for i, n in enumerate(graph.before.graph.nodes) if symbolic(n)}
        given = []
        for node in graph.before.graph.nodes:
            if node.op == "placeholder":
                value = node.meta["val"]
                given.append(size[value.node.expr] if symbolic(node) else real(value, size))
        before, after = (fx.Interpreter(g).run(*given) for g in (graph.before, graph.after))
        for a, b in zip(before, after, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert copies(graph.after.graph) <= copies(graph.before.graph)


def symbolic(node: fx.Node) -> bool:
    return node.op == "placeholder" and isinstance(node.meta["val"], torch.SymInt)


def real(fake: Tensor, size: dict[object, int]) -> Tensor:
    shape = [size[s.node.expr] if isinstance(s, torch.SymInt) else s for s in fake.shape]
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(fake.dtype)


def copies(graph: fx.Graph) -> int:
    return sum(n.target in (torch.ops.aten.clone.default, torch.ops.aten.contiguous.default) for n in graph.nodes)


def run(fn: Callable[..., tuple[Tensor, ...]], sizes: str) -> FusionReport:
    result = checked(fn, verify=True)
    with torch.no_grad():
        for batch, length in ((2, 3),) if sizes == "static" else ((2, 3), (3, 5), (5, 2)):
            given = inputs(batch, length)
            if sizes == "dynamic":
                for tensor, dim in ((t, d) for t in given[:2] for d in (0, 1)):
                    torch._dynamo.mark_dynamic(tensor, dim)
            result.call(*given)
    assert len(result.reports) == 1
    assert result.oracle.identical
    assert result.report.unaccounted == 0
    ignores_assertions(result)
    compare(result)
    return result.report


@pytest.mark.parametrize("sizes", [pytest.param("static", marks=pytest.mark.slow), "dynamic"])
@pytest.mark.parametrize("fn", TAKEN, ids=lambda fn: fn.__name__)
def test_permuted(fn: Callable[..., tuple[Tensor, ...]], sizes: str) -> None:
    report = run(fn, sizes)
    assert [site.variant for site in report.sites] == [TAKEN[fn]]
    assert report.skipped == ()


@pytest.mark.parametrize(
    ("fn", "left"),
    [(scale_by_columns, 0), (scale_by_columns_twice, 1), (scale_both_ways, 1)],
    ids=["", "twice", "both"],
)
def test_transposed_scales_are_written_so(fn: Callable[..., tuple[Tensor, ...]], left: int) -> None:
    """By the op itself: as many copies are left as more than one layout or tensor demand."""
    result = checked(fn)
    with torch.no_grad():
        result.call(*inputs(2, 3))
    (graph,) = result.oracle.graphs
    assert copies(graph.after.graph) == left


@pytest.mark.parametrize("sizes", ["static", "dynamic"])
@pytest.mark.parametrize("fn", [scale_of_rows, value_of_flattened], ids=lambda fn: fn.__name__)
def test_values_and_scales_in_different_orders(fn: Callable[..., tuple[Tensor, ...]], sizes: str) -> None:
    """PyTorch's maxima are contiguous in the order of the indices, whatever the order of the tensor."""
    (site,) = run(fn, sizes).skipped
    assert site.reason.startswith("layout: ")
    assert "in that order" in site.reason


def test_no_guard_is_added() -> None:
    result = checked(add_value, level=0)  # the pass has not run on it
    given = inputs(2, 3)
    for tensor in given[:2]:
        torch._dynamo.mark_dynamic(tensor, 1)
    with torch.no_grad():
        result.call(*given)
    before = result.oracle.graphs[0].before
    environment = next(n.meta["val"] for n in before.graph.nodes if symbolic(n)).node.shape_env
    known = len(environment.guards)
    assert PassManager(config.options()).run(before.graph, True).replaced == {"rms_norm_quant": 1}
    assert len(environment.guards) == known
