"""Small random models of real families, quantised, and what their own modules say should be fused."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear

from aiter_fusion.scaled_product import MOST
from support import cases

HIDDEN, LAYERS, VOCABULARY = 256, 2, 128
COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": VOCABULARY,
}

MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}


def _hugging_face(name: str, **changes: Any) -> Callable[..., nn.Module]:
    """``<name>ForCausalLM`` with its own ``<name>Config`` (or ``<name>TextConfig``)."""

    def make(**more: Any) -> nn.Module:
        config = getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config")
        return getattr(transformers, f"{name}ForCausalLM")(config(**{**COMMON, **changes, **more}))

    return make


def _t5_encoder(num_hidden_layers: int = LAYERS) -> nn.Module:
    """The encoder of T5 1.1, as diffusion models use it for text: GELU by ``gelu_new``, gated."""
    config = transformers.T5Config(
        d_model=HIDDEN,
        d_kv=64,
        d_ff=512,
        num_layers=num_hidden_layers,
        num_heads=4,
        vocab_size=VOCABULARY,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config)


# The next classes have these names so that the hooks below take them for norms.


class RoundFirstRMSNorm(nn.Module):
    """RMSNorm with an optional residual as vLLM runs it without kernels: summed in float32, rounded, weighted."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = 1e-5

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        dtype, x = x.dtype, x.float()
        if residual is not None:
            x = x + residual.float()
        return self.finish(x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps), dtype), x.to(dtype)

    def finish(self, normalised: Tensor, dtype: torch.dtype) -> Tensor:
        return normalised.to(dtype) * self.weight


class WeighFirstRMSNorm(RoundFirstRMSNorm):
    """As SGLang runs it: weighted, then rounded."""

    def finish(self, normalised: Tensor, dtype: torch.dtype) -> Tensor:
        return (normalised * self.weight).to(dtype)


class SiluAndMul(nn.Module):
    """SiLU of the first half of the columns, times the second."""

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-1] // 2
        return nn.functional.silu(x[..., :size]) * x[..., size:]


class EngineBlock(nn.Module):
    """A decoder block in the style of inference engines: flat tokens, packed projections, residual beside the value."""

    def __init__(self, norm: type[RoundFirstRMSNorm]) -> None:
        super().__init__()
        self.first, self.second = norm(HIDDEN), norm(HIDDEN)
        self.qkv_proj, self.o_proj = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.gate_up_proj = nn.Linear(HIDDEN, 1024, bias=False)
        self.down_proj = nn.Linear(512, HIDDEN, bias=False)
        self.act_fn = SiluAndMul()

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        x, residual = self.first(x, before)
        q, k, v = (t.view(-1, 4, 64).transpose(0, 1) for t in self.qkv_proj(x).chunk(3, -1))
        x = self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(-1, HIDDEN))
        x, residual = self.second(x, residual)
        return self.down_proj(self.act_fn(self.gate_up_proj(x))), residual


class Engine(nn.Module):
    """Blocks in the style of inference engines over an embedding."""

    def __init__(self, norm: type[RoundFirstRMSNorm], num_hidden_layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(EngineBlock(norm) for _ in range(num_hidden_layers))
        self.norm, self.head = norm(HIDDEN), nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, use_cache: bool = False) -> Tensor:
        x, residual = self.embed(tokens).flatten(0, 1), None
        for block in self.blocks:
            x, residual = block(x, residual)
        return self.head(self.norm(x, residual)[0])


