"""The pass's work is linear in a model's layers, and a report costs nothing once it has been made."""

from __future__ import annotations

import sys
import time
from typing import Any, cast

import pytest
import torch
import transformers
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

import aiter_fusion
from aiter_fusion import config, journal, report
from aiter_fusion.passes.manager import PassManager
from aiter_fusion.passes.oracle import Oracle, copy_graph
from support import models
from support.checked import checked

# 40,900 with torch 2.13.0, 5,500 of them for the FP8 linear layers, 3,100 for the attention, and 3,500 to turn away the
# forms of LayerNorms, gates, modulations and other formats
CALLS_A_LAYER = 43_000


def llama(layers: int) -> Oracle:
    """The oracle with the graph of a Llama of hidden size 64, quantised per row."""
    small = {**models.COMMON, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers}
    model = cast(nn.Module, transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)))
    model = model.to(torch.bfloat16).eval()
    models.QUANTISATIONS["PerRow"](model)
    result = checked(model)
    with torch.no_grad():
        result.call(models.tokens(), use_cache=False)
    counts = {"rms_norm_quant": 2 * layers + 1, "act_mul_quant": layers, "fp8_linear": 4 * layers + 1}
    counts |= {"decode_attention": layers}
    assert result.report.replaced == counts
    return result.oracle


def work(oracle: Oracle) -> tuple[int, float]:
    """How many functions the whole pass calls on a fresh copy of the graph, and how many milliseconds another run took.

    Calls are counted, since they are the same on every machine, whatever else runs there.
    """
    manager = PassManager(config.options())
    graph = oracle.graphs[0].before
    first, second = (fx.GraphModule(graph, copy_graph(graph.graph)).graph for _ in range(2))
    start = time.process_time()
    manager.run(first, True)
    milliseconds = (time.process_time() - start) * 1e3
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        manager.run(second, True)
    finally:
        sys.setprofile(before)
    return calls, milliseconds


@pytest.mark.parametrize("fewest", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_work_is_linear_in_layers(fewest: int, record_property) -> None:
    most = 4 * fewest
    few, many = llama(fewest), llama(most)
    (short, _), (long, milliseconds) = work(few), work(many)
    record_property(
        "row", f"the pass on {most} layers: {long / most:.0f} calls and {milliseconds / most:.2f} ms a layer"
    )
    assert (long - short) / (most - fewest) <= CALLS_A_LAYER
    assert long <= 4.2 * short  # four times the layers; a quadratic pass would make 16 times the calls


@pytest.mark.slow  # the calls that a graph takes whatever its layers are would count for more with fewer
def test_work_of_many_layers() -> None:
    calls, _ = work(llama(8))
    assert calls / 8 <= CALLS_A_LAYER


def reports_in_counters() -> list[str]:
    return [name for name in counters["inductor"] if name.startswith("aiter_fusion")]


def test_a_report_costs_nothing_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read once, when it comes from the cache, and does not stay in PyTorch's counters."""
    original = report.json.loads
    read: list[str] = []

    def loads(text: Any, **options: Any) -> Any:
        if str(text).startswith('{"sites":'):
            read.append(str(text))
        return original(text, **options)

    def function(x: Tensor, number: int) -> Tensor:
        return torch.mm(x, x)[number:]

    monkeypatch.setattr(report.json, "loads", loads)
    for from_cache in (False, True):
        torch._dynamo.reset()
        aiter_fusion.reset()
        compiled = torch.compile(function, backend="aiter_fusion", dynamic=False)
        with torch.no_grad():
            for number in range(4):
                compiled(torch.ones(8, 8), number)
                assert len(read) == (number + 1 if from_cache else 0)
                assert reports_in_counters() == []
        assert [made.from_cache for made in aiter_fusion.reports()] == [from_cache] * 4


def test_reset_forgets_what_nobody_collected() -> None:
    """A pass can run without a backend of ours, such as under AOTInductor."""
    journal.passed(report.FusionReport(), counters["inductor"])
    assert len(reports_in_counters()) == 1
    aiter_fusion.reset()
    assert reports_in_counters() == []
