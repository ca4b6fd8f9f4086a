"""Routing of tokens to experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..op import Spec
from .bridge import bridge_op

__all__ = ["biased_grouped_topk", "grouped_topk", "topk_softmax"]

F32 = torch.float32
# Added to the sum that weights are divided by, as the models do. No probability is that small.
LEAST = 1e-20


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


def _shape(gating: Tensor, topk: int, **_: Any) -> dict[str, Spec]:
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


@bridge_op("weights", "ids", shape=_shape, samples=_topk_samples)
def topk_softmax(
    gating: Tensor, topk: int, renormalize: bool = True, *, provider: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The ``topk`` experts of the highest probability ``softmax(gating)``, best first.

    Args:
        gating: ``[M, E]`` logits, bfloat16, float16 or float32.
        topk: experts of a token.
        renormalize: whether to divide the weights by their sum.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        (weights ``[M, topk]`` float32, ids ``[M, topk]`` int32).

    AITER: ``aiter.topk_softmax``. Source: Mixtral.
    """
    scores = gating.to(F32).softmax(-1)
    return _weighted(scores, scores.topk(topk, -1).indices, renormalize, 1.0)


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
