"""Mixture of experts: routing, and the experts themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..domains import ANYTHING
from ..op import BridgeOp, Spec
from ..providers import bridge_op

F32 = torch.float32
BLOCK = 128
# Added to the sum that weights are divided by, as the models do: no probability is that small.
LEAST = 1e-20

QUANTISATIONS = ("none", "per_tensor", "per_token", "block_128")
EXPERT_ACTIVATIONS = ("silu", "gelu")


def _weighted(scores: Tensor, ids: Tensor, renormalize: bool, scaling: float) -> dict[str, Tensor]:
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + LEAST)
    return {"weights": (weights * scaling).to(F32), "ids": ids.to(torch.int32)}


def _topk_softmax(gating: Tensor, topk: int, renormalize: bool) -> dict[str, Tensor]:
    scores = gating.to(F32).softmax(-1)
    return _weighted(scores, scores.topk(topk, -1).indices, renormalize, 1.0)


def _within_groups(scores: Tensor, group_scores: Tensor, topk: int, topk_group: int) -> Tensor:
    """The experts of the highest scores among those of the best groups."""
    best = group_scores.topk(topk_group, -1).indices
    allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
    size = scores.shape[1] // group_scores.shape[1]
    return scores.masked_fill(~allowed.repeat_interleave(size, 1), -torch.inf).topk(topk, -1).indices


def _grouped_topk(
    gating: Tensor,
    topk: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool,
    softmax: bool,
    routed_scaling_factor: float,
) -> dict[str, Tensor]:
    scores = gating.to(F32).softmax(-1) if softmax else gating.to(F32).sigmoid()
    groups = scores.unflatten(1, (num_expert_group, -1)).amax(-1)
    return _weighted(scores, _within_groups(scores, groups, topk, topk_group), renormalize, routed_scaling_factor)


def _biased_grouped_topk(
    gating: Tensor,
    correction_bias: Tensor,
    topk: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool,
    routed_scaling_factor: float,
) -> dict[str, Tensor]:
    scores = gating.to(F32).sigmoid()
    biased = scores + correction_bias.to(F32)
    groups = biased.unflatten(1, (num_expert_group, -1)).topk(2, -1).values.sum(-1)
    return _weighted(scores, _within_groups(biased, groups, topk, topk_group), renormalize, routed_scaling_factor)


def _routed(gating: Tensor, topk: int, **_: Any) -> dict[str, Spec]:
    sizes = [gating.shape[0], topk]
    return {"weights": (sizes, F32), "ids": (sizes, torch.int32)}


def _gating(rows: int, experts: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _topk_samples() -> Iterator[dict[str, Any]]:
    for seed, (rows, experts, topk, dtype) in enumerate(
        ((7, 8, 2, F32), (1, 64, 8, torch.bfloat16), (0, 16, 4, F32), (33, 128, 1, torch.float16))
    ):
        for renormalize in (False, True):
            yield {"gating": _gating(rows, experts, seed, dtype), "topk": topk, "renormalize": renormalize}


def _grouped_samples(biased: bool) -> Iterator[dict[str, Any]]:
    for seed, (rows, experts, groups, topk_group, topk) in enumerate(
        ((7, 32, 4, 2, 4), (1, 64, 8, 4, 8), (0, 16, 4, 1, 2), (9, 256, 8, 4, 8))
    ):
        given: dict[str, Any] = {"gating": _gating(rows, experts, seed)}
        if biased:
            given["correction_bias"] = _gating(1, experts, seed + 50)[0]
        given |= {"topk": topk, "num_expert_group": groups, "topk_group": topk_group, "renormalize": seed % 2 == 0}
        yield given | ({} if biased else {"softmax": seed < 2}) | {"routed_scaling_factor": 1.0 if seed else 2.5}


TOPK_SOFTMAX = bridge_op(
    BridgeOp(
        family="topk_softmax",
        features=frozenset(),
        arguments={"gating": "Tensor", "topk": "int", "renormalize": "bool"},
        outputs=("weights", "ids"),
        reference=_topk_softmax,
        shape=_routed,
        samples=_topk_samples,
    )
)

GROUPS = {"topk": "int", "num_expert_group": "int", "topk_group": "int", "renormalize": "bool"}

GROUPED_TOPK = bridge_op(
    BridgeOp(
        family="grouped_topk",
        features=frozenset(),
        arguments={"gating": "Tensor"} | GROUPS | {"softmax": "bool", "routed_scaling_factor": "float"},
        outputs=("weights", "ids"),
        reference=_grouped_topk,
        shape=_routed,
        samples=lambda: _grouped_samples(biased=False),
    )
)

BIASED_GROUPED_TOPK = bridge_op(
    BridgeOp(
        family="biased_grouped_topk",
        features=frozenset(),
        arguments={"gating": "Tensor", "correction_bias": "Tensor"} | GROUPS | {"routed_scaling_factor": "float"},
        outputs=("weights", "ids"),
        reference=_biased_grouped_topk,
        shape=_routed,
        samples=lambda: _grouped_samples(biased=True),
    )
)


# ---- experts --------------------------------------------------------------------------------------------------------


def _dequantised(weight: Tensor, scale: Tensor | None, quantisation: str, expert: int) -> Tensor:
    """An expert's weight ``[N, K]`` in float32."""
    w = weight[expert].to(F32)
    if quantisation == "none":
        return w
    if scale is None:
        raise ValueError(f"quantisation {quantisation!r} wants w1_scale and w2_scale")
    if quantisation != "block_128":
        return w * scale[expert].reshape(-1, 1)
    rows, columns = w.shape
    return w * scale[expert].repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def quantised(x: Tensor, quantisation: str, dtype: torch.dtype, given: Tensor | None) -> Tensor:
    """What is left of float32 values ``[M, K]`` after quantisation to ``dtype``: per tensor by a given scale or by the
    maximum, per token, or per block of 128 columns. A maximum of zero quantises to zeros."""
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


