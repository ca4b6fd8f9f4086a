"""Attention over keys and values that are there as tensors: dense, packed, or in the blocks of a cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..op import Spec
from .attention_arithmetic import F32, Rule, attend, scale_of
from .bridge import bridge_op

__all__ = ["flash_attn", "flash_attn_varlen", "flash_attn_varlen_lse"]


def _dense_shape(q: Tensor, v: Tensor, **_: Any) -> dict[str, Spec]:
    return {"o": ([*q.shape[:3], v.shape[-1]], q.dtype)}


def _varlen_shape(q: Tensor, v: Tensor, **_: Any) -> dict[str, Spec]:
    return {"o": ([*q.shape[:2], v.shape[-1]], q.dtype), "lse": ([q.shape[1], q.shape[0]], F32)}


# (queries, keys, query heads, key heads, elements of a key, elements of a value)
_DENSE = ((5, 5, 4, 4, 32, 32), (1, 9, 4, 2, 32, 32), (7, 3, 2, 1, 64, 32), (0, 4, 2, 2, 16, 16), (3, 3, 8, 2, 16, 16))
# which keys are seen, and what scores become
RULES: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True},
    {"causal": True, "window_left": 2},
    {"window_left": 1, "window_right": 2},
    {"causal": True, "sinks": True},
    {"causal": True, "alibi_slopes": True, "scale": 0.1},
)


def _rule(rule: dict[str, Any], heads: int, generator: torch.Generator) -> dict[str, Any]:
    """The arguments of a rule, with tensors where it says that there is one."""
    given = {"scale": None, "causal": False, "window_left": -1, "window_right": -1} | rule
    for name in ("alibi_slopes", "sinks"):
        given[name] = torch.rand(heads, generator=generator) if given.get(name) else None
    return given


def dense_sample(
    sizes: tuple[int, int, int, int, int, int], rule: dict[str, Any], dtype: torch.dtype, seed: int, batch: int = 2
) -> dict[str, Any]:
    """Arguments of ``flash_attn``: sizes as in ``_DENSE``, a row of ``RULES``."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys, heads, kv_heads, dim, value_dim = sizes
    given = _rule(rule, heads, generator)
    bias = torch.randn(queries, keys, generator=generator).to(dtype) if given.pop("bias", False) else None
    return {
        "q": torch.randn(batch, queries, heads, dim, generator=generator).to(dtype),
        "k": torch.randn(batch, keys, kv_heads, dim, generator=generator).to(dtype),
        "v": torch.randn(batch, keys, kv_heads, value_dim, generator=generator).to(dtype),
        **{name: given[name] for name in ("scale", "causal", "window_left", "window_right")},
        "bias": bias,
        **{name: given[name] for name in ("alibi_slopes", "sinks")},
    }


def _dense_samples() -> Iterator[dict[str, Any]]:
    for seed, rule in enumerate((*RULES, {"bias": True})):
        for dtype in (torch.bfloat16, torch.float16):
            yield dense_sample(_DENSE[seed % len(_DENSE)], rule, dtype, seed)


