"""Weights that AITER's own products read shuffled: stored so once, for torchao's and transformers' layers, and back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

import aiter_fusion
from aiter_fusion import bridge
from aiter_fusion.passes.verify import same_bits
from aiter_fusion.prepared import ShuffledWeight
from aiter_fusion.providers.aiter import hipblaslt
from aiter_fusion.providers.tiles import unshuffled
from support import models
from support.aiter_double import Double

BF16, FN = torch.bfloat16, torch.float8_e4m3fn
X = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0)).to(BF16)


def torchao_s(granularity: str = "PerRow") -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.Linear(256, 128)).to(BF16).eval()
    models.QUANTISATIONS[granularity](model)
    return model


def transformers_s(**changes: Any) -> Any:
    """``FP8Linear`` of transformers, with and without a bias."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    options = {"block_size": (128, 128), "activation_scheme": "dynamic"} | changes
    generator, made = torch.Generator().manual_seed(0), []
    for rows, bias in ((256, False), (384, True)):
        layer = FP8Linear(256, rows, has_bias=bias, **options)
        layer.weight = nn.Parameter(torch.randn(rows, 256, generator=generator).to(FN), requires_grad=False)
        scale = torch.rand(layer.weight_scale_inv.shape, generator=generator) * 0.01 + 0.01
        layer.weight_scale_inv = nn.Parameter(scale.to(layer.weight_scale_inv.dtype), requires_grad=False)
        made.append(layer)
    made[1].bias = nn.Parameter(torch.randn(384, generator=generator).to(BF16))
    return nn.Sequential(*made).eval()


def dequantised(model: Any, x: Tensor) -> Tensor:
    """The layers of transformers in float32, on inputs that are not quantised."""
    x = x.float()
    for layer in model:
        scale = layer.weight_scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)
        x = x @ (layer.weight.float() * scale).t() + (0 if layer.bias is None else layer.bias.float())
    return x


def distance(want: Tensor, have: Tensor) -> float:
    return float((want.float() - have.float()).norm() / want.float().norm())


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_torchao_s_rows(arch: str, make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch) -> None:
    models.need_scaled_rows()
    double = make(arch=arch)
    model = torchao_s()
    before = [layer.weight.qdata.clone() for layer in model]
    done = aiter_fusion.prepare(model, provider="aiter", product="bpreshuffle")
    if arch == "gfx942":  # torchao quantised to the other format
        assert done.layers == ()
        assert "x is torch.float8_e4m3fn, and this GPU's FP8 format is torch.float8_e4m3fnuz" in done.refused["1"]
        return
    assert (done.layers, done.refused) == (("0", "1"), {})
    with torch.no_grad():
        assert distance(torchao_s()(X), model(X)) < 2**-6
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert distance(model(X), compiled(X)) < 2**-6
    assert set(double.called) == {"gemm_a8w8_bpreshuffle"}
    weights: list[Any] = [layer.weight.data for layer in model]
    assert all(same_bits(unshuffled(w.tiles), b) for w, b in zip(weights, before, strict=True))

    assert aiter_fusion.unprepare(model) == ("0", "1")
    assert all(same_bits(layer.weight.qdata, b) for layer, b in zip(model, before, strict=True))
    with torch.no_grad():
        assert same_bits(torchao_s()(X), model(X))
    assert aiter_fusion.unprepare(model) == ()


def test_transformers_blocks(make: Callable[..., Double]) -> None:
    double = make(arch="gfx950")
    model = transformers_s()
    before = [layer.weight.clone() for layer in model]
    want = dequantised(model, X)
    assert aiter_fusion.prepare(model, provider="aiter", product="bpreshuffle").layers == ("0", "1")
    with torch.no_grad():
        have = model(X)
        assert distance(want, have) < 2**-4  # two layers quantise their inputs to FP8
        assert distance(have, torch.compile(model, backend="aot_eager", fullgraph=True)(X)) < 2**-6
    assert set(double.called) == {"dynamic_per_token_scaled_quant", "gemm_a8w8_blockscale_bpreshuffle"}
    assert aiter_fusion.unprepare(model) == ("0", "1")
    assert all(same_bits(layer.weight, b) for layer, b in zip(model, before, strict=True))


