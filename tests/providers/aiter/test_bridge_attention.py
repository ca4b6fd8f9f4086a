"""The bridge's attention: references against models' own attention and float64, layouts of caches, which of AITER's
functions takes a call, and adapters' faults."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from aiter_fusion import bridge
from aiter_fusion.ops import attention_flash as flash
from aiter_fusion.ops import attention_paged as paged
from aiter_fusion.ops import mla
from aiter_fusion.passes.verify import same_bits
from aiter_fusion.providers import BRIDGE_PROVIDERS
from aiter_fusion.providers.aiter import entry_points, installation
from aiter_fusion.providers.aiter.bridge import adapter
from aiter_fusion.providers.aiter.bridge import mla as mla_adapters
from aiter_fusion.providers.kv_cache import LAYOUTS, NHD, SHUFFLED
from aiter_fusion.registry import REGISTRY
from support import attention_samples as samples
from support.aiter_double import Double
from support.bridge_results import alike

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
AITER = BRIDGE_PROVIDERS["aiter"]
FAMILIES = (*samples.FOR_AITER, "gather_kv_cache")
OPS = {family: REGISTRY.bridge[family, frozenset()] for family in FAMILIES}


def call(family: str, arguments: dict[str, Any], provider: str = "reference") -> Any:
    return OPS[family].target(*arguments.values(), provider)


# ---- references ----------------------------------------------------------------------------------------------------


def attention64(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor, bias: Tensor | None = None) -> Tensor:
    """``[t, H, D]`` in float64; ``seen`` is ``[t, s]``. A query that sees nothing gets zeros."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.double(), k) * scale
    scores = (scores if bias is None else scores + bias).masked_fill(~seen, -torch.inf)
    return torch.einsum("hts,shd->thd", scores.softmax(-1).nan_to_num(0.0), v)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=3),
    each=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    causal=st.booleans(),
    left=st.integers(-1, 3),
    right=st.integers(-1, 2),
    page=st.sampled_from([0, 1, 3]),
    seed=st.integers(0, 9),
)
def test_packed_is_float64_s(
    lengths: list[tuple[int, int]],
    each: tuple[int, int],
    causal: bool,
    left: int,
    right: int,
    page: int,
    seed: int,
) -> None:
    """Of float32 tensors, whose results differ from float64's by float32's rounding alone; packed and in blocks."""
    rule = {"causal": causal, "window_left": left, "window_right": right}
    arguments = flash.varlen_sample(tuple(lengths), (*each, 8), rule, F32, seed, page)
    have, lse = call("flash_attn_varlen_lse", arguments)
    starts_q, starts_k = arguments["cu_seqlens_q"].tolist(), arguments["cu_seqlens_k"].tolist()
    for row, (t, s) in enumerate(lengths):
        q, k, v = arguments["q"][starts_q[row] : starts_q[row] + t], arguments["k"], arguments["v"]
        if page:
            slots = [(int(arguments["block_table"][row, j // page]), j % page) for j in range(s)]
            k, v = (torch.stack([x[slot] for slot in slots]) if slots else x[:0, 0] for x in (k, v))
        else:
            k, v = (x[starts_k[row] : starts_k[row] + s] for x in (k, v))
        ahead = torch.tensor([[j - (i + s - t) for j in range(s)] for i in range(t)]).reshape(t, s)
        limit = 0 if causal else right
        seen = torch.ones(t, s, dtype=torch.bool) if limit < 0 else ahead <= limit
        seen = seen if left < 0 else seen & (ahead >= -left)
        want = attention64(q, k, v, 8**-0.5, seen)
        own = slice(starts_q[row], starts_q[row] + t)
        assert torch.allclose(have[own].double(), want, atol=1e-5)
        assert ((lse[:, own] == -torch.inf) == ~seen.any(-1)).all()


def model(heads: int, kv_heads: int, **more: Any) -> Any:
    """What transformers' attention functions ask of a module."""
    return SimpleNamespace(num_key_value_groups=heads // kv_heads, training=False, **more)


def windowed(t: int, s: int, window: int = 0) -> Tensor:
    """transformers' additive mask of a causal layer whose tokens see themselves and the ``window - 1`` before."""
    ahead = torch.arange(s) - (torch.arange(t)[:, None] + s - t)
    seen = (ahead <= 0) & ((ahead > -window) if window else torch.tensor(True))
    return torch.zeros(t, s).masked_fill(~seen, torch.finfo(F32).min)[None, None]


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss", "bloom"])
def test_dense_is_transformers(name: str) -> None:
    """Their eager attention, in float32: grouped heads, a window, a cap (packed), sinks, ALiBi."""
    from importlib import import_module

    arguments = flash.dense_sample((6, 9, 4, 2, 16, 16), {"causal": True}, F32, 0)
    q, k, v = (arguments[name].transpose(1, 2) for name in ("q", "k", "v"))
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    window = 3 if name in ("mistral", "gemma2", "gpt_oss") else 0
    mask = windowed(6, 9, window)
    changes: dict[str, Any] = {"window_left": window - 1 if window else -1}
    more: dict[str, Any] = {}
    if name == "bloom":
        theirs = import_module("transformers.models.bloom.modeling_bloom")
        alibi = theirs.build_alibi_tensor(torch.ones(2, 9), 4, F32).view(2, 4, 1, 9)
        mask, changes["alibi_slopes"], source = mask + alibi, theirs._get_alibi_slopes(4, q.device).reshape(4), "llama"
    else:
        source = name
    eager = import_module(f"transformers.models.{source}.modeling_{source}").eager_attention_forward
    if name == "gemma2":
        more["softcap"] = 2.0
    if name == "gpt_oss":
        changes["sinks"] = sinks
    want = eager(model(4, 2, sinks=sinks, head_dim=16), q, k, v, mask, scaling=0.25, **more)[0]
    if more:  # of the dense op AITER has no cap
        packed = flash.varlen_sample(((6, 9), (6, 9)), (4, 2, 16), {"causal": True, **more, **changes}, F32, 0)
        packed |= {name: arguments[name].flatten(0, 1) for name in ("q", "k", "v")}
        have = call("flash_attn_varlen", packed | {"scale": 0.25}).view(2, 6, 4, 16)
    else:
        have = call("flash_attn", arguments | changes | {"scale": 0.25})
    assert torch.allclose(want, have, atol=1e-5)


def test_latent_attention_is_deepseek_s() -> None:
    """transformers' DeepSeek-V3 expands keys and values; here the queries are projected instead."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "v_head_dim": 12}
    sizes |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "kv_lora_rank": 24, "q_lora_rank": None}
    module: Any = theirs.DeepseekV3Attention(DeepseekV3Config(**sizes), 0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latent, rotated = (torch.randn(1, 1, 9, n, generator=generator) for n in (24, 8))
        q = torch.randn(1, 4, 3, 24, generator=generator)
        keys, values = module.expand_kv(latent, rotated)
        want = theirs.eager_attention_forward(module, q, keys, values, windowed(3, 9), scaling=0.3)[0][0]
        up = module.kv_b_proj.weight.view(4, 28, 24)
        absorbed = torch.cat([torch.einsum("htn,hnr->htr", q[0, ..., :16], up[:, :16]), q[0, ..., 16:]], -1)
        cache = torch.zeros(4, 3, 1, 32)
        cache[[2, 0, 3]] = torch.cat([latent, rotated], -1).view(3, 3, 1, 32)
        i32 = torch.int32
        pages: dict[str, Any] = {"kv_indices": torch.tensor([2, 0, 3], dtype=i32)}
        pages |= {"kv_last_page_lens": torch.tensor([3], dtype=i32), "max_seqlen_q": 3, "value_dim": 24}
        starts = torch.tensor([0, 3], dtype=i32)
        for decode in (bridge.mla_decode_fwd, bridge.mla_prefill_fwd):
            o = decode(absorbed.transpose(0, 1).contiguous(), cache, starts, starts, **pages, sm_scale=0.3)
            have = torch.einsum("thr,hvr->thv", o, up[:, 16:])
            assert torch.allclose(want, have, atol=1e-5)


@pytest.mark.parametrize("page", [0, 4])
def test_parts_are_merged_by_their_lse(page: int) -> None:
    """Keys in two parts, merged as their sums say, are the whole; the same of latent keys."""
    whole = flash.varlen_sample(((3, 8), (2, 8)), (4, 2, 16), {}, F32, 0, page)
    want, lse = call("flash_attn_varlen_lse", whole)
    halves = []
    for part in (0, 1):
        if page:
            own = {"block_table": whole["block_table"][:, part : part + 1].contiguous()}
        else:
            own = {name: whole[name].view(2, 2, 4, 2, 16)[:, part].reshape(8, 2, 16) for name in ("k", "v")}
        starts = torch.tensor([0, 4, 8], dtype=torch.int32)
        halves.append(call("flash_attn_varlen_lse", whole | own | {"cu_seqlens_k": starts, "max_seqlen_k": 4}))
    sums = torch.stack([sums for _, sums in halves])
    shares = (sums - sums.logsumexp(0)).exp().transpose(1, 2)[..., None]
    assert torch.allclose(want, (shares * torch.stack([o for o, _ in halves])).sum(0), atol=1e-5)
    assert torch.allclose(lse, sums.logsumexp(0), atol=1e-5)
    given = mla.sample((6, 8), 1, 2, 4, 32, 24, F32, 0)
    o, own = call("mla_decode_fwd_lse", given)
    assert torch.equal(o, call("mla_decode_fwd", given))
    assert own.shape == (4, 2)


def test_bounds_that_are_too_small() -> None:
    """AITER would leave rows out."""
    arguments = flash.varlen_sample(((3, 5),), (2, 2, 16), {}, F32, 0)
    with pytest.raises(ValueError, match="sequence 0 has 3 queries and 5 keys, and max_seqlen_q and max_seqlen_k say"):
        call("flash_attn_varlen", arguments | {"max_seqlen_q": 2})
    arguments = paged.attention_sample((9,), (2, 2, 16), 16, NHD, BF16, BF16, 0)
    with pytest.raises(ValueError, match="sequence 0 has 9 tokens, and max_seq_len says at most 8"):
        call("paged_attention", arguments | {"max_seq_len": 8})


# ---- caches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FN], ids=str)
def test_layouts(dtype: torch.dtype) -> None:
    """Each element stands where AITER's documentation says; and there is a way back."""
    key, value = (torch.randn(3, 32, 2, 32).to(dtype) for _ in range(2))
    keys, values = bridge.shuffled_kv_cache(key, value)
    x = 16 // dtype.itemsize
    assert keys.shape == (3, 2, 32 // x, 32, x)
    assert values.shape == (3, 2, 32 // x, 32, x)
    for block, token, head, d in ((0, 0, 0, 0), (2, 31, 1, 31), (1, 17, 0, 9), (1, 5, 1, 30)):
        assert keys[block, head, d // x, token, d % x].float() == key[block, token, head, d].float()
        assert values[block, head, token // x, d, token % x].float() == value[block, token, head, d].float()
    assert all(map(same_bits, bridge.unshuffled_kv_cache(keys, values), (key, value)))
    with pytest.raises(ValueError, match=r"has no shuffled form: .* heads and blocks in multiples of"):
        bridge.shuffled_kv_cache(key[:, :5].contiguous(), value[:, :5].contiguous())


def test_the_preferred_layout_depends_on_no_other_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bridge.preferred_kv_layout() == NHD
    for master in ("1", "0"):
        monkeypatch.setenv("AITER_FUSION_AITER", master)
        for said, layout in (("1", SHUFFLED), ("0", NHD)):
            monkeypatch.setenv("AITER_FUSION_SHUFFLE_KV_CACHE", said)
            assert bridge.preferred_kv_layout() == layout
            key, value = bridge.kv_cache(3, 16, 2, 64, BF16)
            token = torch.randn(1, 2, 64).to(BF16)
            bridge.reshape_and_cache(token, token, key, value, torch.tensor([5]), layout)
    assert bridge.kv_cache(3, 16, 2, 64, BF16, layout=SHUFFLED)[0].dim() == 5
    with pytest.raises(ValueError, match="layout 'hnd' is none of nhd, shuffled"):
        bridge.kv_cache(3, 16, 2, 64, BF16, layout="hnd")


SIZES = (3, 16, 2, 64)  # blocks, tokens, heads, elements


def cache_of(layout: str) -> tuple[Tensor, Tensor]:
    return bridge.kv_cache(3, 16, 2, 64, BF16, layout=layout)


WRONG: dict[str, tuple[str, Callable[[], tuple[Tensor, Tensor]]]] = {
    "in layout nhd a cache has 4 dimensions": (NHD, lambda: cache_of(SHUFFLED)),
    "in layout shuffled a cache has 5 dimensions": (SHUFFLED, lambda: cache_of(NHD)),
    "are not one cache in layout nhd": (
        NHD,
        lambda: (torch.zeros(3, 16, 2, 64, dtype=BF16), torch.zeros(3, 2, 16, 64, dtype=BF16)),
    ),
    "the innermost sizes of the cache are 8 and 8, and those of a shuffled one of torch.float8_e4m3fn are 16": (
        SHUFFLED,
        lambda: tuple(x.to(FN) for x in cache_of(SHUFFLED)),  # type: ignore[return-value]
    ),
    "are not one cache in layout shuffled": (
        SHUFFLED,  # values as those of vLLM's first layout, [blocks, Hk, D / x, block, x]
        lambda: (torch.zeros(3, 2, 8, 16, 8, dtype=BF16), torch.zeros(3, 2, 8, 16, 8, dtype=BF16)),
    ),
    "the cache has keys of 32 elements, and this call of 64": (NHD, lambda: bridge.kv_cache(3, 16, 2, 32, BF16)),
    "both must have one dtype": (NHD, lambda: (torch.zeros(SIZES, dtype=BF16), torch.zeros(SIZES, dtype=F16))),
    "layout nhd": (NHD, lambda: bridge.kv_cache(3, 16, 3, 64, BF16)),  # three heads
}


@pytest.mark.parametrize("reason", WRONG)
@pytest.mark.parametrize("family", ["paged_attention", "reshape_and_cache"])
def test_a_wrong_layout_is_an_error(family: str, reason: str) -> None:
    """When the op is called and when it is traced."""
    layout, make = WRONG[reason]
    if family == "paged_attention":
        arguments = paged.attention_sample((5, 9), (4, 2, 64), 16, NHD, BF16, BF16, 0)
    else:
        arguments = paged.write_sample(4, 2, 64, 16, NHD, BF16, BF16, 0)
    arguments |= {"layout": layout} | dict(zip(("key_cache", "value_cache"), make(), strict=True))
    with pytest.raises(ValueError, match=reason):
        call(family, arguments)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=reason):
        call(family, {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()})


def decode_step(
    q: Tensor, key: Tensor, value: Tensor, caches: tuple[Tensor, Tensor], slots: Tensor, table: Tensor, layout: str
) -> Tensor:
    """Write the tokens of two sequences, then attend to the third and the fifth of them."""
    bridge.reshape_and_cache(key, value, *caches, slots, layout)
    lengths = torch.tensor([3, 5], dtype=torch.int32)
    return bridge.paged_attention(q, *caches, table, lengths, 5, layout)


def step_inputs(layout: str) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    q, key, value = (torch.randn(n, 2, 32, generator=generator).to(BF16) for n in (2, 8, 8))
    table = torch.tensor([[2], [1]], dtype=torch.int32)
    slots = torch.tensor([32, 33, 34, 16, 17, 18, 19, 20])
    return q, key, value, bridge.kv_cache(3, 16, 2, 32, BF16, layout=layout), slots, table, layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_is_read(layout: str) -> None:
    q, key, value, caches, slots, table, layout = step_inputs(layout)
    o = decode_step(q, key, value, caches, slots, table, layout)
    for row, tokens in enumerate((slice(0, 3), slice(3, 8))):
        want = attention64(q[row : row + 1], key[tokens], value[tokens], 32**-0.5, torch.tensor(True))
        assert alike(want.to(BF16)[0], o[row])
    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    gathered = bridge.gather_kv_cache(caches[0], caches[1], table, starts, 8, layout, BF16)
    assert all(map(same_bits, gathered, (key, value)))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_compiled_step_writes_to_the_caller_s_cache(layout: str, backend: str) -> None:
    """In one graph, in order: what is written before is read."""
    wanted, given = step_inputs(layout), step_inputs(layout)
    want = decode_step(*wanted)
    have = torch.compile(decode_step, backend=backend, fullgraph=True)(*given)
    assert torch.equal(want, have)
    assert all(map(same_bits, wanted[3], given[3]))


def test_gather_is_an_op() -> None:
    op = OPS["gather_kv_cache"]
    assert AITER.why_not(op, next(op.samples())) == "it declares no kernel for gather_kv_cache"
    for index, arguments in enumerate(op.samples()):
        checks = ("test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
        if index in (0, 3):  # plain halves, shuffled FP8
            torch.library.opcheck(op.target, tuple(arguments.values()), test_utils=checks)
        k, v = op.target(*arguments.values(), "reference")
        starts, block = arguments["cu_seqlens"].tolist(), 16
        caches = arguments["key_cache"], arguments["value_cache"]
        if arguments["layout"] == SHUFFLED:
            caches = bridge.unshuffled_kv_cache(*caches)
        for row in range(len(starts) - 1):
            for token in range(starts[row + 1] - starts[row]):
                place = int(arguments["block_table"][row, token // block]), token % block
                for have, cache, scale in ((k, caches[0], "k_scale"), (v, caches[1], "v_scale")):
                    factor = 1.0 if arguments[scale] is None else arguments[scale]
                    want = (cache[place].float() * factor).to(BF16)
                    assert torch.equal(have[starts[row] + token], want)


# ---- by AITER ------------------------------------------------------------------------------------------------------

# op -> what a call is like -> the function that computes it.
CHOSEN: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "paged_attention": {
        "plain": ("paged_attention_v1", {"layout": NHD}),
        "plain, a window": ("paged_attention_v1", {"layout": NHD, "window": 3}),
        "plain, a cap": ("paged_attention_v1", {"layout": NHD, "softcap": 2.0}),
        "plain, slopes": ("paged_attention_v1", {"layout": NHD, "alibi_slopes": True}),
        "plain, sinks": ("unified_attention", {"layout": NHD, "sinks": True}),
        "plain, small heads": ("unified_attention", {"layout": NHD, "dim": 32}),
        "plain, FP8": ("paged_attention_v1", {"layout": NHD, "cache": FNUZ}),
        "shuffled": ("pa_fwd_asm", {}),
        "shuffled, a scale": ("paged_attention_rocm", {"scale": 0.1}),
        "shuffled, the usual scale": ("pa_fwd_asm", {"scale": 128**-0.5}),
        "shuffled, small heads": ("paged_attention_rocm", {"dim": 64}),
        "shuffled, large blocks": ("paged_attention_rocm", {"block": 32}),
        "shuffled, slopes": ("paged_attention_rocm", {"alibi_slopes": True}),
        "shuffled, a window": ("unified_attention", {"window": 3}),
        "shuffled, a cap": ("unified_attention", {"softcap": 2.0}),
        "shuffled, sinks": ("unified_attention", {"sinks": True}),
        "shuffled, FP8": ("paged_attention_rocm", {"cache": FNUZ}),
        "shuffled, FP8, a scale for each token": ("pa_fwd_asm", {"cache": FNUZ, "each": True}),
    },
    "reshape_and_cache": {"plain": ("reshape_and_cache_flash", {"layout": NHD}), "shuffled": ("reshape_and_cache", {})},
    "flash_attn_varlen": {
        "packed": ("flash_attn_varlen_func", {}),
        "in blocks": ("unified_attention", {"page": 16, "causal": True}),
    },
    "flash_attn_varlen_lse": {
        "packed": ("flash_attn_varlen_func", {}),
        "in blocks": ("mha_batch_prefill_func", {"page": 16}),
    },
    "mla_decode_fwd": {"": ("mla_decode_fwd", {}), "a cap": ("decode_attention_fwd", {"logit_cap": 2.0})},
    "mla_decode_fwd_lse": {"": ("mla_decode_fwd", {}), "a cap": ("decode_attention_fwd", {"logit_cap": 2.0})},
}


def arguments_of(family: str, seed: int = 0, **like: Any) -> dict[str, Any]:
    """A call, like this."""
    if family == "paged_attention":
        cache, dim, block = like.pop("cache", BF16), like.pop("dim", 128), like.pop("block", 16)
        layout = like.pop("layout", SHUFFLED)
        for name in ("alibi_slopes", "sinks"):
            if like.pop(name, False):
                like[name] = torch.tensor([0.5, 0.25, 1.0, 0.1])
        if like.pop("each", False):
            scales = torch.rand(2, 4, 2, block, generator=torch.Generator().manual_seed(1)) + 0.5
            like |= {"k_scale": scales[0], "v_scale": scales[1]}
        return paged.attention_sample((19, 3), (4, 2, dim), block, layout, BF16, cache, seed, **like)
    if family == "reshape_and_cache":
        return paged.write_sample(5, 2, 32, 16, like.pop("layout", SHUFFLED), BF16, like.pop("cache", BF16), seed)
    if family.startswith("mla"):
        return mla.sample((5, 9), 1, 1, 4, 576, 512, BF16, seed, like.get("logit_cap", 0.0))
    page = like.pop("page", 0)
    if family == "flash_attn":
        return flash.dense_sample((5, 7, 4, 2, 32, 32), like, BF16, seed)
    return flash.varlen_sample(((2, 9), (4, 5)), (4, 2, 32), like, BF16, seed, page)


CASES = [(family, what) for family, cases in CHOSEN.items() for what in cases]


@pytest.mark.parametrize(("family", "what"), CASES, ids=[": ".join(case) for case in CASES])
def test_which_function(family: str, what: str, make: Callable[..., Double]) -> None:
    """The first that can computes it, rightly; of each that is asked before, ``routes`` says why not."""
    function, like = CHOSEN[family][what]
    double, arguments = make(), arguments_of(family, **like)
    found = bridge.routes(family, **arguments)
    assert next(name for name, why in found if why is None).endswith(f".{function}")
    compute(family, arguments)
    assert double.called[-1] == function


def compute(family: str, arguments: dict[str, Any]) -> None:
    """Fails unless AITER's result is the reference's."""
    reference = {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    want, have = call(family, reference), call(family, arguments, "aiter")
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (want, have)), strict=True):
        assert a is b is None or alike(a, b), "the results differ"
    for name in ("key_cache", "value_cache"):
        if family == "reshape_and_cache":
            assert same_bits(reference[name], arguments[name]), f"{name} differs"


def test_routes_of_what_cannot_run() -> None:
    reason = "AITER needs a ROCm build of PyTorch"
    for name, why in bridge.routes("paged_attention", **arguments_of("paged_attention")):
        assert name.startswith("aiter.")
        assert str(why).startswith(reason)


# (op, what the call is like, changes) -> what stands against it
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "q is torch.float32, and the kernel takes bfloat16 and float16": (
        "flash_attn",
        {},
        {name: torch.zeros(2, 5, 4, 32) for name in ("q", "k", "v")},
    ),
    "k is torch.float16, and the kernel needs torch.bfloat16, like q": (
        "flash_attn",
        {},
        {"k": torch.zeros(2, 5, 4, 32, dtype=F16)},
    ),
    "the heads have up to 264 elements, and the kernel takes up to 256": (
        "flash_attn",
        {},
        {name: torch.zeros(1, 2, 2, 264, dtype=BF16) for name in ("q", "k", "v")},
    ),
    "4 query heads cannot share 3": ("flash_attn", {}, {"k": torch.zeros(2, 5, 3, 32, dtype=BF16)}),
    "a gradient is wanted": ("flash_attn", {}, {"q": torch.zeros(2, 5, 4, 32, dtype=BF16, requires_grad=True)}),
    "alibi_slopes is torch.float64": ("flash_attn", {}, {"alibi_slopes": torch.zeros(4, dtype=F64)}),
    "the kernel adds a bias or slopes, not both": ("flash_attn", {"bias": True, "alibi_slopes": True}, {}),
    "the bias is [5, 6], and the kernel needs [5, 7]": ("flash_attn", {}, {"bias": torch.zeros(5, 6, dtype=BF16)}),
    "there are no keys": ("flash_attn", {}, {name: torch.zeros(2, 0, 2, 32, dtype=BF16) for name in ("k", "v")}),
    "cu_seqlens_q is torch.int64": ("flash_attn_varlen", {}, {"cu_seqlens_q": torch.tensor([0, 2, 6])}),
    "with which it ended processes (ROCm/aiter#4455)": ("flash_attn_varlen", {"page": 16}, {}),
    "one query each of torch.float16 and heads of 32 come out wrong on gfx942 (ROCm/aiter#2229)": (
        "flash_attn_varlen",
        {},
        {"max_seqlen_q": 1, **{name: torch.zeros(9, 2, 32, dtype=F16) for name in ("q", "k", "v")}},
    ),
    "it is causal always, and this call is not": ("flash_attn_varlen", {"page": 16}, {}),
    "blocks have 8 tokens, not a multiple of 16": ("flash_attn_varlen", {"page": 8, "causal": True}, {}),
    "which changes results where there are sinks": (
        "flash_attn_varlen",
        {"page": 16, "causal": True, "sinks": True, "alibi_slopes": True},
        {},
    ),
    "whether its lse counts them is not documented": ("flash_attn_varlen_lse", {"sinks": True}, {}),
    "there are no keys, for which its lse is +inf": ("flash_attn_varlen_lse", {}, {"max_seqlen_k": 0}),
    "k has heads of 36, not a multiple of 8": (
        "flash_attn_varlen_lse",
        {"page": 16},
        {"k": torch.zeros(4, 16, 2, 36, dtype=BF16)},
    ),
    "it reads layout nhd, and the cache is shuffled": ("paged_attention", {"sinks": True, "block": 8}, {}),
    "the cache is torch.float8_e4m3fn, not torch.bfloat16, like q, or torch.float8_e4m3fnuz": (
        "paged_attention",
        {"cache": FN},
        {},
    ),
    "a cache of torch.float8_e4m3fnuz without k_scale": ("paged_attention", {"cache": FNUZ}, {"k_scale": None}),
    "a cache of torch.bfloat16 with v_scale": ("paged_attention", {}, {"v_scale": torch.ones(1)}),
    "seq_lens is torch.int64, not torch.int32": ("paged_attention", {}, {"seq_lens": torch.tensor([19, 3])}),
    "block_table is torch.int64": ("paged_attention", {}, {"block_table": torch.zeros(2, 2, dtype=torch.int64)}),
    "block_table has room for 32 tokens, and max_seq_len is 40": ("paged_attention", {}, {"max_seq_len": 40}),
    "q is not contiguous": ("paged_attention", {}, {"q": torch.zeros(2, 4, 256, dtype=BF16)[..., :128]}),
    "paged_attention_v1: the kernel has no sinks, and this call has sinks": (
        "paged_attention",
        {"layout": NHD, "sinks": True, "alibi_slopes": True},
        {},
    ),
    "paged_attention_v1: the heads have 16 elements, fewer than 64": (
        "paged_attention",
        {"layout": NHD, "dim": 16},
        {},
    ),
    "k_scale has 128 elements, and it takes one": (
        "paged_attention",
        {"layout": NHD, "cache": FNUZ, "each": True},
        {},
    ),
    "pa_fwd_asm: the kernel has no window, and this call has a window": (
        "paged_attention",
        {"window": 3, "cache": FNUZ, "each": True},
        {},
    ),
    "paged_attention_rocm: the kernel has no cap, and this call has a cap": (
        "paged_attention",
        {"softcap": 2.0, "block": 8},
        {},
    ),
    "key is torch.float32, and the kernel takes bfloat16 and float16": (
        "reshape_and_cache",
        {},
        {"key": torch.zeros(5, 2, 32)},
    ),
    "slot_mapping is torch.int16": ("reshape_and_cache", {}, {"slot_mapping": torch.zeros(5, dtype=torch.int16)}),
    "the heads of a token of value are not next to each other": (
        "reshape_and_cache",
        {},
        {"value": torch.zeros(5, 32, 2, dtype=BF16).transpose(1, 2)},
    ),
    "the blocks of keys and of values are not equally far apart": (
        "reshape_and_cache",
        {"layout": NHD},
        {"key_cache": torch.zeros(6, 16, 2, 32, dtype=BF16)[::2]},
    ),
    "max_seqlen_q is 3, no power of two, which wants metadata (ROCm/aiter#2720)": (
        "mla_decode_fwd",
        {},
        {"max_seqlen_q": 3},
    ),
    "max_seqlen_k is None, and it needs the most keys of a sequence": (
        "mla_decode_fwd",
        {"logit_cap": 2.0},
        {"max_seqlen_k": None},
    ),
    "the metadata have 3 elements, and this call needs": (
        "mla_decode_fwd",
        {},
        {"metadata": torch.zeros(3, dtype=torch.int32), "q": torch.zeros(2, 8, 576, dtype=BF16)},
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusal(reason: str, make: Callable[..., Double]) -> None:
    make()
    family, like, changes = REFUSED[reason]
    assert reason in str(bridge.why_not(family, **arguments_of(family, **like) | changes))


def test_refusals_of_the_others(make: Callable[..., Double]) -> None:
    """Of latent prefill and metadata; and beyond what pa_fwd_asm addresses."""
    double = make()
    given = next(samples.FOR_AITER["mla_prefill_fwd"](double))
    assert bridge.why_not("mla_prefill_fwd", **given) is None
    wrong: dict[str, Any] = {"q": torch.zeros(4, 8, 576, dtype=F16), "kv_buffer": torch.zeros(9, 3, 2, 576, dtype=F16)}
    assert bridge.why_not("mla_prefill_fwd", **given | wrong) == (
        "q is torch.float16, not torch.bfloat16; kv_buffer is torch.float16, not torch.bfloat16; "
        "the cache has 2 heads, not 1; there are 8 heads, and the kernel takes 16 and 128; "
        "pages have 3 tokens, no power of two"
    )
    given = next(samples.FOR_AITER["mla_decode_metadata"](double))
    assert bridge.why_not("mla_decode_metadata", **given) is None
    changes: tuple[dict[str, Any], ...] = ({"size": 5}, {"heads": 12})
    said = [str(bridge.why_not("mla_decode_metadata", **{**given, **change})) for change in changes]
    assert said[0].startswith("size is 5, and mla_decode_metadata_size says ")
    assert "not a multiple of 8" in said[1]
    with FakeTensorMode():
        cache = [torch.empty(sizes, dtype=BF16) for sizes in ((70000, 2, 16, 16, 8), (70000, 2, 2, 128, 8))]
    given = {**arguments_of("paged_attention"), **dict(zip(("key_cache", "value_cache"), cache, strict=True))}
    why = dict(bridge.routes("paged_attention", **given))["aiter.pa_fwd_asm"]
    assert why == "70000 blocks are more than it can address (ROCm/aiter#3062)"


Change = Callable[[dict[str, Any]], Any]
# (op, what the call is like, function, keyword, what is given instead)
FAULTS: dict[str, tuple[str, dict[str, Any], str, str, Change]] = {
    "another scale": ("flash_attn", {}, "flash_attn_func", "softmax_scale", lambda g: 1.0),
    "not causal": ("flash_attn", {"causal": True}, "flash_attn_func", "causal", lambda g: False),
    "the window's sides swapped": (
        *("flash_attn", {"window_left": 3, "window_right": 0}, "flash_attn_func", "window_size"),
        lambda g: g["window_size"][::-1],
    ),
    "a window of one more": (
        *("flash_attn", {"causal": True, "window_left": 2}, "flash_attn_func", "window_size"),
        lambda g: (g["window_size"][0] + 1, 0),
    ),
    "no bias": ("flash_attn", {"bias": True}, "flash_attn_func", "bias", lambda g: None),
    "no sinks": ("flash_attn", {"sinks": True}, "flash_attn_func", "sink_ptr", lambda g: None),
    "slopes of other heads": (
        *("flash_attn", {"alibi_slopes": True}, "flash_attn_func", "alibi_slopes"),
        lambda g: g["alibi_slopes"].flip(0),
    ),
    "keys and values swapped": ("flash_attn", {}, "flash_attn_func", "v", lambda g: g["k"]),
    "starts of keys for queries": (
        *("flash_attn_varlen", {}, "flash_attn_varlen_func", "cu_seqlens_q"),
        lambda g: g["cu_seqlens_k"].clamp(max=6),
    ),
    "no cap": ("flash_attn_varlen", {"softcap": 0.5}, "flash_attn_varlen_func", "logits_soft_cap", lambda g: 0.0),
    "too few queries": ("flash_attn_varlen", {}, "flash_attn_varlen_func", "max_seqlen_q", lambda g: 3),
    "too few keys": ("flash_attn_varlen", {}, "flash_attn_varlen_func", "max_seqlen_k", lambda g: 8),
    "starts for lengths": (
        *("flash_attn_varlen", {"page": 16, "causal": True}, "unified_attention", "seqused_k"),
        lambda g: torch.tensor([9, 14], dtype=torch.int32),
    ),
    "a window of one less": (
        *("flash_attn_varlen", {"page": 16, "causal": True, "window_left": 2}, "unified_attention", "window_size"),
        lambda g: (g["window_size"][0] - 1, 0),
    ),
    "no lengths": (
        *("flash_attn_varlen_lse", {"page": 16}, "mha_batch_prefill_func", "seqlen_k"),
        lambda g: torch.tensor([16, 16], dtype=torch.int32),
    ),
    "an older table": (
        *("flash_attn_varlen_lse", {"page": 16}, "mha_batch_prefill_func", "block_table"),
        lambda g: g["block_table"].flip(0),
    ),
    "lse not asked for": ("flash_attn_varlen_lse", {}, "flash_attn_varlen_func", "return_lse", lambda g: False),
    "values by other scales": (
        *("paged_attention", {"layout": NHD, "cache": FNUZ}, "paged_attention_v1", "v_scale"),
        lambda g: g["k_scale"] * 2,
    ),
    "FP8 not said": (
        *("paged_attention", {"layout": NHD, "cache": FNUZ}, "paged_attention_v1", "kv_cache_dtype"),
        lambda g: "auto",
    ),
    "a small workspace": (
        *("paged_attention", {"layout": NHD}, "paged_attention_v1", "workspace_buffer"),
        lambda g: g["workspace_buffer"][:-1],
    ),
    "a window without the query": (
        *("paged_attention", {"layout": NHD, "window": 3}, "paged_attention_v1", "sliding_window"),
        lambda g: g["sliding_window"] - 1,
    ),
    "shuffling not said": (
        *("paged_attention", {"window": 3}, "unified_attention", "shuffled_kv_cache"),
        lambda g: False,
    ),
    "unified's window of W": (
        *("paged_attention", {"window": 3}, "unified_attention", "window_size"),
        lambda g: (g["window_size"][0] + 1, 0),
    ),
    "values in the layout of keys": ("paged_attention", {}, "pa_fwd_asm", "V", lambda g: other_layout(g["V"])),
    "a table's other stride": ("paged_attention", {}, "pa_fwd_asm", "block_tables_stride0", lambda g: 1),
    "scales by heads first": (
        *("paged_attention", {"cache": FNUZ, "each": True}, "pa_fwd_asm", "K_QScale"),
        lambda g: g["K_QScale"].transpose(0, 1).contiguous(),
    ),
    "the usual scale in any case": (
        *("paged_attention", {"scale": 0.3}, "paged_attention_rocm", "scale"),
        lambda g: 128**-0.5,
    ),
    "no room for partitions": (
        *("paged_attention", {"scale": 0.3}, "paged_attention_rocm", "tmp_out"),
        lambda g: g["tmp_out"][:, :, :0],
    ),
    "numbers of 32 bits as of 64": (
        *("reshape_and_cache", {}, "reshape_and_cache", "slot_mapping"),
        lambda g: torch.cat([g["slot_mapping"], g["slot_mapping"][-1:]]).int(),
    ),
    "the other layout of values": ("reshape_and_cache", {}, "reshape_and_cache", "asm_layout", lambda g: False),
    "keys for values": ("reshape_and_cache", {"layout": NHD}, "reshape_and_cache_flash", "value", lambda g: g["key"]),
    "a scale where none is": (
        *("reshape_and_cache", {"layout": NHD, "cache": FNUZ}, "reshape_and_cache_flash", "k_scale"),
        lambda g: torch.ones(1),
    ),
    "another latent scale": ("mla_decode_fwd", {}, "mla_decode_fwd", "sm_scale", lambda g: 1.0),
    "pages out of order": ("mla_decode_fwd", {}, "mla_decode_fwd", "kv_indices", lambda g: g["kv_indices"].flip(0)),
    "partial sums for the lse": ("mla_decode_fwd_lse", {}, "mla_decode_fwd", "return_lse", lambda g: False),
    "no latent cap": (
        *("mla_decode_fwd", {"logit_cap": 0.5}, "decode_attention_fwd", "logit_cap"),
        lambda g: 0.0,
    ),
    "a token more": (
        *("mla_decode_fwd", {"logit_cap": 2.0}, "decode_attention_fwd", "b_seq_len"),
        lambda g: g["b_seq_len"] - 1,
    ),
    "a narrow table": (
        *("mla_decode_fwd", {"logit_cap": 2.0}, "csr_to_dense_block_table", "max_ctx"),
        lambda g: 3,
    ),
}


def other_layout(values: Tensor) -> Tensor:
    """Shuffled values as ``[blocks, Hk, D, block]``, which have as many bytes."""
    blocks, heads, packs, dim, x = values.shape
    return values.permute(0, 1, 3, 2, 4).reshape(blocks, heads, dim, packs * x)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_adapter_is_caught(fault: str, make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch) -> None:
    family, like, function, keyword, change = FAULTS[fault]
    make()
    compute(family, arguments_of(family, **like))
    real, changed = entry_points.call, []

    def faulty(entry: entry_points.EntryPoint, **given: Any) -> Any:
        if entry.name == function:
            changed.append(keyword)
            given |= {keyword: change(given)}
        return real(entry, **given)

    for module in (adapter, mla_adapters):
        monkeypatch.setattr(module, "call", faulty)
    # IndexError: it reads what is not there
    with pytest.raises((AssertionError, RuntimeError, ValueError, TypeError, IndexError)):
        compute(family, arguments_of(family, **like))
    assert changed


def test_metadata_can_be_copied(make: Callable[..., Double]) -> None:
    """AITER keeps addresses in them, which are of the copy; those of another step are not taken for this one's."""
    make()
    given = mla.sample((5, 9), 3, 2, 16, 576, 512, BF16, 0)
    metadata = samples.metadata_of(given)
    assert metadata.shape == (bridge.mla_decode_metadata_size(2, 3, 16, BF16, BF16),)
    assert alike(call("mla_decode_fwd", given), call("mla_decode_fwd", given | {"metadata": metadata.clone()}, "aiter"))
    other = samples.metadata_of(mla.sample((6, 8), 3, 2, 16, 576, 512, BF16, 0))
    with pytest.raises(AssertionError, match="works on what the metadata say"):
        call("mla_decode_fwd", given | {"metadata": other}, "aiter")


def test_metadata_without_aiter() -> None:
    given = mla.sample((5, 9), 3, 2, 16, 64, 48, F32, 0)
    assert bridge.mla_decode_metadata_size(2, 3, 16, BF16, BF16) == 0
    metadata = samples.metadata_of(given, "auto")
    assert metadata.shape == (0,)
    assert torch.equal(call("mla_decode_fwd", given), call("mla_decode_fwd", given | {"metadata": metadata}, "auto"))


@pytest.mark.parametrize(("arch", "heads", "splits"), [("gfx942", 8, 2), ("gfx950", 32, 1), ("gfx950", 8, None)])
def test_the_lse_of_latent_attention(arch: str, heads: int, splits: int | None, make: Callable[..., Double]) -> None:
    """With as many parts as its lse is right with."""
    double = make(arch=arch)
    dtype = double.fp8 if arch == "gfx942" else BF16
    given = mla.sample((5, 9), 1, 1, heads, 576, 512, dtype, 0)
    for a, b in zip(call("mla_decode_fwd_lse", given), call("mla_decode_fwd_lse", given, "aiter"), strict=True):
        assert alike(a, b)
    assert double.calls[-1][1].num_kv_splits == splits


@pytest.mark.parametrize(
    ("version", "family", "takes"),
    [
        ("v0.1.7.post2", "paged_attention", "unified_attention"),  # v1 has no window yet
        ("v0.1.9", "flash_attn_varlen", None),
        ("v0.1.12", "mla_decode_fwd", "mla_decode_fwd"),
    ],
)
def test_older_versions(version: str, family: str, takes: str | None, make: Callable[..., Double]) -> None:
    """What one function lacks another may have."""
    double = make(version)
    plain: dict[str, Any] = {"layout": NHD} if family == "paged_attention" else {}
    arguments = arguments_of(family, **plain)
    why = bridge.why_not(family, **arguments)
    if takes is None:
        assert f"of AITER {version} takes no argument sink_ptr" in str(why)
        return
    assert why is None
    compute(family, arguments)
    assert double.called[-1] == takes


# ---- vLLM's PR 33749: availability apart from preference, attention by name ------------------------------------------

COUNTING = """
import sys
sys.modules.setdefault("imports_of_aiter", []).append(__name__)
"""
FLASH = """
import torch
def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
        logits_soft_cap=0.0, causal=False, window_size=(-1, -1, 0), alibi_slopes=None, sink_ptr=None):
    return torch.full_like(q, 7.0)
"""


@pytest.fixture
def imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The imports of a package that is found as AITER, on a machine that could run it."""
    from aiter_fusion import machine
    from aiter_fusion.providers.aiter import provider

    for path, text in (
        ("jit/core.py", ""),
        ("ops/__init__.py", ""),
        ("_version.py", "__version__ = 'v0.1.20'"),
        ("__init__.py", COUNTING + FLASH),
    ):
        (tmp_path / "aiter" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "aiter" / path).write_text(text)
    counted: list[str] = []
    monkeypatch.setitem(sys.modules, "imports_of_aiter", counted)  # type: ignore[arg-type]
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(installation, "why_no_aiter", lambda: None)
    monkeypatch.setattr(machine, "architecture", lambda device=0: "gfx942")
    monkeypatch.setattr(provider, "DEVICE", "cpu")
    Double._forget_answers()
    yield counted
    Double._forget_answers()
    for name in [name for name in sys.modules if name.partition(".")[0] == "aiter"]:
        del sys.modules[name]


@pytest.mark.parametrize("provider", ["auto", "aiter"])
@pytest.mark.parametrize("preferred", ["1", "0"])
def test_pr_33749_preference_and_explicit_call(
    provider: str, preferred: str, imports: list[str], monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    """Row 2, 3 and 5: by name it works with everything switched off, and is imported when it is called, once; unasked
    it is called where it is preferred, and not even imported where it is not."""
    for name in ("AITER", "MHA"):
        monkeypatch.setenv(f"AITER_FUSION_{name}", preferred)
    arguments = arguments_of("flash_attn_varlen")
    assert installation.is_aiter_found()
    assert installation.is_aiter_found_and_supported()
    assert imports == [], "discovery imports nothing"
    by_aiter = provider == "aiter" or preferred == "1"
    for _ in range(2):
        o: Tensor = call("flash_attn_varlen", arguments, provider)
        assert bool((o == 7.0).all()) == by_aiter
    assert len(imports) == (1 if by_aiter else 0)
    record_property(
        "row", f"attention by {provider}, preferences {preferred}: {len(imports)} imports, AITER called: {by_aiter}"
    )


def test_pr_33749_row_1_availability_reads_no_variable() -> None:
    assert not re.search(r"os\.|getenv", Path(installation.__file__).read_text())


def test_pr_33749_row_4_formats_are_this_package_s(make: Callable[..., Double]) -> None:
    """Not what AITER's import says, which is wrong without a GPU."""
    make()
    from aiter_fusion.providers.aiter import provider

    assert provider.native_fp8() is FNUZ


@pytest.mark.parametrize("family", ["paged_attention", "reshape_and_cache", "flash_attn_varlen"])
def test_pr_33749_row_6_by_name_whatever_is_preferred(
    family: str, make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    """paged_attention_v1 and pa_fwd_asm need no import by the caller, which registers them."""
    double = make()
    for name in ("AITER", "MHA", "PAGED_ATTN"):
        monkeypatch.setenv(f"AITER_FUSION_{name}", "0")
    for layout in LAYOUTS:
        like: dict[str, Any] = {} if family == "flash_attn_varlen" else {"layout": layout}
        compute(family, arguments_of(family, **like))
    called = len(double.called)
    assert called
    call(family, arguments_of(family), "auto")
    assert len(double.called) == called


def test_pr_33749_row_7_the_layout_is_a_preference_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AITER_FUSION_AITER", "0")
    monkeypatch.setenv("AITER_FUSION_SHUFFLE_KV_CACHE", "1")
    assert bridge.kv_cache(2, 16, 2, 64, BF16)[0].shape == (2, 2, 8, 16, 8)


def test_pr_33749_row_8_gather_then_attend(make: Callable[..., Double]) -> None:
    """Several queries over a shuffled cache, for which AITER's packed attention has no table."""
    double = make()
    given = paged.attention_sample((19, 7), (4, 2, 64), 16, SHUFFLED, BF16, BF16, 0)
    caches = given["key_cache"], given["value_cache"]
    starts, i32 = torch.tensor([0, 19, 26], dtype=torch.int32), torch.int32
    k, v = bridge.gather_kv_cache(*caches, given["block_table"], starts, 26, SHUFFLED, BF16)
    q = torch.randn(5, 4, 64, generator=torch.Generator().manual_seed(1)).to(BF16)
    own = torch.tensor([0, 3, 5], dtype=i32)
    o = bridge.flash_attn_varlen(q, k, v, own, starts, 3, 19, causal=True, provider="aiter")
    assert double.called == ["flash_attn_varlen_func"]
    rows = bridge.unshuffled_kv_cache(*caches)
    table = given["block_table"]
    want = bridge.flash_attn_varlen(q, *rows, own, starts, 3, 19, causal=True, block_table=table, provider="reference")
    assert alike(want, o)
    assert math.isfinite(o.float().sum())
