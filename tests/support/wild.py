"""Small random models of the libraries' own classes that are no decoders: of diffusion, vision, speech and text."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from support.models import FAMILIES as DECODERS
from support.models import HIDDEN, LAYERS, VOCABULARY, quantises

BF16 = torch.bfloat16
SIZES: dict[str, Any] = {
    "num_attention_heads": 4,
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
}
Made = tuple[nn.Module, Mapping[str, Any]]


def _diffusers(name: str, **config: Any) -> nn.Module:
    pytest.importorskip("diffusers", reason="needs diffusers: pip install '.[diffusion]'")
    return getattr(importlib.import_module("diffusers"), name)(**config)


def _random(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(len(sizes))).to(BF16)


def _tokens(length: int = 16) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


def _flux() -> Made:
    model = _diffusers(
        "FluxTransformer2DModel",
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=8,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    return model, {
        "hidden_states": _random(2, 16, 16),
        "encoder_hidden_states": _random(2, 8, 128),
        "pooled_projections": _random(2, 64),
        "timestep": torch.tensor([0.5, 0.25], dtype=BF16),
        "guidance": torch.tensor([3.5, 2.5], dtype=BF16),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
        "return_dict": False,
    }


def _stable_diffusion() -> Made:
    model = _diffusers(
        "SD3Transformer2DModel",
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=8,
        joint_attention_dim=128,
        caption_projection_dim=HIDDEN,
        pooled_projection_dim=64,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return model, {
        "hidden_states": _random(2, 4, 8, 8),
        "encoder_hidden_states": _random(2, 8, 128),
        "pooled_projections": _random(2, 64),
        "timestep": torch.tensor([5, 7]),
        "return_dict": False,
    }


def _ltx() -> Made:
    model = _diffusers(
        "LTXVideoTransformer3DModel",
        in_channels=16,
        out_channels=16,
        num_attention_heads=8,
        attention_head_dim=32,
        cross_attention_dim=HIDDEN,
        num_layers=2,
        caption_channels=128,
    )
    return model, {
        "hidden_states": _random(2, 16, 16),
        "encoder_hidden_states": _random(2, 8, 128),
        "encoder_attention_mask": torch.ones(2, 8, dtype=torch.int64),
        "timestep": torch.tensor([5, 7]),
        "num_frames": 1,
        "height": 4,
        "width": 4,
        "return_dict": False,
    }


def _siglip() -> Made:
    config = transformers.SiglipVisionConfig(**SIZES, image_size=32, patch_size=8)
    config.vision_use_head = False
    return transformers.SiglipVisionModel(config), {"pixel_values": _random(2, 3, 32, 32)}


def _whisper() -> Made:
    sizes: dict[str, Any] = {"d_model": HIDDEN, "vocab_size": VOCABULARY, "num_mel_bins": 16}
    sizes |= {"max_source_positions": 16, "max_target_positions": 16}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": LAYERS, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 512}
    inputs = {"input_features": _random(2, 16, 32), "decoder_input_ids": _tokens(8), "use_cache": False}
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes)), inputs


def _bert() -> Made:
    return transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=VOCABULARY)), {"input_ids": _tokens()}


def _nemotron() -> Made:
    config = transformers.NemotronConfig(**SIZES, num_key_value_heads=2, vocab_size=VOCABULARY)
    return transformers.NemotronForCausalLM(config), {"input_ids": _tokens(), "use_cache": False}


FAMILIES: dict[str, Callable[[], Made]] = {
    "FLUX": _flux,
    "SD3.5": _stable_diffusion,
    "LTX": _ltx,
    "SigLIP": _siglip,
    "Whisper": _whisper,
    "BERT": _bert,
    "Nemotron": _nemotron,
    "T5": lambda: (DECODERS["T5"](), {"input_ids": _tokens()}),
}


def build(family: str) -> Made:
    """A random bf16 model in eval mode, and inputs by name."""
    model, inputs = FAMILIES[family]()
    model = model.to(BF16).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.05).to(parameter.dtype)
    return model, inputs


def values(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """How many different tensors enter quantised linear layers of the eager model; a view of one is the same."""
    entered: dict[tuple[Any, ...], Tensor] = {}  # kept, so that no memory is used twice

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        entered[x.data_ptr(), x.numel(), x.stride(-1)] = x

    hooks = [module.register_forward_pre_hook(watch) for module in model.modules() if quantises(module)]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return len(entered)
