"""The main job: an FP8 Llama from transformers and torchao, compiled by name, and the proof that nothing changed.

    python examples/quickstart.py

Random weights, a prefill of 64 tokens and 8 greedy decode steps. Prints what was fused, that the rewritten graphs give
the same bits as the original ones, and how far both compiled models are from eager PyTorch; leaves a depyf dump.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is made here, nothing is downloaded

import depyf
import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quant_api, quantize_
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import aiter_fusion

PREFILL, STEPS = 64, 8
CONFIG = LlamaConfig(
    hidden_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    intermediate_size=1408,
    vocab_size=1024,
)


def build() -> nn.Module:
    """The quantised model, in eval mode, on the GPU if there is one."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = cast(nn.Module, LlamaForCausalLM(CONFIG)).to(device, torch.bfloat16).eval()
    if device == "cpu":
        # torchao demands a GPU with FP8 units; a CPU computes the same graph, slowly: bypassed for this demonstration.
        quant_api._check_hardware_support = lambda granularity: None
    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return model


def generate(call, model: nn.Module, prompt: Tensor, forced: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Prefill and greedy decoding: (tokens ``[STEPS]``, logits ``[STEPS + 1, vocabulary]``).

    ``forced`` tokens are fed instead of the model's own, so that the logits of two models can be compared.
    """
    cache = StaticCache(config=CONFIG, max_cache_len=PREFILL + STEPS)
    fed, tokens, logits = prompt, [], []
    for step in range(STEPS + 1):
        start = 0 if step == 0 else PREFILL + step - 1
        positions = torch.arange(start, start + fed.shape[1], device=fed.device)
        result = call(fed, past_key_values=cache, position_ids=positions[None], use_cache=True).logits[0, -1]
        logits.append(result.float())
        if step < STEPS:
            tokens.append(result.argmax() if forced is None else forced[step])
            fed = tokens[-1].view(1, 1)
    return torch.stack(tokens), torch.stack(logits)


def distance(logits: Tensor, eager: Tensor) -> str:
    """Largest absolute and relative (Frobenius) difference."""
    difference = logits - eager
    return f"max |difference| {difference.abs().max():.4f}, relative {difference.norm() / eager.norm():.2e}"


@torch.no_grad()
def main() -> None:
    model = build()
    device = next(model.parameters()).device
    prompt = torch.randint(0, CONFIG.vocab_size, (1, PREFILL), generator=torch.Generator().manual_seed(1)).to(device)

    tokens, eager = generate(model, model, prompt)
    print(f"eager: {tokens.tolist()}\n")

    # The main job. Without the caches of graphs, since depyf can only dump graphs that are really compiled.
    dump = Path(tempfile.mkdtemp(prefix="aiter_fusion_depyf_"))
    with (
        inductor_config.patch(fx_graph_cache=False),
        functorch_config.patch(enable_autograd_cache=False),
        depyf.prepare_debug(str(dump)),
    ):
        _, fused = generate(torch.compile(model, backend="aiter_fusion"), model, prompt, tokens)
    for name, report in zip(("prefill", "decode"), aiter_fusion.reports(), strict=True):
        print(f"\n{name}: {report}")

    # The proof: both graphs, interpreted node by node, on the same calls.
    torch._dynamo.reset()
    oracle = aiter_fusion.Backend().oracle()
    generate(torch.compile(model, backend=oracle), model, prompt, tokens)
    calls = sum(graph.calls for graph in oracle.graphs)
    same = "bit-identical" if oracle.identical else "DIFFERENT"
    print(f"\nrewritten and original post-grad graphs, interpreted: {same} logits ({calls} calls)")

    torch._dynamo.reset()
    _, plain = generate(torch.compile(model), model, prompt, tokens)
    print(f"aiter_fusion to eager:   {distance(fused, eager)}")
    print(f"plain Inductor to eager: {distance(plain, eager)}")

    after = [path for path in sorted(dump.glob("*AFTER_POST_GRAD*")) if "rms_norm_quant" in path.read_text()]
    print(f"\ndepyf dump: {dump}\npost-grad graphs that name the fused ops: {', '.join(path.name for path in after)}")
    if not oracle.identical or not after:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
