"""Several records as one op: FP8 linear layers that read one value, which of them go together, and what is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import aiter_fusion
from aiter_fusion import providers, report
from aiter_fusion.config import options
from aiter_fusion.passes.manager import PassManager
from aiter_fusion.passes.oracle import copy_graph
from support import cases, models
from support.checked import Checked, checked, fused

BF16, FN = torch.bfloat16, torch.float8_e4m3fn
K = 64


@pytest.fixture(autouse=True)
def _scaled_rows() -> None:
    models.need_scaled_rows()


def tensors(*widths: int, k: int = K) -> list[Tensor]:
    """A value, then a weight ``[N, K]`` and its scale for each width."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(5, k, generator=generator).to(BF16)]
    for n in widths:
        made += [torch.randn(n, k, generator=generator).to(FN), torch.rand(1, n, generator=generator) * 0.01]
    return made


def product(*operands: Tensor, fast: bool = True, **options: Any) -> Tensor:
    """Of a value and its scale, and of a weight ``[N, K]`` and its scale."""
    q, scale, w, s = operands
    options = {"out_dtype": BF16, "use_fast_accum": fast} | options
    return torch.ops.aten._scaled_mm(q, w.t(), scale, s, **options)


def pairs(given: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(given[::2], given[1::2], strict=True))


def linear(made: report.FusionReport) -> list[report.Site]:
    return [site for site in made.sites if site.family == "fp8_linear"]


def products(result: Checked) -> list[int]:
    """Of the sites that are replaced, how many products each has."""
    assert [t for t in result.targets if "scaled_mm" in t] == []
    return [site.products for site in linear(result.report) if site.status == report.REPLACED]


