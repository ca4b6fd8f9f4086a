"""Routing of tokens to experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..domains import ANYTHING
from ..op import Spec
from .bridge import bridge_op

__all__ = ["biased_grouped_topk", "fused_topk", "grouped_topk", "topk_gating", "topk_sigmoid", "topk_softmax"]

F32 = torch.float32
# Added to the sum that weights are divided by, as the models do. No probability is that small.
LEAST = 1e-20
# The scores of ``topk_gating``, by AITER's names.
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "sigmoid": torch.sigmoid,
    "softmax": lambda x: x.softmax(-1),
}


def _weighted(scores: Tensor, ids: Tensor, renormalize: bool, scaling: float) -> tuple[Tensor, Tensor]:
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + LEAST)
    return (weights * scaling).to(F32), ids.to(torch.int32)


def _within_groups(scores: Tensor, group_scores: Tensor, topk: int, topk_group: int) -> Tensor:
    """The experts of the highest scores among those of the best groups."""
    best = group_scores.topk(topk_group, -1).indices
    allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best, True)
    size = scores.shape[1] // group_scores.shape[1]
    return scores.masked_fill(~allowed.repeat_interleave(size, 1), -torch.inf).topk(topk, -1).indices


def _shape(gating: Tensor, topk: int, num_shared_experts: int = 0, **_: Any) -> dict[str, Spec]:
    sizes = [gating.shape[0], topk + num_shared_experts]
    return {"weights": (sizes, F32), "ids": (sizes, torch.int32)}


def _gating(rows: int, experts: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _topk_samples() -> Iterator[dict[str, Any]]:
    for seed, (rows, experts, topk, dtype) in enumerate(
        ((7, 8, 2, F32), (1, 64, 8, torch.bfloat16), (0, 16, 4, F32), (33, 128, 1, torch.float16))
    ):
        for renormalize in (False, True):
            yield {"gating": _gating(rows, experts, seed, dtype), "topk": topk, "renormalize": renormalize}


def _softmax_samples() -> Iterator[dict[str, Any]]:
    for given in _topk_samples():
        yield given | {"num_shared_experts": 0}
    for shared, experts in ((1, 8), (2, 60)):
        gating = _gating(5, experts + shared, experts)
        yield {"gating": gating, "topk": 4, "renormalize": True, "num_shared_experts": shared}


def _sigmoid_samples() -> Iterator[dict[str, Any]]:
    for given in _topk_samples():
        if given["renormalize"]:
            yield {name: given[name] for name in ("gating", "topk")}


def _score_samples() -> Iterator[dict[str, Any]]:
    for seed, (rows, experts, topk, score, biased, renormalize) in enumerate(
        (
            (7, 32, 4, "sqrtsoftplus", True, True),
            (1, 64, 8, "sigmoid", False, True),
            (0, 16, 2, "sigmoid", False, True),
            (5, 128, 6, "softmax", False, False),
            (9, 256, 8, "softmax", True, True),
            (3, 24, 3, "sqrtsoftplus", False, False),
        )
    ):
        yield {
            "gating": _gating(rows, experts, seed),
            "topk": topk,
            "correction_bias": _gating(1, experts, seed + 50)[0] if biased else None,
            "renormalize": renormalize,
            "routed_scaling_factor": 2.5 if biased else 1.0,
            "score": score,
        }


def _grouped_samples(biased: bool) -> Iterator[dict[str, Any]]:
    for seed, (rows, experts, groups, topk_group, topk) in enumerate(
        ((7, 32, 8, 2, 4), (1, 64, 8, 4, 8), (0, 16, 8, 2, 2), (9, 256, 8, 4, 8), (3, 24, 2, 1, 3))
    ):
        given: dict[str, Any] = {"gating": _gating(rows, experts, seed)}
        if biased:
            given["correction_bias"] = _gating(1, experts, seed + 50)[0]
        given |= {"topk": topk, "num_expert_group": groups, "topk_group": topk_group, "renormalize": seed % 2 == 0}
        yield given | ({} if biased else {"softmax": seed < 2}) | {"routed_scaling_factor": 1.0 if seed else 2.5}


@bridge_op("weights", "ids", shape=_shape, samples=_softmax_samples)
def topk_softmax(
    gating: Tensor, topk: int, renormalize: bool = True, num_shared_experts: int = 0, *, provider: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The ``topk`` experts of the highest probability ``softmax(gating)``, best first, and then the shared experts.

    Args:
        gating: ``[M, E + num_shared_experts]`` logits, bfloat16, float16 or float32; those of shared experts last.
        topk: experts of a token, chosen among the first E.
        renormalize: whether to divide the weights of these by their sum.
        num_shared_experts: experts that every token has besides, weighted by ``sigmoid`` of their logits.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        (weights ``[M, topk + num_shared_experts]`` float32, ids of the same shape, int32).

    AITER: ``aiter.topk_softmax``, with 0, or (v0.1.12 on) 1, 2, 4 or 8 shared experts. Source: Mixtral, Qwen2-MoE.
    """
    experts = gating.shape[1] - num_shared_experts
    scores = gating[:, :experts].to(F32).softmax(-1)
    weights, ids = _weighted(scores, scores.topk(topk, -1).indices, renormalize, 1.0)
    shared = torch.arange(experts, gating.shape[1], dtype=torch.int32, device=gating.device)
    of_shared = gating[:, experts:].to(F32).sigmoid()
    return torch.cat((weights, of_shared), 1), torch.cat((ids, shared.expand(len(ids), -1)), 1)


