"""What other matchers got wrong: near misses must be refused, with a reason, and never miscompiled."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx

from aiter_fusion import config
from aiter_fusion.passes.manager import PassManager
from aiter_fusion.passes.oracle import copy_graph
from aiter_fusion.passes.verify import same_bits
from support import cases
from support.checked import Checked, checked, fused
from support.hand_built import hand_built

BF16, F32 = torch.bfloat16, torch.float32


def inputs(*names: str, sizes: tuple[int, ...] = (4,)) -> list[Tensor]:
    return cases.tensors(names, sizes, BF16, "normal")


def norm_with(square: Callable[[Tensor], Tensor] = lambda h: h.pow(2).mean(-1, keepdim=True)) -> Callable[..., Tensor]:
    def call(x: Tensor, w: Tensor) -> Tensor:
        h = x.float()
        return w * (h * torch.rsqrt(square(h) + 1e-6)).to(x.dtype)

    return call


NOT_NORMS = {
    "mean in float64": norm_with(lambda h: h.pow(2).mean(-1, keepdim=True, dtype=torch.float64).float()),
    "another power": norm_with(lambda h: h.pow(3).mean(-1, keepdim=True)),
    "another axis": norm_with(lambda h: h.pow(2).mean(0, keepdim=True)),
    "two axes": norm_with(lambda h: h.pow(2).mean((0, 1), keepdim=True)),
    "a sum": norm_with(lambda h: h.pow(2).sum(-1, keepdim=True)),
    "eps with alpha=2": norm_with(
        lambda h: torch.add(h.pow(2).mean(-1, keepdim=True), torch.ones((), dtype=h.dtype), alpha=2)
    ),
    "a mean of another tensor": norm_with(lambda h: (h + 1).pow(2).mean(-1, keepdim=True)),
}


@pytest.mark.parametrize("name", NOT_NORMS)
def test_not_a_norm(name: str) -> None:
    result = fused(lambda x, w: cases.q1_row(NOT_NORMS[name](x, w)), *inputs("x", "w"))
    assert result.report.replaced == {}
    assert [site.reason.split(":")[0] for site in result.report.bare] == ["producer"]


def half_swish(x: Tensor) -> Tensor:
    g, u = x.chunk(2, -1)
    return (g * torch.sigmoid(g) * u.float()).to(x.dtype)


def half_silu(x: Tensor) -> Tensor:
    g, u = x.chunk(2, -1)
    return g / (torch.exp(-g) + 1) * u


def half_sigmoid_only(x: Tensor) -> Tensor:
    g, u = x.chunk(2, -1)
    return (g.float() * torch.sigmoid(g) * u.float()).to(x.dtype)


def broadcast_up(x: Tensor) -> Tensor:
    return F.silu(x[..., : cases.H] * 1) * (x[:1, cases.H :] * 1)


def swiglu_clamped_elsewhere(x: Tensor) -> Tensor:
    """Like GPT-OSS's, with bounds that are not opposite."""
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-5.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def swiglu_of_two_limits(x: Tensor) -> Tensor:
    gate, up = x[..., ::2].clamp(max=5.0), x[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def swiglu_of_another_gate(x: Tensor) -> Tensor:
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(up * 1.702))


def swiglu_rounded_sometimes(x: Tensor) -> Tensor:
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return ((up + 1).float() * (gate * torch.sigmoid(gate * 1.702)).float()).to(x.dtype)


SWIGLUS = [swiglu_clamped_elsewhere, swiglu_of_two_limits, swiglu_of_another_gate, swiglu_rounded_sometimes]


@pytest.mark.parametrize("act", [half_swish, half_silu, half_sigmoid_only, broadcast_up, *SWIGLUS])
def test_not_an_activation(act: Callable[[Tensor], Tensor]) -> None:
    """In half precision every step rounds."""
    assert fused(lambda x2: cases.q3(act(x2)), *inputs("x2")).report.replaced == {}


def test_interleaved_columns_of_an_odd_number() -> None:
    """Two even columns and one odd: up is broadcast."""

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        return cases.q3(F.silu(x[..., ::2]) * x[..., 1::2])

    assert fused(fn, torch.randn(4, 3).to(BF16)).report.replaced == {}


