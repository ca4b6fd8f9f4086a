"""Attention of few query rows over a cache with grouped heads, without copies of the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..domains import FLAG, Number, Tensors
from ..op import FusedOp, Spec, define
from ..providers.choice import implementation

HALVES = (torch.bfloat16, torch.float16)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    position: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    by_tokens: bool,
) -> dict[str, Tensor]:
    """``y = softmax(softcapped((q @ k.T) * scale) + mask) @ v`` in float32, over the keys that each query sees."""
    tokens, keys, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    place = torch.arange(keys, device=q.device)
    visible = torch.ones(tokens, keys, dtype=torch.bool, device=q.device)
    if position is not None:
        at = position + torch.arange(tokens, device=q.device)[:, None]
        visible = place <= at
        if window:
            visible &= place > at - window
    read = visible.any(0)[:, None]
    wide_k = torch.where(read, k.float(), 0.0).repeat_interleave(group, 1)
    wide_v = torch.where(read, v.float(), 0.0).repeat_interleave(group, 1)
    score = q.float() @ wide_k.mT * scale
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    if mask is not None and mask.dtype is torch.bool:
        visible = visible & mask
    elif mask is not None:
        score = score + mask.float()
    score = torch.where(visible, score, -math.inf)
    y = (torch.nan_to_num(torch.softmax(score, -1), 0.0) @ wide_v).to(q.dtype)
    return {"y": y.transpose(1, 2).contiguous().transpose(1, 2) if by_tokens else y}


def shape(q: Tensor, by_tokens: bool, **_: Any) -> dict[str, Spec]:
    """Sizes, dtype and layout of what ``reference`` returns."""
    return {"y": (q.shape, q.dtype, (0, 2, 1, 3)) if by_tokens else (q.shape, q.dtype)}


def samples() -> Iterator[dict[str, Any]]:
    """One call."""
    made = [torch.randn(2, heads, size, 64, dtype=torch.bfloat16) for heads, size in ((4, 1), (2, 8), (2, 8))]
    given: dict[str, Any] = dict(zip("qkv", made, strict=True))
    yield {**given, "mask": None, "position": torch.tensor(5), "scale": 0.25, "window": 0, "softcap": 0.0} | {
        "by_tokens": True
    }


ATTENTION = define(
    FusedOp(
        family="decode_attention",
        features=frozenset(),
        arguments={
            "q": "Tensor",
            "k": "Tensor",
            "v": "Tensor",
            "mask": "Tensor?",
            "position": "Tensor?",
            "scale": "float",
            "window": "int",
            "softcap": "float",
            "by_tokens": "bool",
        },
        outputs=("y",),
        reference=reference,
        shape=shape,
        samples=samples,
        layouts=({"by_tokens": True}, {"by_tokens": False}),
        domains={
            **dict.fromkeys("qkv", Tensors(HALVES)),
            "mask": Tensors((torch.bool, torch.float32, *HALVES), optional=True),
            "position": Tensors((torch.int64, torch.int32), optional=True, elements=1),
            "scale": Number(),
            "window": Number(),
            "softcap": Number(),
            "by_tokens": FLAG,
        },
        products=True,
    ),
    implementation,
)
