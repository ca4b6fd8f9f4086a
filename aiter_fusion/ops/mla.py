"""Decoding with multi-head latent attention over a paged cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..op import Spec
from .bridge import bridge_op

__all__ = ["mla_decode_fwd"]

F32 = torch.float32


def _result_dtype(q: Tensor) -> torch.dtype:
    """The dtype of the result: that of the queries, bfloat16 for FP8."""
    return torch.bfloat16 if q.element_size() == 1 else q.dtype


def _shape(q: Tensor, value_dim: int, **_: Any) -> dict[str, Spec]:
    return {"o": ([q.shape[0], q.shape[1], value_dim], _result_dtype(q))}


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
    } | scales


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
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[T, H, value_dim]`` of the dtype of q, bfloat16 if that is FP8.

    AITER: ``aiter.mla.mla_decode_fwd`` (v0.1.10.post2 on); heads of 576 and 512, no cap.
    """
    page_size = kv_buffer.shape[1]
    queries = q.to(F32) if q_scale is None else q.to(F32) * q_scale
    scale = q.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    starts, pages, lasts = qo_indptr.tolist(), kv_indptr.tolist(), kv_last_page_lens.tolist()
    results = [queries.new_empty(0, q.shape[1], value_dim)]
    for sequence, last in enumerate(lasts):
        taken = kv_indices[pages[sequence] : pages[sequence + 1]].long()
        length = (len(taken) - 1) * page_size + last
        keys = kv_buffer[taken].flatten(0, 1)[:length].to(F32)
        keys = keys if kv_scale is None else keys * kv_scale
        keys = keys.repeat_interleave(q.shape[1] // keys.shape[1], 1)
        own = queries[starts[sequence] : starts[sequence + 1]]
        scores = torch.einsum("qhd,khd->hqk", own, keys) * scale
        if logit_cap > 0:
            scores = logit_cap * torch.tanh(scores / logit_cap)
        # the last query sees all keys, the one before it one less
        position = torch.arange(len(own), device=q.device)[:, None] + length - len(own)
        hidden = torch.arange(length, device=q.device)[None] > position
        shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        results.append(torch.einsum("hqk,khd->qhd", shares, keys[..., :value_dim]))
    return torch.cat(results).to(_result_dtype(q))