def test_columns_that_are_not_the_two_interleaved_parts() -> None:
    """Every other column, but of another part, or up to another end: two tensors to the op."""

    def fn(x: Tensor) -> tuple[Tensor, ...]:
        even, odd = x[..., ::2], x[..., 1::2]
        part = x[..., : cases.H : 2]
        return (*cases.q3(F.silu(even) * even), *cases.q3(F.silu(odd[..., :128]) * part))

    result = fused(fn, *inputs("x2"))
    assert result.variants == ["act_mul_quant:token"] * 2


def test_tensors_without_dimensions() -> None:
    def fn(x: Tensor, w: Tensor, a: Tensor) -> tuple[Tensor, ...]:
        return (*cases.q3(cases.llama(x, w)), F.silu(a) * a, F.silu(a) * w, cases.q3_tensor(a)[0])

    result = fused(fn, *inputs("x", "w"), torch.tensor(0.5, dtype=BF16), strict=True)
    assert result.variants == ["rms_norm_quant:token"]


def test_a_value_in_float64_is_left_alone() -> None:
    x, w = inputs("x", "w")
    for quantise in (cases.q3, lambda y: cases.q2_static(y, torch.full((1, 1), 0.02))):
        result = fused(lambda x, w, quantise=quantise: quantise(cases.llama(x, w)), x, w.double())
        assert result.report.replaced == {}


def q_wrong_axis(y: Tensor) -> tuple[Tensor, ...]:
    scale = y.abs().amax(-1).float() / 448.0  # [rows] broadcasts over columns where rows == columns
    return ((y.float() / scale).to(cases.FN), scale)


def q_columns(y: Tensor) -> tuple[Tensor, ...]:
    scale = y.abs().amax(0, keepdim=True).float() / 448.0
    return ((y.float() / scale).to(cases.FN), scale)


def q_signed(y: Tensor) -> tuple[Tensor, ...]:
    scale = y.amax(-1, keepdim=True).float() / 448.0
    return ((y.float() / scale).to(cases.FN), scale)


def q_of_other(y: Tensor) -> tuple[Tensor, ...]:
    scale = (y + 1).abs().amax(-1, keepdim=True).float() / 448.0
    return ((y.float() / scale).to(cases.FN), scale)


def q_floor_division(y: Tensor) -> tuple[Tensor, ...]:
    scale = y.abs().amax(-1, keepdim=True).float() / 448.0
    return (torch.div(y.float(), scale, rounding_mode="floor").to(cases.FN), scale)


def q_swapped_groups(y: Tensor) -> tuple[Tensor, ...]:
    groups = y.reshape(*y.shape[:-1], 2, 128)
    scale = groups.abs().amax(-1, keepdim=True).float() / 448.0
    return ((groups.float() / scale.flip(-2)).to(cases.FN).reshape(y.shape), scale)


NOT_QUANTISERS = {
    f.__name__: f for f in (q_wrong_axis, q_columns, q_signed, q_of_other, q_floor_division, q_swapped_groups)
}


@pytest.mark.parametrize("name", NOT_QUANTISERS)
def test_not_a_quantiser(name: str) -> None:
    """A square input, so that broadcasting along the wrong axis is possible."""
    x, w = inputs("x", "w", sizes=(cases.H,))
    result = fused(lambda x, w: NOT_QUANTISERS[name](cases.llama(x, w)), x, w)
    assert result.report.replaced == {}
    assert all(site.reason for site in result.report.sites)
    assert any(site.family == "fp8_quant" for site in result.report.bare)


