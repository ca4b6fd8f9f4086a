"""AITER's Triton kernels of attention, from a checkout, against the references of the bridge; see ``aiter_src.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from aiter_fusion import bridge
from aiter_fusion.ops import attention_flash as flash
from aiter_fusion.ops import attention_paged as paged
from aiter_fusion.ops import mla
from aiter_fusion.providers.aiter.bridge import ADAPTERS
from aiter_fusion.providers.aiter.bridge import mla as mla_adapters
from aiter_fusion.providers.aiter.bridge.adapter import Adapter
from aiter_fusion.providers.kv_cache import NHD, SHUFFLED
from aiter_fusion.registry import REGISTRY

F16, BF16, FN = torch.float16, torch.bfloat16, torch.float8_e4m3fn

Far = Callable[[list[Tensor], Callable[[Any], list[Tensor]], tuple[Any, ...]], str | None]
Rows = Iterator[tuple[str, str | None]]


def by(path: Adapter, family: str) -> Callable[[tuple[Any, ...]], list[Tensor]]:
    """The op by one of AITER's functions, called as the adapter calls it."""
    op = REGISTRY.bridge[family, frozenset()]
    return lambda given: list(path.run(op, given[0]).values())


def reference(family: str, arguments: dict[str, Any]) -> list[Tensor]:
    return list(REGISTRY.bridge[family, frozenset()].reference(**arguments).values())


def unified(far: Far, moved: Callable[..., dict[str, Any]], dtypes: tuple[torch.dtype, ...]) -> Rows:
    """Their kernel for packed queries over blocks, and for decode steps over both layouts, by its adapters."""
    packed = ADAPTERS["flash_attn_varlen"].paths[1]
    rules: tuple[dict[str, Any], ...] = ({}, {"window_left": 5}, {"softcap": 3.0}, {"sinks": True})
    for dtype in dtypes:
        for rule in (*rules, {"alibi_slopes": True}):
            given = moved(
                flash.varlen_sample(((3, 40), (1, 17), (9, 9)), (4, 2, 64), {"causal": True, **rule}, dtype, 0, 16)
            )
            want = reference("flash_attn_varlen", given)
            what = f"unified_attention: packed over blocks, {dtype}, {', '.join(rule) or 'causal'}"
            yield what, far(want, by(packed, "flash_attn_varlen"), (given,))
        for layout, place in ((NHD, 1), (SHUFFLED, 4)):
            path = ADAPTERS["paged_attention"].paths[place]
            slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
            decode: tuple[dict[str, Any], ...] = ({}, {"window": 5}, {"softcap": 2.0}, {"alibi_slopes": slopes})
            more: tuple[dict[str, Any], ...] = ({"sinks": slopes}, {"cache": FN})
            for rule in (*decode, *more):
                changes = {name: value for name, value in rule.items() if name != "cache"}
                cache: Any = rule.get("cache", dtype)
                sample = paged.attention_sample((40, 1, 17), (4, 2, 64), 16, layout, dtype, cache, 1, **changes)
                given: dict[str, Any] = moved(sample)
                want = reference("paged_attention", given)
                what = f"unified_attention: {layout}, {dtype} over {cache}, {', '.join(changes) or 'plain'}"
                yield what, far(want, by(path, "paged_attention"), (given,))


def capped(far: Far, moved: Callable[..., dict[str, Any]], dtypes: tuple[torch.dtype, ...]) -> Rows:
    """Their latent decoding with a cap and an lse, by its adapter."""
    path = Adapter(mla_adapters.CAPPED, mla_adapters._capped, compute=mla_adapters._by_triton)
    for dtype in dtypes:
        for lengths, page, cap in (((40, 17), 1, 2.0), ((21, 9, 5), 4, 30.0)):
            given = moved(mla.sample(lengths, 1, page, 16, 576, 512, dtype, 1, cap))
            want = reference("mla_decode_fwd_lse", given)
            what = f"decode_attention_fwd: sequences of {lengths}, pages of {page}, a cap of {cap}, {dtype}"
            yield what, far(want, by(path, "mla_decode_fwd_lse"), (given,))


def dense(far: Far, moved: Callable[..., dict[str, Any]], dtypes: tuple[torch.dtype, ...]) -> Rows:
    """Their namesakes of the CK kernels: other keywords, no window's right side, and another layout of the lse."""
    theirs: Any = import_module("aiter.ops.triton.attention.mha")
    for dtype in dtypes:
        for rule in ({}, {"causal": True}, {"causal": True, "sinks": True}):
            given = moved(flash.dense_sample((40, 40, 4, 2, 64, 64), rule, dtype, 2))

            def run(call: tuple[Any, ...]) -> list[Tensor]:
                a = call[0]
                return [theirs.flash_attn_func(a["q"], a["k"], a["v"], causal=a["causal"], sink=a["sinks"])]

            yield (
                f"mha.flash_attn_func: {dtype}, {', '.join(rule) or 'all keys'}",
                far(reference("flash_attn", given), run, (given,)),
            )
            given = moved(flash.varlen_sample(((40, 40), (3, 33), (17, 17)), (4, 2, 64), rule, dtype, 3))

            def packed(call: tuple[Any, ...]) -> list[Tensor]:
                a = call[0]
                names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
                more = {"causal": a["causal"], "sink": a["sinks"], "return_lse": True}
                o, lse, *_ = theirs.flash_attn_varlen_func(*(a[name] for name in names), **more)
                return [o, lse.t().contiguous()]

            what = f"mha.flash_attn_varlen_func: {dtype}, {', '.join(rule) or 'all keys'}, with lse"
            yield what, far(reference("flash_attn_varlen_lse", given), packed, (given,))


def written(far: Far, moved: Callable[..., dict[str, Any]], dtypes: tuple[torch.dtype, ...]) -> Rows:
    """Their writer that rotates first, by an angle of nothing."""
    theirs: Any = import_module("aiter.ops.triton.fusions.fused_kv_cache")
    for dtype in dtypes:
        # of halves it writes bfloat16 alone
        for layout, cache in ((layout, FN if dtype is F16 else BF16) for layout in (NHD, SHUFFLED)):
            given = moved(paged.write_sample(7, 2, 64, 16, layout, dtype, cache, 0))
            wanted: dict[str, Any] = {
                name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()
            }
            bridge.reshape_and_cache(**wanted, provider="reference")

            def run(call: tuple[Any, ...], layout: str = layout) -> list[Tensor]:
                a = call[0]
                x, t = a["key"], len(a["key"])
                positions = torch.zeros(t, dtype=torch.int64, device=x.device)
                theirs.fused_qk_rope_reshape_and_cache(
                    *(torch.zeros_like(x), x, a["value"], a["key_cache"], a["value_cache"], a["slot_mapping"]),
                    *(positions, x.new_ones(t, 1, 1, 32), x.new_zeros(t, 1, 1, 32), a["k_scale"], a["v_scale"], True),
                    flash_layout=layout == NHD,
                    apply_scale=a["k_scale"] is not None,
                    output_zeros=False,
                )
                return [a[name].to(torch.float32) for name in ("key_cache", "value_cache")]

            what = f"fused_qk_rope_reshape_and_cache: {layout}, {dtype} to {cache}"
            want = [wanted[name].to(torch.float32) for name in ("key_cache", "value_cache")]
            yield what, far(want, run, (given,))


PARTS = (unified, capped, dense, written)
