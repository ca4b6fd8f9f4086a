"""A ready FP8 checkpoint, loaded by transformers, and ``generate()`` with a static cache.

    python examples/fp8_checkpoint.py [checkpoint]

Without an argument a tiny random Llama is quantised by torchao and saved first, in the format in which quantised models
are published: safetensors, with ``quantization_config`` in ``config.json``. The model is compiled once for the prompt
and once for every further token.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # remove it to download a checkpoint by its name

import torch
from tiny import DEVICE, FP8
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import aiter_fusion

NEW_TOKENS = 4


def make(folder: Path) -> Path:
    """Save a random model, quantise it while it is loaded, and save it again: what a publisher does."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        vocab_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder / "bf16")
    quantised: Any = AutoModelForCausalLM.from_pretrained(
        folder / "bf16", dtype=torch.bfloat16, quantization_config=TorchAoConfig(FP8)
    )
    quantised.save_pretrained(folder / "fp8")
    return folder / "fp8"


@torch.no_grad()
def main(checkpoint: str | Path | None) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint or make(Path(tempfile.mkdtemp())), dtype="auto")
    model.to(DEVICE).eval()
    print("loaded:", type(model.model.layers[0].self_attn.q_proj.weight).__name__, "weights")

    prompt = torch.arange(16, device=DEVICE)[None] % model.config.vocab_size
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    model.forward = torch.compile(model.forward, backend="aiter_fusion")
    # disable_compile: generate() would compile the decode step itself, by Inductor alone.
    tokens = model.generate(prompt, cache_implementation="static", disable_compile=True, **settings)
    print("tokens:", tokens[0, prompt.shape[1] :].tolist())
    for name, report in zip(("prompt", "further tokens"), aiter_fusion.reports(), strict=False):
        print(f"{name}: {report.summary()}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
