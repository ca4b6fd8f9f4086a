"""Attention of a decode step: few queries over a cache whose heads several queries share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..domains import FLAG, Number, Sizes, Tensors
from ..op import FusedOp, Spec, Tolerance, define, dense
from ..providers.choice import implementation
from ..stage import Setting

F32 = torch.float32
FLOATS = (torch.bfloat16, torch.float16, F32)
INDICES = (torch.int64, torch.int32)

# A decode step has at most so many queries a sequence: one token, and those that a draft model proposes.
FEW = 16

# In memory the queries of a token lie together, or those of a head.
BY_TOKENS = (0, 2, 1, 3)


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
    """``y = softmax(cap((q @ k.T) * scale) + mask) @ v`` over the keys that a query sees, for each of H heads.

    ``cap(s)`` is ``softcap * tanh(s / softcap)``, or s if ``softcap`` is 0. Query head h reads key head h // (H / Hk).
    With a position, query t sees key j if ``j <= position + t``, and with a window only if ``j > position + t -
    window`` too: what a cache holds from ``position + T`` on, NaN included, does not reach the result. A query that
    sees no key gives 0.

    On a CPU, without softcap, it is PyTorch's own call for grouped heads, and has its bits; elsewhere everything is in
    float32, and y is rounded once.

    Args:
        q: ``[B, H, T, D]`` bfloat16, float16 or float32; of any strides, the last one 1, as k and v.
        k: ``[B, Hk, S, D]`` of the dtype of q; Hk divides H.
        v: ``[B, Hk, S, D]`` of the dtype of q.
        mask: None, or ``[B or 1, H or 1, T or 1, S]``: bool (True: attend), or of the dtype of q or float32 (added).
        position: None, or one integer on the device of q: that of the first query, from 0 to S - T.
        scale: of the products.
        window: 0, or how many keys a query sees, its own included; only with a position.
        softcap: 0, or the bound of the scaled products.
        by_tokens: whether y lies in memory as ``[B, T, H, D]``, or as it is.

    Returns:
        y: ``[B, H, T, D]`` of the dtype of q.

    Raises:
        ValueError: the sizes of the tensors do not go together, or there is a window without a position.

    Source: ``scaled_dot_product_attention`` of PyTorch after ``repeat_kv`` of transformers. Where a query sees no key,
    its backends disagree: 0 on a CPU and by the math and memory-efficient kernels, the mean of all values by cuDNN, to
    which PyTorch says False as -65504.
    """
    spec = shape(q, k, mask, position, window, by_tokens)["y"]
    filled, mask = _visible(q, k, mask, position, window)
    if filled is not None:
        k, v = (torch.where(filled[:, None], cached, 0.0) for cached in (k, v))
    if q.device.type == "cpu" and not softcap:
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    else:
        y = _in_float32(q, k, v, mask, scale, softcap)
    return {"y": dense(spec, q.new_empty).copy_(y)}


def _visible(
    q: Tensor, k: Tensor, mask: Tensor | None, position: Tensor | None, window: int
) -> tuple[Tensor | None, Tensor | None]:
    """Which slots of the cache are filled (None: all), and the mask with what the position and the window say."""
    if position is None:
        return None, mask
    queries, slots = q.shape[2], torch.arange(k.shape[2], device=q.device)
    first = position.reshape(())
    own = first + torch.arange(queries, device=q.device)[:, None]
    visible = (slots <= own) & (slots > own - window) if window else slots <= own
    if mask is None:
        mask = visible[None, None]
    elif mask.dtype is torch.bool:
        mask = mask & visible
    else:
        mask = torch.where(visible, mask, -math.inf)
    return slots < first + queries, mask


def _in_float32(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    keys, values = (cached.to(F32).repeat_interleave(groups, 1) for cached in (k, v))
    scores = (q.to(F32) @ keys.transpose(2, 3)) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    sees = (scores != -math.inf).any(-1, keepdim=True)
    return (torch.where(sees, scores.softmax(-1), 0.0) @ values).to(q.dtype)


def shape(
    q: Tensor, k: Tensor, mask: Tensor | None, position: Tensor | None, window: int, by_tokens: bool, **_: Any
) -> dict[str, Spec]:
    """Sizes, dtype and layout of what ``reference`` returns.

    Raises:
        ValueError: as ``reference``.
    """
    heads, key_heads = q.shape[1], k.shape[1]
    if isinstance(heads, int) and isinstance(key_heads, int) and (key_heads == 0 or heads % key_heads):
        raise ValueError(f"decode_attention: k has {key_heads} heads, which do not divide the {heads} of q")
    if mask is not None and mask.dim() != 4:
        raise ValueError(f"decode_attention: mask has {mask.dim()} dimensions, not 4: [B or 1, H or 1, T or 1, S]")
    if window and position is None:
        raise ValueError(f"decode_attention: window {window} says nothing without a position: give both or neither")
    return {"y": (q.shape, q.dtype, BY_TOKENS) if by_tokens else (q.shape, q.dtype)}


def operands(
    batch: int,
    heads: int,
    key_heads: int,
    queries: int,
    slots: int,
    dim: int,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> dict[str, Any]:
    """Queries that lie by tokens, as projections give them, and a cache, of normal values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    return {
        "q": normal(batch, queries, heads, dim).transpose(1, 2),
        "k": normal(batch, key_heads, slots, dim),
        "v": normal(batch, key_heads, slots, dim),
    }