def test_a_residual_with_alpha_stays_outside() -> None:
    def fn(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        summed = torch.add(r, x, alpha=2)
        return (*cases.q1_row(cases.llama(summed, w)), summed)

    result = fused(fn, *inputs("x", "r", "w"))
    assert result.variants == ["rms_norm_quant:token"]


def dtypes_of_the_sum(result: Checked) -> list[tuple[torch.dtype, torch.dtype]]:
    """(sum_dtype, residual_dtype) of every fused op with a residual."""
    calls = [n for g in result.oracle.graphs for n in g.after.graph.nodes if "rms_norm_quant.add" in str(n.target)]
    return [(call.args[2], call.args[3]) for call in calls]


@pytest.mark.parametrize(
    ("read", "residual_dtype"),
    [
        (lambda summed: (), F32),
        (lambda summed: (summed,), F32),
        (lambda summed: (summed.to(BF16),), BF16),
        (lambda summed: (summed.to(torch.float16).view(-1),), torch.float16),
        (lambda summed: (summed.to(BF16), summed * 2), F32),  # the rounded copy is made from the float32 sum
        (lambda summed: ((summed * 2).to(BF16),), F32),
        (lambda summed: (summed.to(BF16), *cases.q3(cases.no_weight(summed, summed))), F32),
    ],
    ids=["unread", "wide", "rounded", "half_behind_a_view", "both", "scaled", "another_norm"],
)
def test_what_is_read_of_a_float32_sum(read: Callable[..., tuple[Tensor, ...]], residual_dtype: torch.dtype) -> None:
    """The op returns the sum as the graph passes it on, and no addition remains beside it."""

    def fn(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        summed = x.float() + r.float()
        return (*cases.q3(cases.llama(summed, w).to(BF16)), *read(summed))

    result = fused(fn, *inputs("x", "r", "w"))
    assert result.variants[0] == "rms_norm_quant:add+token"
    assert dtypes_of_the_sum(result) == [(F32, residual_dtype)]
    assert "aten.add.Tensor" not in result.targets


def test_operands_of_three_dtypes() -> None:
    """One operand converted by the graph, the other by type promotion, in either order."""
    x, r, w = inputs("x", "r", "w")
    for fn in (
        lambda x, r, w: cases.q3(cases.llama(x.float() + r, w)),
        lambda x, r, w: cases.q3(cases.llama(x + r, w)),
        lambda x, r, w: cases.q3(cases.llama(r + x.to(BF16), w)),
    ):
        result = fused(fn, x.to(torch.float16), r, w)
        assert result.variants == ["rms_norm_quant:add+token"]


def test_a_residual_in_float64_stays_outside() -> None:
    def fn(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return cases.q1_row(cases.llama((r.double() + x).float(), w))

    assert fused(fn, *inputs("x", "r", "w")).variants == ["rms_norm_quant:token"]


def test_a_broadcast_residual_stays_outside() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return cases.q1_row(cases.llama(x + w, w))

    assert fused(fn, *inputs("x", "w")).variants == ["rms_norm_quant:token"]


@pytest.mark.parametrize(
    "producer",
    [
        lambda x, g, s: cases.layer(x) * (1 + g) + s.float(),
        lambda x, g, s: cases.layer(x).float() * g + s,
        lambda x, g, s: cases.layer(x) * g.float() + s,
        lambda x, g, s: (cases.layer(x) * g).float() + s,
        lambda x, g, s: ((cases.layer(x) * g).float() + s).to(BF16),
        lambda x, g, s: cases.llama(x, g[0, 0]).float() * torch.sigmoid(x),
        lambda x, g, s: cases.llama(x, g[0, 0]) * torch.sigmoid(x).float(),
        lambda x, g, s: (cases.llama(x, g[0, 0]) * torch.sigmoid(x).float()).to(BF16),
    ],
)
def test_an_operation_in_float32_because_one_operand_was_converted(producer: Callable[..., Tensor]) -> None:
    """A conversion is left out only where the others' dtype says as much; otherwise it stays, or the graph does."""
    made = cases.tensors(("x", "g", "s"), (2, 3), BF16, "normal")
    fused(lambda x, g, s: cases.q3(producer(x, g, s)), *made)


def test_equal_outputs_stay_two_tensors() -> None:
    """return x + 1, x + 1: nothing is merged that is not part of a site."""
    result = fused(lambda x: (x + 1, x + 1), *inputs("x"))
    assert result.targets.count("aten.add.Tensor") == 2
    assert result.report.sites == ()


def test_equal_quantisers_that_are_returned_stay_two_tensors() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = cases.llama(x, w)
        return (*cases.q3(y), *cases.q3(y))

    x, w = inputs("x", "w")
    result = checked(fn)
    with torch.no_grad():
        q1, s1, q2, s2 = result.call(x, w)
    assert result.oracle.identical
    assert result.variants == ["rms_norm_quant:token"]
    assert len({t.untyped_storage().data_ptr() for t in (q1, s1, q2, s2)}) == 4


def with_write(fn: Callable, names: tuple[str, ...], place: Callable[[fx.Graph], tuple[fx.Node, fx.Node]]) -> None:
    """Compile ``fn``, write to a node before another one (``place`` gives both), and compare the bits."""
    given = inputs(*names)
    comparison = checked(fn)
    with torch.no_grad():
        comparison.call(*given)
    graph = copy_graph(comparison.oracle.graphs[0].before.graph)
    written, before = place(graph)
    with graph.inserting_before(before):
        write = graph.call_function(torch.ops.aten.mul_.Tensor, (written, 2))
    write.meta["val"] = written.meta["val"]
    rewritten = copy_graph(graph)
    assert PassManager(config.options()).run(rewritten, True).replaced
    results = [fx.Interpreter(torch.nn.Module(), graph=g).run(*(a.clone() for a in given)) for g in (graph, rewritten)]
    for want, have in zip(*results, strict=True):
        assert same_bits(want, have)


def test_a_write_to_one_of_two_equal_results() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = cases.llama(x, w)
        (q1, s1), (q2, s2) = cases.q3(y), cases.q3(y)
        return q1.float() + 1, q2.float() + 2, s1 + 1, s2 + 1

    def place(graph: fx.Graph) -> tuple[fx.Node, fx.Node]:
        results = graph.output_node().all_input_nodes
        return results[2].all_input_nodes[0], min(results[2:])

    with_write(fn, ("x", "w"), place)


def test_a_write_before_a_site_whose_input_another_site_returns() -> None:
    """The first site's residual takes the place of the sum, earlier than the sum was; the second must not follow it."""

    def fn(x: Tensor, r: Tensor, w: Tensor, w2: Tensor) -> tuple[Tensor, ...]:
        summed = r + x
        return (*cases.q3(cases.llama(summed, w)), *cases.q3(cases.llama(summed, w2)), summed)

    def place(graph: fx.Graph) -> tuple[fx.Node, fx.Node]:
        placeholders = [n for n in graph.nodes if n.op == "placeholder" and n.meta["val"].dim() == 1]
        return placeholders[-1], next(n for n in graph.nodes if n.op == "call_function")

    with_write(fn, ("x", "r", "w", "w2"), place)


def test_overlapping_forms_count_once() -> None:
    """The part of an R1 norm before its weight is itself an R4 norm: one record."""
    result = fused(lambda x, w: cases.q1_row(cases.llama(x, w)), *inputs("x", "w"))
    assert [(s.family, s.records) for s in result.report.sites] == [("rms_norm_quant", 2)]


def test_two_weights_on_one_normalised_tensor() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        h = x.float()
        h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return (*cases.q3(w * h), *cases.q3((w + 1) * h))

    assert fused(fn, *inputs("x", "w")).variants == ["rms_norm_quant:token"] * 2


def test_equal_quantisers_of_which_one_returns_its_scale() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = cases.llama(x, w)
        (q1, scale), (q2, _), (q3, other) = cases.q4(y), cases.q4(y), cases.q4(y)
        return q1, scale, q2.float() + 1, q3.float() + 2, other * 2

    assert fused(fn, *inputs("x", "w")).variants == ["rms_norm_quant:token"]


def test_a_normalised_tensor_quantised_before_and_after_its_weight() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        h = cases.no_weight(x, w)
        return (*cases.q3(h), *cases.q3(w * h))

    assert fused(fn, *inputs("x", "w")).variants == ["rms_norm_quant:token+value", "rms_norm_quant:token"]


def test_a_view_between_residual_and_norm() -> None:
    def fn(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        summed = r + x
        q, scale = cases.q3(cases.llama(summed.reshape(-1, cases.H), w))
        return q, scale, summed

    assert fused(fn, *inputs("x", "r", "w", sizes=(2, 3))).variants == ["rms_norm_quant:add+token"]


def test_a_functional_higher_order_operator_in_between() -> None:
    """cond writes to nothing, whatever lies inside it."""

    def fn(x: Tensor, r: Tensor, w: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        y = cases.llama(r + x, w)
        q1, s1 = cases.q7(64)(y)
        z = torch.cond(p, torch.sin, torch.cos, (s1,))
        q2, s2 = cases.q7(64)(y)
        return q1.float() + q2.float(), s1 + s2, z

    graph = checked(fn)
    with torch.no_grad():
        graph.call(*inputs("x", "r", "w"), torch.tensor(True))
    assert graph.oracle.identical
    assert graph.variants == ["rms_norm_quant:add+group64"]


def test_two_quantisers_of_different_kinds() -> None:
    """One is fused and keeps the value; the other reads that value and says what it lost to."""

    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = cases.llama(x, w)
        return (*cases.q3(y), *cases.q7(128)(y))

    result = fused(fn, *inputs("x", "w"))
    assert result.variants == ["rms_norm_quant:token+value"]
    assert [site.reason.split(":")[0] for site in result.report.skipped] == ["starved"]


def test_a_norm_whose_output_is_also_read_after_a_view() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = cases.llama(x, w)
        flat = y.reshape(-1, y.shape[-1])
        return (*cases.q3(flat), flat.reshape(y.shape) + 1)

    assert fused(fn, *inputs("x", "w", sizes=(2, 3))).variants == ["rms_norm_quant:token+value"]


def test_a_scale_for_several_rows() -> None:
    """As of heads that are quantised together; a scale for a row and a half is none."""

    def fn(x: Tensor, w: Tensor, across: int) -> tuple[Tensor, ...]:
        return cases.q3(cases.llama(x, w).reshape(-1, across))

    given = inputs("x", "w", sizes=(6,))
    assert fused(lambda x, w: fn(x, w, 2 * cases.H), *given).variants == ["rms_norm_quant:token"]
    (site,) = fused(lambda x, w: fn(x, w, 3 * cases.H // 2), *given).report.bare[1:]
    assert site.reason == "producer: scales are for blocks of 384, which its rows of 256 do not divide into"


ROWS_TAKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "the last": lambda y: y[:, -1:],
    "the last but one, without its dimension": lambda y: y[:, -2],
    "every other": lambda y: y[:, ::2],
    "of all batches": lambda y: y.reshape(-1, cases.H)[1:],
    "twice": lambda y: y[1:][:, 1:],
    "and viewed": lambda y: y[:, -1:].flatten(0, 1),
}


def test_rows_taken_out_of_a_norm() -> None:
    """They are taken out of what is normed: the ops see no other row."""

    def fn(x: Tensor, r: Tensor, w: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        results = []
        for number, take in enumerate(ROWS_TAKEN.values()):
            results += cases.q1_row(take(cases.llama(x, w, 1e-6 * (number + 1))))
        # the sum is returned, so it is computed of all rows
        summed = r + x
        results += [*cases.q1_row(cases.llama(summed, w)[:, -1:]), summed]
        return (*results, *cases.q3(cases.sliced(x2).flatten(0, 1)[2:]), *cases.q3_tensor(cases.gemma(x, w)[:, -1]))

    result = fused(fn, *inputs("x", "r", "w", "x2", sizes=(2, 5)))
    variants = ["rms_norm_quant:token"] * (len(ROWS_TAKEN) + 1)
    assert sorted(result.variants) == ["act_mul_quant:packed+token", "rms_norm_quant:offset+tensor", *variants]
    (reason,) = {site.reason for site in result.report.sites} - {""}
    assert re.fullmatch(
        r"without residual_add: rows: add\w*, of which slice_\d+ takes some, is read elsewhere too", reason
    )
    (graph,) = result.oracle.graphs
    calls = [n for n in graph.after.graph.nodes if "aiter_fusion" in str(n.target)]
    assert len(calls) == len(ROWS_TAKEN) + 3
    assert all(call.args[0].meta["val"].shape[:-1].numel() < 10 for call in calls)


def test_rows_taken_out_of_any_number() -> None:
    """One graph serves them all, and nothing is assumed of their number."""

    def fn(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        flat = cases.llama(x, w).reshape(-1, cases.H)
        return (*cases.q3(flat[x.shape[1] :]), *cases.q1_row(cases.olmo2(r + x, w)[:, -1:]))

    result = checked(fn, verify=True)
    with torch.no_grad():
        for size in (5, 2):
            given = inputs("x", "r", "w", sizes=(2, size))
            torch._dynamo.mark_dynamic(given[0], 1)
            torch._dynamo.mark_dynamic(given[1], 1)
            result.call(*given)
    assert result.oracle.identical
    assert [made.replaced for made in result.reports] == [{"rms_norm_quant": 2}]


def test_rows_that_stay_with_the_others() -> None:
    """Columns are no rows; a copy of all rows is no view of some. A norm that is read elsewhere the graph computes too,
    of all rows."""

    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        value = cases.llama(x, w)
        return (
            *cases.q1_row(cases.llama(x, w, 1e-5)[..., ::2]),
            *cases.q1_row(cases.llama(x, w, 1e-4)[..., 0]),
            *cases.q1_row(value[:, -1:]),
            value,
            *cases.q1_row(cases.llama(x.transpose(0, 1), w, 1e-3).reshape(-1, cases.H)[2:]),
        )

    result = fused(fn, *inputs("x", "w", sizes=(2, 5)))
    assert result.report.replaced == {"rms_norm_quant": 1}
    assert result.targets.count("aten.rsqrt.default") == 4
    reasons = sorted(site.reason for site in result.report.sites if "quant" in site.family and site.reason)
    assert [reason.split(":")[0] for reason in reasons] == ["layout", "producer", "producer"]
    assert "copied" in reasons[0]


@pytest.mark.parametrize("read", [0, 1, 2])
@pytest.mark.parametrize("count", [2, 3])
def test_several_static_scales_of_one_value(count: int, read: int) -> None:
    """As AMD Quark gives q, k and v, and gate and up, each their own: one op, whose kernel reads x once."""

    def fn(x: Tensor, r: Tensor, w: Tensor, *scales: Tensor) -> tuple[Tensor, ...]:
        summed = x + r
        value = cases.llama(summed, w)
        given = [*scales, *scales[: read % 2]]  # one of them maybe twice
        after = (value,) if read == 2 else ()
        return (*(q for scale in given for q in cases.q2_static(value, scale)), summed, *after)

    scales = [torch.full((1, 1), 0.02 * (n + 1)) for n in range(count)]
    result = fused(fn, *inputs("x", "r", "w"), *scales)
    (site,) = result.report.sites
    assert (site.status, site.records) == ("replaced", 3 + count + read % 2 - 1)
    assert result.variants == [f"rms_norm_quant:add+static{count}" + "+value" * (read == 2)]


def test_more_static_scales_than_an_op_takes() -> None:
    """One fused op would leave the others to read its value from memory: Inductor's kernel makes all codes at once."""

    def fn(x: Tensor, w: Tensor, *scales: Tensor) -> tuple[Tensor, ...]:
        value = cases.llama(x, w)
        return tuple(q for scale in scales for q in cases.q2_static(value, scale))

    result = fused(fn, *inputs("x", "w"), *[torch.full((1, 1), 0.02 * n) for n in (1, 2, 3, 4)])
    assert [(site.family, site.status) for site in result.report.sites] == [("rms_norm_quant", "skipped")]
    assert result.report.sites[0].reason == "overload: rms_norm_quant has none with static4"
    (graph,) = result.oracle.graphs
    assert str(graph.after.graph) == str(graph.before.graph)


@pytest.mark.parametrize("sizes", [(4,), (2, 3), (2, 2, 3)], ids=str)
def test_views_between(sizes: tuple[int, ...]) -> None:
    """Flattened, unsqueezed and split between norm and quantiser, and on the scale."""

    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = cases.llama(x, w).unsqueeze(0).reshape(-1, cases.H)
        q, scale = cases.q3(y)
        return q.view(*x.shape), scale.squeeze(-1).unsqueeze(0)

    assert fused(fn, *inputs("x", "w", sizes=sizes)).variants == ["rms_norm_quant:token"]


def test_a_view_that_changes_the_rows_is_a_boundary() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return cases.q3(cases.llama(x, w).transpose(0, 1).reshape(-1, 2 * cases.H))

    result = fused(fn, *inputs("x", "w", sizes=(4, 2)))
    assert result.report.replaced == {}


def test_a_permuted_norm_whose_scales_are_not_is_left_alone() -> None:
    """The original's values lie in the permuted order, its scales in that of the indices; the op's in one order."""

    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return cases.q3(cases.llama(x.transpose(0, 1), w))

    result = fused(fn, *inputs("x", "w", sizes=(4, 3)))
    assert result.report.replaced == {}
    assert [site.reason.split(":")[0] for site in result.report.skipped] == ["layout"]


def test_a_reader_before_the_last_input() -> None:
    """The sum is read before the weight exists: the norm is fused, the addition is not."""
    graph, args = hand_built()
    manager = PassManager(config.options())
    report = manager.run(graph.graph, True)
    assert [site.variant for site in report.sites] == ["token"]
    graph.recompile()
    graph.graph.lint()
    for want, have in zip(hand_built()[0](*args), graph(*args), strict=True):
        assert same_bits(want, have)


def test_a_write_inside_a_site() -> None:
    graph, args = hand_built("inside")
    before = str(graph.graph)
    report = PassManager(config.options()).run(graph.graph, True)
    assert [site.reason.split(":")[0] for site in report.skipped] == ["mutation"]
    assert str(graph.graph) == before
    assert len(graph(*args)) == 3


def test_a_write_before_a_site() -> None:
    """The op must not move in front of it: the addition stays where it is, and the norm is fused."""
    graph, args = hand_built("before")
    report = PassManager(config.options()).run(graph.graph, True)
    assert [site.variant for site in report.sites] == ["token"]
    graph.recompile()
    want = hand_built("before")[0](*(a.clone() for a in args))
    for expected, have in zip(want, graph(*args), strict=True):
        assert same_bits(expected, have)


def test_nothing_replaced_is_the_identical_graph() -> None:
    result = fused(lambda x, w: F.silu(cases.llama(x, w)), *inputs("x", "w"))
    comparison = result.oracle.graphs[0]
    assert str(comparison.before.graph) == str(comparison.after.graph)
    assert [(s.family, s.reason.split(":")[0]) for s in result.report.bare] == [("rms_norm", "unquantised")]


def test_true_meta() -> None:
    """Every new node's fake has the shape, strides and dtype of the real value."""
    for case, quant in ((cases.FUSION["add_norm_value"], cases.q7(64)), (cases.FUSION["add_norm"], cases.q1_tensor)):
        given = inputs(*case.inputs, sizes=(2, 3))
        result = fused(case.call(cases.llama, quant), *given)
        module = result.oracle.graphs[0].after

        class Compare(fx.Interpreter):
            def run_node(self, n: fx.Node) -> object:
                real, fake = super().run_node(n), n.meta.get("val")
                if isinstance(real, Tensor) and n.op == "call_function":
                    assert isinstance(fake, Tensor), n
                    assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype), n
                return real

        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        assert len(placeholders) == len(given)
        Compare(module).run(*given)


def test_training_graphs_are_left_alone() -> None:
    x, w = inputs("x", "w")
    w.requires_grad_()

    def fn(x: Tensor, w: Tensor) -> Tensor:
        q, scale = cases.q3(cases.llama(x, w))
        return q.float().sum() + scale.sum()

    result = checked(fn)
    result.call(x, w).backward()
    forward = result.reports[0]
    assert forward.replaced == {}
    assert [site.reason.split(":")[0] for site in forward.skipped] == ["training"]
    assert "training graph" in forward.note
    assert w.grad is not None


def test_unknown_arithmetic_names_the_node() -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y = cases.llama(x, w)
        scale = torch.sqrt(y.abs().amax(-1, keepdim=True).float())
        return (y.float() / scale).to(cases.FN), scale

    result = fused(fn, *inputs("x", "w"))
    unknown = [site for site in result.report.bare if site.variant == "unknown"]
    assert len(unknown) == 1
    assert unknown[0].reason.startswith("unknown: ")
    assert "sqrt" in unknown[0].reason