def varlen_sample(
    lengths: tuple[tuple[int, int], ...],
    heads: tuple[int, int, int],
    rule: dict[str, Any],
    dtype: torch.dtype,
    seed: int,
    page: int = 0,
) -> dict[str, Any]:
    """Arguments of ``flash_attn_varlen``.

    Args:
        lengths: (queries, keys) of each sequence.
        heads: query heads, key heads, elements.
        rule: a row of ``RULES``, also with ``softcap``.
        dtype: of the tensors.
        seed: of their values.
        page: tokens in a block of the cache; 0: keys and values are packed.
    """
    generator = torch.Generator().manual_seed(seed)
    count, kv_heads, dim = heads
    queries, keys = ([pair[which] for pair in lengths] for which in (0, 1))
    given, table = {"softcap": 0.0} | _rule(rule, count, generator), None
    sizes: tuple[int, ...] = (sum(keys), kv_heads, dim)
    if page:
        each = [-(-length // page) for length in keys]
        order = torch.randperm(sum(each) + 2, generator=generator).to(torch.int32)
        table = torch.zeros(len(keys), max(each) + 1, dtype=torch.int32)
        for row, (start, pages) in enumerate(zip([0, *torch.tensor(each).cumsum(0).tolist()], each, strict=False)):
            table[row, :pages] = order[start : start + pages]
        sizes = (sum(each) + 2, page, kv_heads, dim)
    starts = (torch.tensor([0, *torch.tensor(part).cumsum(0).tolist()], dtype=torch.int32) for part in (queries, keys))
    return {
        "q": torch.randn(sum(queries), count, dim, generator=generator).to(dtype),
        "k": torch.randn(sizes, generator=generator).to(dtype),
        "v": torch.randn(sizes, generator=generator).to(dtype),
        **dict(zip(("cu_seqlens_q", "cu_seqlens_k"), starts, strict=True)),
        "max_seqlen_q": max(queries),
        "max_seqlen_k": max(keys),
        **{name: given[name] for name in ("scale", "causal", "window_left", "window_right", "softcap")},
        **{name: given[name] for name in ("alibi_slopes", "sinks")},
        "block_table": table,
    }


# (queries, keys) of sequences: some without queries, without keys, and with more queries than keys
_VARLEN = (((5, 5), (1, 7), (3, 3)), ((2, 9), (0, 4), (4, 2)), ((1, 1), (6, 8)), ((3, 0), (2, 5)))


def _varlen_samples() -> Iterator[dict[str, Any]]:
    for seed, rule in enumerate((*RULES, {"causal": True, "softcap": 3.0})):
        for page in (0, 4):
            dtype = (torch.bfloat16, torch.float16)[seed % 2]
            yield varlen_sample(_VARLEN[seed % len(_VARLEN)], (4, 2, 32), rule, dtype, seed, page)


@bridge_op("o", shape=_dense_shape, samples=_dense_samples)
def flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    provider: str = "auto",
) -> Tensor:
    """``softmax(q @ k.T * scale) @ v`` for each batch and head, in float32 inside.

    Query i of Sq stands at position ``i + Sk - Sq``: the last query sees the last key. A query that sees no key gets
    zeros.

    Args:
        q: ``[B, Sq, H, D]`` bfloat16 or float16.
        k: ``[B, Sk, Hk, D]`` of the dtype of q; query head h reads key head ``h // (H / Hk)``.
        v: ``[B, Sk, Hk, Dv]`` of the dtype of q.
        scale: of the scores; None is ``D ** -0.5``.
        causal: no query sees a key after its position.
        window_left: keys before its position that a query sees, -1 for all. A window of W tokens is ``W - 1``.
        window_right: keys after its position that a query sees, -1 for all.
        bias: ``[Sq, Sk]``, added to the scores of every head.
        alibi_slopes: ``[H]`` float32: ``-slope * |position - key|`` is added to scores.
        sinks: ``[H]`` float32: the score of one more key for each head, which has no value.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[B, Sq, H, Dv]`` of the dtype of q, contiguous.

    AITER: ``aiter.flash_attn_func`` (v0.1.10 on); forward only, heads of up to 256, bias or slopes.
    """
    rule = Rule(scale_of(q, scale), causal, window_left, window_right, 0.0, sinks, alibi_slopes, bias)
    results = [attend(*each, rule)[0] for each in zip(q, k, v, strict=True)]
    o = torch.stack(results) if results else q.new_empty(*q.shape[:3], v.shape[-1])
    return o.to(q.dtype)


@bridge_op("o", shape=_varlen_shape, samples=_varlen_samples)
def flash_attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    block_table: Tensor | None = None,
    *,
    provider: str = "auto",
) -> Tensor:
    """``flash_attn`` of sequences of different lengths, packed one after another.

    Args:
        q: ``[T, H, D]`` bfloat16 or float16, the queries of all sequences.
        k: ``[keys of all sequences, Hk, D]``; with a block table a cache in layout ``nhd``, ``[blocks, block, Hk, D]``.
        v: as k, with Dv elements.
        cu_seqlens_q: ``[B + 1]`` int32, where each sequence's queries start; the last is their number.
        cu_seqlens_k: ``[B + 1]`` int32, the same of keys, also with a block table.
        max_seqlen_q: at least the most queries of a sequence. Too few, and AITER leaves rows out.
        max_seqlen_k: at least the most keys of a sequence.
        scale: of the scores; None is ``D ** -0.5``.
        causal: no query sees a key after its position.
        window_left: keys before its position that a query sees, -1 for all. A window of W tokens is ``W - 1``.
        window_right: keys after its position that a query sees, -1 for all.
        softcap: above 0, scores s become ``softcap * tanh(s / softcap)``.
        alibi_slopes: ``[H]`` float32: ``-slope * |position - key|`` is added to scores.
        sinks: ``[H]`` float32: the score of one more key for each head, which has no value.
        block_table: ``[B, blocks of the longest]`` int32, the blocks of each sequence's keys.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[T, H, Dv]`` of the dtype of q, contiguous.

    AITER: ``aiter.flash_attn_varlen_func`` (v0.1.10 on); with a block table its Triton ``unified_attention``, causal.
    """
    given = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "block_table": block_table}
    rule = Rule(scale_of(q, scale), causal, window_left, window_right, softcap, sinks, alibi_slopes)
    return _of_sequences(q, k, v, max_seqlen_q, max_seqlen_k, rule, **given)[0]


