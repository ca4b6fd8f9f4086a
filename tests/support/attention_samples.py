"""Calls of the bridge's attention in the formats and of the sizes that AITER takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from aiter_fusion import bridge
from aiter_fusion.ops import attention_flash as flash
from aiter_fusion.ops import attention_paged as paged
from aiter_fusion.ops import mla
from aiter_fusion.providers.kv_cache import LAYOUTS, NHD

from .aiter_double import Double

BF16, F16 = torch.bfloat16, torch.float16
Samples = Iterator[dict[str, Any]]


def _flash(double: Double) -> Samples:
    for seed, rule in enumerate((*flash.RULES, {"bias": True})):
        for sizes in ((5, 5, 4, 4, 32, 32), (2, 7, 4, 2, 64, 32), (6, 3, 2, 1, 16, 16), (0, 3, 2, 2, 16, 16)):
            yield flash.dense_sample(sizes, rule, (BF16, F16)[seed % 2], seed)


def _varlen(double: Double) -> Samples:
    lengths = ((5, 5), (1, 7), (3, 3)), ((2, 9), (0, 4), (4, 2)), ((1, 1), (6, 8)), ((3, 0), (2, 5))
    for seed, rule in enumerate((*flash.RULES, {"causal": True, "softcap": 3.0})):
        for page in (0, 16):
            dtype = (BF16, F16)[seed % 2]
            yield flash.varlen_sample(lengths[seed % 4], (4, 2, 32), rule, dtype, seed, page)
    yield flash.varlen_sample(((1, 5), (1, 2)), (4, 2, 32), {"causal": True}, BF16, 9)
    # no sequence has keys
    yield flash.varlen_sample(((2, 0), (1, 0)), (4, 2, 32), {}, BF16, 10)


RULES: tuple[dict[str, Any], ...] = (
    {},
    {"window": 3, "scale": 0.1},
    {"softcap": 2.0},
    {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05])},
    {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
)


def _paged(double: Double) -> Samples:
    for layout in LAYOUTS:
        for seed, rule in enumerate(RULES):
            for heads in ((4, 2, 64), (4, 1, 32)):
                cache = (double.fp8, BF16, F16)[seed % 3]
                dtype = F16 if cache is F16 else BF16
                yield paged.attention_sample((5, 1, 17, 16), heads, 16, layout, dtype, cache, seed, **rule)
        for dtype in (BF16, F16):
            yield paged.attention_sample((19, 3), (8, 2, 128), 16, layout, dtype, dtype, 3)
    each = {name: torch.rand(4, 2, 16) + 0.5 for name in ("k_scale", "v_scale")}
    yield paged.attention_sample((5, 30), (8, 2, 128), 16, "shuffled", BF16, double.fp8, 7, **each)
    # beyond a partition, and beyond what is asked for by the longest sequence
    yield paged.attention_sample((300, 20), (4, 2, 64), 16, NHD, BF16, BF16, 8)
    yield paged.attention_sample((300, 20), (4, 2, 64), 16, "shuffled", BF16, BF16, 8)


def _written(double: Double) -> Samples:
    for layout in LAYOUTS:
        for seed, (tokens, cache) in enumerate(((5, BF16), (1, F16), (19, double.fp8), (0, BF16))):
            dtype = BF16 if cache is double.fp8 else cache
            yield paged.write_sample(tokens, 2, 32, 16, layout, dtype, cache, seed)
        given = paged.write_sample(6, 2, 32, 16, layout, BF16, BF16, 5)
        # as a projection gives them: tokens apart, heads together
        key, value = torch.cat([given["key"], given["value"]], -2).unflatten(1, (2, 2)).unbind(1)
        yield given | {"key": key, "value": value, "slot_mapping": given["slot_mapping"].int()}


def mla_calls(double: Double, heads: int = 0, tokens: tuple[int, ...] = (1, 2, 1, 4)) -> Samples:
    dtypes = BF16, BF16, double.fp8, double.fp8
    for seed, (lengths, page, count) in enumerate((((5, 1, 9), 1, 4), ((7, 3), 1, 2), ((6, 4), 4, 4), ((6,), 2, 2))):
        yield mla.sample(lengths, tokens[seed], page, heads or count, 576, 512, dtypes[seed], seed)


def _decode(double: Double) -> Samples:
    yield from mla_calls(double)
    yield mla.sample((5, 1, 9), 1, 1, 4, 576, 512, BF16, 0, logit_cap=2.0)
    yield mla.sample((7, 9), 1, 4, 4, 576, 512, F16, 1, logit_cap=2.0)
    for given in mla_calls(double, 8, (1, 2, 3, 4)):
        yield given | {"metadata": metadata_of(given)}


def metadata_of(given: dict[str, Any], provider: str = "aiter") -> torch.Tensor:
    """The metadata of a call of ``mla_decode_fwd``."""
    work = metadata_call(given)
    return bridge.mla_decode_metadata(**work, provider=provider)


def metadata_call(given: dict[str, Any]) -> dict[str, Any]:
    q, kv, most = given["q"], given["kv_buffer"], given["max_seqlen_q"]
    rows = len(given["kv_last_page_lens"])
    return {
        **{name: given[name] for name in ("qo_indptr", "kv_indptr", "kv_last_page_lens")},
        "heads": q.shape[1],
        "kv_heads": 1,
        "max_seqlen_q": most,
        "page_size": kv.shape[1],
        "q_dtype": q.dtype,
        "kv_dtype": kv.dtype,
        "size": bridge.mla_decode_metadata_size(rows, most, q.shape[1], q.dtype, kv.dtype),
    }


def _decode_lse(double: Double) -> Samples:
    yield from _decode(double)
    yield mla.sample((5, 9), 1, 1, 32, 576, 512, BF16, 0)


def _prefill(double: Double) -> Samples:
    others = ("logit_cap", "q_scale", "kv_scale", "metadata", "max_seqlen_k")
    for seed, (lengths, tokens, page) in enumerate((((5, 9), 4, 1), ((7,), 7, 2))):
        given = mla.sample(lengths, tokens, page, 16, 576, 512, BF16, seed)
        yield {name: value for name, value in given.items() if name not in others}


def _metadata(double: Double) -> Samples:
    for given in mla_calls(double, 16):
        yield metadata_call(given)


FOR_AITER: dict[str, Callable[[Double], Samples]] = {
    "flash_attn": _flash,
    "flash_attn_varlen": _varlen,
    "flash_attn_varlen_lse": _varlen,
    "paged_attention": _paged,
    "reshape_and_cache": _written,
    "mla_decode_fwd": _decode,
    "mla_decode_fwd_lse": _decode_lse,
    "mla_prefill_fwd": _prefill,
    "mla_decode_metadata": _metadata,
}

# The versions with which each function binds, by its place among those of an op.
BINDS = {
    "flash_attn": "v0.1.10",
    "flash_attn_varlen 0: flash_attn_varlen_func": "v0.1.10",
    "flash_attn_varlen 1: unified_attention": "v0.1.6.post2",
    "flash_attn_varlen_lse 0: flash_attn_varlen_func": "v0.1.10",
    "flash_attn_varlen_lse 1: mha_batch_prefill_func": "v0.1.10",
    "paged_attention 0: paged_attention_v1": "v0.1.7.post3",
    "paged_attention 1: unified_attention": "v0.1.6.post2",
    "paged_attention 2: pa_fwd_asm": "v0.1.5",
    "paged_attention 3: paged_attention_rocm": "v0.1.4",
    "paged_attention 4: unified_attention": "v0.1.15.post1",
    "reshape_and_cache 0: reshape_and_cache_flash": "v0.1.1",
    "reshape_and_cache 1: reshape_and_cache": "v0.1.1",
    "mla_decode_fwd 0: mla_decode_fwd": "v0.1.10.post2",
    "mla_decode_fwd 1: decode_attention_fwd": "v0.1.13",
    "mla_decode_fwd_lse 0: mla_decode_fwd": "v0.1.10.post2",
    "mla_decode_fwd_lse 1: decode_attention_fwd": "v0.1.13",
    "mla_decode_metadata": "v0.1.10.post2",
    "mla_prefill_fwd": "v0.1.1",
}