# Batch, heads, key heads, queries, slots, dim; the position of the first query, or None; window; softcap.
_SAMPLES = (
    ((2, 4, 2, 1, 16, 64), 4, 0, 0.0),
    ((1, 32, 8, 1, 700, 128), 0, 0, 0.0),
    ((3, 8, 1, 1, 64, 64), 63, 0, 0.0),
    ((2, 4, 4, 1, 96, 80), None, 0, 0.0),
    ((1, 16, 2, 4, 130, 128), 100, 0, 0.0),
    ((2, 8, 2, FEW, 64, 64), 20, 0, 0.0),
    ((2, 4, 2, 1, 256, 256), 200, 64, 0.0),
    ((1, 8, 4, 3, 72, 96), 40, 24, 30.0),
    ((2, 8, 2, 1, 40, 64), 17, 0, 50.0),
    ((2, 4, 2, 5, 33, 64), None, 0, 0.0),
    ((1, 6, 2, 2, 48, 120), 9, 0, 0.0),
    ((0, 4, 2, 1, 16, 64), 4, 0, 0.0),
    ((2, 4, 2, 1, 8, 64), None, 0, 20.0),
)


def samples() -> Iterator[dict[str, Any]]:
    """Calls with every kind of mask, one after another, and without; empty and full caches, with and without a window.

    With a position the slots beyond the filled ones hold NaN; one query of a mask sees no key; values go up to 1e4.
    """
    for seed, (sizes, position, window, softcap) in enumerate(_SAMPLES):
        batch, heads, _, queries, slots, dim = sizes
        dtype = FLOATS[seed % 2]
        given = operands(*sizes, dtype, seed)
        if seed % 3 == 1:
            given["q"] *= 100
            given["k"] *= 100
        if position is not None:
            given["k"][:, :, position + queries :] = given["v"][:, :, position + queries :] = math.nan
        yield given | {
            "mask": _mask(seed, batch, heads, queries, slots, dtype),
            "position": None if position is None else torch.tensor(position, dtype=INDICES[seed % 2]),
            "scale": dim**-0.5,
            "window": window,
            "softcap": softcap,
            "by_tokens": seed % 2 == 0,
        }


def _mask(seed: int, batch: int, heads: int, queries: int, slots: int, dtype: torch.dtype) -> Tensor | None:
    """None, or a mask of one of four kinds; that of padding leaves the first sequence's first query no key."""
    generator = torch.Generator().manual_seed(seed + 100)
    padding = torch.rand(batch, 1, 1, slots, generator=generator) < 0.8
    match seed % 5:
        case 1:
            return padding
        case 2:
            padding[:1] = False
            return torch.where(padding, 0.0, -math.inf).to(dtype).expand(batch, 1, queries, slots)
        case 3:
            return torch.randn(1, heads, queries, slots, generator=generator)
        case 4:
            return torch.rand(batch, 1, queries, slots, generator=generator) < 0.6
    return None


def _typical(setting: Setting) -> dict[str, Any]:
    """One token of ``rows`` sequences over a cache of 1,024, all but the last filled; heads of 128, four of queries to
    one of keys."""
    heads, slots, dim = setting.hidden // 128, 1024, 128
    given = operands(setting.rows, heads, heads // 4, 1, slots, dim)
    return {name: tensor.to(setting.device) for name, tensor in given.items()} | {
        "mask": None,
        "position": torch.full((), slots - 1, device=setting.device),
        "scale": dim**-0.5,
        "window": 0,
        "softcap": 0.0,
        "by_tokens": True,
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
        typical=_typical,
        layouts=({"by_tokens": True}, {"by_tokens": False}),
        domains={
            **dict.fromkeys(("q", "k", "v"), Tensors(FLOATS)),
            "mask": Tensors((torch.bool, *FLOATS), optional=True),
            "position": Tensors(INDICES, optional=True, elements=1),
            "scale": Number(),
            "window": Sizes(0, 2**31 - 1),
            "softcap": Number(),
            "by_tokens": FLAG,
        },
        # Attention without PyTorch's call rounds the scores up to four times to bf16, 2**-9 of up to 5 each: that moves
        # each weight by up to 4 %, and their mean by less.
        tolerance=Tolerance(sums=2**-5),
        products=True,
        by_rows=False,
        greatest={"position": lambda given: given["k"].shape[2] - given["q"].shape[2]},
    ),
    implementation,
)