class TorchBlock(nn.Module):
    """A pre-norm block of ``torch.nn`` modules; ``modulated`` scales the first norm's value before it is read."""

    def __init__(self, modulated: bool) -> None:
        super().__init__()
        self.first, self.second = nn.RMSNorm(HIDDEN, eps=3e-6), nn.RMSNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.up, self.gate = nn.Linear(HIDDEN, 512, bias=False), nn.Linear(HIDDEN, 512, bias=False)
        self.down, self.act_fn = nn.Linear(512, HIDDEN, bias=False), nn.GELU(approximate="tanh")
        self.modulated = modulated

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.modulated:
            h = h * (1 + x.mean(1, keepdim=True))  # what is quantised is no longer the norm's value
        q, k, v = (t.unflatten(-1, (4, 64)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.second(x)
        return x + self.down(self.up(h) * self.act_fn(self.gate(h)))


class TorchModel(nn.Module):
    """Blocks of ``torch.nn`` modules over an embedding."""

    def __init__(self, modulated: bool, num_hidden_layers: int = LAYERS) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.Sequential(*(TorchBlock(modulated) for _ in range(num_hidden_layers)))

    def forward(self, tokens: Tensor, use_cache: bool = False) -> Tensor:
        return self.blocks(self.embed(tokens))


FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "Llama": _hugging_face("Llama"),
    "Qwen3": _hugging_face("Qwen3", head_dim=64),
    "Mistral": _hugging_face("Mistral"),
    "Gemma3": _hugging_face("Gemma3", head_dim=64, tie_word_embeddings=False),
    "Qwen2": _hugging_face("Qwen2"),
    "Gemma2": _hugging_face("Gemma2", head_dim=64, tie_word_embeddings=False),
    "Phi3": _hugging_face("Phi3", pad_token_id=0),
    "Glm4": _hugging_face("Glm4", head_dim=64, pad_token_id=0),
    "Olmo2": _hugging_face("Olmo2"),
    "Mixtral": _hugging_face("Mixtral", num_local_experts=4),
    "Qwen3Moe": _hugging_face("Qwen3Moe", head_dim=64, num_experts=4, **MOE),
    "GptOss": _hugging_face("GptOss", head_dim=64, num_local_experts=4, num_experts_per_tok=2),
    "Llama4": _hugging_face("Llama4", head_dim=64, num_local_experts=4, intermediate_size_mlp=512, pad_token_id=0),
    "DeepseekV3": _hugging_face(
        "DeepseekV3",
        num_key_value_heads=4,
        q_lora_rank=128,
        kv_lora_rank=128,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        **MOE,
    ),
    "Qwen3Next": _hugging_face(
        "Qwen3Next",
        head_dim=64,
        num_experts=4,
        shared_expert_intermediate_size=128,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        layer_types=["linear_attention", "full_attention"],
        **MOE,
    ),
    "vLLM": functools.partial(Engine, RoundFirstRMSNorm),
    "SGLang": functools.partial(Engine, WeighFirstRMSNorm),
    "torch.nn": functools.partial(TorchModel, modulated=False),
    "modulated": functools.partial(TorchModel, modulated=True),
    "T5": _t5_encoder,
}


ENGINES = ("vLLM", "SGLang")
# Whose attention is not PyTorch's call, and the op that takes its place rounds less often: left out where bits count.
BY_HAND = ("Gemma2",)


def build(family: str, **changes: Any) -> nn.Module:
    """A random bf16 model in eval mode; weights do not depend on global random state. ``changes`` are to a Hugging Face
    model's configuration; the number of layers changes that of any."""
    model = FAMILIES[family](**changes).to(torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul_(0.05).to(parameter.dtype)
    return model


class GroupLinear(nn.Module):
    """A linear layer that quantises its input by hand, one scale for 128 elements."""

    quantise = staticmethod(cases.q7(128))

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        q, scale = self.quantise(x)
        back = q.to(x.dtype) * scale.to(x.dtype).repeat_interleave(128, -1)
        return nn.functional.linear(back, self.weight)


class EngineLinear(GroupLinear):
    """As inference engines quantise without kernels."""

    quantise = staticmethod(cases.q7_floor_in_half)


@functools.cache
def scales_rows() -> bool:
    """Whether this torch multiplies FP8 matrices with one scale a row on a CPU; 2.11 does not."""
    a, scale = torch.zeros(16, 16).to(cases.FN), torch.ones(16, 1)
    try:
        torch.ops.aten._scaled_mm(a, a.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def need_scaled_rows() -> None:
    """Skip a test that runs torchao's per-row linear layers on a CPU that cannot."""
    if not scales_rows():
        pytest.skip("needs a torch whose _scaled_mm takes a scale for each row on a CPU: 2.12 or newer")


@torch.library.custom_op("aiter_fusion_tests::blockwise_gemm", mutates_args=())
def blockwise_gemm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, block_size: int) -> Tensor:
    """``a @ b.T`` of FP8 tensors with a scale for each 1 x 128 block of a and 128 x 128 block of b."""
    a32 = (a.float().view(-1, block_size) * a_scale.reshape(-1, 1)).view(a.shape)
    b32 = b.float() * b_scale.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
    return (a32 @ b32.t()).to(torch.bfloat16)


@blockwise_gemm.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, block_size: int) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=torch.bfloat16)


