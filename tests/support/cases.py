"""One row for each form and each fusion; every generic test runs over these rows.

A form is a function of tensors that spells one piece of a model. To cover a new form, add one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

FN = torch.float8_e4m3fn
FNUZ = torch.float8_e4m3fnuz
H = 256  # the width of every case: two groups of 128


# ---- normalisations: (x, weight) -> value --------------------------------------------------------------------


def llama(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return w * h.to(x.dtype)


def llama4(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * w


def olmo2(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))).to(x.dtype)


def torch_nn(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), w, 3.7e-6)


def torch_nn_default_eps(x: Tensor, w: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), w)


def gemma(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (1.0 + w.float())).to(x.dtype)


def no_weight(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@dataclass(frozen=True)
class NormForm:
    name: str
    call: Callable[[Tensor, Tensor], Tensor]
    fp32_weight: bool = True  # whether an fp32 weight with a half-precision input is still this form


NORMS = (
    NormForm("R1", llama),
    NormForm("R1_other_eps", lambda x, w: llama(x, w, 4.2e-5)),
    NormForm("R1'", llama4),
    NormForm("R2", olmo2),
    NormForm("R2'", torch_nn),
    NormForm("R2'_default_eps", torch_nn_default_eps),
    NormForm("R3", gemma),
    NormForm("R4", no_weight),
)


# ---- gated activations: one packed tensor [.., 2H] -> value [.., H] ------------------------------------------


def chunked(act: Callable[[Tensor], Tensor], up_first: bool = False) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return a * act(b) if up_first else act(a) * b

    return call


def sliced(x: Tensor) -> Tensor:
    d = x.shape[-1] // 2
    return F.silu(x[..., :d]) * x[..., d:]


def sliced_up_first(x: Tensor) -> Tensor:
    d = x.shape[-1] // 2
    return x[..., :d] * F.silu(x[..., d:])


def separate(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        gate, up = x[..., ::2] * 2, x[..., 1::2] * 2  # two tensors, as two projections give (times 1 is left out)
        return act(gate) * up

    return call


def separate_up_first(x: Tensor) -> Tensor:
    gate, up = x[..., ::2] * 2, x[..., 1::2] * 2
    return up * F.silu(gate)


def wide_gate(x: Tensor) -> Tensor:
    gate, up = x[..., ::2].float() * 2, x[..., 1::2] * 2
    return F.silu(gate).to(x.dtype) * up


def wide_up(x: Tensor) -> Tensor:
    gate, up = x[..., ::2] * 2, x[..., 1::2].float() * 2
    return up * F.silu(gate)


def rounded_late(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return (F.silu(a.float()) * b.float()).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def swish(x: Tensor) -> Tensor:
    return (x.float() * torch.sigmoid(x.float())).to(x.dtype)


def interleaved(act: Callable[[Tensor], Tensor], up_first: bool = False) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        a, b = x[..., ::2], x[..., 1::2]
        return a * act(b) if up_first else act(a) * b

    return call


def clamped_swiglu(gate: Tensor, up: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    gate = gate.clamp(min=None, max=limit)
    up = up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


def gpt_oss(x: Tensor) -> Tensor:
    return clamped_swiglu(x[..., ::2], x[..., 1::2])


def gpt_oss_other_numbers(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return clamped_swiglu(gate, up, 0.3, 1)


def gpt_oss_separate(x: Tensor) -> Tensor:
    up, gate = x[..., ::2] * 2, x[..., 1::2] * 2
    return clamped_swiglu(gate, up)


def gpt_oss_rounded_late(x: Tensor) -> Tensor:
    return clamped_swiglu(x[..., 1::2].float(), x[..., ::2].float()).to(x.dtype)


def gelu_new(x: Tensor) -> Tensor:
    """transformers' NewGELUActivation, in whatever dtype x has."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gated_by_sigmoid(x: Tensor) -> Tensor:
    value, gate = x[..., ::2] * 2, x[..., 1::2] * 2
    return value * torch.sigmoid(gate)


@dataclass(frozen=True)
class ActForm:
    name: str
    call: Callable[[Tensor], Tensor]
    packed: bool