@bridge_op("weights", "ids", shape=_shape, samples=_topk_samples)
def fused_topk(gating: Tensor, topk: int, renormalize: bool = True, *, provider: str = "auto") -> tuple[Tensor, Tensor]:
    """``topk_softmax`` by the kernel that AITER finds best: of its own for some numbers of experts.

    Args:
        gating: ``[M, E]`` logits, bfloat16, float16 or float32.
        topk: experts of a token.
        renormalize: whether to divide the weights by their sum.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        (weights ``[M, topk]`` float32, ids ``[M, topk]`` int32), in no particular order.

    AITER: ``aiter.fused_moe.fused_topk``.
    """
    scores = gating.to(F32).softmax(-1)
    return _weighted(scores, scores.topk(topk, -1).indices, renormalize, 1.0)


@bridge_op("weights", "ids", shape=_shape, samples=_sigmoid_samples)
def topk_sigmoid(gating: Tensor, topk: int, *, provider: str = "auto") -> tuple[Tensor, Tensor]:
    """The ``topk`` experts of the highest logit, best first, weighted by ``sigmoid(gating)``.

    Args:
        gating: ``[M, E]`` logits, bfloat16, float16 or float32.
        topk: experts of a token.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        (weights ``[M, topk]`` float32, ids ``[M, topk]`` int32).

    AITER: ``aiter.topk_sigmoid`` (v0.1.6.post2 on). Source: Llama 4.
    """
    scores = gating.to(F32)
    return _weighted(scores.sigmoid(), scores.topk(topk, -1).indices, False, 1.0)


@bridge_op("weights", "ids", shape=_shape, samples=_score_samples, domains={"score": ANYTHING})
def topk_gating(
    gating: Tensor,
    topk: int,
    correction_bias: Tensor | None = None,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
    score: str = "sqrtsoftplus",
    *,
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The ``topk`` experts of the highest ``score(gating) + correction_bias``, weighted by ``score(gating)``.

    Args:
        gating: ``[M, E]`` logits, bfloat16, float16 or float32.
        topk: experts of a token, up to 64.
        correction_bias: ``[E]`` float32, or bfloat16 (not with a float16 gating).
        renormalize: whether to divide the weights by their sum.
        routed_scaling_factor: multiplied with the weights after they are renormalised.
        score: ``softmax``, ``sigmoid`` or ``sqrtsoftplus``, the square root of ``log(1 + exp(x))``.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        (weights ``[M, topk]`` float32, ids ``[M, topk]`` int32), in no particular order.

    Raises:
        ValueError: a score of another name.

    AITER: ``aiter.topk_gating`` (v0.1.14 on; ``softmax`` with ``renormalize`` from v0.1.20 on); gfx942 and gfx950.
    """
    if score not in SCORES:
        raise ValueError(f"{score!r} is none of {', '.join(SCORES)}")
    scores = SCORES[score](gating.to(F32))
    biased = scores if correction_bias is None else scores + correction_bias.to(F32)
    return _weighted(scores, biased.topk(topk, -1).indices, renormalize, routed_scaling_factor)


@bridge_op("weights", "ids", shape=_shape, samples=lambda: _grouped_samples(biased=False))
def grouped_topk(
    gating: Tensor,
    topk: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool = True,
    softmax: bool = True,
    routed_scaling_factor: float = 1.0,
    *,
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The ``topk`` experts of the highest score among those in the ``topk_group`` groups with the best single expert.

    Args:
        gating: ``[M, E]`` logits, bfloat16, float16 or float32, E a multiple of ``num_expert_group``.
        topk: experts of a token.
        num_expert_group: groups that the experts are divided into.
        topk_group: groups of a token.
        renormalize: whether to divide the weights by their sum.
        softmax: whether scores are ``softmax(gating)``; else they are ``sigmoid(gating)``.
        routed_scaling_factor: multiplied with the weights after they are renormalised.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        (weights ``[M, topk]`` float32, ids ``[M, topk]`` int32), in no particular order.

    AITER: ``aiter.grouped_topk`` (v0.1.5 on). Source: DeepSeek-V2.
    """
    scores = gating.to(F32).softmax(-1) if softmax else gating.to(F32).sigmoid()
    groups = scores.unflatten(1, (num_expert_group, -1)).amax(-1)
    return _weighted(scores, _within_groups(scores, groups, topk, topk_group), renormalize, routed_scaling_factor)


@bridge_op("weights", "ids", shape=_shape, samples=lambda: _grouped_samples(biased=True))
def biased_grouped_topk(
    gating: Tensor,
    correction_bias: Tensor,
    topk: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
    *,
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Experts chosen by ``sigmoid(gating) + correction_bias``, weighted by ``sigmoid(gating)``: the ``topk`` highest
    among those in the ``topk_group`` groups with the highest sum of their two best.

    Args:
        gating: ``[M, E]`` logits, bfloat16, float16 or float32, E a multiple of ``num_expert_group``.
        correction_bias: ``[E]`` of the dtype of gating.
        topk: experts of a token.
        num_expert_group: groups that the experts are divided into.
        topk_group: groups of a token.
        renormalize: whether to divide the weights by their sum.
        routed_scaling_factor: multiplied with the weights after they are renormalised.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        (weights ``[M, topk]`` float32, ids ``[M, topk]`` int32), in no particular order.

    AITER: ``aiter.biased_grouped_topk``, with ``renormalize``. Source: DeepSeek-V3.
    """
    scores = gating.to(F32).sigmoid()
    biased = scores + correction_bias.to(F32)
    groups = biased.unflatten(1, (num_expert_group, -1)).topk(2, -1).values.sum(-1)
    return _weighted(scores, _within_groups(biased, groups, topk, topk_group), renormalize, routed_scaling_factor)
