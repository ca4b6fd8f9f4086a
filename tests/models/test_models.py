"""Real model families: every site that the model's own modules call for, bit-equal, and every other with a reason.

By default a family of each form is captured once, Llama with every quantiser, and one model with dynamic sizes; the
families that repeat a form are slow. AITER_FUSION_MATRIX=all takes every family with every quantiser, with static
sizes, with marked dynamic ones and with all dynamic, and generates code for every family.
"""

from __future__ import annotations

import os
from itertools import product
from typing import Any

import pytest
import torch

import aiter_fusion
from aiter_fusion import report
from aiter_fusion.reasons import CODES
from support import cases, models
from support.checked import checked

ALL = os.environ.get("AITER_FUSION_MATRIX") == "all"
SIZES = ("static", "marked", "dynamic")
# Their norms, activations and residuals are those of other families: Mistral's and Qwen2's of Llama, and so on.
REPEATING = ("Mistral", "Qwen2", "Qwen3", "Gemma2", "Glm4", "Mixtral")
# Their layers differ from each other. Of others a second layer brings no site that one has not.
DIFFERING = ("Gemma2", "Gemma3", "GptOss", "Llama4", "DeepseekV3", "Qwen3Next", "torch.nn", "modulated")


def chosen() -> list[Any]:
    every = product(models.FAMILIES, models.QUANTISATIONS, SIZES)
    if ALL:
        return [(f, q, s) for f, q, s in every if q != "engine" or f in models.ENGINES]
    always = [
        *((family, "PerRow", "static") for family in models.FAMILIES if family not in REPEATING),
        *(("Llama", q, "static") for q in models.QUANTISATIONS if q not in ("PerRow", "engine")),
        ("SGLang", "engine", "static"),
        ("Qwen2", "PerRow", "marked"),
    ]
    slow = [
        *((family, "PerRow", "static") for family in REPEATING),
        ("Gemma3", "PerTensor", "static"),
        ("Gemma3", "group128", "static"),
        ("Llama", "static", "marked"),
        ("Llama", "PerRow", "dynamic"),  # test_one_dynamic_graph_serves_all_lengths has its sizes
    ]
    return [*always, *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


def built(family: str) -> torch.nn.Module:
    few = family not in DIFFERING and not ALL
    return models.build(family, **({"num_hidden_layers": 1} if few else {}))


@pytest.mark.parametrize(("family", "quantisation", "sizes"), chosen())
def test_counts(family: str, quantisation: str, sizes: str, record_property) -> None:
    model = built(family)
    models.QUANTISATIONS[quantisation](model)
    tokens = models.tokens(2)
    replaced, alone = models.expected(model, quantisation, tokens)
    assert replaced.total() > 0
    dynamic = sizes == "dynamic"
    without = ["decode_attention"] if family in models.BY_HAND else []
    result = checked(model, verify=True, dynamic=dynamic or None, disable=without)
    if sizes == "marked":
        torch._dynamo.mark_dynamic(tokens, 1)
    with torch.no_grad():
        result.call(tokens, use_cache=False)
    made = result.report
    record_property("row", f"{family} {quantisation} {sizes}: {made.summary()}")
    assert result.oracle.identical
    assert made.replaced == dict(+replaced)
    assert sum(site.records for site in made.bare if site.family.endswith("_quant")) == alone
    assert [site.family for site in made.skipped] == without * models.LAYERS  # both layers of such a family differ
    assert made.unaccounted == 0
    assert all(site.reason.split(":")[0] in CODES for site in made.bare)
    assert all(site.where for site in made.sites)


@pytest.mark.parametrize("marked", [pytest.param(False, marks=pytest.mark.slow), True], ids=["static", "marked"])
def test_prefill_of_generate(marked: bool) -> None:
    """Of the last norm only the last token is read: no more is normed, and no row of another is lost."""
    model = built("Llama")
    models.QUANTISATIONS["PerRow"](model)
    tokens = models.tokens(2)
    replaced, alone = models.expected(model, "PerRow", tokens)
    result = checked(model, verify=True)
    if marked:
        torch._dynamo.mark_dynamic(tokens, 1)
    with torch.no_grad():
        result.call(tokens, use_cache=False, logits_to_keep=1)
        if marked:
            result.call(models.tokens(2, 7), use_cache=False, logits_to_keep=1)
    assert result.oracle.identical
    assert [made.replaced for made in result.reports] == [dict(replaced)]
    assert [site.family for site in result.report.bare] == ["fp8_quant"] * alone
    assert not result.report.skipped
    (graph,) = result.oracle.graphs
    last = [n for n in graph.after.graph.nodes if "rms_norm_quant" in str(n.target)][-1]
    assert [n.meta["val"].shape for n in last.all_input_nodes] == [(2, 1, 256), (2, 1, 256), (256,)]


def test_sums_in_float32_are_fused() -> None:
    """An engine's norms take the residual with them, and no addition is left over."""
    model = models.build("vLLM", num_hidden_layers=1)
    models.QUANTISATIONS["PerTensor"](model)
    result = checked(model)
    with torch.no_grad():
        result.call(models.tokens(2))
    assert result.oracle.identical
    norms = [variant for variant in result.variants if variant.startswith("rms_norm_quant")]
    assert norms == ["rms_norm_quant:tensor", *["rms_norm_quant:add+tensor"] * 2]
    assert "aten.add.Tensor" not in result.targets


def test_the_activation_of_gpt_oss_itself() -> None:
    """Its experts are not quantised by anything that runs on a CPU; here their activation's result is, by hand."""
    experts = models.build("GptOss").model.layers[0].mlp.experts  # type: ignore[union-attr]
    result = checked(lambda x: cases.q3(experts._apply_gate(x)))
    with torch.no_grad():
        for rows in cases.ROWS:
            result.call(*cases.tensors(("x2",), (6,), torch.bfloat16, rows))
    assert result.oracle.identical
    assert result.variants == ["act_mul_quant:packed+token"]


def test_a_draft_and_a_target_model() -> None:
    """Of one family, with another eps, which Dynamo then makes an input: the second has every site of the first."""
    torch._dynamo.reset()
    oracle = aiter_fusion.Backend().oracle()
    tokens = models.tokens(2)
    with torch.no_grad():
        for eps in (1e-6, 1e-5):
            model = models.build("Llama", num_hidden_layers=1, rms_norm_eps=eps)
            models.QUANTISATIONS["group128"](model)
            replaced, _ = models.expected(model, "group128", tokens)
            torch.compile(model, backend=oracle)(tokens, use_cache=False)
    assert oracle.identical
    assert [graph.report.replaced for graph in oracle.graphs] == [dict(+replaced)] * 2
    assert not oracle.report.skipped


@pytest.mark.parametrize("family", models.FAMILIES if ALL else ("SGLang",))
def test_code_generation(family: str, record_property) -> None:
    """What Inductor compiles has the sites that the oracle captured, and runs."""
    model = built(family)
    models.QUANTISATIONS["PerTensor"](model)
    tokens = models.tokens(2)
    captured = checked(model)
    with torch.no_grad():
        captured.call(tokens, use_cache=False)
        torch._dynamo.reset()
        torch.compile(model, backend=aiter_fusion.Backend())(tokens, use_cache=False)
    made = report.merge(aiter_fusion.reports())
    record_property("row", f"{family} compiled: {made.summary()}")
    assert made.replaced
    assert made.sites == captured.report.sites
    assert not made.from_cache


def test_one_dynamic_graph_serves_all_lengths() -> None:
    model = built("Llama")
    models.QUANTISATIONS["PerRow"](model)
    replaced, _ = models.expected(model, "PerRow", models.tokens(2))
    result = checked(model, dynamic=None)
    with torch.no_grad():
        for batch, length in ((2, 5), (3, 9), (2, 17), (4, 33)):
            result.call(models.tokens(batch, length), use_cache=False)
    assert result.oracle.identical
    # one with static sizes, one for all others
    assert [made.replaced for made in result.reports] == [dict(+replaced)] * 2