def _fused_moe(
    hidden: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    expert_mask: Tensor | None,
    w1_scale: Tensor | None,
    w2_scale: Tensor | None,
    a1_scale: Tensor | None,
    a2_scale: Tensor | None,
    activation: str,
    quantisation: str,
    doweight_stage1: bool,
) -> dict[str, Tensor]:
    check(activation, quantisation)
    act = F.silu if activation == "silu" else F.gelu
    ids = topk_ids.long()
    if expert_mask is not None:
        local = expert_mask.long().cumsum(0) - 1
        ids = torch.where(expert_mask.bool(), local, -1)[ids]  # -1: on another rank
    local = [torch.where(ids == expert) for expert in range(w1.shape[0])]  # (rows, places) of each expert
    x = quantised(hidden.to(F32), quantisation, w1.dtype, a1_scale)
    inner = x.new_zeros(*ids.shape, w2.shape[2])
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
    return {"y": y.to(hidden.dtype)}


def check(activation: str, quantisation: str) -> None:
    """Raise a ValueError for a name that does not exist."""
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
            routed = _topk_softmax(torch.randn(rows, experts, generator=generator), topk, True)
            yield {
                "hidden": hidden,
                "w1": q1,
                "w2": q2,
                "topk_weights": routed["weights"],
                "topk_ids": routed["ids"],
                "expert_mask": torch.tensor([0, 1, 0, 1], dtype=torch.int32) if masked else None,
                "w1_scale": s1,
                "w2_scale": s2,
                "a1_scale": None,
                "a2_scale": None,
                "activation": "gelu" if masked else "silu",
                "quantisation": quantisation,
                "doweight_stage1": seed == 2,
            }


FUSED_MOE = bridge_op(
    BridgeOp(
        family="fused_moe",
        features=frozenset(),
        arguments={
            "hidden": "Tensor",
            "w1": "Tensor",
            "w2": "Tensor",
            "topk_weights": "Tensor",
            "topk_ids": "Tensor",
            "expert_mask": "Tensor?",
            "w1_scale": "Tensor?",
            "w2_scale": "Tensor?",
            "a1_scale": "Tensor?",
            "a2_scale": "Tensor?",
            "activation": "str",
            "quantisation": "str",
            "doweight_stage1": "bool",
        },
        outputs=("y",),
        reference=_fused_moe,
        # in the model's dtype, whatever the weights are in
        shape=lambda hidden, **_: {"y": (hidden.shape, hidden.dtype)},
        samples=_moe_samples,
        # a call that names another gets the ValueError of ``check``
        domains={"activation": ANYTHING, "quantisation": ANYTHING},
    )
)
