"""Mixture of experts: the experts themselves."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..domains import ANYTHING
from ..op import Spec
from ..providers.tiles import gates_and_ups, in_rows, interleaved, shuffled, shuffled_scales, unshuffled_scales
from . import microscaling
from .bridge import bridge_op
from .routing import LEAST

__all__ = ["asm_moe_tkw1", "fused_moe", "moe_sum", "shuffled_experts"]

F32 = torch.float32
BLOCK = 128

QUANTISATIONS = ("none", "per_tensor", "per_token", "block_128", "mxfp4", "mxfp8")
MICROSCALING = QUANTISATIONS[-2:]
EXPERT_ACTIVATIONS = ("silu", "gelu", "swiglu")
# GPT-OSS: the limit of gate and up unless another is given, and the factor within the sigmoid.
SWIGLU_LIMIT, SWIGLU_ALPHA = 7.0, 1.702
# With swiglu and MXFP4 weights fewer tokens than these are not quantised.
FEW_TOKENS = 256


def _act(gate_up: Tensor, gated: bool, activation: str, limit: float | None) -> Tensor:
    """The activation of the first product's rows: of their first half, times the second, or of all of them."""
    act = F.gelu if activation == "gelu" else F.silu
    if not gated:
        return act(gate_up)
    gate, up = gate_up.chunk(2, -1)
    limit = limit or (SWIGLU_LIMIT if activation == "swiglu" else None)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "swiglu":
        return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)
    return act(gate) * up


def _dequantised(weight: Tensor, scale: Tensor | None, quantisation: str, expert: int) -> Tensor:
    """An expert's weight ``[N, K]`` in float32."""
    if quantisation == "none":
        return weight[expert].to(F32)
    if scale is None:
        raise ValueError(f"quantisation {quantisation!r} needs w1_scale and w2_scale")
    if quantisation in MICROSCALING:
        return microscaling.dequantised(weight[expert], scale[expert])
    w = weight[expert].to(F32)
    if quantisation != "block_128":
        return w * scale[expert].reshape(-1, 1)
    rows, columns = w.shape
    return w * scale[expert].repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def quantised(x: Tensor, quantisation: str, dtype: torch.dtype, given: Tensor | None) -> Tensor:
    """Float32 values ``[M, K]``, quantised to ``dtype`` and back. The scale is ``given``, or found from the maximum of
    the tensor, of each token, or of each 128 (microscaling: 32) columns of a token. A maximum of zero quantises to
    zeros."""
    if quantisation == "none":
        return x
    if quantisation in MICROSCALING:
        to = microscaling.to_mxfp4(x) if quantisation == "mxfp4" else microscaling.to_mxfp8(x, dtype)
        return microscaling.dequantised(*to)
    top = 127.0 if dtype is torch.int8 else torch.finfo(dtype).max
    blocks = x.unflatten(1, (-1, BLOCK)) if quantisation == "block_128" else x[:, None]
    if given is not None:
        scale = given.to(F32).reshape(1, 1, 1) if given.numel() == 1 else given.to(F32).reshape(-1, 1, 1)
    elif quantisation == "per_tensor":
        scale = (x.abs().amax() if x.numel() else x.new_zeros(())) / top
    else:
        scale = blocks.abs().amax(-1, keepdim=True) / top
    scale = torch.where(scale == 0, 1.0, scale)
    q = (blocks / scale).clamp(-top, top)
    q = q.round() if dtype is torch.int8 else q.to(dtype).to(F32)
    return (q * scale).reshape(x.shape)


def _assigned(ids: Tensor, experts: int, expert_mask: Tensor | None) -> list[tuple[Tensor, ...]]:
    """(tokens, places among a token's experts) of each of this rank's experts."""
    if expert_mask is not None:
        local = expert_mask.long().cumsum(0) - 1
        ids = torch.where(expert_mask.bool(), local, -1)[ids]  # -1: on another rank
    return [torch.where(ids == expert) for expert in range(experts)]


