"""The transformer of a diffusion pipeline, from diffusers, quantised by torchao: which of its sites are fused, and why
the others are not.

    python examples/diffusion_transformer.py

A random Flux of one double and one single block; the pipeline around it would be compiled in the same way:
``pipe.transformer = torch.compile(pipe.transformer, backend="aiter_fusion")``. Graphs are interpreted, not compiled to
code.
"""

from __future__ import annotations

import importlib.util
import sys

import torch
from tiny import DEVICE, FP8
from torch import nn
from torchao.quantization import quantize_

import aiter_fusion


def build() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The model and the arguments of one denoising step."""
    from diffusers import FluxTransformer2DModel  # type: ignore[import-not-found]

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(8, 12, 12),
    )
    model = model.to(DEVICE, torch.bfloat16).eval()
    quantize_(model, FP8, lambda module, name: isinstance(module, nn.Linear) and min(module.weight.shape) >= 64)
    half, ids = {"device": DEVICE, "dtype": torch.bfloat16}, {"device": DEVICE, "dtype": torch.float32}
    return model, {
        "hidden_states": torch.randn(1, 16, 16, **half),
        "encoder_hidden_states": torch.randn(1, 8, 64, **half),
        "pooled_projections": torch.randn(1, 64, **half),
        "timestep": torch.ones(1, **half),
        "img_ids": torch.zeros(16, 3, **ids),
        "txt_ids": torch.zeros(8, 3, **ids),
    }


@torch.no_grad()
def main() -> None:
    if importlib.util.find_spec("diffusers") is None:
        sys.exit("this example needs diffusers: pip install diffusers")
    model, step = build()
    oracle = aiter_fusion.Backend().oracle()
    torch.compile(model, backend=oracle)(**step)
    print(oracle.report)
    print("the same bits as the original graphs:", oracle.identical)


if __name__ == "__main__":
    main()