ACTS = (
    ActForm("S1", separate(F.silu), False),
    ActForm("S1_up_first", separate_up_first, False),
    ActForm("S1_gelu_tanh", separate(gelu_tanh), False),
    ActForm("S1_gelu", separate(F.gelu), False),
    ActForm("S1_swish", separate(swish), False),
    ActForm("S1_wide_gate", wide_gate, False),
    ActForm("S1_wide_up", wide_up, False),
    ActForm("S2", chunked(F.silu), True),
    ActForm("S2_rounded_late", rounded_late, True),
    ActForm("S3", chunked(F.silu, up_first=True), True),
    ActForm("S3_gelu_tanh", chunked(gelu_tanh, up_first=True), True),
    ActForm("S4", sliced, True),
    ActForm("S4_up_first", sliced_up_first, True),
    ActForm("S7", interleaved(F.silu), True),
    ActForm("S7_gelu_tanh", interleaved(gelu_tanh, up_first=True), True),
    ActForm("S6", gpt_oss, True),
    ActForm("S6_other_numbers", gpt_oss_other_numbers, True),
    ActForm("S6_separate", gpt_oss_separate, False),
    ActForm("S6_rounded_late", gpt_oss_rounded_late, True),
    ActForm("S8", separate(gelu_new), False),
    ActForm("S8_packed", chunked(gelu_new), True),
    ActForm("S9", gated_by_sigmoid, False),
    ActForm("S9_packed", chunked(torch.sigmoid, up_first=True), True),
)


# ---- producers with inputs of their own: (...) -> value, or the value and what else is returned ---------------


def layer(x: Tensor, w: Tensor | None = None, b: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), w, b, eps)


