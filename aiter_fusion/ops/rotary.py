"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..op import Spec
from .bridge import bridge_op

__all__ = ["rotary_embedding", "rotary_embedding_"]

F32 = torch.float32


def _samples() -> Iterator[dict[str, Any]]:
    for seed, (rows, heads, kv_heads, dim, rotated, dtype) in enumerate(
        (
            (5, 4, 2, 16, 16, torch.bfloat16),
            (3, 2, 2, 32, 16, torch.float16),
            (1, 8, 1, 64, 64, torch.bfloat16),
            (0, 4, 2, 16, 16, torch.bfloat16),
            (7, 3, 1, 32, 8, F32),
        )
    ):
        for neox in (True, False):
            generator = torch.Generator().manual_seed(seed)
            angles = torch.rand(20, rotated // 2, generator=generator) * 6
            yield {
                "q": torch.randn(rows, heads, dim, generator=generator).to(dtype),
                "k": torch.randn(rows, kv_heads, dim, generator=generator).to(dtype),
                "cos": angles.cos().to(dtype),
                "sin": angles.sin().to(dtype),
                "positions": torch.randint(0, 20, (rows,), generator=generator),
                "neox": neox,
                "nope_first": rotated < dim and neox,
            }


def _shape(q: Tensor, k: Tensor, **_: Any) -> dict[str, Spec]:
    return {"q_out": (q.shape, q.dtype), "k_out": (k.shape, k.dtype)}


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, neox: bool, nope_first: bool) -> Tensor:
    """``x`` with each pair (a, b) of its rotated part as (a cos - b sin, b cos + a sin), rounded once."""
    width = 2 * cos.shape[-1]
    kept, turned = (x[..., :-width], x[..., -width:]) if nope_first else (x[..., width:], x[..., :width])
    pairs = turned.to(F32).unflatten(-1, (2, -1) if neox else (-1, 2))
    a, b = pairs.unbind(-2 if neox else -1)
    cos, sin = cos.to(F32)[:, None], sin.to(F32)[:, None]
    rotated = torch.stack((a * cos - b * sin, b * cos + a * sin), -2 if neox else -1).flatten(-2).to(x.dtype)
    return torch.cat((kept, rotated) if nope_first else (rotated, kept), -1)


@bridge_op("q_out", "k_out", shape=_shape, samples=_samples)
def rotary_embedding(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    neox: bool = True,
    nope_first: bool = False,
    *,
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Queries and keys with R elements of each head turned in pairs by the angles of their positions.

    A pair (a, b) becomes ``(a * cos - b * sin, b * cos + a * sin)``, in float32, rounded once.

    Args:
        q: ``[T, H, D]`` bfloat16 or float16 (reference: any float).
        k: ``[T, KV heads, D]`` of the dtype of q.
        cos: ``[positions, R / 2]`` of the dtype of q, R up to D.
        sin: ``[positions, R / 2]`` of the dtype of q.
        positions: ``[T]`` int64, rows of cos and sin.
        neox: whether a pair is an element of the first half and one of the second (GPT-NeoX, Llama); else two
            neighbours (GPT-J).
        nope_first: whether the last R elements of a head are turned; else the first R.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        (q, k) of the same shapes and dtype, contiguous.

    AITER: ``aiter.rope_cached_positions_2c_fwd``.
    """
    cos, sin = cos[positions], sin[positions]
    return _rotated(q, cos, sin, neox, nope_first), _rotated(k, cos, sin, neox, nope_first)


@bridge_op(shape=lambda **_: {}, samples=_samples, mutates=("q", "k"))
def rotary_embedding_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    neox: bool = True,
    nope_first: bool = False,
    *,
    provider: str = "auto",
) -> None:
    """``rotary_embedding`` in place: q and k, which may be views such as parts of one projection, are overwritten.

    Args:
        q: ``[T, H, D]`` bfloat16 or float16 (reference: any float); written to.
        k: ``[T, KV heads, D]`` of the dtype of q; written to.
        cos: ``[positions, R / 2]`` of the dtype of q, R up to D.
        sin: ``[positions, R / 2]`` of the dtype of q.
        positions: ``[T]`` int64, rows of cos and sin.
        neox: as of ``rotary_embedding``.
        nope_first: as of ``rotary_embedding``.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        Nothing; the op's schema says that it writes to q and k.

    AITER: ``aiter.rope_cached_positions_2c_fwd_inplace``.
    """
    cos, sin = cos[positions], sin[positions]
    for x in (q, k):
        x.copy_(_rotated(x, cos, sin, neox, nope_first))
