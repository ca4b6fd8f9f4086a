"""The decoder of ``examples/aiter_ops.py`` computes what plain PyTorch does, by AITER where that is."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from support.aiter_double import Double

PATH = Path(__file__).parent.parent.parent / "examples" / "aiter_ops.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec: Any = importlib.util.spec_from_file_location("aiter_ops", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "aiter_ops", module)
    spec.loader.exec_module(module)
    return module


def plain(model: Any, tokens: Tensor) -> Tensor:
    """The logits of every token of one sequence, in float64, without a cache."""
    sizes = model.sizes
    model = model.double()
    x, cos, sin = model.embedding(tokens), model.cos[: len(tokens), None], model.sin[: len(tokens), None]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, 1e-5)

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    for layer in model.layers:
        heads = layer.qkv(norm(x, layer.attention_norm)).unflatten(-1, (-1, sizes.head))
        q, k, v = heads.split([sizes.heads, sizes.kv_heads, sizes.kv_heads], 1)
        q, k, v = (t.transpose(0, 1)[None] for t in (turned(q), turned(k), v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        x = x + layer.out(o.flatten(1))
        y = norm(x, layer.experts_norm)
        weights, ids = layer.router(y).softmax(-1).topk(sizes.topk, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        gate, up = torch.einsum("td,tkid->tki", y, layer.w1[ids]).chunk(2, -1)
        x = x + torch.einsum("tki,tkdi,tk->td", F.silu(gate) * up, layer.w2[ids], weights)
    return model.head(norm(x, model.norm))


def test_it_is_plain_attention_and_experts(example: ModuleType) -> None:
    """In float32, where the next token is not a matter of rounding."""
    model = example.build().float()
    with torch.no_grad():
        tokens = example.decode(model, model, torch.tensor([[1, 2, 3], [7, 8, 9]]), 5)
        for row in tokens:
            assert torch.equal(plain(model, row[:-1]).argmax(-1)[2:], row[3:])
            model.float()


def test_what_it_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [str(PATH), "aot_eager"])
    runpy.run_path(str(PATH), run_name="__main__")
    said = capsys.readouterr().out
    assert "compiled and not, the same: True" in said
    assert "graphs: 1, graph breaks: 0" in said
    assert "computed by: PyTorch (AITER needs a ROCm build of PyTorch" in said


def test_with_aiter_nothing_is_added(example: ModuleType, make: Callable[..., Double]) -> None:
    """By its double: every function of the bridge that the model calls is AITER's, chosen unasked."""
    double = make()
    model, prompt = example.build(), torch.tensor([[1, 2, 3], [7, 8, 9]])
    with torch.no_grad():
        tokens = example.decode(torch.compile(model, backend="aot_eager", fullgraph=True), model, prompt, 2)
    assert tokens.shape == (2, 5)
    called = set(double.called)
    assert called >= {"rmsnorm2d_fwd_with_add", "rope_cached_positions_2c_fwd", "reshape_and_cache_flash"}
    assert called >= {"paged_attention_v1", "topk_softmax", "fused_moe", "greedy_sample"}