def layer_in_float32(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """diffusers' FP32LayerNorm."""
    return layer(x.float(), w.float(), b.float()).to(x.dtype)


def add_layer(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    summed = r + x
    return layer(summed, w, b), summed


def modulated(x: Tensor, g: Tensor, s: Tensor) -> Tensor:
    return layer(x) * (1 + g) + s


def modulated_in_float32(x: Tensor, g: Tensor, s: Tensor) -> Tensor:
    """Wan's."""
    return (layer(x.float()) * (1 + g.float()) + s.float()).to(x.dtype)


def chunked_modulation(x: Tensor, gs: Tensor) -> Tensor:
    """Both of one projection, so with gaps between their rows."""
    gain, shift = gs.chunk(2, -1)
    return layer(x) * (1 + gain) + shift


def prepared_gain(x: Tensor, g: Tensor, s: Tensor) -> Tensor:
    """1 is added before the gain has its dimension of tokens."""
    gain = (1 + g.flatten(0, -2)).reshape(g.shape)
    return layer(x) * gain + s


def scaled_rms(x: Tensor, w: Tensor, g: Tensor) -> Tensor:
    return llama(x, w) * (1 + g)


def modulated_rms(x: Tensor, g: Tensor, s: Tensor) -> Tensor:
    """LTX's."""
    return no_weight(x, x) * (1 + g) + s


def gated_modulated(x: Tensor, r: Tensor, e: Tensor, g: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """FLUX's: what a gate lets through is added, and the sum is read again."""
    summed = r + e * x
    return layer(summed) * (1 + g) + s, summed


def gated_in_float32(x: Tensor, r: Tensor, e: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Wan's: the sum of float32 is rounded before it is normalised."""
    summed = (r.float() + x * e.float()).to(x.dtype)
    return layer_in_float32(summed, w, b), summed


def gated_rms(x: Tensor, r: Tensor, e: Tensor, w: Tensor) -> Tensor:
    return llama(x * e + r, w)


def gated_norm(x: Tensor, w: Tensor, z: Tensor) -> Tensor:
    """Qwen3-Next's linear attention."""
    return (llama(x, w) * F.silu(z.float())).to(x.dtype)


def gated_heads(x: Tensor, z: Tensor) -> Tensor:
    """The same, of heads."""
    x, z = (t.unflatten(-1, (4, -1)) for t in (x, z))
    return (F.silu(z.float()) * no_weight(x, x)).to(x.dtype).flatten(-2)


def squared_relu(x: Tensor) -> Tensor:
    return torch.square(F.relu(x))


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def beside(x: Tensor, x2: Tensor) -> Tensor:
    """FLUX's single blocks: attention beside an activation."""
    return torch.cat([x, gelu_tanh(x2)], -1)


def activated_first(x: Tensor, x2: Tensor) -> Tensor:
    return torch.cat([squared_relu(x), x2], -1)


def added(x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    summed = r + x
    return summed, summed * 2


def gated(x: Tensor, r: Tensor, e: Tensor) -> tuple[Tensor, ...]:
    """LTX's and PixArt's: a residual stream that is quantised as it is."""
    summed = r + x * e
    return summed, summed


@dataclass(frozen=True)
class Producer:
    """A producer that reads ``inputs``; ``words``: what the variant has before the granularity."""

    name: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    family: str
    words: str
    inputs: tuple[str, ...]


PRODUCERS = (
    Producer("L1", layer, "layer_norm_quant", "", ("x", "w", "b")),
    Producer("L1_other_eps", lambda x, w, b: layer(x, w, b, 3e-4), "layer_norm_quant", "", ("x", "w", "b")),
    Producer("L1_float32", layer_in_float32, "layer_norm_quant", "", ("x", "w", "b")),
    Producer("L1_add", add_layer, "layer_norm_quant", "add", ("x", "r", "w", "b")),
    Producer("L2", lambda x: layer(x), "layer_norm_quant", "", ("x",)),
    Producer("L3", lambda x, w: layer(x, w), "layer_norm_quant", "", ("x", "w")),
    Producer("L3_plus_one", lambda x, w: layer(x, w + 1), "layer_norm_quant", "", ("x", "w")),
    Producer("L4", lambda x, b: layer(x, None, b), "layer_norm_quant", "", ("x", "b")),
    Producer("M1", modulated, "layer_norm_quant", "modulate", ("x", "g", "s")),
    Producer("M1_float32", modulated_in_float32, "layer_norm_quant", "modulate", ("x", "g", "s")),
    Producer("M1_chunked", chunked_modulation, "layer_norm_quant", "modulate", ("x", "gs")),
    Producer("M1_prepared", prepared_gain, "layer_norm_quant", "modulate", ("x", "g", "s")),
    Producer("M2", scaled_rms, "rms_norm_quant", "modulate", ("x", "w", "g")),
    Producer("M2_shifted", modulated_rms, "rms_norm_quant", "modulate", ("x", "g", "s")),
    Producer("G1", gated_modulated, "layer_norm_quant", "gated_add+modulate", ("x", "r", "e", "g", "s")),
    Producer("G1_float32", gated_in_float32, "layer_norm_quant", "gated_add", ("x", "r", "e", "w", "b")),
    Producer("G2", gated_rms, "rms_norm_quant", "gated_add", ("x", "r", "e", "w")),
    Producer("N1", gated_norm, "rms_norm_quant", "gated", ("x", "w", "r")),
    Producer("N1_heads", gated_heads, "rms_norm_quant", "gated", ("x", "r")),
    Producer("N1_sigmoid", lambda x, r: no_weight(x, x) * torch.sigmoid(r), "rms_norm_quant", "gated", ("x", "r")),
    Producer("A1", lambda x: F.gelu(x), "act_quant", "", ("x",)),
    Producer("A1_tanh", gelu_tanh, "act_quant", "", ("x",)),
    Producer("A1_new", gelu_new, "act_quant", "", ("x",)),
    Producer("A1_quick", quick_gelu, "act_quant", "", ("x",)),
    Producer("A2", lambda x: F.silu(x), "act_quant", "", ("x",)),
    Producer("A3", lambda x: F.relu(x), "act_quant", "", ("x",)),
    Producer("A3_squared", squared_relu, "act_quant", "", ("x",)),
    Producer("C1", beside, "cat_quant", "", ("x", "x2")),
    Producer("C1_first", activated_first, "cat_quant", "", ("x", "x2")),
    Producer("C2", lambda x, r: torch.cat([x, r], -1), "cat_quant", "", ("x", "r")),
    Producer("X1", added, "add_quant", "add", ("x", "r")),
    Producer("X2", gated, "add_quant", "gated_add", ("x", "r", "e")),
)


# ---- quantisers: value -> tensors that leave it --------------------------------------------------------------


def _saturated(x: Tensor, dtype: torch.dtype = FN) -> Tensor:
    top = torch.finfo(dtype).max
    return x.clamp(-top, top).to(dtype)


def q1_row(y: Tensor) -> tuple[Tensor, ...]:
    scale = (y.abs().amax(-1, keepdim=True) / 448.0).float()
    return _saturated(y.float() / scale).reshape(-1, y.shape[-1]), scale.unsqueeze(-1).reshape(-1, 1)


def q1_tensor(y: Tensor) -> tuple[Tensor, ...]:
    scale = (y.abs().amax(list(range(y.dim())), keepdim=True) / 448.0).float()
    return _saturated(y.float() / scale).reshape(-1, y.shape[-1]), scale.reshape(1, 1)


def q1_block(y: Tensor) -> tuple[Tensor, ...]:
    groups = y.reshape(*y.shape[:-1], y.shape[-1] // 128, 128)
    scale = (groups.abs().amax(-1, keepdim=True) / 448.0).squeeze(-1).float()
    spread = scale.unsqueeze(-1).expand(*scale.shape, 128).clone().reshape(y.shape)
    return _saturated(y.float() / spread), scale.reshape(-1, scale.shape[-1])


def q2_static(y: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return (_saturated(y.float() / scale),)


def q2_static_half(y: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return (_saturated(y / scale.reshape(())),)


def q2_static_product(y: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return (_saturated(y.float() * scale.reciprocal()),)


def q3(y: Tensor) -> tuple[Tensor, ...]:
    scale = y.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448.0
    return _saturated(y.float() / scale), scale


def q3_floor_last(y: Tensor) -> tuple[Tensor, ...]:
    scale = (y.abs().float().amax(-1, keepdim=True) / 448.0).clamp(min=1e-10)
    return _saturated(y.float() / scale), scale


def q3_tensor(y: Tensor) -> tuple[Tensor, ...]:
    scale = y.abs().max().float().clamp(min=1e-12) / 448.0
    return _saturated(y.float() / scale), scale


def q3_fnuz(y: Tensor) -> tuple[Tensor, ...]:
    scale = y.abs().amax(-1, keepdim=True).float() / 240.0
    return _saturated(y.float() / scale, FNUZ), scale


def q3_one_for_zero(y: Tensor) -> tuple[Tensor, ...]:
    """Hugging Face's loader of compressed-tensors; a NaN becomes 1 too."""
    top = y.float().abs().amax(-1)
    scale = torch.where(top > 0, top, torch.ones_like(top)) / 448.0
    return _saturated(y.float() / scale.unsqueeze(-1)), scale


def q4(y: Tensor) -> tuple[Tensor, ...]:
    scale = (y.abs().amax(-1).unsqueeze(-1).float() / 448.0).clamp(min=1 / (448.0 * 512.0))
    return _saturated(y.float() * scale.reciprocal()), scale


def q5(y: Tensor) -> tuple[Tensor, ...]:
    inverse = 448.0 / y.abs().amax(-1, keepdim=True).float().clamp(min=1e-4)
    return _saturated(y.float() * inverse), inverse.reciprocal()


def q5_unclamped(y: Tensor) -> tuple[Tensor, ...]:
    groups = y.reshape(-1, y.shape[-1] // 128, 128)
    top = groups.abs().float().amax(2).clamp(1e-4)
    q = (groups * (448.0 / top.unsqueeze(2))).to(FN).reshape(y.shape)
    return q, top / 448.0


def q7(group: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def call(y: Tensor) -> tuple[Tensor, ...]:
        groups = y.reshape(-1, group)
        scale = (groups.abs().max(-1, keepdim=True)[0].float() / 448.0).clamp(min=1e-10)
        q = _saturated(groups / scale).reshape(y.shape)
        return q, scale.reshape(*y.shape[:-1], y.shape[-1] // group)

    return call


def q7_floor_in_half(y: Tensor) -> tuple[Tensor, ...]:
    groups = y.reshape(-1, 128)
    scale = groups.abs().max(dim=-1, keepdim=True)[0].clamp(min=1e-10).float() / 448.0
    return _saturated(groups / scale).reshape(y.shape), scale.reshape(*y.shape[:-1], y.shape[-1] // 128)


def q2_static_scale_first(y: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return ((scale.reshape(()) * y).to(FN),)


def q3_converted_before_the_view(y: Tensor) -> tuple[Tensor, ...]:
    groups = y.float().reshape(-1, 128)
    scale = groups.abs().amax(-1, keepdim=True) / 448.0
    return _saturated(groups / scale), scale


def q3_view_after_abs(y: Tensor) -> tuple[Tensor, ...]:
    scale = y.abs().reshape(-1, 128).amax(-1, keepdim=True).float() / 448.0
    return _saturated(y.reshape(-1, 128).float() / scale), scale


def q2_static_unclamped(y: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return ((y / scale.reshape(())).to(FN),)


def q2_static_many_dims(y: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return (_saturated(y / scale.reshape((1,) * y.dim())),)


def q1_bounded(y: Tensor) -> tuple[Tensor, ...]:
    top = y.abs().amax(-1, keepdim=True).float().clamp(min=1e-4, max=1e3).to(y.dtype)
    scale = (top / 448.0).float()
    return _saturated(y.float() / scale), scale


def q8_power_of_two(y: Tensor) -> tuple[Tensor, ...]:
    groups = y.float().reshape(-1, 128)
    top = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(top / 448.0)))
    return _saturated(groups / scale).reshape(y.shape), scale.reshape(*y.shape[:-1], y.shape[-1] // 128)


def q8_by_bits(y: Tensor) -> tuple[Tensor, ...]:
    """DeepGEMM, and with it transformers' fine-grained FP8, where scales are powers of two."""
    groups = y.reshape(-1, y.shape[-1] // 128, 128)
    bits = (groups.abs().float().amax(2).clamp(1e-4) / 448.0).abs().float().view(torch.int)
    exponent = ((bits >> 23) & 0xFF) + (bits & 0x7FFFFF).bool().int()
    scale = (exponent.clamp(1, 254) << 23).view(torch.float)
    return (groups * (1.0 / scale.unsqueeze(2))).to(FN).reshape(y.shape), scale


def x1(y: Tensor) -> tuple[Tensor, ...]:
    """torchao's MXFP8: the scale of 32 values is a byte."""
    groups = y.reshape(*y.shape[:-1], y.shape[-1] // 32, 32)
    scale = groups.abs().amax(-1).unsqueeze(-1).float() / 448.0
    exponent = (scale.log2().ceil().clamp(-127, 127) + 127).to(torch.uint8)
    byte = torch.where(scale.isnan(), 255, torch.where(scale.isinf(), 254, exponent))
    inverse = torch.where(byte == 0, 1.0, torch.exp2(127 - byte.float()))
    inverse = torch.where(byte == 255, scale, torch.where(byte == 254, 2.0**-127, inverse))
    return _saturated(groups.float() * inverse).reshape(y.shape), byte.squeeze(-1)


def i1(y: Tensor) -> tuple[Tensor, ...]:
    """torchao's dynamic int8: of the least and the greatest value."""
    zero = torch.zeros_like(y.amin(-1, keepdim=True))
    top = torch.max(-torch.min(y.amin(-1, keepdim=True), zero), torch.max(y.amax(-1, keepdim=True), zero))
    scale = (top / 127.5).float().clamp(min=torch.finfo(torch.float32).eps).to(y.dtype).float()
    q = torch.round(y * (1.0 / scale)).clamp(-128, 127).to(torch.int8)
    return q.reshape(-1, y.shape[-1]), scale.reshape(-1, 1)


def i2(y: Tensor) -> tuple[Tensor, ...]:
    """By hand: symmetric, of the maximum."""
    scale = y.abs().amax(-1, keepdim=True).float().clamp(min=1e-5) / 127.0
    return torch.round(y / scale).clamp(-127, 127).to(torch.int8), scale


def i2_unclamped(y: Tensor) -> tuple[Tensor, ...]:
    """A scale that was rounded down makes codes that int8 does not have."""
    scale = y.abs().amax(-1, keepdim=True) / 127.0
    return torch.round(y / scale).to(torch.int8), scale.float()


def i2_group(y: Tensor) -> tuple[Tensor, ...]:
    groups = y.reshape(*y.shape[:-1], y.shape[-1] // 64, 64)
    scale = groups.abs().amax(-1, keepdim=True).float().clamp(min=1e-10) / 127.0
    return torch.round(groups / scale).to(torch.int8).reshape(y.shape), scale.squeeze(-1)


def i3_static(y: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    return (torch.round(y.float() / scale).clamp(-128, 127).to(torch.int8),)


@dataclass(frozen=True)
class QuantForm:
    name: str
    call: Callable[..., tuple[Tensor, ...]]
    granularity: str  # as in a site's variant
    static: bool = False


QUANTS = (
    QuantForm("Q1r", q1_row, "token"),
    QuantForm("Q1t", q1_tensor, "tensor"),
    QuantForm("Q1b", q1_block, "group128"),
    QuantForm("Q1c", q1_bounded, "token"),
    QuantForm("Q2", q2_static, "static", static=True),
    QuantForm("Q2_half", q2_static_half, "static", static=True),
    QuantForm("Q2_product", q2_static_product, "static", static=True),
    QuantForm("Q2_unclamped", q2_static_unclamped, "static", static=True),
    QuantForm("Q2_many_dims", q2_static_many_dims, "static", static=True),
    QuantForm("Q2_scale_first", q2_static_scale_first, "static", static=True),
    QuantForm("Q3", q3, "token"),
    QuantForm("Q3_converted_first", q3_converted_before_the_view, "group128"),
    QuantForm("Q3_view_after_abs", q3_view_after_abs, "group128"),
    QuantForm("Q3_floor_last", q3_floor_last, "token"),
    QuantForm("Q3_tensor", q3_tensor, "tensor"),
    QuantForm("Q3_fnuz", q3_fnuz, "token"),
    QuantForm("Q4", q4, "token"),
    QuantForm("Q5", q5, "token"),
    QuantForm("Q5_unclamped", q5_unclamped, "group128"),
    QuantForm("Q7_32", q7(32), "group32"),
    QuantForm("Q7_64", q7(64), "group64"),
    QuantForm("Q7_128", q7(128), "group128"),
    QuantForm("Q7_floor_in_half", q7_floor_in_half, "group128"),
    QuantForm("Q8", q8_power_of_two, "group128"),
    QuantForm("Q8_by_bits", q8_by_bits, "group128"),
    QuantForm("X1", x1, "mxfp8+group32"),
    QuantForm("I1", i1, "int8+token"),
    QuantForm("I2", i2, "int8+token"),
    QuantForm("I2_unclamped", i2_unclamped, "int8+token"),
    QuantForm("I2_64", i2_group, "int8+group64"),
    QuantForm("I3", i3_static, "static+int8", static=True),
)


# ---- fusions: how the pieces meet ----------------------------------------------------------------------------


@dataclass(frozen=True)
class FusionCase:
    """``call(norm or act, quantise)`` gives a function of the tensors that ``inputs`` names."""

    name: str
    family: str
    before: str  # what the variant has before the granularity
    after: str  # ... and after it
    call: Callable[..., Callable[..., tuple[Tensor, ...]]]
    inputs: tuple[str, ...]


def _plain(norm: Callable[..., Tensor], quantise: Callable[..., tuple[Tensor, ...]]):
    return lambda x, w, *scale: quantise(norm(x, w), *scale)


def _add(norm: Callable[..., Tensor], quantise: Callable[..., tuple[Tensor, ...]]):
    def call(x: Tensor, r: Tensor, w: Tensor, *scale: Tensor) -> tuple[Tensor, ...]:
        summed = r + x
        return (*quantise(norm(summed, w), *scale), summed)

    return call


def _add_dead(norm: Callable[..., Tensor], quantise: Callable[..., tuple[Tensor, ...]]):
    return lambda x, r, w, *scale: quantise(norm(x + r, w), *scale)


def _add_float32_sum(norm: Callable[..., Tensor], quantise: Callable[..., tuple[Tensor, ...]]):
    """As inference engines do: the sum is normalised in float32, and passed on rounded."""

    def call(x: Tensor, r: Tensor, w: Tensor, *scale: Tensor) -> tuple[Tensor, ...]:
        summed = x.float() + r.float()
        return (*quantise(norm(summed, w).to(x.dtype), *scale), summed.to(x.dtype))

    return call


def _add_float32_residual(norm: Callable[..., Tensor], quantise: Callable[..., tuple[Tensor, ...]]):
    """A residual stream in float32, whatever the activations are."""

    def call(x: Tensor, r32: Tensor, w: Tensor, *scale: Tensor) -> tuple[Tensor, ...]:
        summed = r32 + x
        return (*quantise(norm(summed, w).to(x.dtype), *scale), summed)

    return call


def _value(norm: Callable[..., Tensor], quantise: Callable[..., tuple[Tensor, ...]]):
    def call(x: Tensor, w: Tensor, *scale: Tensor) -> tuple[Tensor, ...]:
        value = norm(x, w)
        return (*quantise(value, *scale), value * 2)

    return call


def _add_value(norm: Callable[..., Tensor], quantise: Callable[..., tuple[Tensor, ...]]):
    def call(x: Tensor, r: Tensor, w: Tensor, *scale: Tensor) -> tuple[Tensor, ...]:
        summed = r + x
        value = norm(summed, w)
        return (*quantise(value, *scale), value, summed)

    return call


def _thrice(norm: Callable[..., Tensor], quantise: Callable[..., tuple[Tensor, ...]]):
    """Three consumers that quantise for themselves, as torchao's q, k and v do."""

    def call(x: Tensor, w: Tensor, *scale: Tensor) -> tuple[Tensor, ...]:
        value = norm(x, w)
        results = [quantise(value, *scale) for _ in range(3)]
        return tuple(torch.stack([part.float() for part in parts]).sum(0) for parts in zip(*results, strict=True))

    return call


def _act(act: Callable[[Tensor], Tensor], quantise: Callable[..., tuple[Tensor, ...]]):
    return lambda x2, *scale: quantise(act(x2), *scale)


def _act_value(act: Callable[[Tensor], Tensor], quantise: Callable[..., tuple[Tensor, ...]]):
    def call(x2: Tensor, *scale: Tensor) -> tuple[Tensor, ...]:
        value = act(x2)
        return (*quantise(value, *scale), value)

    return call


NORM_FUSIONS = (
    FusionCase("norm", "rms_norm_quant", "", "", _plain, ("x", "w")),
    FusionCase("add_norm", "rms_norm_quant", "add", "", _add, ("x", "r", "w")),
    FusionCase("add_norm_dead_residual", "rms_norm_quant", "add", "", _add_dead, ("x", "r", "w")),
    FusionCase("norm_value", "rms_norm_quant", "", "value", _value, ("x", "w")),
    FusionCase("add_norm_value", "rms_norm_quant", "add", "value", _add_value, ("x", "r", "w")),
    FusionCase("norm_thrice", "rms_norm_quant", "", "", _thrice, ("x", "w")),
    FusionCase("add_norm_float32_sum", "rms_norm_quant", "add", "", _add_float32_sum, ("x", "r", "w")),
    FusionCase("add_norm_float32_residual", "rms_norm_quant", "add", "", _add_float32_residual, ("x", "r32", "w")),
)


def _produced(produce: Callable[..., Tensor | tuple[Tensor, ...]], quantise: Callable[..., tuple[Tensor, ...]]):
    count = len([p for p in signature(produce).parameters.values() if p.default is p.empty or p.name in "wb"])

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        made = produce(*given[:count])
        value, *others = made if isinstance(made, tuple) else (made,)
        return (*quantise(value, *given[count:]), *others)

    return call


def _produced_value(produce: Callable[..., Tensor], quantise: Callable[..., tuple[Tensor, ...]]):
    def both(*given: Tensor) -> tuple[Tensor, ...]:
        made = produce(*given)
        return (*made, made[0]) if isinstance(made, tuple) else (made, made)

    both.__signature__ = signature(produce)  # type: ignore[attr-defined]
    return _produced(both, quantise)


PRODUCED = FusionCase("produced", "", "", "", _produced, ())
PRODUCED_VALUE = FusionCase("produced_value", "", "", "value", _produced_value, ())
ACT_FUSIONS = (
    FusionCase("act", "act_mul_quant", "", "", _act, ("x2",)),
    FusionCase("act_value", "act_mul_quant", "", "value", _act_value, ("x2",)),
)


# By name.
NORM = {norm.name: norm for norm in NORMS}
ACT = {act.name: act for act in ACTS}
PRODUCER = {producer.name: producer for producer in PRODUCERS}
QUANT = {quant.name: quant for quant in QUANTS}
FUSION = {fusion.name: fusion for fusion in (*NORM_FUSIONS, *ACT_FUSIONS, PRODUCED, PRODUCED_VALUE)}

AnyForm = NormForm | ActForm | Producer


def built(case: FusionCase, producer: AnyForm, quant: QuantForm) -> tuple[Callable[..., tuple[Tensor, ...]], list[str]]:
    """What a fusion makes of a producer and a quantiser, and its inputs."""
    own = producer.inputs if isinstance(producer, Producer) else ()
    return case.call(producer.call, quant.call), [*case.inputs, *own, *(["scale"] if quant.static else [])]


def variant(case: FusionCase, producer: AnyForm, quant: QuantForm) -> str:
    """Family and variant of the one site that these make."""
    if isinstance(producer, Producer):
        return f"{producer.family}:{'+'.join(filter(None, [producer.words, quant.granularity, case.after]))}"
    offset = producer.name == "R3"
    packed = isinstance(producer, ActForm) and producer.packed
    parts = [case.before, "offset" * offset, "packed" * packed, quant.granularity, case.after]
    return f"{case.family}:{'+'.join(filter(None, parts))}"


def tensors(names: tuple[str, ...], sizes: tuple[int, ...], dtype: torch.dtype, rows: str) -> list[Tensor]:
    """Inputs of a case. ``rows``: normal, tiny, huge, zero or nonfinite (one NaN and one infinity)."""
    generator = torch.Generator().manual_seed(len(sizes))
    factor = {"tiny": 1e-30 if dtype is not torch.float16 else 1e-7, "zero": 0.0}.get(rows, 1.0)
    factor = torch.finfo(dtype).max / 8 if rows == "huge" else factor

    def make(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator) * factor
        if rows != "normal" and rows != "nonfinite" and shape[0] > 1:
            x[0] = torch.randn(x[0].shape, generator=generator)  # next to an ordinary row
        if rows == "nonfinite":
            flat = x.view(-1, shape[-1])
            flat[0, 3], flat[-1, 5] = float("nan"), float("inf")
        return x.to(dtype)

    weight = torch.randn(H, generator=generator).to(dtype)
    entries = (sizes[0], *[1] * (len(sizes) - 1)) if len(sizes) > 1 else (1,)
    known = {
        "x": lambda: make(*sizes, H),
        "r": lambda: make(*sizes, H),
        "r32": lambda: make(*sizes, H).float(),
        "x2": lambda: make(*sizes, 2 * H),
        "w": lambda: weight,
        "b": lambda: weight.flip(0),
        "e": lambda: make(*entries, H),
        "g": lambda: make(*entries, H),
        "s": lambda: make(*entries, H),
        "gs": lambda: make(*entries, 2 * H),
        "w2": lambda: weight * 3,
        "w32": lambda: weight.float(),
        "scale": lambda: torch.full((1,) * (len(sizes) + 1), 0.02),
    }
    return [known[name]() for name in names]


ROWS = ("normal", "tiny", "huge", "zero", "nonfinite")
