"""Multi-head latent attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .... import machine
from ..entry_points import EntryPoint, call, constant, probe, same
from .adapter import (
    F32,
    HALVES,
    Adapter,
    Arguments,
    Condition,
    Outputs,
    Routes,
    contiguous,
    entry,
    of_dtype,
    score_scale,
)

# Elements of a head's keys and of its values.
HEAD, VALUE = 576, 512
# Parts of a sequence's keys that the Triton kernel reduces apart from each other.
SPLITS = 8


def _latent(a: Arguments) -> Iterator[Condition]:
    heads = (a["q"].shape[-1], a["value_dim"])
    yield heads == (HEAD, VALUE), f"the heads have {heads[0]} and {heads[1]} elements, not {HEAD} and {VALUE}"
    for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_lens"):
        yield of_dtype(name, a[name], torch.int32)
    yield contiguous("q", a["q"])
    yield contiguous("kv_buffer", a["kv_buffer"])


def _decode(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    q, kv, most = a["q"], a["kv_buffer"], a["max_seqlen_q"]
    yield from _latent(a)
    yield a["logit_cap"] <= 0, f"logit_cap is {a['logit_cap']}, and the kernel has no cap"
    for name, tensor, scale in (("q", q, "q_scale"), ("the cache", kv, "kv_scale")):
        yield tensor.dtype in (torch.bfloat16, native), f"{name} is {tensor.dtype}, not torch.bfloat16 or {native}"
        yield tensor.dtype != native or a[scale] is not None, f"{name} is FP8 without a scale ({scale})"
    if a["metadata"] is None:
        rounded = most & (most - 1) == 0
        yield rounded, f"max_seqlen_q is {most}, no power of two, which wants metadata (ROCm/aiter#2720)"
        arch = machine.architecture(q.device.index or 0)
        wrong = (arch, q.dtype, q.shape[1], most) == ("gfx942", torch.bfloat16, 16, 8)
        yield not wrong, "8 queries of 16 heads in bfloat16 come out wrong on gfx942 (ROCm/aiter#5679)"
    else:
        need, have = size(_work(a)), a["metadata"].numel()
        yield have == need, f"the metadata have {have} elements, and this call needs {need}"
        yield of_dtype("metadata", a["metadata"], torch.int32)


def _capped(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    """AITER's Triton kernel, which is taken for what its assembly has not."""
    q, kv = a["q"], a["kv_buffer"]
    yield from _latent(a)
    yield a["logit_cap"] > 0, "it is for scores with a cap, and this call has none"
    yield q.dtype in HALVES, f"q is {q.dtype}, and the kernel takes bfloat16 and float16"
    yield kv.dtype in (q.dtype, native), f"the cache is {kv.dtype}, not {q.dtype}, like q, or {native}"
    yield kv.dtype != native or a["kv_scale"] is not None, "the cache is FP8 without a scale (kv_scale)"
    rows = len(a["kv_last_page_lens"])
    yield q.shape[0] == rows, f"there are {q.shape[0]} queries for {rows} sequences, and it takes one for each"
    yield a["max_seqlen_k"] is not None, "max_seqlen_k is None, and it needs the most keys of a sequence"
    yield a["metadata"] is None, "it divides the work itself, and this call has metadata"


