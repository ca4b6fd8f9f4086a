"""Multi-head latent attention over a paged cache: decode steps, and prefill with absorbed weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..op import Spec
from .attention_arithmetic import F32, Rule, attend, scale_of
from .bridge import bridge_op

__all__ = ["mla_decode_fwd", "mla_decode_fwd_lse", "mla_decode_metadata", "mla_prefill_fwd"]


def _result_dtype(q: Tensor) -> torch.dtype:
    """The dtype of the result: that of the queries, bfloat16 for FP8."""
    return torch.bfloat16 if q.element_size() == 1 else q.dtype


def _shape(q: Tensor, value_dim: int, **_: Any) -> dict[str, Spec]:
    return {"o": ([q.shape[0], q.shape[1], value_dim], _result_dtype(q)), "lse": ([q.shape[1], q.shape[0]], F32)}


def _samples() -> Iterator[dict[str, Any]]:
    for seed, (lengths, tokens, page_size, heads, dtype) in enumerate(
        (
            ((5, 1, 9), 1, 1, 4, torch.bfloat16),
            ((7, 3), 2, 1, 2, torch.bfloat16),
            ((10, 4), 1, 4, 4, torch.float16),
            ((6,), 3, 2, 16, torch.float8_e4m3fn),
        )
    ):
        yield sample(lengths, tokens, page_size, heads, 96, 64, dtype, seed)


def sample(
    lengths: tuple[int, ...],
    tokens: int,
    page_size: int,
    heads: int,
    dim: int,
    value_dim: int,
    dtype: torch.dtype,
    seed: int,
    logit_cap: float = 0.0,
) -> dict[str, Any]:
    """Sequences of these lengths, each with ``tokens`` queries, their pages in a random order."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // page_size) for length in lengths]
    total = sum(counts)
    scales = {"q_scale": None, "kv_scale": None}
    if dtype.itemsize == 1:
        scales = {"q_scale": torch.tensor([0.5]), "kv_scale": torch.tensor([2.0])}
    return {
        "q": torch.randn(tokens * len(lengths), heads, dim, generator=generator).to(dtype),
        "kv_buffer": torch.randn(total + 2, page_size, 1, dim, generator=generator).to(dtype),
        "qo_indptr": torch.arange(len(lengths) + 1, dtype=torch.int32) * tokens,
        "kv_indptr": torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
        "kv_indices": torch.randperm(total + 2, generator=generator)[:total].to(torch.int32),
        "kv_last_page_lens": torch.tensor([(n - 1) % page_size + 1 for n in lengths], dtype=torch.int32),
        "max_seqlen_q": tokens,
        "value_dim": value_dim,
        "sm_scale": None if seed % 2 else 0.1,
        "logit_cap": logit_cap,
        **scales,
        "metadata": None,
        "max_seqlen_k": max(lengths),
    }


def _prefill_samples() -> Iterator[dict[str, Any]]:
    others = ("logit_cap", "q_scale", "kv_scale", "metadata", "max_seqlen_k")
    for given in _samples():
        if given["q"].dtype.itemsize > 1:
            yield {name: value for name, value in given.items() if name not in others}


def _metadata_samples() -> Iterator[dict[str, Any]]:
    for given in _samples():
        yield {
            **{name: given[name] for name in ("qo_indptr", "kv_indptr", "kv_last_page_lens")},
            "heads": given["q"].shape[1],
            "kv_heads": 1,
            "max_seqlen_q": given["max_seqlen_q"],
            "page_size": given["kv_buffer"].shape[1],
            "q_dtype": given["q"].dtype,
            "kv_dtype": given["kv_buffer"].dtype,
            "size": 0,
        }