def once(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Quantised once, multiplied with every weight."""
    q, scale = cases.q3(cases.llama(x, x[0]))
    return tuple(product(q, scale, w, s) for w, s in pairs(weights))


def each(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """As torchao does: quantised for every weight, each result used before the next."""
    y = cases.llama(x, x[0])
    return tuple(product(*cases.q3(y), w, s).relu() for w, s in pairs(weights))


def each_bare(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    y = x * 2
    return tuple(product(*cases.q3(y), w, s).relu() for w, s in pairs(weights))


def each_unknown(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """By a quantiser that no form knows."""

    def quantise() -> tuple[Tensor, Tensor]:
        scale = torch.sqrt(x.abs().amax(-1, keepdim=True).float())
        return (x.float() / scale).to(FN), scale

    return tuple(product(*quantise(), w, s) for w, s in pairs(weights))


@pytest.mark.parametrize("fn", [once, each, each_bare, each_unknown])
def test_products_of_one_value_are_one_op(fn: Callable[..., Any]) -> None:
    result = fused(fn, *tensors(48, 16, 32), verify=True, strict=True)
    assert products(result) == [3]
    assert "3 products in 1 launches" in result.report.summary()
    assert "rowwise, 3 products" in str(result.report)
    if fn is not each_bare and fn is not each_unknown:
        return
    casts = [n for n in result.oracle.graphs[0].after.graph.nodes if n.meta["val"] is not None and n.args[1:] == (FN,)]
    assert len(casts) == 1, "of equal quantisers one is left"


def test_what_is_not_equal_is_not_joined() -> None:
    """Another value, scale, accumulation or result."""

    def call(x: Tensor, w: Tensor, s: Tensor) -> list[Tensor]:
        q, scale = cases.q3(x * 2)
        other, of_other = cases.q3(x * 3)
        return [
            product(q, scale, w, s),
            product(other, of_other, w, s),
            product(q, of_other, w, s),
            product(q, scale, w, s, fast=False),
            product(q, scale, w, s, out_dtype=torch.float32),
        ]

    assert products(fused(call, *tensors(48), verify=True)) == [1] * 5


def test_eight_at_most() -> None:
    assert products(fused(once, *tensors(*[16] * 11), verify=True)) == [8, 3]


def test_random_values_are_not_equal() -> None:
    def call(x: Tensor, w: Tensor, s: Tensor, w2: Tensor, s2: Tensor) -> list[Tensor]:
        return [product(*cases.q3(torch.nn.functional.dropout(x, 0.5)), *of) for of in ((w, s), (w2, s2))]

    result = checked(call)
    with torch.no_grad():
        result.call(*tensors(48, 16))
    assert products(result) == [1, 1]


def test_tied_weights() -> None:
    """One weight for two values is in two ops; one weight twice for one value is one product, and its results are two
    tensors."""

    def call(x: Tensor, w: Tensor, s: Tensor, w2: Tensor, s2: Tensor) -> list[Tensor]:
        values = x * 2, x * 3
        made = [product(*cases.q3(value), w, s) for value in values]
        return [*made, product(*cases.q3(values[0]), w, s), product(*cases.q3(values[1]), w2, s2)]

    result = fused(call, *tensors(48, 16), verify=True)
    assert products(result) == [1, 2]
    with torch.no_grad():
        first, _, again, _ = result.call(*tensors(48, 16))
    assert first.data_ptr() != again.data_ptr()


class Layers(nn.Module):
    """A weight in rows with a bias, one that is stored transposed, and one by ``_scaled_mm_v2``, as constants."""

    def __init__(self) -> None:
        super().__init__()
        _, self.w, self.s, w2, self.s2, self.w3, self.s3 = tensors(48, 16, 32)
        self.transposed, self.bias = w2.t(), torch.ones(48, dtype=BF16)

    def forward(self, x: Tensor) -> list[Tensor]:
        from torch.nn.functional import ScalingType, scaled_mm

        rows = ScalingType.RowWise
        (q, scale), aten = cases.q3(cases.llama(x, x[0])), torch.ops.aten
        return [
            product(q, scale, self.w, self.s, bias=self.bias, fast=False),
            aten._scaled_mm(q, self.transposed, scale, self.s2, out_dtype=BF16),
            scaled_mm(q, self.w3.t(), scale, rows, self.s3, rows, output_dtype=BF16),
        ]


def test_however_weights_are_given() -> None:
    """Nothing is copied: what the op reads are views of the weights."""
    result = fused(Layers(), tensors()[0], verify=True, strict=True)
    assert products(result) == [3]
    (call,) = [n for n in result.oracle.graphs[0].after.graph.nodes if "fp8_linear" in str(n.target)]
    assert [w.meta["val"].stride() for w in call.args[1]] == [(1, K)] * 3
    assert [None if bias is None else bias.op for bias in call.args[4]] == ["placeholder", None, None]
    assert "aten.clone.default" not in result.targets


def test_scales_of_tensors_by_both_calls() -> None:
    def call(x: Tensor, w: Tensor, w2: Tensor, s: Tensor) -> list[Tensor]:
        from torch.nn.functional import ScalingType, scaled_mm

        q, scale = cases.q3_tensor(x * 2)
        whole = ScalingType.TensorWise
        return [product(q, scale, w, s, fast=False), scaled_mm(q, w2.t(), scale, whole, s, whole, output_dtype=BF16)]

    x, w, _, w2, _ = tensors(48, 16)
    result = fused(call, x, w, w2, torch.tensor(0.5), verify=True)
    assert products(result) == [2]
    assert linear(result.report)[0].variant == "tensorwise"


class Block(nn.Module):
    """The linear layers of a decoder layer, and a head, with what quantises and reads each."""

    def __init__(self, size: int = 256) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(size), nn.RMSNorm(size)
        self.q, self.k, self.v, self.gate, self.up = (nn.Linear(size, size) for _ in range(5))
        self.o, self.down, self.head = nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, 128)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        x = x + self.o(self.q(y).relu() * self.k(y).relu() + self.v(y))
        y = self.second(x)
        return self.head(self.down(nn.functional.silu(self.gate(y)) * self.up(y)) * 2)


def of_torchao(quantisation: str) -> nn.Module:
    torch.manual_seed(0)
    model = Block().to(BF16).eval()
    models.QUANTISATIONS[quantisation](model)
    return model


def again(result: Checked, **changed: Any) -> report.FusionReport:
    """What becomes of the graph that has been captured, with other options."""
    (captured,) = result.oracle.graphs
    return PassManager(options(**changed)).run(copy_graph(captured.before.graph), True)


@pytest.mark.parametrize("quantisation", ["PerRow", "PerTensor"])
def test_a_decoder_layer(quantisation: str) -> None:
    """q + k + v, o, gate + up, down, the head; o reads a sum. Without them the other counts are the same."""
    x = torch.randn(2, 3, 256).to(BF16)
    others = {"rms_norm_quant": 2, "act_mul_quant": 1, "add_quant": 1}
    result = fused(of_torchao(quantisation), x)
    assert result.report.replaced == {**others, "fp8_linear": 5}
    assert products(result) == [3, 1, 2, 1, 1]
    without = again(result, disable="fp8_linear")
    assert without.replaced == others
    assert [site.products for site in linear(without)] == [3, 1, 2, 1, 1]
    assert {site.reason for site in linear(without)} == {"disabled: fp8_linear is in 'disable'"}


def test_torchao_s_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their product exists where Triton does; here one of the same name and arguments takes its place."""
    from torchao.quantization.quantize_.workflows.float8 import float8_tensor

    library = torch.library.Library("ao", "FRAGMENT")
    library.define("blockwise_fp8_gemm(Tensor a, Tensor a_s, Tensor b, Tensor b_s, int block_size=128) -> Tensor")
    library.impl("blockwise_fp8_gemm", lambda *given: models.blockwise_gemm(*given[:4], 128), "CPU")
    library.impl("blockwise_fp8_gemm", lambda a, a_s, b, *_: a.new_empty(a.shape[0], b.shape[0], dtype=BF16), "Meta")
    try:
        monkeypatch.setattr(float8_tensor, "blockwise_fp8_gemm", torch.ops.ao.blockwise_fp8_gemm.default)
        monkeypatch.setattr(models, "_run_blockwise_gemm_on_a_cpu", lambda: None)
        model, x = of_torchao("PerBlock"), torch.randn(2, 3, 256).to(BF16)
        result = checked(model, verify=True, dynamic=True)
        with torch.no_grad():
            result.call(x)
        exact = again(result, numerics="exact")
    finally:
        library._destroy()
    assert result.report.replaced == {"rms_norm_quant": 2, "act_mul_quant": 1, "add_quant": 1, "fp8_linear": 5}
    sites = linear(result.report)
    assert [(site.variant, site.products) for site in sites] == [("blockwise", n) for n in (3, 1, 2, 1, 1)]
    refused = {site.reason for site in linear(exact)}
    assert refused == {"numerics: reference: it does not keep the graph's roundings"}


def test_any_number_of_rows() -> None:
    """One compiled graph, without a guard on the rows, is the original's for each."""
    compiled = torch.compile(each, backend=aiter_fusion.Backend(strict=True, expect={"fp8_linear": 1}), dynamic=None)
    oracle = checked(each, dynamic=None)
    _, *weights = tensors(48, 16)
    for rows in (5, 3, 17, 128):
        given = torch.randn(rows, K, generator=torch.Generator().manual_seed(rows)).to(BF16)
        torch._dynamo.mark_dynamic(given, 0)
        with torch.no_grad():
            want = each(given, *weights)
            assert all(map(torch.equal, oracle.call(given, *weights), want))
            for a, b in zip(compiled(given, *weights), want, strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                assert (a.float() - b.float()).norm() <= 2**-6 * b.float().norm()
    assert (len(aiter_fusion.reports()), len(oracle.reports)) == (1, 1)
    assert oracle.oracle.identical


# ---- Order and writes -------------------------------------------------------------------------------------------


def test_a_scale_that_is_computed_from_another_product() -> None:
    """The second is there only when the first has been read; the third goes with the first."""

    def call(x: Tensor, w: Tensor, s: Tensor, w2: Tensor, s2: Tensor, w3: Tensor, s3: Tensor) -> list[Tensor]:
        q, scale = cases.q3(cases.llama(x, x[0]))
        first = product(q, scale, w, s)
        second = product(q, scale, w2, s2 * first.float().abs().amax())
        return [first, second, product(q, scale, w3, s3)]

    result = fused(call, *tensors(48, 16, 32), verify=True, strict=True)
    assert products(result) == [2, 1]
    one, other = linear(result.report)
    assert one.reason == ""
    assert other.reason.startswith("without _scaled_mm: order: convert_element_type_")
    assert " reads _scaled_mm before mul" in other.reason


def hand_built(write: str, is_read: bool) -> tuple[fx.GraphModule, list[Tensor]]:
    """Three products of one value; before the second one something that one of them reads is written to."""
    aten = torch.ops.aten
    x, *weights = tensors(48, 16, 32)
    args = [x.to(FN), torch.ones(5, 1), *weights]
    names = ["q", "scale", "w", "s", "w2", "s2", "w3", "s3"]
    graph = fx.Graph()

    def call(target: Callable, *operands: Any) -> fx.Node:
        node = graph.call_function(target, operands)
        node.meta["val"] = target(*(o.meta["val"] if isinstance(o, fx.Node) else o for o in operands))
        return node

    nodes = {}
    for name, value in zip(names, args, strict=True):
        nodes[name] = graph.placeholder(name)
        nodes[name].meta["val"] = value.clone()
    results = []
    for index, (w, s) in enumerate((("w", "s"), ("w2", "s2"), ("w3", "s3"))):
        if index == 1 and write:
            call(aten.mul_.Tensor, nodes[write], 2)
        weight = call(aten.permute.default, nodes[w], [1, 0])
        operands = (nodes["q"], weight, nodes["scale"], nodes[s], None, None, BF16)
        results.append(call(aten._scaled_mm.default, *operands))
        results[-1] = call(aten.relu.default, results[-1]) if is_read else results[-1]
    graph.output(tuple(results))
    return fx.GraphModule(nn.Module(), graph), args


# Whether results are read at once, what is written to, and the products of each op. The op may go after the write where
# no result is read before, and all products read the same before it.
WRITES = {
    (False, ""): [3],
    (False, "s"): [3],
    (False, "s2"): [3],
    (False, "scale"): [1, 2],
    (True, ""): [3],
    (True, "s"): [3],
    (True, "s2"): [1, 2],
    (True, "s3"): [1, 2],
    (True, "scale"): [1, 2],
}


@pytest.mark.parametrize(("is_read", "write"), WRITES)
def test_a_write_between_products(is_read: bool, write: str) -> None:
    """The op computes with the values that each product would have read."""
    before, args = hand_built(write, is_read)
    after = fx.GraphModule(before, copy_graph(before.graph))
    made = PassManager(options()).run(after.graph, True)
    after.graph.lint()
    want = fx.Interpreter(before).run(*[a.clone() for a in args])
    have = fx.Interpreter(after).run(*[a.clone() for a in args])
    assert all(map(torch.equal, want, have))
    sites = linear(made)
    assert {site.status for site in sites} == {report.REPLACED}
    assert sorted(site.products for site in sites) == WRITES[is_read, write]
    why = "without _scaled_mm_default: mutation: mul__tensor (aten.mul_.Tensor) writes to a tensor of this site"
    assert [site.reason for site in sites if site.reason] == [why] * (len(sites) - 1)


# ---- Reasons ----------------------------------------------------------------------------------------------------


def sites(**options: Any) -> Iterator[report.Site]:
    x, *weights = tensors(48, 16, 32)
    yield from linear(fused(once, x, *weights, **options).report)


def refusing(patch: pytest.MonkeyPatch, **changes: Any) -> None:
    patch.setitem(providers.PROVIDERS, "reference", replace(providers.PROVIDERS["reference"], **changes))


def test_level_and_names() -> None:
    for level in (1, 2):
        (site,) = sites(level=level)
        assert (site.reason, site.products) == (f"level: needs level 3, this is level {level}", 3)
    assert [site.status for site in sites(level=1, enable="fp8_linear", numerics="exact")] == [report.REPLACED]
    assert [site.reason for site in sites(disable="fp8_linear")] == ["disabled: fp8_linear is in 'disable'"]


@pytest.mark.parametrize("code", ["slower", "unmeasured"])
def test_what_is_not_known_to_be_faster_stays(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, **{code: lambda op, arguments: "7 rows" if op.family == "fp8_linear" else None})
    (site,) = sites()
    assert (site.status, site.reason, site.products) == (report.SKIPPED, f"{code}: reference: 7 rows", 3)
    assert [site.status for site in sites(provider="reference")] == [report.REPLACED]


def test_numerics(monkeypatch: pytest.MonkeyPatch) -> None:
    refusing(monkeypatch, inexact=frozenset({"fp8_linear"}))
    (site,) = sites(numerics="exact")
    assert site.reason == "numerics: reference: it does not keep the graph's roundings"
    assert [site.status for site in sites()] == [report.REPLACED]


def test_products_that_a_provider_refuses_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(op: Any, arguments: Any) -> str | None:
        narrow = op.family == "fp8_linear" and any(w.shape[1] == 16 for w in arguments["weights"])
        return "N is 16" if narrow else None

    refusing(monkeypatch, refuse=refuse)
    taken, left = sites()
    assert (taken.status, taken.products) == (report.REPLACED, 2)
    assert (left.status, left.products, left.reason) == (report.SKIPPED, 1, "provider: reference: N is 16")


def test_where_only_several_are_refused_each_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def slower(op: Any, arguments: Any) -> str | None:
        return "too many" if op.family == "fp8_linear" and len(arguments["weights"]) > 1 else None

    refusing(monkeypatch, slower=slower)
    assert [(site.status, site.products) for site in sites()] == [(report.REPLACED, 1)] * 3


def test_training() -> None:
    x, *weights = tensors(48)
    result = checked(lambda x: x.float().sum() + once(x.detach(), *weights)[0].float().sum())
    x.requires_grad_()
    result.call(x)
    assert [site.reason.split(":")[0] for site in linear(result.report)] == ["training"]


def test_the_cache_key_tells_joins_apart() -> None:
    """A compiled graph comes from the cache with its report, and its counts."""
    x, *weights = tensors(48, 16)
    for cached in (False, True):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(once, backend=aiter_fusion.Backend(strict=True, expect={"fp8_linear": 1}))(x, *weights)
        made = aiter_fusion.reports()[-1]
        assert made.from_cache == cached
        assert [site.products for site in linear(made)] == [2]
        assert "2 products in 1 launches" in made.summary()
