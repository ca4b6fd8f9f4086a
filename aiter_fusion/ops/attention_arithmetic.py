"""What all references of attention compute: one sequence's softmax attention, in float32."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

F32 = torch.float32


class Rule(NamedTuple):
    """Which keys a query sees, and how its scores become shares.

    Query i of ``t`` stands at position ``i + s - t`` among ``s`` keys: the last query sees the last key.

    scale:   of the scores.
    causal:  a query sees no key after its position.
    left:    keys before its position that it sees; -1: all.
    right:   keys after its position that it sees; -1: all.
    softcap: scores become ``softcap * tanh(score / softcap)``; 0: they stay.
    sinks:   ``[H]``, the score of one more key for each head, without a value.
    slopes:  ``[H]``, ALiBi: ``-slope * |position - key|`` is added to scores.
    bias:    ``[t, s]``, added to the scores of every head.
    """

    scale: float
    causal: bool = False
    left: int = -1
    right: int = -1
    softcap: float = 0.0
    sinks: Tensor | None = None
    slopes: Tensor | None = None
    bias: Tensor | None = None


def attend(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """The result ``[t, H, Dv]`` and the logarithm of each query's sum of exponentials, ``[H, t]``, both in float32.

    A query that sees no key, and has no sink, gets zeros and ``-inf``.

    Args:
        q: ``[t, H, D]``.
        k: ``[s, Hk, D]``; query head h reads key head ``h // (H / Hk)``.
        v: ``[s, Hk, Dv]``.
        rule: see ``Rule``.
    """
    each = q.shape[1] // k.shape[1]
    keys, values = (x.to(F32).repeat_interleave(each, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.to(F32), keys) * rule.scale
    if rule.softcap > 0:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    # key minus position, [t, s]
    t, s = scores.shape[1:]
    ahead = torch.arange(s, device=q.device) - (torch.arange(t, device=q.device)[:, None] + s - t)
    if rule.slopes is not None:
        scores = scores - rule.slopes.to(F32)[:, None, None] * ahead.abs()
    if rule.bias is not None:
        scores = scores + rule.bias.to(F32)
    right = 0 if rule.causal else rule.right
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if right >= 0:
        hidden |= ahead > right
    if rule.left >= 0:
        hidden |= ahead < -rule.left
    scores = scores.masked_fill(hidden, -torch.inf)
    every = scores
    if rule.sinks is not None:
        every = torch.cat([scores, rule.sinks.to(F32)[:, None, None].expand(-1, t, 1)], -1)
    lse = every.logsumexp(-1) if every.shape[-1] else scores.new_full(scores.shape[:2], -torch.inf)
    # where nothing is seen, lse is -inf, and -inf minus itself is no number
    shares = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("hts,shd->thd", shares, values), lse


def scale_of(q: Tensor, scale: float | None) -> float:
    """The scale of the scores, by default ``D ** -0.5``."""
    return q.shape[-1] ** -0.5 if scale is None else scale