def _prefill(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    q, kv = a["q"], a["kv_buffer"]
    yield from _latent(a)
    for name, tensor in (("q", q), ("kv_buffer", kv)):
        yield of_dtype(name, tensor, torch.bfloat16)
    yield kv.shape[2] == 1, f"the cache has {kv.shape[2]} heads, not 1"
    yield q.shape[1] in (16, 128), f"there are {q.shape[1]} heads, and the kernel takes 16 and 128"
    page = kv.shape[1]
    yield page & (page - 1) == 0, f"pages have {page} tokens, no power of two"


# ---- the division of the work --------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What is divided, in AITER's words: sequences, the queries of each, heads, dtypes of queries and of the cache."""

    batch_size: int
    max_seqlen_qo: int
    num_head_qo: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype


INFO = entry(
    "aiter.get_mla_metadata_info_v1",
    {
        **same(*Work._fields),
        "is_sparse": constant(False),
        "fast_mode": constant(True),
    },
)
# The buffers, in the order in which INFO gives their sizes, after two addresses.
BUFFERS = ("work_indptr", "work_info_set", "reduce_indptr", "reduce_final_map", "reduce_partial_map")


def _sizes(work: Work) -> dict[str, tuple[int, ...]]:
    """The sizes of the buffers for some work, all of int32."""
    described = call(INFO, **INFO.arguments(work._asdict()))
    sizes = (found if isinstance(found, tuple) else (found,) for found, _ in described[1:])
    return dict(zip(BUFFERS, sizes, strict=True))


def size(work: Work) -> int:
    """Elements of all buffers for some work; 0 if this version of AITER has none."""
    return 0 if isinstance(probe(INFO), str) else sum(math.prod(sizes) for sizes in _sizes(work).values())


def _work(a: Arguments) -> Work:
    """The work of a call of ``mla_decode_fwd``."""
    rows, q = len(a["kv_last_page_lens"]), a["q"]
    return Work(rows, a["max_seqlen_q"], q.shape[1], q.dtype, a["kv_buffer"].dtype)


def _buffers(metadata: Tensor, work: Work) -> dict[str, Tensor]:
    """The buffers in one tensor, and their addresses, which AITER keeps in a buffer of its own: written anew for every
    call, so that metadata can be copied."""
    sizes = _sizes(work)
    parts = metadata.split([math.prod(own) for own in sizes.values()])
    made = {name: part.view(own) for (name, own), part in zip(sizes.items(), parts, strict=True)}
    addresses = metadata.new_empty(2, dtype=torch.int64)
    for index, name in enumerate(("work_indptr", "work_info_set")):
        addresses[index].fill_(made[name].data_ptr())
    return {"addresses": addresses.view(torch.uint64), **made}


BUILD = entry(
    "aiter.get_mla_metadata_v1",
    {
        "seqlens_qo_indptr": "qo_indptr",
        "seqlens_kv_indptr": "kv_indptr",
        **same("kv_last_page_lens", "page_size", *BUFFERS),
        "num_heads_per_head_k": lambda a: a["heads"] // a["kv_heads"],
        "num_heads_k": "kv_heads",
        "is_causal": constant(True),
        "work_metadata_ptrs": "addresses",
        "kv_granularity": lambda a: max(a["page_size"], 16),
        "max_seqlen_qo": "max_seqlen_q",
        "uni_seqlen_qo": "max_seqlen_q",
        "fast_mode": constant(True),
        "dtype_q": "q_dtype",
        "dtype_kv": "kv_dtype",
    },
)


def _built_for(a: Arguments) -> Work:
    rows = len(a["kv_last_page_lens"])
    return Work(rows, a["max_seqlen_q"], a["heads"], a["q_dtype"], a["kv_dtype"])


def _metadata(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield a["heads"] % 8 == 0, f"there are {a['heads']} heads, not a multiple of 8"
    for name in ("qo_indptr", "kv_indptr", "kv_last_page_lens"):
        yield of_dtype(name, a[name], torch.int32)
    for name in ("q_dtype", "kv_dtype"):
        yield a[name] in (torch.bfloat16, native), f"{name} is {a[name]}, not torch.bfloat16 or {native}"
    if a["heads"] % 8 == 0:
        need = size(_built_for(a))
        yield a["size"] == need, f"size is {a['size']}, and mla_decode_metadata_size says {need}"


def _built(a: Arguments) -> Outputs:
    metadata = a["qo_indptr"].new_zeros(a["size"], dtype=torch.int32)
    call(BUILD, **BUILD.arguments({**a, **_buffers(metadata, _built_for(a))}))
    return {"metadata": metadata}


# ---- calls ---------------------------------------------------------------------------------------------------------


def _splits(a: Arguments) -> int | None:
    """Parts of a sequence's keys, where AITER's own choice gives a wrong lse; vLLM sets the same."""
    arch = machine.architecture(a["q"].device.index or 0)
    if arch == "gfx942" and a["q"].element_size() == 1:
        return 2  # with one part it writes no lse
    if arch == "gfx950" and a["q"].dtype is torch.bfloat16 and a["q"].shape[1] == 32:
        return 1  # with several it gets the last one wrong
    return None


def _decode_entry(more: Mapping[str, Any]) -> EntryPoint:
    return entry(
        "aiter.mla.mla_decode_fwd",
        {
            **same("q", "kv_buffer", "o", "qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_lens"),
            **same("max_seqlen_q", "sm_scale", "q_scale", "kv_scale"),
            "page_size": lambda a: a["kv_buffer"].shape[1],
            "nhead_kv": lambda a: a["kv_buffer"].shape[2],
            "logit_cap": constant(0.0),
            "work_meta_data": lambda a: a.get("addresses"),
            **{name: functools.partial(_buffer, name) for name in BUFFERS},
            **more,
        },
    )


def _buffer(name: str, a: Mapping[str, Any]) -> Tensor | None:
    return a.get(name)


DECODE = _decode_entry({})
DECODE_LSE = _decode_entry({"return_lse": constant(True), "num_kv_splits": _splits})


def _by_assembly(function: EntryPoint, a: Arguments) -> Outputs:
    q = a["q"]
    dtype = torch.bfloat16 if q.element_size() == 1 else q.dtype
    o = q.new_empty(*q.shape[:2], a["value_dim"], dtype=dtype)
    buffers = {} if a["metadata"] is None else _buffers(a["metadata"], _work(a))
    _, lse = call(function, **function.arguments({**a, "o": o, **buffers}))
    return {"o": o} if function is DECODE else {"o": o, "lse": lse.view(q.shape[:2]).t()}


_TRITON = "aiter.ops.triton.attention.mla_decode."
TABLE = entry(f"{_TRITON}csr_to_dense_block_table", same("kv_indices", "kv_indptr", "dense_table", "max_ctx", "bs"))
CAPPED = entry(
    f"{_TRITON}decode_attention_fwd",
    {
        **same("q", "k_buffer", "v_buffer", "o", "lse", "req_to_token", "b_seq_len", "attn_logits", "logit_cap"),
        "num_kv_splits": constant(SPLITS),
        "sm_scale": score_scale("sm_scale"),
        "page_size": "page",
        "k_scale": "kv_scale",
        "v_scale": "kv_scale",
    },
)


def _by_triton(a: Arguments) -> Outputs:
    q, page = a["q"], a["kv_buffer"].shape[1]
    rows, heads, dim = len(q), q.shape[1], a["value_dim"]
    width = -(-a["max_seqlen_k"] // page)
    given = {
        "dense_table": q.new_zeros(rows, width, dtype=torch.int32),
        "max_ctx": width,
        "bs": rows,
        "o": q.new_empty(rows, heads, dim),
        "lse": q.new_empty(rows, heads, dtype=F32),
        "b_seq_len": (a["kv_indptr"].diff() - 1) * page + a["kv_last_page_lens"],
        "attn_logits": q.new_empty(rows, heads, SPLITS, dim + 1, dtype=F32),
        "k_buffer": a["kv_buffer"].flatten(0, 1),
        "v_buffer": a["kv_buffer"].flatten(0, 1)[..., :dim],
        "page": page,
    }
    given["req_to_token"] = given["dense_table"]
    call(TABLE, **TABLE.arguments({**a, **given}))
    call(CAPPED, **CAPPED.arguments({**a, **given}))
    return {"o": given["o"], "lse": given["lse"].t()}


def _routes(function: EntryPoint) -> Routes:
    return Routes(
        (
            Adapter(function, _decode, compute=functools.partial(_by_assembly, function)),
            Adapter(CAPPED, _capped, compute=_by_triton, others=(TABLE,)),
        )
    )


ADAPTERS = {
    "mla_decode_fwd": _routes(DECODE),
    "mla_decode_fwd_lse": _routes(DECODE_LSE),
    "mla_decode_metadata": Adapter(BUILD, _metadata, compute=_built, others=(INFO,)),
    "mla_prefill_fwd": Adapter(
        entry(
            "aiter.mla.mla_prefill_fwd",
            {
                **same("q", "kv_buffer", "o", "qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_lens"),
                **same("max_seqlen_q", "sm_scale"),
            },
        ),
        _prefill,
    ),
}
