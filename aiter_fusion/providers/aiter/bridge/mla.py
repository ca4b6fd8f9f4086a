"""Decoding with multi-head latent attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..entry_points import constant, same
from .adapter import Adapter, Arguments, Condition, contiguous, entry, of_dtype

# Elements of a head's keys and of its values.
HEAD, VALUE = 576, 512


def _decode(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    q, kv = a["q"], a["kv_buffer"]
    heads = (q.shape[-1], a["value_dim"])
    yield heads == (HEAD, VALUE), f"the heads have {heads[0]} and {heads[1]} elements, not {HEAD} and {VALUE}"
    yield a["logit_cap"] <= 0, f"logit_cap is {a['logit_cap']}, and the kernel has no cap"
    for name, tensor, scale in (("q", q, "q_scale"), ("the cache", kv, "kv_scale")):
        yield tensor.dtype in (torch.bfloat16, native), f"{name} is {tensor.dtype}, not torch.bfloat16 or {native}"
        yield tensor.dtype != native or a[scale] is not None, f"{name} is FP8 without a scale ({scale})"
    for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_lens"):
        yield of_dtype(name, a[name], torch.int32)
    yield contiguous("q", q)
    yield contiguous("kv_buffer", kv)


ADAPTERS = {
    "mla_decode_fwd": Adapter(
        entry(
            "aiter.mla.mla_decode_fwd",
            {
                **same("q", "kv_buffer", "o", "qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_lens"),
                **same("max_seqlen_q", "sm_scale", "q_scale", "kv_scale"),
                "page_size": lambda a: a["kv_buffer"].shape[1],
                "nhead_kv": lambda a: a["kv_buffer"].shape[2],
                "logit_cap": constant(0.0),
            },
        ),
        _decode,
    )
}