@bridge_op("o", "lse", shape=_varlen_shape, samples=_varlen_samples)
def flash_attn_varlen_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    block_table: Tensor | None = None,
    *,
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``flash_attn_varlen`` and the logarithms of its sums, with which results over parts of the keys can be merged.

    Args:
        q: this and all others as those of ``flash_attn_varlen``.

    Returns:
        The result ``[T, H, Dv]``, and ``lse`` ``[H, T]`` float32: the natural logarithm of the sum of the exponentials
        of each query's scores, its sink's included; ``-inf`` where it sees no key.

    AITER: ``aiter.flash_attn_varlen_func`` (v0.1.10 on), with a block table ``aiter.mha_batch_prefill_func``; no sinks.
    """
    given = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "block_table": block_table}
    rule = Rule(scale_of(q, scale), causal, window_left, window_right, softcap, sinks, alibi_slopes)
    return _of_sequences(q, k, v, max_seqlen_q, max_seqlen_k, rule, **given)


def _of_sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    rule: Rule,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    block_table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    results, sums = [q.new_empty(0, q.shape[1], v.shape[-1], dtype=F32)], [q.new_empty(q.shape[1], 0, dtype=F32)]
    for sequence in range(len(queries) - 1):
        own, seen = slice(*queries[sequence : sequence + 2]), slice(*keys[sequence : sequence + 2])
        count, length = own.stop - own.start, seen.stop - seen.start
        if count > max_seqlen_q or length > max_seqlen_k:
            raise ValueError(
                f"sequence {sequence} has {count} queries and {length} keys, and max_seqlen_q and max_seqlen_k say at "
                f"most {max_seqlen_q} and {max_seqlen_k}"
            )
        if block_table is None:
            its_keys, its_values = k[seen], v[seen]
        else:
            blocks = block_table[sequence, : -(-length // k.shape[1])].long()
            its_keys, its_values = (cache[blocks].flatten(0, 1)[:length] for cache in (k, v))
        result, lse = attend(q[own], its_keys, its_values, rule)
        results.append(result)
        sums.append(lse)
    return torch.cat(results).to(q.dtype), torch.cat(sums, 1)
