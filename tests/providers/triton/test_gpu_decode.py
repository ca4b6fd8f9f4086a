"""On a GPU: a Llama decodes with every family fused as exactly as with plain Inductor, and copies no cache."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import aiter_fusion
from aiter_fusion.passes.verify import same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

PROMPT, STEPS, LENGTH, BATCH = 16, 256, 1024, 2
# The distances of two quantised models to the one in bf16 are both that of FP8: they differ by chance alone, by about
# one part in the square root of the number of logits that count; and so does the number of equal tokens.
CHANCE = 1.02


@dataclass(frozen=True)
class Decoded:
    """Logits ``[steps, B, vocabulary]`` of one step after the other, the cache after them, and the memory of a step.

    copied: bytes of GPU memory that the last step needed beyond what it found.
    """

    logits: Tensor
    cache: Any
    copied: int


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def llama(layers: int) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=8192,
    )
    torch.manual_seed(layers)
    with torch.device("cuda"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def decode(call: Callable[..., Any], model: Any, tokens: Tensor | None, prompt: Tensor) -> Decoded:
    """Steps after a prompt, that eager PyTorch reads: of the given tokens ``[B, steps]``, else the likeliest ones."""
    cache = transformers.StaticCache(config=model.config, max_cache_len=LENGTH)
    last = model(prompt, past_key_values=cache).logits[:, -1]
    logits, copied = [], 0
    for step in range(STEPS):
        fed = last.argmax(-1, keepdim=True) if tokens is None else tokens[:, step : step + 1]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        last = call(fed, past_key_values=cache).logits[:, -1]
        copied = torch.cuda.max_memory_allocated() - before
        logits.append(last.float())
    return Decoded(torch.stack(logits), cache, copied)


def compiled(model: nn.Module, backend: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, dynamic=False, fullgraph=True)


def test_256_steps() -> None:
    """Fed with the tokens of the model in bf16: no further from its logits than Inductor, nor fewer of its tokens."""
    model = llama(2)
    prompt = torch.randint(0, 8192, (BATCH, PROMPT), device="cuda")
    eager = decode(model, model, None, prompt)
    tokens = torch.cat([model(prompt).logits[:, -1:].argmax(-1), eager.logits.argmax(-1).T], 1)
    quantised = copy.deepcopy(model)
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(quantised, torchao.Float8DynamicActivationFloat8WeightConfig(granularity=torchao.PerRow()))
    every = {"rms_norm_quant": 5, "act_mul_quant": 2, "fp8_linear": 9, "decode_attention": 2}
    ours = decode(compiled(quantised, aiter_fusion.Backend(expect=every)), quantised, tokens, prompt)
    theirs = decode(compiled(quantised, "inductor"), quantised, tokens, prompt)

    def distance(found: Decoded) -> float:
        return float((found.logits - eager.logits).norm() / eager.logits.norm())

    def agreeing(found: Decoded) -> int:
        return int((found.logits.argmax(-1) == eager.logits.argmax(-1)).sum())

    print(f"distance {distance(ours):.5f}, Inductor {distance(theirs):.5f}")
    print(f"tokens of {STEPS * BATCH}: {agreeing(ours)}, Inductor {agreeing(theirs)}")
    assert distance(ours) <= CHANCE * distance(theirs)
    assert agreeing(ours) >= agreeing(theirs) / CHANCE


@pytest.mark.parametrize("layers", [1, 8])
def test_the_cache(layers: int) -> None:
    """The first layer's keys and values are Inductor's bits, and a step needs no memory of the size of a cache."""
    model = llama(layers)
    prompt = torch.randint(0, 8192, (BATCH, PROMPT), device="cuda")
    tokens = torch.randint(0, 8192, (BATCH, STEPS), device="cuda")
    ours = decode(compiled(model, aiter_fusion.Backend(expect={"decode_attention": layers})), model, tokens, prompt)
    theirs = decode(compiled(model, "inductor"), model, tokens, prompt)
    # a later layer's depend on the attention before it, which is rounded elsewhere
    assert same_bits(ours.cache.layers[0].keys, theirs.cache.layers[0].keys)
    assert same_bits(ours.cache.layers[0].values, theirs.cache.layers[0].values)
    size = ours.cache.layers[0].keys.nbytes
    print(f"{layers} layers, cache of {size} bytes: a step takes {ours.copied}, Inductor's {theirs.copied}")
    assert ours.copied < size < theirs.copied
