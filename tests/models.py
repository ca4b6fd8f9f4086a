"""Small random models of real families, quantised, and what their own modules say should be fused."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import cases
import torch
import transformers
from torch import Tensor, nn

HIDDEN, LAYERS, VOCABULARY = 256, 2, 128
COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": VOCABULARY,
}

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON)),
    "Qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=64, **COMMON)),
    "Mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**COMMON)),
    "Gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(head_dim=64, tie_word_embeddings=False, **COMMON)
    ),
}


def build(family: str) -> nn.Module:
    """A random bf16 model in eval mode; weights do not depend on global random state."""
    model = FAMILIES[family]().to(torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.05).to(parameter.dtype)
    return model


class GroupLinear(nn.Module):
    """A linear layer that quantises its input by hand, one scale for 128 elements."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        q, scale = cases.q7(128)(x)
        back = q.to(x.dtype) * scale.to(x.dtype).repeat_interleave(128, -1)
        return nn.functional.linear(back, self.weight)


def _replace_linears(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, GroupLinear(child))
        else:
            _replace_linears(child)


def _torchao(granularity: str) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quant_api, quantize_
        from torchao.quantization.granularity import PerRow, PerTensor

        chosen = {"PerRow": PerRow, "PerTensor": PerTensor}[granularity]()
        check = quant_api._check_hardware_support
        quant_api._check_hardware_support = lambda granularity: None  # it demands a GPU
        try:
            quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=chosen))
        finally:
            quant_api._check_hardware_support = check

    return quantise


QUANTISATIONS: dict[str, Callable[[nn.Module], None]] = {
    "PerRow": _torchao("PerRow"),
    "PerTensor": _torchao("PerTensor"),
    "group128": _replace_linears,
}


def expected(model: nn.Module, *inputs: Tensor) -> tuple[Counter[str], int]:
    """What the eager model says: replaced sites by family, and quantisers whose input no fusion computes.

    Watched: which storage every norm returns, which modules call an activation, and what enters every linear layer.
    A norm that some linear layer reads is one site; so is the product that enters a linear layer beside an activation;
    every other linear layer quantises for itself.
    """
    normed: dict[int, str] = {}
    activated: set[str] = set()
    read: Counter[str] = Counter()
    alone = 0
    keep: list[Tensor] = []  # so that no storage is used twice
    hooks = []

    def norm_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            keep.append(output)
            normed[output.untyped_storage().data_ptr()] = name

        return hook

    def act_hook(parent: str) -> Callable[..., None]:
        return lambda module, args, output: activated.add(parent)

    def linear_hook(parent: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal alone
            keep.append(args[0])
            producer = normed.get(args[0].untyped_storage().data_ptr())
            if producer is not None:
                read[producer] += 1
            elif parent in activated:
                read[f"act of {parent}"] += 1
            else:
                alone += 1

        return hook

    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if type(module).__name__.endswith("RMSNorm"):
            hooks.append(module.register_forward_hook(norm_hook(name)))
        elif name.endswith("act_fn"):
            hooks.append(module.register_forward_hook(act_hook(parent)))
        elif isinstance(module, (nn.Linear, GroupLinear)):
            hooks.append(module.register_forward_pre_hook(linear_hook(parent)))
    with torch.no_grad():
        model(*inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    families = Counter("act_mul_quant" if name.startswith("act of") else "rms_norm_quant" for name in read)
    return families, alone


def tokens(batch: int = 1, length: int = 16) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