def _require_known(activation: str, quantisation: str) -> None:
    """Raise a ValueError for an activation or a quantisation of another name."""
    for name, known in ((activation, EXPERT_ACTIVATIONS), (quantisation, QUANTISATIONS)):
        if name not in known:
            raise ValueError(f"{name!r} is none of {', '.join(known)}")


def quantise_weight(weight: Tensor, quantisation: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A weight ``[E, N, K]`` quantised, and its scales: ``[E]``, ``[E, N]``, ``[E, N / 128, K / 128]``, or, with
    microscaling, ``[E, N, K / 32]``."""
    if quantisation == "none":
        return weight, None
    if quantisation in MICROSCALING:
        return microscaling.to_mxfp4(weight) if quantisation == "mxfp4" else microscaling.to_mxfp8(weight, dtype)
    experts, rows, columns = weight.shape
    top = 127.0 if dtype is torch.int8 else torch.finfo(dtype).max
    w = weight.to(F32)
    if quantisation == "block_128":
        tiles = w.reshape(experts, rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = tiles.abs().amax((2, 4)) / top
        spread = scale.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    else:
        scale = w.abs().amax((1, 2) if quantisation == "per_tensor" else 2) / top
        spread = scale.reshape(experts, -1, 1)
    q = w / spread
    return (q.round() if dtype is torch.int8 else q).to(dtype), scale


def shuffled_experts(
    weight: Tensor, scale: Tensor | None = None, *, gate_up: bool = False
) -> tuple[Tensor, Tensor | None]:
    """A weight of experts, and its scales of microscaling, in the order in which AMD's matrix cores read them, for
    ``fused_moe(..., weights_are_shuffled=True)``.

    Args:
        weight: ``[E, N, K]`` of any dtype (two 4-bit values in a byte), N and K multiples of 32.
        scale: ``[E, N, K / 32]`` (4-bit: ``[E, N, K / 16]``) uint8, E8M0; None for others, which have no such order.
        gate_up: whether it is w1 with MXFP8, whose gate and up are interleaved in blocks of 16 rows.

    Returns:
        (the weight, of the same shape; the scales of all experts as one ``shuffled_scales``, or None).
    """
    if gate_up:
        weight, scale = interleaved(weight), None if scale is None else interleaved(scale)
    experts, rows, columns = weight.shape
    in_bytes = weight.reshape(-1, columns).view(torch.uint8)
    tiles = shuffled(in_bytes).view(in_bytes.shape).view(weight.dtype).view(weight.shape)
    return tiles, None if scale is None else shuffled_scales(scale.reshape(experts * rows, -1))


def _as_rows(weight: Tensor, scale: Tensor | None, per_byte: int, gate_up: bool) -> tuple[Tensor, Tensor | None]:
    """What ``shuffled_experts`` was given."""
    experts, rows, columns = weight.shape
    in_bytes = weight.reshape(-1, columns).view(torch.uint8)
    flat = in_rows(in_bytes.t(), is_shuffled=True).view(weight.dtype).view(weight.shape)
    if scale is not None and scale.dim() == 2 and scale.element_size() == 1:
        groups = columns * per_byte // microscaling.GROUP
        scale = unshuffled_scales(scale, experts * rows, groups).view(experts, rows, groups)
        if gate_up:
            scale = gates_and_ups(scale)
    return gates_and_ups(flat) if gate_up else flat, scale


class _Case(NamedTuple):
    """What a sample of ``fused_moe`` is about."""

    quantisation: str = "none"
    dtype: torch.dtype = torch.bfloat16
    rows: int = 5
    masked: bool = False
    doweight: bool = False
    activation: str = "silu"
    more: Mapping[str, Any] = MappingProxyType({})


_CASES = (
    *(
        _Case(quantisation, dtype, rows, masked, seed == 2, "gelu" if masked else "silu")
        for seed, (quantisation, dtype) in enumerate(
            (
                ("none", torch.bfloat16),
                ("per_token", torch.int8),
                *((q, torch.float8_e4m3fn) for q in QUANTISATIONS[1:4]),
            )
        )
        for rows, masked in ((5, False), (0, False), (3, True))
    ),
    _Case("mxfp4"),
    _Case("mxfp4", activation="gelu", masked=True),
    _Case("mxfp4", activation="swiglu", more={"bias1": 0.5, "bias2": 0.5, "swiglu_limit": 5.0}),
    _Case("mxfp8", torch.float8_e4m3fn),
    _Case("none", more={"num_local_tokens": 3, "sorting_policy": 1}),
    _Case("per_token", torch.float8_e4m3fn, more={"dtype": torch.float16, "weights_are_shuffled": True}),
    _Case("none", more={"hidden_pad": 32, "intermediate_pad": 32}),
    _Case("mxfp4", more={"shared": True}),
)


def _moe_sample(case: _Case, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    blocks = case.quantisation == "block_128" or case.quantisation in MICROSCALING
    width, inner, experts, topk = (256, 128, 4, 2) if blocks else (64, 32, 4, 2)
    if case.quantisation in MICROSCALING:
        inner, experts = 256, 4 if case.masked else 2
    more, draw = dict(case.more), lambda *sizes: torch.randn(sizes, generator=generator)
    hidden = draw(case.rows, width).to(torch.bfloat16)
    local = 2 if case.masked else experts
    w1 = draw(local, 2 * inner, width).to(torch.bfloat16) * 0.1
    w2 = draw(local, width, inner).to(torch.bfloat16) * 0.1
    if "hidden_pad" in more:
        w1[:, :, -32:], w2[:, -32:], w2[:, :, -32:] = 0, 0, 0
        w1.unflatten(1, (2, -1))[:, :, -32:] = 0
    (q1, s1), (q2, s2) = (quantise_weight(w, case.quantisation, case.dtype) for w in (w1, w2))
    is_shuffled = more.pop("weights_are_shuffled", False) or case.quantisation in MICROSCALING
    if is_shuffled:
        scaled = case.quantisation in MICROSCALING
        q1, shuffled1 = shuffled_experts(q1, s1 if scaled else None, gate_up=case.quantisation == "mxfp8")
        q2, shuffled2 = shuffled_experts(q2, s2 if scaled else None)
        s1, s2 = (shuffled1, shuffled2) if scaled else (s1, s2)
    shared: dict[str, Any] = dict.fromkeys(("shared_w1", "shared_w2", "shared_w1_scale", "shared_w2_scale"))
    if more.pop("shared", False):
        for name, w in (("shared_w1", draw(1, 2 * inner, width)), ("shared_w2", draw(1, width, inner))):
            values, scales = quantise_weight(w * 0.1, "mxfp8", torch.float8_e4m3fn)
            shared[name], shared[f"{name}_scale"] = shuffled_experts(values, scales)
    scores = draw(case.rows, experts).softmax(-1)
    weights, ids = scores.topk(topk, -1)
    if shared["shared_w1"] is not None:
        ids[:, 1] = experts - 1
        ids[:, 0] %= experts - 1
    biases = {name: draw(local, size) * more.get(name, 0) for name, size in (("bias1", 2 * inner), ("bias2", width))}
    count = more.get("num_local_tokens")
    return {
        "hidden": hidden,
        "w1": q1,
        "w2": q2,
        "topk_weights": weights / (weights.sum(-1, keepdim=True) + LEAST),
        "topk_ids": ids.to(torch.int32),
        "expert_mask": torch.tensor([0, 1, 0, 1], dtype=torch.int32) if case.masked else None,
        "w1_scale": s1,
        "w2_scale": s2,
        "a1_scale": None,
        "a2_scale": None,
        "activation": case.activation,
        "quantisation": case.quantisation,
        "doweight_stage1": case.doweight,
        **{name: bias if name in more else None for name, bias in biases.items()},
        "swiglu_limit": more.get("swiglu_limit"),
        "num_local_tokens": None if count is None else torch.tensor([count], dtype=torch.int32),
        "hidden_pad": more.get("hidden_pad", 0),
        "intermediate_pad": more.get("intermediate_pad", 0),
        "dtype": more.get("dtype"),
        "weights_are_shuffled": is_shuffled,
        "sorting_policy": more.get("sorting_policy", 0),
        **shared,
    }


@functools.cache
def _drawn() -> tuple[dict[str, Any], ...]:
    return tuple(_moe_sample(case, seed) for seed, case in enumerate(_CASES))


def _moe_samples() -> Iterator[dict[str, Any]]:
    yield from map(dict, _drawn())


def _result(hidden: Tensor, dtype: torch.dtype | None = None, **_: Any) -> dict[str, Spec]:
    # in the model's dtype, whatever the dtype of the weights
    return {"y": (hidden.shape, dtype or hidden.dtype)}


@bridge_op(
    "y",
    shape=_result,
    samples=_moe_samples,
    # the reference raises the ValueError for other names
    domains={"activation": ANYTHING, "quantisation": ANYTHING},
)
def fused_moe(
    hidden: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    expert_mask: Tensor | None = None,
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    a1_scale: Tensor | None = None,
    a2_scale: Tensor | None = None,
    activation: str = "silu",
    quantisation: str = "none",
    doweight_stage1: bool = False,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    swiglu_limit: float | None = None,
    num_local_tokens: Tensor | None = None,
    hidden_pad: int = 0,
    intermediate_pad: int = 0,
    dtype: torch.dtype | None = None,
    weights_are_shuffled: bool = False,
    sorting_policy: int = 0,
    shared_w1: Tensor | None = None,
    shared_w2: Tensor | None = None,
    shared_w1_scale: Tensor | None = None,
    shared_w2_scale: Tensor | None = None,
    provider: str = "auto",
) -> Tensor:
    """``sum over a token's experts of weight * (act(x @ gate.T) * (x @ up.T)) @ w2.T`` with gate, up the halves of w1.

    Args:
        hidden: ``[M, D]`` bfloat16 or float16.
        w1: ``[E, 2 I, D]``, gate above up, of this rank's E experts; or ``[E, I, D]``, without up. MXFP4: half as many
            bytes in a row.
        w2: ``[E, D, I]`` of the dtype of w1.
        topk_weights: ``[M, k]`` float32.
        topk_ids: ``[M, k]`` int32, counted over the experts of all ranks.
        expert_mask: ``[experts of all ranks]`` int32, 1 for those of this rank, in order; others contribute nothing.
        w1_scale: float32 dequantisation scales of w1: ``[E]`` per tensor, ``[E, 2 I]`` per token, or one for each
            block; with microscaling uint8, E8M0: ``[E, 2 I, D / 32]``, or as ``shuffled_experts`` gives them.
        w2_scale: the same of w2: ``[E]``, ``[E, D]``, one for each block, or ``[E, D, I / 32]``.
        a1_scale: float32 scale of the first product's input; None: it is quantised by its maximum.
        a2_scale: float32 scale of the second product's input; None: it is quantised by its maximum.
        activation: ``silu``, ``gelu``, or GPT-OSS's ``swiglu``: ``gate * sigmoid(1.702 * gate) * (up + 1)``.
        quantisation: ``none``: weights of the dtype of hidden. ``per_tensor``: FP8. ``per_token``: FP8 or int8.
            ``block_128``: FP8, a scale for each 128 x 128. ``mxfp4``: uint8, two E2M1 values each; the inputs of both
            products are quantised so too, but with ``swiglu`` of fewer than 256 tokens. ``mxfp8``: FP8.
        doweight_stage1: whether to multiply with the weights before the activation (one expert a token).
        bias1: ``[E, 2 I]`` float32, added to the first product.
        bias2: ``[E, D]`` float32, added to the second product.
        swiglu_limit: gate is cut off above it, up above it and below its negative; None: at 7 with ``swiglu``, else
            not at all.
        num_local_tokens: ``[1]`` int32, how many rows of hidden there are; what the others of the result are is not
            specified.
        hidden_pad: the last elements of D whose weights are 0, which need not be computed.
        intermediate_pad: the last elements of I whose weights are 0, of gate and of up.
        dtype: of the result, bfloat16 or float16; None: that of hidden.
        weights_are_shuffled: whether w1 and w2, and E8M0 scales, are as ``shuffled_experts`` gives them; AITER reads
            quantised weights so, and others either way.
        sorting_policy: how AITER sorts tokens by expert, ``moe_sorting_dispatch_policy``; the result is the same.
        shared_w1: ``[1, 2 I, D]`` FP8, the weight of expert ``E - 1`` in place of that of w1, where the routed experts
            are ``mxfp4``; as ``shuffled_experts`` gives it.
        shared_w2: ``[1, D, I]`` FP8, the same of w2.
        shared_w1_scale: uint8, E8M0, as ``shuffled_experts`` gives them.
        shared_w2_scale: uint8, E8M0, as ``shuffled_experts`` gives them.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[M, D]`` of ``dtype``.

    Raises:
        ValueError: an activation or quantisation of another name.

    AITER: ``aiter.fused_moe.fused_moe``; arguments from ``bias1`` on are passed where they are given, to the releases
    that have them; microscaling on gfx950.
    """
    _require_known(activation, quantisation)
    if weights_are_shuffled:
        per_byte = 2 if quantisation == "mxfp4" else 1
        w1, w1_scale = _as_rows(w1, w1_scale, per_byte, quantisation == "mxfp8")
        w2, w2_scale = _as_rows(w2, w2_scale, per_byte, False)
    weights = {"w1": (w1, w1_scale), "w2": (w2, w2_scale)}
    shared: dict[str, tuple[Tensor, Tensor | None]] = {}
    if shared_w1 is not None and shared_w2 is not None:
        shared["w1"] = _as_rows(shared_w1, shared_w1_scale, 1, False)
        shared["w2"] = _as_rows(shared_w2, shared_w2_scale, 1, False)

    def weight(name: str, expert: int) -> Tensor:
        if shared and expert == w1.shape[0] - 1:
            values, scale = shared[name]
            return _dequantised(values, scale, "mxfp8", 0)
        values, scale = weights[name]
        return _dequantised(values, scale, quantisation, expert)

    local = _assigned(topk_ids.long(), w1.shape[0], expert_mask)
    if num_local_tokens is not None:
        there = torch.arange(len(hidden), device=hidden.device) < num_local_tokens
        local = [(rows[there[rows]], places[there[rows]]) for rows, places in local]
    inputs = "none" if activation == "swiglu" and len(hidden) < FEW_TOKENS and quantisation == "mxfp4" else quantisation
    x = quantised(hidden.to(F32), inputs, w1.dtype, a1_scale)
    width = w2.shape[2] * (2 if quantisation == "mxfp4" else 1)
    inner = x.new_zeros(*topk_ids.shape, width)
    for expert, (rows, places) in enumerate(local):
        gate_up = x[rows] @ weight("w1", expert).t()
        if doweight_stage1:
            gate_up = gate_up * topk_weights[rows, places, None].to(F32)
        if bias1 is not None:
            gate_up = gate_up + bias1[expert].to(F32)
        inner[rows, places] = _act(gate_up, gate_up.shape[1] == 2 * width, activation, swiglu_limit)
    # the first stage leaves in the dtype of the model, and is quantised from there, all of it together
    inner = inner.to(dtype or hidden.dtype).to(F32)
    inner = quantised(inner.flatten(0, 1), inputs, w2.dtype, a2_scale).view(inner.shape)
    y = x.new_zeros(hidden.shape)
    for expert, (rows, places) in enumerate(local):
        result = inner[rows, places] @ weight("w2", expert).t()
        if bias2 is not None:
            result = result + bias2[expert].to(F32)
        share = 1.0 if doweight_stage1 else topk_weights[rows, places, None].to(F32)
        y.index_add_(0, rows, result * share)
    return y.to(dtype or hidden.dtype)


def _tkw1_samples() -> Iterator[dict[str, Any]]:
    names = ("hidden", "w1", "w2", "topk_weights", "topk_ids", "w1_scale", "w2_scale", "expert_mask", "activation")
    for seed, (dtype, rows, masked) in enumerate(
        ((torch.float8_e4m3fn, 5, False), (torch.int8, 3, True), (torch.float8_e4m3fn, 0, False))
    ):
        given = _moe_sample(_Case("per_token", dtype, rows, masked, True, "gelu" if masked else "silu"), seed)
        given |= {name: given[name][:, :1].contiguous() for name in ("topk_weights", "topk_ids")}
        given |= {name: shuffled_experts(given[name])[0] for name in ("w1", "w2")}
        yield {name: given[name] for name in names}


@bridge_op("y", shape=_result, samples=_tkw1_samples, domains={"activation": ANYTHING})
def asm_moe_tkw1(
    hidden: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w1_scale: Tensor,
    w2_scale: Tensor,
    expert_mask: Tensor | None = None,
    activation: str = "silu",
    *,
    provider: str = "auto",
) -> Tensor:
    """``fused_moe`` of weights with scales per token whose routing weights are multiplied in before the activation.

    Args:
        hidden: ``[M, D]`` bfloat16 or float16.
        w1: ``[E, 2 I, D]`` FP8 or int8, gate above up, as ``shuffled_experts`` gives it.
        w2: ``[E, D, I]`` of the dtype of w1, the same.
        topk_weights: ``[M, 1]`` float32.
        topk_ids: ``[M, 1]`` int32, counted over the experts of all ranks.
        w1_scale: ``[E, 2 I]`` float32, dequantisation scales.
        w2_scale: ``[E, D]`` float32, dequantisation scales.
        expert_mask: as of ``fused_moe``.
        activation: ``silu`` or ``gelu``.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[M, D]`` of the dtype of hidden.

    AITER: ``aiter.fused_moe_bf16_asm.asm_moe_tkw1``, whose arguments ``a16`` and ``per_tensor_quant_scale`` have no
    effect and are not offered. Source: Llama 4.
    """
    return fused_moe(
        hidden,
        w1,
        w2,
        topk_weights,
        topk_ids,
        expert_mask=expert_mask,
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        activation=activation,
        quantisation="per_token",
        doweight_stage1=True,
        weights_are_shuffled=True,
        provider="reference",
    )


def _sum_samples() -> Iterator[dict[str, Any]]:
    for seed, (rows, topk, width, dtype) in enumerate(
        ((5, 2, 64, torch.bfloat16), (3, 8, 100, torch.float16), (0, 4, 64, torch.bfloat16), (1, 5, 64, F32))
    ):
        yield {"x": torch.randn(rows, topk, width, generator=torch.Generator().manual_seed(seed)).to(dtype)}


@bridge_op("y", shape=lambda x: {"y": ([x.shape[0], x.shape[2]], x.dtype)}, samples=_sum_samples)
def moe_sum(x: Tensor, *, provider: str = "auto") -> Tensor:
    """The sum of the results of a token's experts, in float32, rounded once.

    Args:
        x: ``[M, k, D]`` bfloat16, float16 or float32.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[M, D]`` of the dtype of x.

    AITER: ``aiter.moe_sum``; for k of 2, 4 and 5 a kernel of its own.
    """
    return x.to(F32).sum(1).to(x.dtype)
