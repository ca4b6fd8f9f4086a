"""Attention over tensors and over caches in blocks, and what writes to these caches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .... import machine
from ....op import is_contiguous
from ...kv_cache import NHD, SHUFFLED, sizes, why_not_of_layout
from ..entry_points import EntryPoint, Value, constant, same
from .adapter import (
    F32,
    HALVES,
    Adapter,
    Arguments,
    Condition,
    Conditions,
    Outputs,
    Routes,
    contiguous,
    entry,
    of_dtype,
    score_scale,
)

# The largest head of CK's kernels.
WIDEST = 256
# Tokens of a partition, for which paged_attention_v1 and paged_attention_rocm keep a partial result each.
PARTITION = 256
# pa_fwd_asm: elements of a head, tokens of a block, query heads for a key head.
ASM_HEAD, ASM_BLOCK, ASM_GROUP = 128, 16, 16
# Blocks, and bytes of a cache, beyond which pa_fwd_asm reads other blocks.
ASM_BLOCKS, ASM_BYTES = 1 << 16, 1 << 31


def _heads(q: Tensor, heads: int) -> Condition:
    return q.shape[1] % heads == 0, f"{q.shape[1]} query heads cannot share {heads}"


def _floats(a: Arguments, *names: str) -> Iterator[Condition]:
    for name in names:
        if a[name] is not None:
            yield of_dtype(name, a[name], F32)
            yield contiguous(name, a[name])


def _table(a: Arguments) -> Iterator[Condition]:
    yield of_dtype("block_table", a["block_table"], torch.int32)
    last = a["block_table"].stride(-1)
    yield statically_known_true(last == 1), f"the entries of a row of block_table are {last} apart"


# ---- keys and values as tensors ------------------------------------------------------------------------------------


def _flash(a: Arguments) -> Iterator[Condition]:
    q, k, v = a["q"], a["k"], a["v"]
    yield q.dtype in HALVES, f"q is {q.dtype}, and the kernel takes bfloat16 and float16"
    for name in ("k", "v"):
        yield a[name].dtype == q.dtype, f"{name} is {a[name].dtype}, and the kernel needs {q.dtype}, like q"
    widest = max(q.shape[-1], v.shape[-1])
    yield widest <= WIDEST, f"the heads have up to {widest} elements, and the kernel takes up to {WIDEST}"
    heads, kv_heads = q.shape[-2], k.shape[-2]
    yield heads % kv_heads == 0, f"{heads} query heads cannot share {kv_heads}"
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    yield not wanted, "a gradient is wanted, and the kernel is called for the result alone"
    yield from _floats(a, "alibi_slopes", "sinks")


def _dense(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield from _flash(a)
    bias = a["bias"]
    yield statically_known_true(a["k"].shape[1] > 0), "there are no keys"
    yield bias is None or a["alibi_slopes"] is None, "the kernel adds a bias or slopes, not both"
    if bias is not None:
        yield of_dtype("bias", bias, a["q"].dtype)
        want = (a["q"].shape[1], a["k"].shape[1])
        yield tuple(bias.shape) == want, f"the bias is {list(bias.shape)}, and the kernel needs {list(want)}"


def _packed(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield from _flash(a)
    table = a["block_table"] is None
    yield table, "keys are in blocks, with which it ended processes (ROCm/aiter#4455)"
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        yield of_dtype(name, a[name], torch.int32)
        yield contiguous(name, a[name])
    q, arch = a["q"], machine.architecture(a["q"].device.index or 0)
    wrong = a["max_seqlen_q"] == 1 and (q.dtype is torch.float16 or q.shape[-1] in (64, 256))
    said = f"one query each of {q.dtype} and heads of {q.shape[-1]}"
    yield not wrong or arch != "gfx942", f"{said} come out wrong on gfx942 (ROCm/aiter#2229)"


def _lse(a: Arguments) -> Iterator[Condition]:
    yield a["sinks"] is None, "there are sinks, and whether its lse counts them is not documented"
    yield a["max_seqlen_k"] > 0, "there are no keys, for which its lse is +inf"


def _packed_lse(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield from _packed(a, native)
    yield from _lse(a)


def _in_blocks(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    """Packed queries over keys in blocks."""
    yield a["block_table"] is not None, "it is for keys in blocks, and these are packed"
    if a["block_table"] is None:
        return
    yield from _flash(a)
    yield from _table(a)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        yield of_dtype(name, a[name], torch.int32)


def _batch_prefill(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield from _in_blocks(a, native)
    yield from _lse(a)
    pack = 16 // a["k"].element_size()
    for name in ("k", "v"):
        yield a[name].shape[-1] % pack == 0, f"{name} has heads of {a[name].shape[-1]}, not a multiple of {pack}"
        yield contiguous(name, a[name])


def _unified_packed(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield from _in_blocks(a, native)
    if a["block_table"] is None:
        return
    yield a["causal"], "it is causal always, and this call is not"
    yield a["k"].shape[-1] == a["v"].shape[-1], "it takes keys and values of one size"
    yield from _unified(a, a["k"].shape[1], a["q"].shape[-1])


def _unified(a: Arguments, block: int, dim: int) -> Iterator[Condition]:
    yield block % 16 == 0, f"blocks have {block} tokens, not a multiple of 16"
    yield dim >= 32, f"the heads have {dim} elements, fewer than 32"
    both = a["alibi_slopes"] is not None and a["sinks"] is not None
    yield not both, "its slopes count from the first key, which changes results where there are sinks"


def _lengths(a: Arguments) -> Tensor:
    return a["cu_seqlens_k"].diff()


def _window(a: Arguments) -> tuple[int, int]:
    """What a query sees on its sides. Without a window nothing is said, though causal calls see nothing after the
    query: only so AITER takes its assembly."""
    return a["window_left"], (-1 if a["window_left"] < 0 else 0) if a["causal"] else a["window_right"]


_RULE: dict[str, Value] = {
    "softmax_scale": score_scale("scale"),
    "causal": "causal",
    "window_size": _window,
    "alibi_slopes": "alibi_slopes",
}
_PACKED: dict[str, Value] = {
    **same("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
    **_RULE,
    "logits_soft_cap": "softcap",
    "sink_ptr": "sinks",
}
_UNIFIED: dict[str, Value] = {
    **same("block_table", "softcap", "alibi_slopes", "sinks"),
    "q": "q",
    "out": "o",
    "causal": constant(True),
    "softmax_scale": score_scale("scale"),
    "q_descale": constant(None),
}


def _unified_entry(takes: Mapping[str, Value]) -> EntryPoint:
    path = "aiter.ops.triton.attention.unified_attention.unified_attention"
    return entry(path, {**_UNIFIED, **takes}, "aiter.ops.triton.unified_attention")


def _result_and_lse(returned: tuple[Tensor, Tensor], outputs: Outputs) -> Outputs:
    return {"o": returned[0], "lse": returned[1]}


# ---- caches in blocks ----------------------------------------------------------------------------------------------


def _cache(a: Arguments, layout: str, native: torch.dtype | None, like: str) -> Iterator[Condition]:
    """A cache in the layout that a function reads, of halves or of FP8 with scales."""
    yield a["layout"] == layout, f"it reads layout {layout}, and the cache is {a['layout']}"
    key, value, dtype = a["key_cache"], a["value_cache"], a[like].dtype
    why = why_not_of_layout(key, value, a["layout"])
    yield why is None, str(why)
    yield dtype in HALVES, f"{like} is {dtype}, and the kernel takes bfloat16 and float16"
    yield key.dtype in (dtype, native), f"the cache is {key.dtype}, not {dtype}, like {like}, or {native}"
    for name in ("k_scale", "v_scale"):
        given = a[name] is not None
        yield given == (key.dtype.itemsize == 1), f"a cache of {key.dtype} {'with' if given else 'without'} {name}"
    yield from _floats(a, "k_scale", "v_scale")


def _one_scale(a: Arguments) -> Iterator[Condition]:
    for name in ("k_scale", "v_scale"):
        count = 1 if a[name] is None else a[name].numel()
        yield count == 1, f"{name} has {count} elements, and it takes one"


def _paged(a: Arguments, layout: str, native: torch.dtype | None) -> Iterator[Condition]:
    yield from _cache(a, layout, native, "q")
    if a["layout"] != layout:
        return
    q, own = a["q"], sizes(a["key_cache"], layout)
    yield _heads(q, own.heads)
    yield contiguous("q", q)
    yield of_dtype("seq_lens", a["seq_lens"], torch.int32)
    yield from _table(a)
    room = a["block_table"].shape[1] * own.block
    yield room >= a["max_seq_len"], f"block_table has room for {room} tokens, and max_seq_len is {a['max_seq_len']}"
    yield from _floats(a, "alibi_slopes", "sinks")


def _plain(a: Arguments, what: str, *names: str) -> Iterator[Condition]:
    """What a kernel leaves out of account."""
    said = {"window": "a window", "softcap": "a cap", "sinks": "sinks", "alibi_slopes": "slopes"}
    for name in names:
        absent = a[name] is None or (not isinstance(a[name], Tensor) and a[name] == 0)
        yield absent, f"{what} has no {said[name].removeprefix('a ')}, and this call has {said[name]}"


def _v1(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield from _paged(a, NHD, native)
    if a["layout"] != NHD:
        return
    key, value = a["key_cache"], a["value_cache"]
    own = sizes(key, NHD)
    yield from _one_scale(a)
    yield from _plain(a, "the kernel", "sinks")
    yield own.dim >= 64, f"the heads have {own.dim} elements, fewer than 64"
    yield own.block <= PARTITION, f"blocks have {own.block} tokens, more than {PARTITION}"
    yield key.stride() == value.stride(), f"it reads values by the strides of keys, {tuple(key.stride())}"
    yield is_contiguous(key.transpose(0, 0)[0]), "the elements of a block are not next to each other"


def _unified_paged(layout: str) -> Conditions:
    def conditions(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
        yield from _paged(a, layout, native)
        if a["layout"] != layout:
            return
        own = sizes(a["key_cache"], layout)
        yield from _one_scale(a)
        yield from _unified(a, own.block, own.dim)

    return conditions


def _asm(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield from _paged(a, SHUFFLED, native)
    if a["layout"] != SHUFFLED:
        return
    q, key = a["q"], a["key_cache"]
    own = sizes(key, SHUFFLED)
    yield from _plain(a, "the kernel", "window", "softcap", "alibi_slopes", "sinks")
    yield own.dim == ASM_HEAD, f"the heads have {own.dim} elements, not {ASM_HEAD}"
    yield own.block == ASM_BLOCK, f"blocks have {own.block} tokens, not {ASM_BLOCK}"
    group = q.shape[1] // own.heads
    yield group <= ASM_GROUP, f"{group} query heads share a key head, more than {ASM_GROUP}"
    usual = a["scale"] in (None, ASM_HEAD**-0.5)
    yield usual, f"the scale is {a['scale']}, and the kernel's is {ASM_HEAD} ** -0.5"
    far = own.blocks > ASM_BLOCKS or key.numel() * key.element_size() > ASM_BYTES
    yield not far, f"{own.blocks} blocks are more than it can address (ROCm/aiter#3062)"
    if key.dtype.itemsize == 1:
        each = [own.blocks, own.heads, own.block]
        for name in ("k_scale", "v_scale"):
            found = None if a[name] is None else list(a[name].shape)
            yield found == each, f"{name} is {found}, and it takes one for each token, {each}"
    for name in ("key_cache", "value_cache"):
        yield contiguous(name, a[name])


def _rocm(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield from _paged(a, SHUFFLED, native)
    if a["layout"] != SHUFFLED:
        return
    own = sizes(a["key_cache"], SHUFFLED)
    yield from _plain(a, "the kernel", "window", "softcap", "sinks")
    yield from _one_scale(a)
    group = a["q"].shape[1] // own.heads
    yield group <= 32, f"{group} query heads share a key head, more than 32"
    yield a["max_seq_len"] <= 65536, f"max_seq_len is {a['max_seq_len']}, more than 65536"
    arch = machine.architecture(a["q"].device.index or 0) or "unknown"
    yield arch.startswith("gfx9"), f"the GPU is {arch}, and the kernel is for gfx9"
    for name in ("key_cache", "value_cache"):
        yield contiguous(name, a[name])


def _scale(name: str, like: str) -> Value:
    """A scale, 1 for a cache without one: the kernels read it in any case."""
    return lambda a: a[like].new_ones(1, dtype=F32) if a[name] is None else a[name]


def _partitions(a: Arguments) -> int:
    return -(-a["max_seq_len"] // PARTITION)


def _workspace(a: Arguments) -> Tensor:
    """Room for a result in the dtype of q, a sum and a maximum for each partition of each query."""
    rows, heads, dim = a["q"].shape
    each = dim * a["q"].element_size() + 2 * 4
    return a["q"].new_empty(rows * heads * _partitions(a) * each, dtype=torch.uint8)


def _statistic(a: Arguments) -> Tensor:
    """A number for each partition of each query."""
    return a["q"].new_empty(*a["q"].shape[:2], _partitions(a), dtype=F32)


def _partial(a: Arguments) -> Tensor:
    """A result for each partition of each query."""
    return a["q"].new_empty(*a["q"].shape[:2], _partitions(a), a["q"].shape[2])


_KIND: dict[str, Value] = {"kv_cache_dtype": lambda a: "fp8" if a["key_cache"].element_size() == 1 else "auto"}
_DECODE: dict[str, Value] = {
    "out": "o",
    "query": "q",
    **same("key_cache", "value_cache", "alibi_slopes"),
    "scale": score_scale("scale"),
    "block_tables": "block_table",
    "context_lens": "seq_lens",
    "max_context_len": "max_seq_len",
    "k_scale": _scale("k_scale", "q"),
    "v_scale": _scale("v_scale", "q"),
    "partition_size": constant(PARTITION),
    **_KIND,
}
_UNIFIED_DECODE: dict[str, Value] = {
    "k": "key_cache",
    "v": "value_cache",
    "cu_seqlens_q": lambda a: torch.arange(len(a["q"]) + 1, dtype=torch.int32, device=a["q"].device),
    "max_seqlen_q": constant(1),
    "seqused_k": "seq_lens",
    "max_seqlen_k": "max_seq_len",
    "window_size": lambda a: (a["window"] - 1 if a["window"] else -1, 0),
    "k_descale": "k_scale",
    "v_descale": "v_scale",
}


# ---- writing -------------------------------------------------------------------------------------------------------


def _written(layout: str) -> Conditions:
    def conditions(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
        yield from _cache(a, layout, native, "key")
        if a["layout"] != layout:
            return
        yield from _one_scale(a)
        key, value = a["key"], a["value"]
        yield value.dtype == key.dtype, f"key is {key.dtype}, value {value.dtype}, but both must have one dtype"
        for name in ("key", "value"):
            dense = is_contiguous(a[name][:1]) if len(a[name]) else True
            yield dense, f"the heads of a token of {name} are not next to each other"
        integers = a["slot_mapping"].dtype in (torch.int32, torch.int64)
        yield integers, f"slot_mapping is {a['slot_mapping'].dtype}, not torch.int32 or torch.int64"
        if layout == SHUFFLED:
            for name in ("key_cache", "value_cache"):
                yield contiguous(name, a[name])
            return
        caches = a["key_cache"], a["value_cache"]
        yield caches[0].stride(0) == caches[1].stride(0), "the blocks of keys and of values are not equally far apart"
        yield all(is_contiguous(cache[:1]) for cache in caches), "the tokens of a block are not next to each other"

    return conditions


_WRITE: dict[str, Value] = {
    **same("key", "value", "key_cache", "value_cache"),
    # older releases read the numbers as int64, whatever they are
    "slot_mapping": lambda a: a["slot_mapping"].long(),
    "k_scale": _scale("k_scale", "key"),
    "v_scale": _scale("v_scale", "key"),
    **_KIND,
}


ADAPTERS = {
    "flash_attn": Adapter(
        entry("aiter.flash_attn_func", {**same("q", "k", "v", "bias"), **_RULE, "sink_ptr": "sinks"}),
        _dense,
        returns="o",
    ),
    "flash_attn_varlen": Routes(
        (
            Adapter(entry("aiter.flash_attn_varlen_func", _PACKED), _packed, returns="o"),
            Adapter(
                _unified_entry(
                    {
                        **same("k", "v", "cu_seqlens_q", "max_seqlen_q", "max_seqlen_k"),
                        "seqused_k": _lengths,
                        "window_size": lambda a: (a["window_left"], 0),
                        "k_descale": constant(None),
                        "v_descale": constant(None),
                    }
                ),
                _unified_packed,
            ),
        )
    ),
    "flash_attn_varlen_lse": Routes(
        (
            Adapter(
                entry("aiter.flash_attn_varlen_func", _PACKED | {"return_lse": constant(True)}),
                _packed_lse,
                returns=_result_and_lse,
            ),
            Adapter(
                entry(
                    "aiter.mha_batch_prefill_func",
                    {
                        **same("q", "k", "v", "cu_seqlens_q", "max_seqlen_q", "max_seqlen_k", "block_table"),
                        **_RULE,
                        "logits_soft_cap": "softcap",
                        "return_lse": constant(True),
                        "seqlen_k": _lengths,
                        # lists of pages, which it wants and, with a table, does not read
                        "kv_indptr": "cu_seqlens_k",
                        "kv_page_indices": "block_table",
                    },
                ),
                _batch_prefill,
                returns=_result_and_lse,
            ),
        )
    ),
    "paged_attention": Routes(
        (
            Adapter(
                entry(
                    "aiter.paged_attention_v1",
                    {
                        **_DECODE,
                        "workspace_buffer": _workspace,
                        "cu_query_lens": constant(None),
                        "kv_cache_layout": constant("NHD"),
                        "logits_soft_cap": "softcap",
                        "sliding_window": "window",
                    },
                ),
                _v1,
            ),
            Adapter(_unified_entry(_UNIFIED_DECODE), _unified_paged(NHD)),
            Adapter(
                entry(
                    "aiter.pa_fwd_asm",
                    {
                        "Q": "q",
                        "K": "key_cache",
                        "V": "value_cache",
                        "block_tables": "block_table",
                        "context_lens": "seq_lens",
                        "block_tables_stride0": lambda a: a["block_table"].stride(0),
                        "K_QScale": "k_scale",
                        "V_QScale": "v_scale",
                        "out_": "o",
                    },
                ),
                _asm,
            ),
            Adapter(
                entry(
                    "aiter.paged_attention_rocm",
                    {
                        **_DECODE,
                        "exp_sums": _statistic,
                        "max_logits": _statistic,
                        "tmp_out": _partial,
                        "num_kv_heads": lambda a: a["key_cache"].shape[1],
                        "block_size": lambda a: a["key_cache"].shape[3],
                    },
                ),
                _rocm,
            ),
            Adapter(_unified_entry(_UNIFIED_DECODE | {"shuffled_kv_cache": constant(True)}), _unified_paged(SHUFFLED)),
        )
    ),
    "reshape_and_cache": Routes(
        (
            Adapter(entry("aiter.reshape_and_cache_flash", _WRITE), _written(NHD)),
            Adapter(entry("aiter.reshape_and_cache", _WRITE | {"asm_layout": constant(True)}), _written(SHUFFLED)),
        )
    ),
}
