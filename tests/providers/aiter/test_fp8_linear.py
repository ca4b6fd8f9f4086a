"""FP8 linear layers go to AITER's products where they fit, say why where not, and prepared weights keep their bits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aiter_fusion
from aiter_fusion import bridge, report
from aiter_fusion.passes.verify import same_bits
from aiter_fusion.prepared import ByTorchAO, ShuffledWeight
from aiter_fusion.providers.tiles import unshuffled
from support import models
from support.aiter_double import Double
from support.checked import Checked, checked

pytestmark = pytest.mark.skipif(
    not models.scales_rows(), reason="needs a torch whose _scaled_mm takes a scale for each row on a CPU: 2.12 or newer"
)

BF16, FN = torch.bfloat16, torch.float8_e4m3fn


@pytest.fixture
def double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Double]:
    made = Double(arch="gfx950")
    yield made.install(monkeypatch, tmp_path)
    made.forget()


def linear(replaced: Checked) -> list[report.Site]:
    return [site for site in replaced.report.sites if site.family == "fp8_linear"]


class Rows(nn.Module):
    """A linear layer of FP8 values as PyTorch spells it."""

    def __init__(self, n: int = 48, k: int = 64, dtype: torch.dtype = BF16, v2: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(n)
        self.weight = nn.Parameter(torch.randn(n, k, generator=generator).to(FN), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(1, n, generator=generator) + 0.5, requires_grad=False)
        self.dtype, self.v2 = dtype, v2

    def forward(self, x: Tensor, x_scale: Tensor) -> Tensor:
        if self.v2:
            from torch.nn.functional import ScalingType, scaled_mm

            rows = ScalingType.RowWise
            return scaled_mm(x, self.weight.t(), x_scale, rows, self.scale, rows, output_dtype=self.dtype)
        return torch.ops.aten._scaled_mm(x, self.weight.t(), x_scale, self.scale, out_dtype=self.dtype)


def run(model: nn.Module, x: Tensor, x_scale: Tensor, **options: Any) -> Checked:
    result = checked(model, **{"provider": "aiter", "verify": True} | options)
    with torch.no_grad():
        want, have = model(x, x_scale), result.call(x, x_scale)
    assert (want.shape, want.stride(), want.dtype) == (have.shape, have.stride(), have.dtype)
    assert ((want.float() - have.float()).abs() <= 2**-7 * want.float().abs().amax()).all()
    assert result.report.unaccounted == 0
    return result


def operands(m: int = 5, k: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m)
    return torch.randn(m, k, generator=generator).to(FN), torch.rand(m, 1, generator=generator) + 0.5


@pytest.mark.parametrize("v2", [False, True], ids=["_scaled_mm", "_scaled_mm_v2"])
def test_rows(v2: bool, double: Double) -> None:
    (site,) = linear(run(Rows(v2=v2), *operands()))
    assert (site.status, site.op, site.provider) == ("replaced", "aiter_fusion::gemm_a8w8", "aiter")
    assert site.variant == "rowwise"
    assert "hipb_mm_fp8: AITER_FUSION_LINEAR_HIPBMM is off (set it to 1)" in site.reason
    assert set(double.called) == {"gemm_a8w8"}


def test_any_number_of_rows(double: Double) -> None:
    """One graph, no guard."""
    model = Rows()
    result = checked(model, provider="aiter")
    for m in (5, 17, 3):
        x, scale = operands(m)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(scale, 0)
        with torch.no_grad():
            result.call(x, scale)
    assert len(result.reports) == 1
    assert result.report.replaced == {"fp8_linear": 1}


def test_by_hipblaslt(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AITER_FUSION_LINEAR_HIPBMM", "1")
    (site,) = linear(run(Rows(), *operands()))
    assert (site.op, site.reason) == ("aiter_fusion::hipb_mm_fp8", "")
    assert set(double.called) == {"hipb_create_extension", "hipb_mm"}


GATES = {
    "N is 8, below 16; N is 8, not a multiple of 16": Rows(8),
    "the result is torch.float16, and with scales for rows hipBLASLt makes bfloat16": Rows(dtype=torch.float16),
    "K is 24, not a multiple of 16": Rows(48, 24),
}


@pytest.mark.parametrize("reason", GATES)
def test_gates_of_hipblaslt(reason: str, double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AITER_FUSION_LINEAR_HIPBMM", "1")
    model = GATES[reason]
    (site,) = linear(run(model, *operands(k=model.weight.shape[1])))
    assert site.op == "aiter_fusion::gemm_a8w8"
    assert site.reason == f"first choice refused: provider: aiter: {reason}"


def test_float32_results_stay(double: Double) -> None:
    (site,) = linear(run(Rows(dtype=torch.float32), *operands()))
    assert site.status == "skipped"
    assert "hipb_mm_fp8: " in site.reason


@pytest.mark.parametrize("level", [1, 2])
def test_below_level_3(level: int, double: Double) -> None:
    (site,) = linear(run(Rows(), *operands(), level=level))
    assert site.reason == f"level: needs level 3, this is level {level}"
    enabled = run(Rows(), *operands(), level=level, enable="fp8_linear", numerics="kernel")
    assert linear(enabled)[0].status == "replaced"


def tensor_scales(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    return torch.ops.aten._scaled_mm(x, w.t(), s, s, out_dtype=BF16)


def other_result(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    scales = s.expand(5, 1).contiguous(), s.expand(1, 48).contiguous()
    return torch.ops.aten._scaled_mm(x, w, *scales, out_dtype=BF16)


@pytest.mark.parametrize("fn", [tensor_scales, other_result], ids=["one scale", "no transposed weight"])
def test_other_products_are_none_of_these(fn: Callable[..., Tensor], double: Double) -> None:
    x, _ = operands()
    w = Rows().weight.data
    w = w if fn is tensor_scales else w.t()
    result = checked(fn, provider="aiter")
    with torch.no_grad():
        result.call(x, w, torch.ones(1, 1) * 0.5)
    assert result.report.sites == ()


def test_nobody_looks_for_its_ops_without_aiter() -> None:
    for provider in ("auto", "reference"):
        (site,) = linear(run(Rows(), *operands(), provider=provider, strict=True))
        assert (site.op, site.provider) == ("aiter_fusion::fp8_linear", "reference")


def test_a_quantised_llama(double: Double) -> None:
    """torchao's layers: every norm, every activation and every linear layer."""
    model = models.build("Llama", num_hidden_layers=1)
    models.QUANTISATIONS["PerRow"](model)
    tokens = models.tokens(2)
    layers = sum(type(m.weight).__name__ == "Float8Tensor" for m in model.modules() if isinstance(m, nn.Linear))
    result = checked(model, provider="aiter", verify=True)
    with torch.no_grad():
        result.call(tokens)
    assert result.report.replaced["fp8_linear"] == layers
    assert {site.op for site in linear(result)} == {"aiter_fusion::gemm_a8w8"}
    assert result.report.replaced["rms_norm_quant"] > 0


