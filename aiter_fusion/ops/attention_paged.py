"""A decode step over a cache in blocks: writing its token, attending to its tokens, and reading them back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..domains import OneOf
from ..op import Spec
from ..providers.kv_cache import (
    LAYOUTS,
    NHD,
    check_layout,
    pack,
    rows_of_keys,
    rows_of_values,
    shuffled_kv_cache,
    sizes,
    unshuffled_kv_cache,
)
from .attention_arithmetic import F32, Rule, attend, scale_of
from .bridge import bridge_op

__all__ = ["gather_kv_cache", "paged_attention", "reshape_and_cache"]

HALVES = (torch.bfloat16, torch.float16)
LAYOUT = {"layout": OneOf(LAYOUTS)}


def _attention_shape(q: Tensor, key_cache: Tensor, value_cache: Tensor, layout: str, **_: Any) -> dict[str, Spec]:
    """Checks, too: for kernels and the reference alike, when the op is traced and when it is called."""
    check_layout(key_cache, value_cache, layout, q.shape[-1])
    heads, kv_heads = q.shape[1], sizes(key_cache, layout).heads
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share the cache's {kv_heads} (layout {layout})")
    return {"o": (list(q.shape), q.dtype)}


def _write_shape(key: Tensor, key_cache: Tensor, value_cache: Tensor, layout: str, **_: Any) -> dict[str, Spec]:
    """Checks alone: nothing is returned."""
    check_layout(key_cache, value_cache, layout, key.shape[-1])
    if (found := sizes(key_cache, layout).heads) != key.shape[1]:
        raise ValueError(f"the keys have {key.shape[1]} heads, and the cache {found} (layout {layout})")
    return {}


def _gather_shape(
    key_cache: Tensor, value_cache: Tensor, tokens: int, layout: str, dtype: torch.dtype, **_: Any
) -> dict[str, Spec]:
    own = sizes(key_cache, layout)
    check_layout(key_cache, value_cache, layout, own.dim)
    return {name: ([tokens, own.heads, own.dim], dtype) for name in ("k", "v")}


def _cache(blocks: int, block: int, heads: int, dim: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(blocks, block, heads, dim, generator=generator).to(dtype) for _ in range(2)]
    return made[0], made[1]


def _scales(dtype: torch.dtype, sizes: tuple[int, ...] = (1,)) -> dict[str, Tensor | None]:
    if dtype.itemsize > 1:
        return {"k_scale": None, "v_scale": None}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(sizes, generator=generator) + 0.5 for name in ("k_scale", "v_scale")}


def attention_sample(
    lengths: tuple[int, ...],
    heads: tuple[int, int, int],
    block: int,
    layout: str,
    dtype: torch.dtype,
    cache: torch.dtype,
    seed: int,
    **changes: Any,
) -> dict[str, Any]:
    """Arguments of ``paged_attention``: tokens of each sequence, (query heads, key heads, elements), and so on."""
    generator = torch.Generator().manual_seed(seed)
    count, kv_heads, dim = heads
    each = [-(-length // block) for length in lengths]
    key, value = _cache(sum(each) + 1, block, kv_heads, dim, cache, seed)
    if layout != NHD:
        key, value = shuffled_kv_cache(key, value)
    order = torch.randperm(sum(each) + 1, generator=generator).to(torch.int32)
    table = torch.zeros(len(lengths), max(each), dtype=torch.int32)
    for row, (start, blocks) in enumerate(zip([0, *torch.tensor(each).cumsum(0).tolist()], each, strict=False)):
        table[row, :blocks] = order[start : start + blocks]
    return {
        "q": torch.randn(len(lengths), count, dim, generator=generator).to(dtype),
        "key_cache": key,
        "value_cache": value,
        "block_table": table,
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "max_seq_len": max(lengths),
        "layout": layout,
        "scale": None,
        "window": 0,
        "softcap": 0.0,
        "alibi_slopes": None,
        "sinks": None,
    } | {**_scales(cache), **changes}


FN = torch.float8_e4m3fn


def _attention_samples() -> Iterator[dict[str, Any]]:
    rules: tuple[dict[str, Any], ...] = (
        {},
        {"window": 3, "scale": 0.1},
        {"softcap": 2.0},
        {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.05])},
        {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    )
    for layout in LAYOUTS:
        for seed, rule in enumerate(rules):
            dtype, cache = (HALVES * 2)[seed % 2], FN if seed % 3 == 1 else HALVES[seed % 2]
            yield attention_sample((5, 1, 17, 16), (4, 2, 64), 16, layout, dtype, cache, seed, **rule)
    each = {"k_scale": torch.rand(4, 2, 16) + 0.5, "v_scale": torch.rand(4, 2, 16) + 0.5}
    yield attention_sample((5, 30), (8, 2, 128), 16, "shuffled", torch.bfloat16, FN, 7, **each)
    yield attention_sample((5, 30), (8, 2, 128), 16, "shuffled", torch.bfloat16, torch.bfloat16, 8)


def write_sample(
    tokens: int, heads: int, dim: int, block: int, layout: str, dtype: torch.dtype, cache: torch.dtype, seed: int
) -> dict[str, Any]:
    """Arguments of ``reshape_and_cache``, one token of which has no slot."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-tokens // block) + 2
    key_cache, value_cache = _cache(blocks, block, heads, dim, cache, seed)
    if layout != NHD:
        key_cache, value_cache = shuffled_kv_cache(key_cache, value_cache)
    slots = torch.randperm(blocks * block, generator=generator)[:tokens]
    slots[tokens // 2 : tokens // 2 + 1] = -1
    return {
        "key": torch.randn(tokens, heads, dim, generator=generator).to(dtype),
        "value": torch.randn(tokens, heads, dim, generator=generator).to(dtype),
        "key_cache": key_cache,
        "value_cache": value_cache,
        "slot_mapping": slots,
        "layout": layout,
        **_scales(cache),
    }


def _write_samples() -> Iterator[dict[str, Any]]:
    for layout in LAYOUTS:
        for seed, (tokens, cache) in enumerate(
            ((5, torch.bfloat16), (1, torch.float16), (19, FN), (0, torch.bfloat16))
        ):
            dtype = torch.bfloat16 if cache.itemsize == 1 else cache
            yield write_sample(tokens, 2, 32, 16, layout, dtype, cache, seed)


def _gather_samples() -> Iterator[dict[str, Any]]:
    for layout in LAYOUTS:
        for seed, cache in enumerate((torch.bfloat16, FN)):
            given = attention_sample((5, 17, 0, 2), (2, 2, 32), 16, layout, torch.bfloat16, cache, seed)
            yield {
                **{name: given[name] for name in ("key_cache", "value_cache", "block_table")},
                "cu_seqlens": torch.tensor([0, 5, 22, 22, 24], dtype=torch.int32),
                "tokens": 24,
                "layout": layout,
                "dtype": torch.bfloat16,
                **_scales(cache),
            }


@bridge_op("o", shape=_attention_shape, samples=_attention_samples, domains=LAYOUT)
def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    layout: str,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    provider: str = "auto",
) -> Tensor:
    """One query for each sequence over the tokens that a cache has of it, the query's own included.

    Args:
        q: ``[B, H, D]`` bfloat16 or float16.
        key_cache: a cache in ``layout`` (``kv_cache``), of the dtype of q or FP8; query head h reads its head
            ``h // (H / Hk)``.
        value_cache: as key_cache.
        block_table: ``[B, blocks of the longest]`` int32, each sequence's blocks. Entries beyond its length are not
            used, but must be blocks that there are.
        seq_lens: ``[B]`` int32, tokens of each sequence.
        max_seq_len: at least the most tokens of a sequence, known on the host.
        layout: ``nhd`` or ``shuffled``.
        scale: of the scores; None is ``D ** -0.5``.
        window: the last tokens that the query sees, itself included; 0: all.
        softcap: above 0, scores s become ``softcap * tanh(s / softcap)``.
        alibi_slopes: ``[H]`` float32: ``-slope * (tokens since the key)`` is added to scores.
        sinks: ``[H]`` float32: the score of one more key for each head, which has no value.
        k_scale: dequantisation scale of an FP8 cache, float32: one element, or ``[blocks, Hk, block]``.
        v_scale: the same of values.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[B, H, D]`` of the dtype of q, contiguous.

    Raises:
        ValueError: the tensors cannot be a cache in this layout, by their shapes.

    AITER: ``aiter.paged_attention_v1`` for ``nhd``, ``aiter.pa_fwd_asm`` and ``aiter.paged_attention_rocm`` for
    ``shuffled``, its Triton ``unified_attention`` for both. ``aiter_fusion.bridge.routes`` says which takes a call.
    """
    _attention_shape(q, key_cache, value_cache, layout)
    rule = Rule(scale_of(q, scale), False, window - 1 if window else -1, -1, softcap, sinks, alibi_slopes)
    results = [q.new_empty(0, *q.shape[1:], dtype=F32)]
    for row, length in enumerate(seq_lens.tolist()):
        if length > max_seq_len:
            raise ValueError(f"sequence {row} has {length} tokens, and max_seq_len says at most {max_seq_len}")
        blocks = block_table[row, : -(-length // sizes(key_cache, layout).block)].long()
        k, v = _rows(key_cache[blocks], value_cache[blocks], layout)
        k, v = (
            _dequantised(x, None if scale is None else scale if scale.numel() == 1 else scale[blocks])
            for x, scale in ((k, k_scale), (v, v_scale))
        )
        results.append(attend(q[row : row + 1], k.flatten(0, 1)[:length], v.flatten(0, 1)[:length], rule)[0])
    return torch.cat(results).to(q.dtype)


@bridge_op(shape=_write_shape, samples=_write_samples, domains=LAYOUT, mutates=("key_cache", "value_cache"))
def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    layout: str,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    provider: str = "auto",
) -> None:
    """Write tokens into a cache: token t goes to slot ``slot_mapping[t]``. Writes to key_cache and value_cache alone.

    Args:
        key: ``[T, Hk, D]`` bfloat16 or float16.
        value: as key.
        key_cache: a cache in ``layout`` (``kv_cache``), of the dtype of key or FP8; written to.
        value_cache: as key_cache; written to.
        slot_mapping: ``[T]`` int32 or int64: ``block * (tokens in a block) + place``; below 0, the token is left out.
        layout: ``nhd`` or ``shuffled``.
        k_scale: dequantisation scale of an FP8 cache, one float32 element: ``key / k_scale`` is stored, saturated.
        v_scale: the same of values.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        Nothing.

    Raises:
        ValueError: the tensors cannot be a cache in this layout, by their shapes.

    AITER: ``aiter.reshape_and_cache_flash`` for ``nhd``, ``aiter.reshape_and_cache`` for ``shuffled``.
    """
    _write_shape(key, key_cache, value_cache, layout)
    kept = slot_mapping >= 0
    slots, block = slot_mapping[kept].long(), sizes(key_cache, layout).block
    blocks, places = slots // block, slots % block
    keys, values = (_stored(x[kept], scale, key_cache.dtype) for x, scale in ((key, k_scale), (value, v_scale)))
    if layout == NHD:
        key_cache[blocks, places] = keys
        value_cache[blocks, places] = values
        return
    x = pack(key_cache.dtype)
    rows_of_keys(key_cache)[blocks, places] = keys.unflatten(-1, (-1, x))
    rows_of_values(value_cache)[blocks, places // x, places % x] = values


@bridge_op("k", "v", shape=_gather_shape, samples=_gather_samples, domains=LAYOUT)
def gather_kv_cache(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    cu_seqlens: Tensor,
    tokens: int,
    layout: str,
    dtype: torch.dtype,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The tokens of sequences in a cache, packed one after another, as ``flash_attn_varlen`` takes them: attention of
    several queries over a shuffled cache is this, and then that.

    It never waits for the device, and computes by PyTorch's own indexing everywhere.

    Args:
        key_cache: a cache in ``layout`` (``kv_cache``).
        value_cache: as key_cache.
        block_table: ``[B, blocks of the longest]`` int32, each sequence's blocks.
        cu_seqlens: ``[B + 1]`` int32, where each sequence's tokens are to start.
        tokens: at least the tokens of all sequences, known on the host. What follows them is of no sequence.
        layout: ``nhd`` or ``shuffled``.
        dtype: of the result.
        k_scale: dequantisation scale of an FP8 cache, one float32 element.
        v_scale: the same of values.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        Keys and values, ``[tokens, Hk, D]`` of ``dtype`` each.

    Raises:
        ValueError: the tensors cannot be a cache in this layout, by their shapes.

    AITER: none; vLLM gathers by a kernel of its own.
    """
    check_layout(key_cache, value_cache, layout, sizes(key_cache, layout).dim)
    block = sizes(key_cache, layout).block
    token = torch.arange(tokens, device=key_cache.device)
    sequence = (torch.searchsorted(cu_seqlens, token, right=True) - 1).clamp(0, len(cu_seqlens) - 2)
    place = (token - cu_seqlens[sequence]).clamp(0, block_table.shape[1] * block - 1)
    blocks, places = block_table[sequence, place // block].long(), place % block
    if layout == NHD:
        k, v = key_cache[blocks, places], value_cache[blocks, places]
    else:
        x = pack(key_cache.dtype)
        k = rows_of_keys(key_cache)[blocks, places].flatten(-2)
        v = rows_of_values(value_cache)[blocks, places // x, places % x]
    return _dequantised(k, k_scale).to(dtype), _dequantised(v, v_scale).to(dtype)


def _rows(key: Tensor, value: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    return (key, value) if layout == NHD else unshuffled_kv_cache(key, value)


def _dequantised(x: Tensor, scale: Tensor | None) -> Tensor:
    """Values in float32: of one scale, or of ``[blocks, Hk, block]``, x being ``[blocks, block, Hk, D]``."""
    if scale is None:
        return x.to(F32)
    return x.to(F32) * (scale if scale.numel() == 1 else scale.transpose(1, 2)[..., None])


def _stored(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    if dtype.itemsize > 1:
        return x.to(dtype)
    top = torch.finfo(dtype).max
    return (x.to(F32) if scale is None else x.to(F32) * (1.0 / scale)).clamp(-top, top).to(dtype)