@bridge_op("o", shape=_shape, samples=_samples)
def mla_decode_fwd(
    q: Tensor,
    kv_buffer: Tensor,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    kv_last_page_lens: Tensor,
    max_seqlen_q: int,
    value_dim: int = 512,
    sm_scale: float | None = None,
    logit_cap: float = 0.0,
    q_scale: Tensor | None = None,
    kv_scale: Tensor | None = None,
    metadata: Tensor | None = None,
    max_seqlen_k: int | None = None,
    *,
    provider: str = "auto",
) -> Tensor:
    """``softmax(q @ k.T * sm_scale) @ k[..., :value_dim]`` over each sequence's pages of latent keys.

    Causal over a sequence's queries: the last sees all keys, the one before it one less, and so on.

    Args:
        q: ``[T, H, 576]`` bfloat16 or FP8, the queries of all sequences.
        kv_buffer: ``[pages, page size, KV heads, 576]`` bfloat16 or FP8.
        qo_indptr: ``[B + 1]`` int32, where each sequence's queries start in q.
        kv_indptr: ``[B + 1]`` int32, where each sequence's pages start in kv_indices.
        kv_indices: ``[all pages of all sequences]`` int32, pages of kv_buffer.
        kv_last_page_lens: ``[B]`` int32, tokens in each sequence's last page.
        max_seqlen_q: the most queries of a sequence.
        value_dim: elements of a key that are its value.
        sm_scale: None is ``576 ** -0.5``.
        logit_cap: above 0, scores s become ``logit_cap * tanh(s / logit_cap)``.
        q_scale: ``[1]`` float32, the dequantisation scale of an FP8 q.
        kv_scale: ``[1]`` float32, the dequantisation scale of an FP8 kv_buffer.
        metadata: AITER's division of the work, from ``mla_decode_metadata``; None: it divides every call anew.
        max_seqlen_k: at least the most keys of a sequence, known on the host; AITER wants it for a call with a cap.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[T, H, value_dim]`` of the dtype of q, bfloat16 if that is FP8.

    AITER: ``aiter.mla.mla_decode_fwd`` (v0.1.10.post2 on), heads of 576 and 512; with a cap its Triton
    ``decode_attention_fwd`` (v0.1.13 on), one query for each sequence.
    """
    sequences = qo_indptr, kv_indptr, kv_indices, kv_last_page_lens
    return _decoded(q, kv_buffer, sequences, value_dim, sm_scale, logit_cap, q_scale, kv_scale)[0]