def test_torchao_s_blocks(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their product exists where Triton does; here one of the same name and arguments takes its place."""
    from torchao.quantization.quantize_.workflows.float8 import float8_tensor

    library = torch.library.Library("ao", "FRAGMENT")
    library.define("blockwise_fp8_gemm(Tensor a, Tensor a_s, Tensor b, Tensor b_s, int block_size=128) -> Tensor")
    library.impl("blockwise_fp8_gemm", lambda *given: models.blockwise_gemm(*given[:4], 128), "CPU")
    library.impl("blockwise_fp8_gemm", lambda a, a_s, b, *_: a.new_empty(a.shape[0], b.shape[0], dtype=BF16), "Meta")
    try:
        monkeypatch.setattr(float8_tensor, "blockwise_fp8_gemm", torch.ops.ao.blockwise_fp8_gemm.default)
        monkeypatch.setattr(models, "_run_blockwise_gemm_on_a_cpu", lambda: None)
        model = nn.Sequential(nn.RMSNorm(256), nn.Linear(256, 384)).to(BF16).eval()
        models.QUANTISATIONS["PerBlock"](model)
        result = checked(model, provider="aiter", verify=True)
        with torch.no_grad():
            x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0)).to(BF16)
            want, have = model(x), result.call(x)
    finally:
        library._destroy()
    (site,) = linear(result)
    assert (site.op, site.variant) == ("aiter_fusion::gemm_a8w8_blockscale", "blockwise")
    assert result.report.replaced == {"rms_norm_quant": 1, "fp8_linear": 1}
    # by fewer roundings: a code of FP8 in some of the inputs
    assert (want.float() - have.float()).norm() / want.float().norm() < 0.02


# ---- prepared weights -----------------------------------------------------------------------------------------------


def layers(granularity: str = "PerRow", widths: tuple[int, int] = (256, 128), shared: bool = False) -> Any:
    """A norm and two linear layers, quantised by torchao."""
    torch.manual_seed(0)
    k, n = widths
    model = nn.Sequential(nn.RMSNorm(k), nn.Linear(k, k, bias=False), nn.Linear(k, n), nn.Linear(n, n, bias=False))
    model = model.to(BF16).eval()
    models.QUANTISATIONS[granularity](model)
    if shared:
        model.append(nn.Linear(n, n, bias=False))
        model[4].weight = model[3].weight
    return model


X = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0)).to(BF16)


def near(want: Tensor, have: Tensor) -> bool:
    """Each of three or four layers quantises what the one before rounded: some values go to the next FP8 code, 2**-4
    away."""
    return bool((want.float() - have.float()).norm() <= 2**-4 * want.float().norm())


def test_prepare(double: Double) -> None:
    """Once, in place, compiled without a break; the norm is still fused."""
    model = layers(shared=True)
    with torch.no_grad():
        want = model(X)
    done = aiter_fusion.prepare(model, provider="aiter")
    assert (done.layers, done.refused) == (("1", "2", "3", "4"), {})
    weight = model[1].weight
    assert isinstance(weight.data, ShuffledWeight)
    assert weight.shape == (16, 8, 16, 32)
    assert model[3].weight is model[4].weight
    assert aiter_fusion.prepare(model, provider="aiter") == done
    assert model[1].weight is weight
    with torch.no_grad():
        assert near(want, model(X))
    # once for three numbers of rows and for three kinds of layers (two weights are alike), then the four layers
    assert double.called == ["hipb_create_extension", *["hipb_mm"] * (3 * 3 + 4)]
    assert [given.mat1.shape[0] for name, given in double.calls if name == "hipb_mm"] == [1, 16, 512] * 3 + [6] * 4
    assert all(given.bpreshuffle for name, given in double.calls if name == "hipb_mm")
    result = checked(model, provider="aiter", verify=True)
    with torch.no_grad():
        assert near(want, result.call(X))
    assert result.report.replaced == {"rms_norm_quant": 1}
    (graph,) = result.oracle.graphs
    targets = [str(node.target) for node in graph.after.graph.nodes]
    assert targets.count("aiter_fusion.hipb_mm_fp8.default") == 4
    tiles = [n.meta["val"].shape for n in graph.after.graph.nodes if n.op == "placeholder" and n.meta["val"].dim() == 4]
    assert (16, 8, 16, 32) in [tuple(shape) for shape in tiles]


def test_prepared_weights_are_the_same_bits() -> None:
    """By the reference: nothing but the order of the bytes has changed, and no weight is held twice."""
    model = layers()
    linears: list[Any] = [m for m in model if isinstance(m, nn.Linear)]
    before = [m.weight.qdata.clone() for m in linears]
    size = sum(b.numel() for b in before)
    aiter_fusion.prepare(model, provider="reference")
    after = [m.weight.data for m in linears]
    for a, b in zip(before, after, strict=True):
        assert same_bits(a, unshuffled(b.tiles))
    assert sum(b.tiles.untyped_storage().nbytes() for b in after) == size
    with torch.no_grad():
        assert near(layers()(X), model(X))
        assert near(model(X), copy.deepcopy(model)(X))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert near(model(X), compiled(X))


def test_whatever_else_reads_a_shuffled_weight_fails() -> None:
    model = layers()
    aiter_fusion.prepare(model, provider="reference")
    weight = model[1].weight
    for wrong in (
        lambda: X @ weight.t(),
        lambda: torch.add(weight, 1),
        lambda: weight.to(torch.float16),
        lambda: weight.sum(),
    ):
        with torch.no_grad(), pytest.raises(TypeError, match=r"only torch\.nn\.functional\.linear computes"):
            wrong()
    with torch.no_grad(), pytest.raises(TypeError, match="of 256 features was given"):
        model[1](X[..., :128])


UNFIT = {
    "AITER_FUSION_LINEAR is off (set it to 1)": ("auto", {}, {"LINEAR": "0"}),
    "AITER_FUSION_LINEAR_HIPBMM is off (set it to 1)": ("auto", {}, {}),
    "its activations have scales PerTensor, not one for each row; its weight has scales": (
        "aiter",
        {"granularity": "PerTensor"},
        {},
    ),
    "its weight is 128 x 240, not in multiples of 16 x 32": ("aiter", {"widths": (240, 128)}, {}),
}


@pytest.mark.parametrize("reason", UNFIT)
def test_unfit_layers_stay_and_say_why(reason: str, double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    provider, changes, environment = UNFIT[reason]
    for name, value in environment.items():
        monkeypatch.setenv(f"AITER_FUSION_{name}", value)
    model = layers(**changes)
    before = [m.weight for m in model]
    done = aiter_fusion.prepare(model, provider=provider)
    assert reason in done.refused["2"]
    assert model[2].weight is before[2]
    double.arch = "gfx1201"
    found = aiter_fusion.prepare(layers(), provider="aiter").refused
    assert found["1"].startswith("the GPU is gfx1201, and AITER's hipb_mm_fp8 is for gfx942, gfx950")


@pytest.mark.parametrize("rows", [1, 512])
def test_layers_without_a_kernel_stay(rows: int, double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product is tried before a weight is touched, for all layers that share it; nothing is tuned meanwhile."""
    double.has_kernel = lambda m, n, k: (m, n, k) != (rows, 128, 128)
    monkeypatch.setenv("HIP_ONLINE_TUNING", "1")
    model = layers(shared=True)
    before = [m.weight for m in model]
    done = aiter_fusion.prepare(model, provider="aiter")
    assert done.layers == ("1", "2")
    assert set(done.refused) == {"3", "4"}
    assert done.refused["3"].startswith(
        f"hipblasLtMatmulAlgoGetHeuristic found 0 valid solutions for TN (128, {rows}, 128), "
    )
    assert model[3].weight is model[4].weight is before[3]
    assert double.tuned == []


def test_a_prepared_layer_meets_a_shape_without_a_kernel(double: Double, caplog: pytest.LogCaptureFixture) -> None:
    """In the middle of a run, compiled or not: computed by the other product, the tiles as they were, said once."""
    model = layers()
    expected = copy.deepcopy(model)
    aiter_fusion.prepare(model, provider="aiter")
    linears: list[Any] = [m for m in model if isinstance(m, nn.Linear)]
    tiles = [m.weight.data.tiles for m in linears]
    size = sum(t.untyped_storage().nbytes() for t in tiles)
    bits = [t.view(torch.uint8).clone() for t in tiles]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    few = X[:, :2].clone()
    torch._dynamo.mark_dynamic(few, 1)
    with torch.no_grad():
        have = compiled(few)
        double.has_kernel = lambda m, n, k: m != 6
        # what the same layers give by AITER's other product, each from torchao's own values and scales
        want = X
        for layer in expected:
            want = _by_gemm_a8w8(layer, want) if isinstance(layer, nn.Linear) else layer(want)
        double.calls.clear()
        for run in (compiled, model, compiled):
            assert same_bits(want, run(X))
        assert double.called.count("gemm_a8w8") == 3 * 3
        assert double.called.count("hipb_mm") == 3  # each kind of layer asked once
        assert same_bits(have, compiled(few))
    assert double.called.count("hipb_mm") == 3 + 3
    after = [m.weight.data.tiles for m in linears]
    assert sum(t.untyped_storage().nbytes() for t in after) == size
    assert all(same_bits(a, b.view(torch.uint8)) for a, b in zip(bits, after, strict=True))
    warnings = [record.getMessage() for record in caplog.records if "hipBLASLt cannot compute" in record.getMessage()]
    sizes = ["256 x 256", "128 x 256", "128 x 128"]
    assert [f"weight of {size}" in warning for size, warning in zip(sizes, warnings, strict=True)] == [True] * 3


def _by_gemm_a8w8(layer: nn.Linear, x: Tensor) -> Tensor:
    weight: Any = layer.weight
    q, scale = ByTorchAO(weight.act_quant_kwargs)(x)
    operands = q.reshape(-1, q.shape[-1]), weight.qdata, scale.reshape(-1, 1), weight.scale
    y = bridge.gemm_a8w8(*operands, layer.bias, BF16, provider="aiter")
    return y.reshape(*x.shape[:-1], -1)


def test_prepare_without_aiter() -> None:
    model = layers()
    done = aiter_fusion.prepare(model)
    assert done.layers == ()
    assert done.refused["1"].startswith("AITER needs a ROCm build of PyTorch, and this is ")
    assert "AITER_FUSION_LINEAR_HIPBMM is off" in done.refused["1"]
    with pytest.raises(RuntimeError, match="provider='aiter' cannot run here: AITER needs a ROCm build of PyTorch"):
        aiter_fusion.prepare(model, provider="aiter")
    with pytest.raises(ValueError, match="shuffled weights are read by auto, aiter and reference"):
        aiter_fusion.prepare(model, provider="torch")
