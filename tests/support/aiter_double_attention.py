"""What AITER's attention, cache writers and latent attention compute, mutate, return and silently get wrong.

Written from its documentation, query by query and key by key, apart from this project's references.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .aiter_double import Double, computes, supported

F32 = torch.float32


def one_query(scores: Tensor, values: Tensor, sink: float | None = None) -> tuple[Tensor, float]:
    """The result of a query of one head and its lse, from the scores of the keys that it sees and their values."""
    every = [*scores.tolist(), *([] if sink is None else [sink])]
    if not every:
        return torch.zeros(values.shape[-1]), -math.inf
    most = max(every)
    weights = [math.exp(score - most) for score in every]
    total = sum(weights)
    shares = torch.tensor([weight / total for weight in weights[: len(values)]], dtype=torch.float64)
    return (shares @ values.double()).to(F32), most + math.log(total)  # a sink has no value


Slope = Callable[[int, int, int], float]  # of head, position, key


def queries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: tuple[int, int],
    cap: float = 0.0,
    sinks: Tensor | None = None,
    added: Slope | None = None,
) -> tuple[Tensor, Tensor]:
    """``[t, H, Dv]`` and ``[t, H]``, of queries that end where the keys end."""
    t, heads, s = q.shape[0], q.shape[1], k.shape[0]
    out, lse = torch.zeros(t, heads, v.shape[-1]), torch.zeros(t, heads)
    for i in range(t):
        position = s - t + i
        seen = [
            j
            for j in range(s)
            if (window[0] < 0 or j >= position - window[0]) and (window[1] < 0 or j <= position + window[1])
        ]
        for h in range(heads):
            key_head = h * k.shape[1] // heads
            scores = (k[seen, key_head].double() @ q[i, h].double()).to(F32) * scale
            if cap > 0:
                scores = cap * (scores / cap).tanh()
            if added is not None:
                scores = scores + torch.tensor([added(h, position, j) for j in seen])
            sink = None if sinks is None else float(sinks[h])
            out[i, h], lse[i, h] = one_query(scores, v[seen, key_head], sink)
    return out, lse


def distance(slopes: Tensor | None) -> Slope | None:
    return None if slopes is None else lambda h, position, j: -float(slopes[h]) * abs(position - j)


def from_start(slopes: Tensor | None, start: int) -> Slope | None:
    """Which grows with the key, from a position of the sequence on."""
    return None if slopes is None else lambda h, position, j: float(slopes[h]) * (j - start)


def given(bias: Tensor, keys: int) -> Slope:
    return lambda h, position, j: float(bias[position - (keys - bias.shape[0]), j])


def half(*tensors: Tensor) -> None:
    assert {t.dtype for t in tensors} in ({torch.bfloat16}, {torch.float16}), "one dtype, fp16 or bf16"


def window_of(a: SimpleNamespace) -> tuple[int, int]:
    left, right = a.window_size[:2]
    return left, 0 if a.causal else right


def sink_of(a: SimpleNamespace) -> Tensor | None:
    if a.sink_ptr is not None:
        assert a.sink_ptr.dtype == F32
    return a.sink_ptr


@computes
def flash_attn_func(double: Double, a: SimpleNamespace) -> Any:
    half(a.q, a.k, a.v)
    assert a.dropout_p == 0
    assert a.bias is None or a.alibi_slopes is None
    assert not (torch.is_grad_enabled() and a.q.requires_grad) or a.return_lse
    outs, lses = [], []
    for q, k, v in zip(a.q, a.k, a.v, strict=True):
        added = distance(a.alibi_slopes) if a.bias is None else given(a.bias, k.shape[0])
        out, lse = queries(q, k, v, a.softmax_scale, window_of(a), 0.0, sink_of(a), added)
        outs.append(out)
        lses.append(lse.t())
    out = torch.stack(outs).to(a.q.dtype)
    return (out, torch.stack(lses)) if a.return_lse else out


def packed(double: Double, a: SimpleNamespace, keys_of: Callable[[int, int], tuple[Tensor, Tensor]]) -> Any:
    half(a.q)
    for starts in (a.cu_seqlens_q, a.cu_seqlens_k) if hasattr(a, "cu_seqlens_k") else (a.cu_seqlens_q,):
        assert starts.dtype == torch.int32
    heads = a.q.shape[1]
    lengths = a.cu_seqlens_q.diff().tolist()
    out = torch.full((a.q.shape[0], heads, a.v.shape[-1]), math.nan)  # rows that it skips stay unwritten
    lse = torch.full((heads, a.q.shape[0]), math.nan)
    for row, length in enumerate(lengths):
        if length <= getattr(a, "min_seqlen_q", 0):
            continue
        first = int(a.cu_seqlens_q[row])
        own = slice(first, first + min(length, a.max_seqlen_q))
        k, v = keys_of(row, a.max_seqlen_k)
        part, sums = queries(
            *(a.q[first : first + length], k, v, a.softmax_scale, window_of(a), a.logits_soft_cap, sink_of(a)),
            distance(a.alibi_slopes),
        )
        count = own.stop - own.start
        out[own], lse[:, own] = part[:count], sums[:count].t()
    return out.to(a.q.dtype), lse


@computes
def flash_attn_varlen_func(double: Double, a: SimpleNamespace) -> Any:
    half(a.q, a.k, a.v)
    if a.block_table is not None:
        raise SystemExit("Memory access fault by GPU node")
    starts = a.cu_seqlens_k.tolist()

    def keys_of(row: int, most: int) -> tuple[Tensor, Tensor]:
        own = slice(starts[row], min(starts[row + 1], starts[row] + most))
        return a.k[own], a.v[own]

    out, lse = packed(double, a, keys_of)
    if a.max_seqlen_k == 0:
        lse = torch.full_like(lse, math.inf)
    if double.arch == "gfx942" and a.max_seqlen_q == 1 and (a.q.dtype == torch.float16 or a.q.shape[-1] in (64, 256)):
        out = out.flip(-1)  # wrong
    return (out, lse) if a.return_lse else out


def in_pages(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """The tokens of a sequence in pages ``[page, token, head, element]``."""
    page, j = cache.shape[1], torch.arange(length)
    return cache[table.long()[j // page], j % page]


@computes
def mha_batch_prefill_func(double: Double, a: SimpleNamespace) -> Any:
    half(a.q, a.k, a.v)
    pack = 16 // a.k.element_size()
    if a.q.shape[-1] % pack or a.v.shape[-1] % pack:
        raise ValueError("Batch prefill requires head size divisible by vector size")
    assert a.kv_indptr.dtype == a.block_table.dtype == a.seqlen_k.dtype == torch.int32
    assert a.block_table.stride(-1) == 1
    lengths = a.seqlen_k.tolist()

    def keys_of(row: int, most: int) -> tuple[Tensor, Tensor]:
        length = min(lengths[row], most)
        return in_pages(a.k, a.block_table[row], length), in_pages(a.v, a.block_table[row], length)

    out, lse = packed(double, a, keys_of)
    return (out, lse) if a.return_lse else out


def as_rows(double: Double, key: Tensor, value: Tensor, shuffled: bool) -> tuple[Tensor, Tensor]:
    """Pages ``[page, token, head, element]`` of what a kernel reads as shuffled, element by element."""
    if not shuffled:
        return key, value
    pages, heads, packs, block, x = key.shape
    dim = packs * x
    page, token, head, d = torch.meshgrid(*map(torch.arange, (pages, block, heads, dim)), indexing="ij")
    of_key = (((page * heads + head) * packs + d // x) * block + token) * x + d % x
    of_value = ((page * heads + head) * (block // x) + token // x) * dim * x + d * x + token % x
    # by their places in memory: the shape of values is never checked
    return key.reshape(-1)[of_key], value.reshape(-1)[of_value]


@computes
def unified_attention(double: Double, a: SimpleNamespace) -> Tensor:
    assert a.causal, "Only causal attention is supported"
    half(a.q)
    k, v = as_rows(double, a.k, a.v, getattr(a, "shuffled_kv_cache", False))
    fp8 = a.k.dtype == double.fp8
    lengths = a.seqused_k.tolist()
    for row in range(len(lengths)):
        first, end = int(a.cu_seqlens_q[row]), int(a.cu_seqlens_q[row + 1])
        if end - first > a.max_seqlen_q:
            end = first + a.max_seqlen_q
        own, own_k = a.q[first:end], in_pages(k, a.block_table[row], lengths[row]).to(F32)
        own_v = in_pages(v, a.block_table[row], lengths[row]).to(F32)
        if fp8:  # one element, whatever their size
            own_k, own_v = own_k * float(a.k_descale.reshape(-1)[0]), own_v * float(a.v_descale.reshape(-1)[0])
        added = from_start(a.alibi_slopes, lengths[row] - (end - first))
        window = (a.window_size[0], 0)  # a query sees nothing after it
        out, _ = queries(own, own_k, own_v, a.softmax_scale, window, a.softcap, a.sinks, added)
        a.out[first:end] = out.to(a.out.dtype)
    return a.out


def kind_of(double: Double, a: SimpleNamespace, q: Tensor, cache: Tensor) -> Tensor:
    """The cache as a kernel takes it, whatever its dtype says."""
    assert a.kv_cache_dtype in ("auto", "fp8", "fp8_e4m3")
    return cache.view(q.dtype if a.kv_cache_dtype == "auto" else double.fp8)


def decode(
    q: Tensor, k: Tensor, v: Tensor, a: SimpleNamespace, scale: float, window: int = 0, cap: float = 0.0
) -> Iterator[tuple[int, Tensor]]:
    for row, length in enumerate(a.context_lens.tolist()):
        added = from_start(getattr(a, "alibi_slopes", None), length - 1)
        keys, values = (in_pages(x, a.block_tables[row], length).to(F32) for x in (k, v))
        out, _ = queries(q[row : row + 1], keys, values, scale, (window - 1 if window else -1, 0), cap, None, added)
        yield row, out[0]


def scale_of(scale: Tensor) -> float:
    assert scale.dtype == F32
    return float(scale.reshape(-1)[0])


def room_for(a: SimpleNamespace, block: int) -> None:
    if a.block_tables.shape[1] < -(-a.max_context_len // block):
        raise ValueError("block_tables.size(1) is too small for max_context_len")


@computes
def paged_attention_v1(double: Double, a: SimpleNamespace) -> Tensor:
    half(a.query)
    assert a.kv_cache_layout == "NHD"
    partitions = math.ceil(a.max_context_len / a.partition_size)
    rows, heads, dim = a.query.shape
    need = rows * a.mtp * heads * partitions * (dim * a.query.element_size() + 8)
    if a.workspace_buffer.nbytes < need:
        raise ValueError(f"workspace_buffer is too small, need at least {need} bytes")
    room_for(a, a.key_cache.shape[1])
    key = kind_of(double, a, a.query, a.key_cache)
    value = kind_of(double, a, a.query, a.value_cache).as_strided(key.shape, key.stride())  # by the strides of keys
    k, v = key.to(F32) * scale_of(a.k_scale), value.to(F32) * scale_of(a.v_scale)
    a.out.fill_(math.nan)
    for row, out in decode(a.query, k, v, a, a.scale, a.sliding_window, a.logits_soft_cap):
        a.out[row] = out.to(a.out.dtype)
    return a.out


@computes
def paged_attention_rocm(double: Double, a: SimpleNamespace) -> Tensor:
    partitions = math.ceil(a.max_context_len / a.partition_size)
    for partial in (a.exp_sums, a.max_logits, a.tmp_out):
        if partial.dim() < 3 or partial.shape[2] < partitions:
            raise ValueError("too small for max_context_len")
    assert a.exp_sums.dtype == a.max_logits.dtype == F32
    assert (a.block_size, a.num_kv_heads) == (a.key_cache.shape[3], a.key_cache.shape[1])
    room_for(a, a.block_size)
    k, v = as_rows(double, *(kind_of(double, a, a.query, x) for x in (a.key_cache, a.value_cache)), shuffled=True)
    k, v = k.to(F32) * scale_of(a.k_scale), v.to(F32) * scale_of(a.v_scale)
    for row, out in decode(a.query, k, v, a, a.scale):
        a.out[row] = out.to(a.out.dtype)
    return a.out


@computes
def pa_fwd_asm(double: Double, a: SimpleNamespace) -> Tensor:
    half(a.Q)
    if a.Q.shape[-1] != 128 or a.K.shape[3] != 16 or a.Q.shape[1] // a.K.shape[1] > 16:
        raise RuntimeError("AITER_CHECK: not supported this kernel now!")
    assert a.K.is_contiguous()
    assert a.block_tables_stride0 == a.block_tables.stride(0)
    k, v = (x.to(F32) for x in as_rows(double, a.K, a.V, shuffled=True))
    if a.K.element_size() == 1:
        assert a.K.dtype == double.fp8
        # one for each token, dense, whatever the shape says
        pages, heads, _, block, _ = a.K.shape
        k = k * a.K_QScale.reshape(-1)[: pages * heads * block].view(pages, heads, block).permute(0, 2, 1)[..., None]
        v = v * a.V_QScale.reshape(-1)[: pages * heads * block].view(pages, heads, block).permute(0, 2, 1)[..., None]
    out = torch.empty_like(a.Q) if a.out_ is None else a.out_
    for row, result in decode(a.Q, k, v, a, 128**-0.5):
        out[row] = result.to(out.dtype)
    return out


def written(double: Double, a: SimpleNamespace, put: Callable[[Tensor, Tensor, int, int], None], block: int) -> None:
    """Token by token, as dense heads of dense tokens."""
    supported(double, a.key, a.value, a.key_cache, a.value_cache)
    numbers = a.slot_mapping.contiguous().view(torch.int64).tolist()  # as int64, whatever they are
    fp8 = a.kv_cache_dtype != "auto"
    k_scale, v_scale = (scale_of(s) for s in (a.k_scale, a.v_scale))
    for token, slot in enumerate(numbers[: a.key.shape[0]]):
        if slot < 0:
            continue
        for which, (x, scale) in enumerate(((a.key, k_scale), (a.value, v_scale))):
            values = x[token].to(F32) * (1.0 / scale) if fp8 else x[token]
            if fp8:
                top = torch.finfo(double.fp8).max
                values = values.clamp(-top, top).to(double.fp8)
            put((a.key_cache, a.value_cache)[which], values, slot // block, slot % block * 2 + which)


@computes
def reshape_and_cache_flash(double: Double, a: SimpleNamespace) -> None:
    assert a.key_cache.stride(0) == a.value_cache.stride(0)

    def put(cache: Tensor, values: Tensor, page: int, place: int) -> None:
        cache[page, place // 2] = values

    written(double, a, put, a.key_cache.shape[1])


@computes
def reshape_and_cache(double: Double, a: SimpleNamespace) -> None:
    assert a.asm_layout, "the other layout of values is [page, head, element, token]"
    _, heads, packs, block, x = a.key_cache.shape
    dim = packs * x

    def put(cache: Tensor, values: Tensor, page: int, place: int) -> None:
        token, flat = place // 2, cache.view(torch.uint8 if cache.element_size() == 1 else torch.int16).view(-1)
        raw = values.contiguous().view(flat.dtype)
        for head in range(heads):
            for d in range(dim):
                if place % 2 == 0:
                    at = (((page * heads + head) * packs + d // x) * block + token) * x + d % x
                else:
                    at = ((page * heads + head) * (block // x) + token // x) * dim * x + d * x + token % x
                flat[at] = raw[head, d]

    written(double, a, put, block)


# ---- latent attention ----------------------------------------------------------------------------------------------


def latent(a: SimpleNamespace, row: int, page: int) -> Tensor:
    """The keys of a sequence, ``[tokens, element]``."""
    pages = a.kv_indices[int(a.kv_indptr[row]) : int(a.kv_indptr[row + 1])].tolist()
    keys = torch.cat([a.kv_buffer[p] for p in pages])[:, 0].to(F32)
    return keys[: (len(pages) - 1) * page + int(a.kv_last_page_lens[row])]


@computes
def mla_decode_fwd(double: Double, a: SimpleNamespace) -> Any:
    """Query by query, head by head; writes o."""
    assert a.logit_cap <= 0
    supported(double, a.q, a.kv_buffer)
    _, page, heads_kv, dim = a.kv_buffer.shape
    assert (page, heads_kv) == (a.page_size, a.nhead_kv)
    scale = 1.0 / dim**0.5 if a.sm_scale is None else a.sm_scale
    kv_scale = 1.0 if a.kv_scale is None else float(a.kv_scale)
    scale *= (1.0 if a.q_scale is None else float(a.q_scale)) * kv_scale
    persistent = a.work_meta_data is not None
    if persistent:
        addresses = a.work_meta_data.view(torch.int64).tolist()
        assert addresses == [a.work_indptr.data_ptr(), a.work_info_set.data_ptr()], "follows addresses to other memory"
        plan = _plan(a.qo_indptr, a.kv_indptr, a.kv_last_page_lens, page, a.max_seqlen_q, a.q.shape[1])
        assert torch.equal(a.work_info_set.reshape(-1)[: len(plan)], plan), "works on what the metadata say"
    lse = torch.zeros(a.q.shape[:2])
    for s in range(len(a.qo_indptr) - 1):
        keys = latent(a, s, page)
        first, end = int(a.qo_indptr[s]), int(a.qo_indptr[s + 1])
        part, lse[first:end] = queries(
            a.q[first:end].to(F32), keys[:, None], keys[:, None, : a.o.shape[-1]], scale, (-1, 0)
        )
        if not persistent and a.max_seqlen_q & (a.max_seqlen_q - 1):
            part[:] = part[:1].clone()  # all get the first one's
        a.o[first:end] = (part * kv_scale).to(a.o.dtype)
    splits = getattr(a, "num_kv_splits", None) or 1
    if double.arch == "gfx942" and a.q.element_size() == 1 and splits == 1:
        lse.fill_(math.nan)  # not written
    if double.arch == "gfx950" and a.q.dtype == torch.bfloat16 and a.q.shape[1] == 32 and splits != 1:
        lse += 1.0
    # unless it is asked for, one for each part of the keys
    return None, lse if getattr(a, "return_lse", False) else torch.zeros(a.q.shape[0], splits, a.q.shape[1], 1)


@computes
def mla_prefill_fwd(double: Double, a: SimpleNamespace) -> Any:
    assert a.logit_cap <= 0
    _, page, heads_kv, dim = a.kv_buffer.shape
    if a.q.shape[1] // heads_kv not in (16, 128) or a.q.dtype != torch.bfloat16 or a.kv_buffer.dtype != torch.bfloat16:
        raise RuntimeError("AITER_CHECK: cannot find suitable kernel")
    scale = 1.0 / dim**0.5 if a.sm_scale is None else a.sm_scale
    for s in range(len(a.qo_indptr) - 1):
        keys = latent(a, s, page)
        first, end = int(a.qo_indptr[s]), int(a.qo_indptr[s + 1])
        part, _ = queries(a.q[first:end], keys[:, None], keys[:, None, : a.o.shape[-1]], scale, (-1, 0))
        a.o[first:end] = part.to(a.o.dtype)
    return a.o, torch.zeros(a.q.shape[0], 1, a.q.shape[1], 1)


@computes
def get_mla_metadata_info_v1(double: Double, a: SimpleNamespace) -> Any:
    assert a.num_head_qo % 8 == 0
    units, tiles = 4, a.batch_size * -(-a.max_seqlen_qo * a.num_head_qo // 16)
    i32 = torch.int32
    return (
        (2, torch.uint64),
        (units + 1, i32),
        ((tiles + units, 8), i32),
        (tiles + 1, i32),
        ((tiles, 2), i32),
        (tiles + units, i32),
    )


def _plan(qo: Tensor, kv: Tensor, lasts: Tensor, page: int, most: int, heads: int) -> Tensor:
    """A row for each sequence: what its work depends on."""
    rows = [[int(q), int(k), int(last), page, most, heads, 0, 0] for q, k, last in zip(qo, kv, lasts, strict=False)]
    return torch.tensor(rows, dtype=torch.int32).reshape(-1)


@computes
def get_mla_metadata_v1(double: Double, a: SimpleNamespace) -> None:
    assert a.is_causal
    assert a.kv_granularity == max(a.page_size, 16)
    assert a.uni_seqlen_qo == a.max_seqlen_qo
    heads = a.num_heads_per_head_k * a.num_heads_k
    a.work_metadata_ptrs.view(torch.int64).copy_(torch.tensor([a.work_indptr.data_ptr(), a.work_info_set.data_ptr()]))
    plan = _plan(a.seqlens_qo_indptr, a.seqlens_kv_indptr, a.kv_last_page_lens, a.page_size, a.max_seqlen_qo, heads)
    a.work_info_set.view(-1)[: len(plan)] = plan
    a.work_indptr.fill_(1)


@computes
def csr_to_dense_block_table(double: Double, a: SimpleNamespace) -> None:
    for row in range(a.bs):
        own = a.kv_indices[int(a.kv_indptr[row]) : int(a.kv_indptr[row + 1])]
        a.dense_table[row, : len(own)] = own
    a.dense_table[:, a.max_ctx :] = -1


@computes
def decode_attention_fwd(double: Double, a: SimpleNamespace) -> None:
    assert a.num_kv_splits == a.attn_logits.shape[2]
    assert a.attn_logits.shape[3] == a.v_buffer.shape[-1] + 1
    for row, length in enumerate(a.b_seq_len.tolist()):
        slots = [int(a.req_to_token[row, j // a.page_size]) * a.page_size + j % a.page_size for j in range(length)]
        keys, values = a.k_buffer[slots].to(F32), a.v_buffer[slots].to(F32)
        if a.k_buffer.element_size() == 1:
            keys, values = keys * float(a.k_scale), values * float(a.v_scale)
        out, lse = queries(a.q[row : row + 1], keys, values, a.sm_scale, (-1, 0), a.logit_cap)
        a.o[row], a.lse[row] = out[0].to(a.o.dtype), lse[0]