@bridge_op("o", "lse", shape=_shape, samples=_samples)
def mla_decode_fwd_lse(
    q: Tensor,
    kv_buffer: Tensor,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    kv_last_page_lens: Tensor,
    max_seqlen_q: int,
    value_dim: int = 512,
    sm_scale: float | None = None,
    logit_cap: float = 0.0,
    q_scale: Tensor | None = None,
    kv_scale: Tensor | None = None,
    metadata: Tensor | None = None,
    max_seqlen_k: int | None = None,
    *,
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``mla_decode_fwd`` and the logarithms of its sums, with which results over parts of the keys can be merged.

    Args:
        q: this and all others as those of ``mla_decode_fwd``.

    Returns:
        The result ``[T, H, value_dim]``, and ``lse`` ``[H, T]`` float32: the natural logarithm of the sum of the
        exponentials of each query's scores, as ``flash_attn_varlen_lse`` has it.

    AITER: ``aiter.mla.mla_decode_fwd`` (v0.1.10.post2 on) and ``decode_attention_fwd``, as for ``mla_decode_fwd``.
    """
    sequences = qo_indptr, kv_indptr, kv_indices, kv_last_page_lens
    return _decoded(q, kv_buffer, sequences, value_dim, sm_scale, logit_cap, q_scale, kv_scale)


@bridge_op("o", shape=_shape, samples=_prefill_samples)
def mla_prefill_fwd(
    q: Tensor,
    kv_buffer: Tensor,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    kv_last_page_lens: Tensor,
    max_seqlen_q: int,
    value_dim: int = 512,
    sm_scale: float | None = None,
    *,
    provider: str = "auto",
) -> Tensor:
    """The same attention as ``mla_decode_fwd`` for many queries of each sequence, by kernels made for that.

    Args:
        q: ``[T, H, 576]`` bfloat16, the queries of all sequences.
        kv_buffer: ``[pages, page size, 1, 576]`` bfloat16, which holds the queries' own keys too.
        qo_indptr: ``[B + 1]`` int32, where each sequence's queries start in q.
        kv_indptr: ``[B + 1]`` int32, where each sequence's pages start in kv_indices.
        kv_indices: ``[all pages of all sequences]`` int32, pages of kv_buffer.
        kv_last_page_lens: ``[B]`` int32, tokens in each sequence's last page.
        max_seqlen_q: the most queries of a sequence.
        value_dim: elements of a key that are its value.
        sm_scale: None is ``576 ** -0.5``.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[T, H, value_dim]`` of the dtype of q.

    AITER: ``aiter.mla.mla_prefill_fwd`` (v0.1.1 on); 16 or 128 heads of 576 and 512.
    """
    sequences = qo_indptr, kv_indptr, kv_indices, kv_last_page_lens
    return _decoded(q, kv_buffer, sequences, value_dim, sm_scale, 0.0, None, None)[0]


@bridge_op("metadata", shape=lambda size, **_: {"metadata": ([size], torch.int32)}, samples=_metadata_samples)
def mla_decode_metadata(
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_last_page_lens: Tensor,
    heads: int,
    kv_heads: int,
    max_seqlen_q: int,
    page_size: int,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    size: int,
    *,
    provider: str = "auto",
) -> Tensor:
    """How AITER divides the work of ``mla_decode_fwd`` among a GPU's compute units, computed once for all layers of a
    decode step.

    It is for calls with these arguments by the same provider on the same GPU, and can be copied and moved. The
    reference divides nothing: its metadata are zeros.

    Args:
        qo_indptr: ``[B + 1]`` int32, as in ``mla_decode_fwd``.
        kv_indptr: ``[B + 1]`` int32.
        kv_last_page_lens: ``[B]`` int32.
        heads: query heads.
        kv_heads: heads of the cache.
        max_seqlen_q: the queries of each sequence.
        page_size: tokens in a page.
        q_dtype: of the queries.
        kv_dtype: of the cache.
        size: elements of the result: ``bridge.mla_decode_metadata_size``.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[size]`` int32.

    AITER: ``aiter.get_mla_metadata_v1`` (v0.1.10.post2 on); heads in multiples of 8.
    """
    return qo_indptr.new_zeros(size, dtype=torch.int32)


def _decoded(
    q: Tensor,
    kv_buffer: Tensor,
    sequences: tuple[Tensor, Tensor, Tensor, Tensor],
    value_dim: int,
    sm_scale: float | None,
    logit_cap: float,
    q_scale: Tensor | None,
    kv_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    page_size, own = kv_buffer.shape[1], q.to(F32) if q_scale is None else q.to(F32) * q_scale
    qo_indptr, kv_indptr, kv_indices, kv_last_page_lens = sequences
    starts, pages, lasts = qo_indptr.tolist(), kv_indptr.tolist(), kv_last_page_lens.tolist()
    rule = Rule(scale_of(q, sm_scale), causal=True, softcap=logit_cap)
    results, sums = [own.new_empty(0, q.shape[1], value_dim)], [own.new_empty(q.shape[1], 0)]
    for sequence, last in enumerate(lasts):
        taken = kv_indices[pages[sequence] : pages[sequence + 1]].long()
        keys = kv_buffer[taken].flatten(0, 1)[: (len(taken) - 1) * page_size + last].to(F32)
        keys = keys if kv_scale is None else keys * kv_scale
        result, lse = attend(own[starts[sequence] : starts[sequence + 1]], keys, keys[..., :value_dim], rule)
        results.append(result)
        sums.append(lse)
    return torch.cat(results).to(_result_dtype(q)), torch.cat(sums, 1)
