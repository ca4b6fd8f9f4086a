"""What the passes cost at compile time."""

from __future__ import annotations

import time
from typing import cast

import models
import torch
import transformers
from conftest import checked
from torch import fx, nn

from aiter_fusion import config
from aiter_fusion.passes.manager import PassManager
from aiter_fusion.passes.oracle import Oracle, copy_graph

MILLISECONDS_A_LAYER = 5.0


def llama(layers: int) -> Oracle:
    """The oracle with the graph of a Llama of hidden size 64, quantised per row."""
    small = {**models.COMMON, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers}
    model = cast(nn.Module, transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)))
    model = model.to(torch.bfloat16).eval()
    models.QUANTISATIONS["PerRow"](model)
    result = checked(model)
    with torch.no_grad():
        result.call(models.tokens(), use_cache=False)
    assert result.report.replaced == {"rms_norm_quant": 2 * layers + 1, "act_mul_quant": layers}
    return result.oracle


def milliseconds(oracle: Oracle) -> float:
    """The least of five runs of the whole pass on fresh copies of the graph, in processor time: other work on the
    machine is not the pass's."""
    manager = PassManager(config.options())
    graph = oracle.graphs[0].before
    times = []
    for _ in range(5):
        copied = fx.GraphModule(graph, copy_graph(graph.graph))
        start = time.process_time()
        manager.run(copied.graph, True)
        times.append((time.process_time() - start) * 1e3)
    return min(times)


def test_time_is_linear_in_layers(record_property) -> None:
    few, many = llama(8), llama(32)
    short, long = milliseconds(few), milliseconds(many)
    record_property("row", f"8 layers {short:.1f} ms, 32 layers {long:.1f} ms, {long / 32:.2f} ms a layer")
    assert long / 32 <= MILLISECONDS_A_LAYER
    # four times the layers; the allowance is for timing on shared machines, a quadratic pass would take 16 times
    assert long <= 6 * short