def _run_blockwise_gemm_on_a_cpu() -> None:
    """torchao has this product in Triton only. It is as opaque in the graph as theirs; what quantises is torchao's."""
    from torchao.quantization.quantize_.workflows.float8 import float8_tensor

    theirs = float8_tensor.blockwise_fp8_gemm
    if getattr(theirs, "on_cpu", False):
        return

    def multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, block_size: int = 128) -> Tensor:
        ours = a.device.type == "cpu"
        return (blockwise_gemm if ours else theirs)(a, a_scale, b, b_scale, block_size)

    multiply.on_cpu = True  # type: ignore[attr-defined]
    float8_tensor.blockwise_fp8_gemm = multiply


def _of_whole_blocks(module: nn.Module, name: str) -> bool:
    """torchao takes no other weights; DeepSeek-V3 has one of another shape in each layer."""
    return isinstance(module, nn.Linear) and all(size % 128 == 0 for size in module.weight.shape)


def _torchao(granularity: str, **options: Any) -> Callable[[nn.Module], None]:
    def quantise(model: nn.Module) -> None:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quant_api, quantize_
        from torchao.quantization.granularity import PerBlock, PerRow, PerTensor

        if granularity == "PerRow":
            need_scaled_rows()
        layers = None  # all linear layers
        if granularity == "PerBlock":
            _run_blockwise_gemm_on_a_cpu()
            layers = _of_whole_blocks
        blocks = [PerBlock(size) for size in ([1, 128], [128, 128])]  # type: ignore[arg-type]  # a tuple fails
        chosen = {"PerRow": PerRow(), "PerTensor": PerTensor(), "PerBlock": blocks}[granularity]
        check = quant_api._check_hardware_support
        quant_api._check_hardware_support = lambda granularity: None  # it demands a GPU
        try:
            quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=chosen, **options), layers)
        finally:
            quant_api._check_hardware_support = check

    return quantise


def _int8(model: nn.Module) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())


def _mxfp8(model: nn.Module) -> None:
    """With torchao's emulated product, which is there on a CPU."""
    from torchao.prototype.mx_formats import inference_workflow
    from torchao.quantization import quantize_
    from torchao.quantization.quantize_.common import KernelPreference

    config = inference_workflow.MXDynamicActivationMXWeightConfig(kernel_preference=KernelPreference.EMULATED)
    quantize_(model, config)


SCALE = torch.tensor(0.02)


class StaticLinear(nn.Module):
    """A linear layer that quantises its input by hand with a given scale."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.scale = SCALE  # of the activation, so one for all layers that read it; here one for all

    def forward(self, x: Tensor) -> Tensor:
        (q,) = cases.q2_static(x, self.scale)
        return nn.functional.linear((q.float() * self.scale).to(x.dtype), self.weight)


def _loaded(linear: nn.Linear) -> nn.Module:
    """As transformers loads FP8 checkpoints of compressed-tensors with ``use_optimized_inference=True``."""
    need_scaled_rows()
    weight = linear.weight.float()
    scale = weight.abs().amax(1, keepdim=True) / 448.0
    layer = CompressedTensorsFP8Linear(linear.in_features, linear.out_features, linear.bias is not None)
    layer.weight = nn.Parameter((weight / scale).to(cases.FN), requires_grad=False)
    layer.weight_scale = nn.Parameter(scale.t(), requires_grad=False)
    layer.bias = linear.bias
    return layer


def _by_hand(layer: Callable[[nn.Linear], nn.Module], but: str = "") -> Callable[[nn.Module], None]:
    def quantise(module: nn.Module) -> None:
        for name, child in module.named_children():
            if type(child) is nn.Linear and name != but:  # a router that inherits from it is something else
                setattr(module, name, layer(child))
            else:
                quantise(child)

    return quantise


QUANTISATIONS: dict[str, Callable[[nn.Module], None]] = {
    "PerRow": _torchao("PerRow"),
    "PerTensor": _torchao("PerTensor"),
    "PerBlock": _torchao("PerBlock"),
    "bounded": _torchao("PerRow", activation_value_lb=1e-4, activation_value_ub=1e3),
    "group128": _by_hand(GroupLinear),
    "static": _by_hand(StaticLinear),
    "engine": _by_hand(EngineLinear),
    "int8": _int8,
    "mxfp8": _mxfp8,
    "compressed-tensors": _by_hand(_loaded, but="lm_head"),  # which such checkpoints leave in bfloat16
}


# Those whose layers multiply FP8 values, by an operator that is there on a CPU.
MULTIPLYING = ("PerRow", "PerTensor", "bounded", "compressed-tensors")


def quantises(module: nn.Module) -> bool:
    """Whether a module is a linear layer that quantises its input."""
    by_torchao = isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter
    return by_torchao or isinstance(module, (GroupLinear, StaticLinear, CompressedTensorsFP8Linear))


def unwatched(model: nn.Module, name: str) -> str:
    """The producer of a linear layer's input that no module of its own computes, or nothing."""
    parent, _, layer = name.rpartition(".")
    owner = model.get_submodule(parent)
    kind = type(owner).__name__
    if isinstance(owner, TorchBlock) and owner.modulated and layer == "qkv":
        return f"rms_norm_quant {parent}"
    if kind == "Qwen3NextAttention" and layer == "o_proj":  # times the sigmoid of a gate
        return f"act_mul_quant {parent}"
    embedded = ".layers.0.self_attn" in name
    if kind.startswith("Olmo2") and layer in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") and not embedded:
        return f"add_quant {parent}"  # it norms what a layer returns, and adds that
    return ""