def test_torchao_s_blocks() -> None:
    model = nn.Sequential(nn.Linear(256, 384)).to(BF16).eval()
    want = model(X)
    models.QUANTISATIONS["PerBlock"](model)
    done = aiter_fusion.prepare(model, provider="reference", product="bpreshuffle")
    assert (done.layers, done.refused) == (("0",), {})
    with torch.no_grad():
        assert distance(want, model(X)) < 2**-4


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "its weight has scales [2, 2], not one for each of 256 rows": (transformers_s, "hipb_mm"),
    "its activations have static scales, not dynamic ones": (
        lambda: transformers_s(activation_scheme="static"),
        "bpreshuffle",
    ),
    "its blocks are None, not 128 x 128": (lambda: transformers_s(block_size=None), "bpreshuffle"),
    "its scales are torch.float8_e8m0fnu, not torch.float32": (
        lambda: transformers_s(scale_fmt="ue8m0"),
        "bpreshuffle",
    ),
    "its activations have scales PerTensor, not one for each row": (lambda: torchao_s("PerTensor"), "bpreshuffle"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_layers_that_stay(reason: str) -> None:
    build, product = REFUSED[reason]
    model = build()
    before = [layer.weight for layer in model]
    done = aiter_fusion.prepare(model, provider="reference", product=product)
    assert done.layers == ()
    assert reason in done.refused["0"]
    assert all(layer.weight is weight for layer, weight in zip(model, before, strict=True))


def test_the_mark_stays_where_pytorch_drops_it() -> None:
    """A plain tensor loses an attribute with each of these."""
    model = transformers_s()
    aiter_fusion.prepare(model, provider="reference", product="bpreshuffle")
    weight: Any = model[0].weight
    plain = torch.zeros(2)
    plain.is_shuffled = True  # type: ignore[attr-defined]
    assert not hasattr(nn.Parameter(plain), "is_shuffled")
    for kept in (weight.data, weight.detach(), copy.deepcopy(model)[0].weight.data, model.to("cpu")[0].weight.data):
        assert isinstance(kept, ShuffledWeight)
        assert kept.is_shuffled


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="product='ck': weights are stored for hipb_mm, bpreshuffle or side_by_side"):
        aiter_fusion.prepare(nn.Linear(2, 2), product="ck")
    monkeypatch.setenv("AITER_FUSION_LINEAR", "0")
    refused = aiter_fusion.prepare(transformers_s(), product="bpreshuffle").refused["0"]
    assert "AITER_FUSION_LINEAR is off (set it to 1)" in refused
    assert "LINEAR_HIPBMM" not in refused


@pytest.mark.parametrize(
    ("version", "lacks"),
    [
        ("0.12", ("scales for rows from 1.0", "shuffled weights from 0.15")),
        ("0.15", ("scales for rows from 1.0",)),
        ("1.0", ()),
        (None, ()),
    ],
)
def test_the_version_of_hipblaslt(
    version: str | None,
    lacks: tuple[str, ...],
    make: Callable[..., Double],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Read from the headers of ROCm with which AITER builds; where there are none, nothing is objected."""
    double = make()
    if version is not None:
        header = tmp_path / "include" / "hipblaslt" / "hipblaslt-version.h"
        header.parent.mkdir(parents=True)
        major, minor = version.split(".")
        header.write_text(f"#define HIPBLASLT_VERSION_MAJOR {major}\n#define HIPBLASLT_VERSION_MINOR {minor}\n")
    monkeypatch.setenv("ROCM_PATH", str(tmp_path))
    hipblaslt.library_version.cache_clear()
    try:
        assert hipblaslt.library_version() == (None if version is None else Version(version))
        values = torch.zeros(16, 32).to(double.fp8)
        scales = {"a_scale": torch.ones(16, 1), "b_scale": torch.ones(1, 16)}
        call = {"a": values, "b": values.t(), **scales, "bias": None, "dtype": BF16, "b_is_shuffled": True}
        why = bridge.why_not("hipb_mm_fp8", **call)
    finally:
        hipblaslt.library_version.cache_clear()
    said = [f"hipBLASLt is {version}, and it has {what} on: upgrade ROCm" for what in lacks]
    assert why == ("; ".join(said) or None)
