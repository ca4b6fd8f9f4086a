"""FP8 linear layers of one value by AITER: one product of weights that lie side by side, one each of others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aiter_fusion
from aiter_fusion.ops.linear import LINEAR, operands
from aiter_fusion.providers import PROVIDERS
from aiter_fusion.providers.aiter import entry_points, linear
from aiter_fusion.providers.aiter.bridge import adapter
from aiter_fusion.scaled_product import BLOCKS, ROWS, TENSORS
from support import models
from support.aiter_double import Double
from support.bridge_results import alike
from support.checked import checked

pytestmark = pytest.mark.skipif(
    not models.scales_rows(), reason="needs a torch whose _scaled_mm takes a scale for each row on a CPU: 2.12 or newer"
)

BF16, FN, FNUZ = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz
AITER = PROVIDERS["aiter"]


def arguments_of(scales: str = ROWS, widths: tuple[int, ...] = (48, 16, 32), **changes: Any) -> dict[str, Any]:
    k = 256 if scales == BLOCKS else 64
    given = operands(5, k, widths, scales, FN)
    rest = {"biases": [None] * len(widths), "dtype": BF16, "fast_accum": False}
    return {**given, **rest, **changes}


def beside(tensors: list[Tensor], dim: int = 0) -> list[Tensor]:
    """The same tensors as parts of one."""
    return list(torch.cat(tensors, dim).split([tensor.shape[dim] for tensor in tensors], dim))


def stored(arguments: dict[str, Any], order: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    """The same call of weights that lie side by side in this order."""
    rows = beside([arguments["weights"][index].t() for index in order])
    return arguments | {"weights": [rows[order.index(index)].t() for index in range(len(order))]}


def compute(arguments: dict[str, Any]) -> list[Tensor]:
    """AITER's results; fails unless they are the reference's, each in memory of its own."""
    have = LINEAR.target(*arguments.values(), "aiter")
    want = LINEAR.reference(**arguments)
    for a, b in zip(want.values(), have, strict=True):
        assert alike(a, b), "the results differ"
        assert b.is_contiguous()
        assert b.untyped_storage().nbytes() == b.nbytes
    assert len({b.data_ptr() for b in have}) == len(have)
    return have


BIAS = [torch.ones(48, dtype=BF16), None, torch.arange(32).to(BF16)]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("biases", [[None] * 3, BIAS], ids=["no bias", "some biases"])
def test_one_product_of_what_lies_side_by_side(
    biases: list[Tensor | None], order: tuple[int, ...], make: Callable[..., Double]
) -> None:
    """In whichever order; and scales too, which need no copy then."""
    double = make(arch="gfx950")
    arguments = arguments_of(biases=biases)
    compute(arguments)
    assert double.called == ["gemm_a8w8"] * 3, "weights that lie anywhere"
    double.calls.clear()
    compute(stored(arguments, order))
    assert double.called == ["gemm_a8w8"]
    assert double.calls[0][1].WQ.shape == (96, 64)
    together = stored(arguments) | {"weight_scales": beside(arguments["weight_scales"], 1)}
    scales = together["weight_scales"][0].data_ptr()
    compute(together)
    assert double.calls[-1][1].w_scale.data_ptr() == scales


def test_blocks(make: Callable[..., Double]) -> None:
    double = make(arch="gfx950")
    arguments = arguments_of(BLOCKS, (128, 256, 128))
    assert AITER.why_not(LINEAR, arguments) is None
    compute(arguments)
    compute(stored(arguments))
    assert double.called == ["gemm_a8w8_blockscale"] * 4


def test_a_layer_alone(make: Callable[..., Double]) -> None:
    double = make(arch="gfx950")
    compute(arguments_of(widths=(48,)))
    assert double.called == ["gemm_a8w8"]


@pytest.mark.parametrize("gap", ["a row between", "two tensors", "another length"])
def test_what_is_not_side_by_side(gap: str) -> None:
    whole = torch.randn(10, 8).to(FN)
    parts = {
        "a row between": [whole[:4], whole[5:]],
        "two tensors": [whole[:5].clone(), whole[5:].clone()],
        "another length": [whole[:5], whole[5:].view(10, 4)],
    }
    assert linear.side_by_side(parts[gap]) is None
    joined = linear.side_by_side([whole[2:5], whole[5:]])
    assert joined is not None
    assert (joined.shape, joined.data_ptr()) == ((8, 8), whole[2:].data_ptr())


REFUSED: dict[str, dict[str, Any]] = {
    "weights[0] has other scales than one for each row": arguments_of(TENSORS),
    "dtype torch.float32 is none of": arguments_of(dtype=torch.float32),
    "biases[1] is given, and its product with scales for blocks adds none": arguments_of(
        BLOCKS, (128, 128, 128), biases=[None, torch.ones(128, dtype=BF16), None]
    ),
    "weights[1]: N is 64, not a multiple of 128": arguments_of(BLOCKS, (128, 64, 128)),
    "weights[0]: x is torch.float8_e4m3fnuz, and this GPU's formats are torch.float8_e4m3fn and torch.int8": {
        **arguments_of(),
        "x": torch.zeros(5, 64).to(FNUZ),
        "weights": [torch.zeros(n, 64).to(FNUZ).t() for n in (48, 16, 32)],
    },
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusal(reason: str, make: Callable[..., Double]) -> None:
    make(arch="gfx950")
    assert reason in str(AITER.why_not(LINEAR, REFUSED[reason]))


FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "weights in the order of layers": ("WQ", lambda g: g["WQ"].roll(16, 0)),
    "scales in the order of layers": ("w_scale", lambda g: g["w_scale"].roll(16, 0)),
    "biases in the order of layers": ("bias", lambda g: g["bias"].roll(16, 0)),
    "no biases": ("bias", lambda g: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: str, make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch) -> None:
    make(arch="gfx950")
    arguments = stored(arguments_of(biases=BIAS), (2, 0, 1))
    compute(arguments)
    keyword, change = FAULTS[fault]
    real = entry_points.call
    monkeypatch.setattr(adapter, "call", lambda entry, **given: real(entry, **{**given, keyword: change(given)}))
    with pytest.raises((AssertionError, RuntimeError)):
        compute(arguments)


def test_a_copy_that_is_taken_for_the_original_is_caught(
    make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where weights lie anywhere, the memory after the first is none of theirs."""
    make(arch="gfx950")
    monkeypatch.setattr(linear, "side_by_side", lambda rows: torch.cat([rows[0]] * 6)[: sum(map(len, rows))])
    with pytest.raises(AssertionError, match="the results differ"):
        compute(arguments_of())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, n, bias=n == 32) for n in (64, 32, 32, 64))
        self.norm = nn.RMSNorm(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.o(self.q(x) * torch.cat([self.k(x), self.v(x)], -1))
        return y + self.down(self.up(self.norm(y)))


def test_prepared_layers(make: Callable[..., Double]) -> None:
    """The model computes what it did; its weights are one product; taken apart, they are three."""
    torch.manual_seed(0)
    model = Block().to(BF16).eval()
    models.QUANTISATIONS["PerRow"](model)
    x = torch.randn(3, 64).to(BF16)
    with torch.no_grad():
        want = model(x)
        done = aiter_fusion.prepare(model, product="side_by_side")
        assert torch.equal(want, model(x))
        assert torch.equal(want, torch.compile(model, backend="aot_eager")(x))
    assert done.layers == ("q", "k", "v", "o")
    why = "no neighbour in its module has as many inputs and is quantised alike, with a scale for each row"
    assert done.refused == {"up": why, "down": why}
    weights: list[Any] = [model.q.weight, model.k.weight, model.v.weight]
    double = make(arch="gfx950")
    call = arguments_of() | {
        "weights": [weight.qdata.t() for weight in weights],
        "weight_scales": [weight.scale.t() for weight in weights],
        "biases": [None, model.k.bias, model.v.bias],
    }
    compute(call)
    assert double.called == ["gemm_a8w8"]
    apart: list[Any] = [weight.qdata.clone().t() for weight in weights]
    compute(call | {"weights": apart})
    assert double.called == ["gemm_a8w8"] * 4
    with pytest.raises(ValueError, match="product='rows': weights are stored for hipb_mm, bpreshuffle or side_by_side"):
        aiter_fusion.prepare(model, product="rows")


class Heads(nn.Module):
    """What q, k and v of ``Block`` are: layers that read one value."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, n, bias=False) for n in (64, 32, 32))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


@pytest.mark.parametrize("preferred", ["0", "1"])
def test_a_graph_has_one_product_if_that_is_preferred(
    preferred: str, make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a variable, since a graph does not know where weights lie; else each product is AITER's alone."""
    monkeypatch.setenv("AITER_FUSION_LINEAR_SIDE_BY_SIDE", preferred)
    torch.manual_seed(0)
    model = Heads().to(BF16).eval()
    models.QUANTISATIONS["PerRow"](model)
    aiter_fusion.prepare(model, product="side_by_side")
    double = make(arch="gfx950")
    result = checked(model, provider="aiter")
    with torch.no_grad():
        result.call(torch.randn(3, 64).to(BF16))
    sites = [site for site in result.report.sites if site.family == "fp8_linear"]
    said = {(site.status, site.op, site.provider, site.products) for site in sites}
    if preferred == "1":
        assert said == {("replaced", "aiter_fusion::fp8_linear", "aiter", 3)}
        assert double.called.count("gemm_a8w8") == 1
    else:
        assert said == {("replaced", "aiter_fusion::gemm_a8w8", "aiter", 0)}
        assert double.called.count("gemm_a8w8") == 3
    assert result.report.unaccounted == 0


def test_shared_weights_stay_shared() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 32), "b": nn.Linear(64, 32)}).to(BF16)
    models.QUANTISATIONS["PerRow"](model)
    model["b"].weight = model["a"].weight
    assert aiter_fusion.prepare(model, product="side_by_side").layers == ()
    assert model["b"].weight is model["a"].weight