def expected(model: nn.Module, quantisation: str, *inputs: Tensor) -> tuple[Counter[str], int]:
    """What the eager model says: replaced sites by family, and quantisers whose input no fusion computes.

    Watched: which storage every norm returns, which modules call an activation, and what enters every quantised linear
    layer. A norm that such a layer reads is one site, gated (Qwen3-Next) or not; so is the product that enters one
    beside an activation, and what ``unwatched`` knows; every other such layer quantises for itself. Layers that read
    one tensor are one FP8 product, or as many as it takes where an op computes eight. PyTorch's attention is one site a
    call; without its call see ``BY_HAND``.
    """
    read_from: dict[int, str] = {}  # storage -> the norm, activation or (empty) neither that its tensor comes from
    activated: set[str] = set()
    read: Counter[str] = Counter()
    readers: Counter[tuple[Any, ...]] = Counter()  # tensor -> linear layers that read it
    keep: list[Tensor] = []  # so that no storage is used twice
    hooks = []
    attention = nn.functional.scaled_dot_product_attention
    attended = 0

    def attend(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal attended
        attended += q.dim() == 4
        return attention(q, *args, **kwargs)

    def norm_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            first = output[0] if isinstance(output, tuple) else output
            keep.append(first)
            read_from[first.untyped_storage().data_ptr()] = f"rms_norm_quant {name}"

        return hook

    def act_hook(parent: str) -> Callable[..., None]:
        return lambda module, args, output: activated.add(parent)

    def linear_hook(name: str) -> Callable[..., None]:
        parent = name.rpartition(".")[0]

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            keep.append(args[0])
            readers[args[0].data_ptr(), args[0].shape] += 1
            product = f"act_mul_quant {parent}" if parent in activated else unwatched(model, name)
            read[read_from.setdefault(args[0].untyped_storage().data_ptr(), product)] += 1

        return hook

    for name, module in model.named_modules():
        parent = name.rpartition(".")[0]
        if type(module).__name__.endswith(("RMSNorm", "RMSNormGated", "T5LayerNorm")):
            hooks.append(module.register_forward_hook(norm_hook(name)))
        elif name.endswith(("act_fn", "activation_fn", ".act")):
            hooks.append(module.register_forward_hook(act_hook(parent)))
        elif quantises(module):
            hooks.append(module.register_forward_pre_hook(linear_hook(name)))
    with torch.no_grad(), mock.patch.object(nn.functional, "scaled_dot_product_attention", attend):
        model(*inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    alone = read.pop("", 0)
    launches = sum(-(-count // MOST) for count in readers.values()) if quantisation in MULTIPLYING else 0
    return Counter(name.split()[0] for name in read) + Counter(fp8_linear=launches, decode_attention=attended), alone


def tokens(batch: int = 1, length: int = 16) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))
