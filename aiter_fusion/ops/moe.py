"""Mixture of experts: the experts themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..domains import ANYTHING
from .bridge import bridge_op
from .routing import LEAST

__all__ = ["fused_moe"]

F32 = torch.float32
BLOCK = 128

QUANTISATIONS = ("none", "per_tensor", "per_token", "block_128")
EXPERT_ACTIVATIONS = ("silu", "gelu")


def _dequantised(weight: Tensor, scale: Tensor | None, quantisation: str, expert: int) -> Tensor:
    """An expert's weight ``[N, K]`` in float32."""
    w = weight[expert].to(F32)
    if quantisation == "none":
        return w
    if scale is None:
        raise ValueError(f"quantisation {quantisation!r} needs w1_scale and w2_scale")
    if quantisation != "block_128":
        return w * scale[expert].reshape(-1, 1)
    rows, columns = w.shape
    return w * scale[expert].repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def quantised(x: Tensor, quantisation: str, dtype: torch.dtype, given: Tensor | None) -> Tensor:
    """Float32 values ``[M, K]``, quantised to ``dtype`` and back. The scale is ``given``, or found from the maximum of
    the tensor, of each token, or of each 128 columns of a token. A maximum of zero quantises to zeros."""
    if quantisation == "none":
        return x
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
    """A weight ``[E, N, K]`` quantised, and its scales: ``[E]``, ``[E, N]`` or ``[E, N / 128, K / 128]``."""
    if quantisation == "none":
        return weight, None
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


def _moe_samples() -> Iterator[dict[str, Any]]:
    cases = [
        ("none", torch.bfloat16),
        ("per_token", torch.int8),
        *((q, torch.float8_e4m3fn) for q in QUANTISATIONS[1:]),
    ]
    for seed, (quantisation, dtype) in enumerate(cases):
        for rows, masked in ((5, False), (0, False), (3, True)):
            generator = torch.Generator().manual_seed(seed)
            width, inner, experts, topk = (256, 128, 4, 2) if quantisation == "block_128" else (64, 32, 4, 2)
            hidden = torch.randn(rows, width, generator=generator).to(torch.bfloat16)
            local = 2 if masked else experts
            w1 = torch.randn(local, 2 * inner, width, generator=generator).to(torch.bfloat16) * 0.1
            w2 = torch.randn(local, width, inner, generator=generator).to(torch.bfloat16) * 0.1
            (q1, s1), (q2, s2) = (quantise_weight(w, quantisation, dtype) for w in (w1, w2))
            scores = torch.randn(rows, experts, generator=generator).softmax(-1)
            weights, ids = scores.topk(topk, -1)
            yield {
                "hidden": hidden,
                "w1": q1,
                "w2": q2,
                "topk_weights": weights / (weights.sum(-1, keepdim=True) + LEAST),
                "topk_ids": ids.to(torch.int32),
                "expert_mask": torch.tensor([0, 1, 0, 1], dtype=torch.int32) if masked else None,
                "w1_scale": s1,
                "w2_scale": s2,
                "a1_scale": None,
                "a2_scale": None,
                "activation": "gelu" if masked else "silu",
                "quantisation": quantisation,
                "doweight_stage1": seed == 2,
            }


@bridge_op(
    "y",
    # in the model's dtype, whatever the dtype of the weights
    shape=lambda hidden, **_: {"y": (hidden.shape, hidden.dtype)},
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
    provider: str = "auto",
) -> Tensor:
    """``sum over a token's experts of weight * (act(x @ gate.T) * (x @ up.T)) @ w2.T`` with gate, up the halves of w1.

    Args:
        hidden: ``[M, D]`` bfloat16 or float16.
        w1: ``[E, 2 I, D]``, gate above up, of this rank's E experts.
        w2: ``[E, D, I]`` of the dtype of w1.
        topk_weights: ``[M, k]`` float32.
        topk_ids: ``[M, k]`` int32, counted over the experts of all ranks.
        expert_mask: ``[experts of all ranks]`` int32, 1 for those of this rank, in order; others contribute nothing.
        w1_scale: float32 dequantisation scales of w1: ``[E]`` per tensor, ``[E, 2 I]`` per token, or one for each
            block.
        w2_scale: float32 dequantisation scales of w2: ``[E]`` per tensor, ``[E, D]`` per token, or one for each block.
        a1_scale: float32 scale of the first product's input; None: it is quantised by its maximum.
        a2_scale: float32 scale of the second product's input; None: it is quantised by its maximum.
        activation: ``silu`` or ``gelu``.
        quantisation: ``none``: weights of the dtype of hidden. ``per_tensor``: FP8. ``per_token``: FP8 or int8.
            ``block_128``: FP8, a scale for each 128 x 128.
        doweight_stage1: whether to multiply with the weights before the activation (one expert a token).
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[M, D]`` of the dtype of hidden.

    Raises:
        ValueError: an activation or quantisation of another name.

    AITER: ``aiter.fused_moe.fused_moe``.
    """
    _require_known(activation, quantisation)
    act = F.silu if activation == "silu" else F.gelu
    local = _assigned(topk_ids.long(), w1.shape[0], expert_mask)
    x = quantised(hidden.to(F32), quantisation, w1.dtype, a1_scale)
    inner = x.new_zeros(*topk_ids.shape, w2.shape[2])
    for expert, (rows, places) in enumerate(local):
        first = _dequantised(w1, w1_scale, quantisation, expert)
        gate_up = x[rows] @ first.t()
        if doweight_stage1:
            gate_up = gate_up * topk_weights[rows, places, None].to(F32)
        gate, up = gate_up.chunk(2, -1)
        inner[rows, places] = act(gate) * up
    # the first stage leaves in the dtype of the model, and is quantised from there, all of it together
    inner = inner.to(hidden.dtype).to(F32)
    inner = quantised(inner.flatten(0, 1), quantisation, w2.dtype, a2_scale).view(inner.shape)
    y = x.new_zeros(hidden.shape)
    for expert, (rows, places) in enumerate(local):
        result = inner[rows, places] @ _dequantised(w2, w2_scale, quantisation, expert).t()
        share = 1.0 if doweight_stage1 else topk_weights[rows, places, None].to(F32)
        y.index_add_(0, rows, result * share)
    return y.to(hidden.dtype)
