"""The bridge's ops keep their declarations, and their references agree with other formulations and AITER's double."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from aiter_fusion import bridge
from aiter_fusion.op import FusedOp
from aiter_fusion.ops import mla, moe
from aiter_fusion.passes.verify import same_bits
from aiter_fusion.providers import BRIDGE_PROVIDERS
from aiter_fusion.providers.aiter import entry_points, hipblaslt, installation, releases
from aiter_fusion.providers.aiter.bridge import ADAPTERS, adapter
from aiter_fusion.providers.aiter.bridge.adapter import Adapter
from aiter_fusion.providers.architectures import RUNS_ON, SUPPORTED
from aiter_fusion.providers.tiles import shuffled, unshuffled
from aiter_fusion.registry import REGISTRY
from support import aiter_double, attention_samples, models
from support.aiter_double import Double
from support.bridge_results import APART_QUANTISED, alike, same_routing

BF16, F32 = torch.bfloat16, torch.float32
FNUZ, FN = torch.float8_e4m3fnuz, torch.float8_e4m3fn
AITER = BRIDGE_PROVIDERS["aiter"]

# Those that AITER computes too.
OPS = {family: op for (family, _), op in REGISTRY.bridge.items() if family in ADAPTERS}
# Those for which it has one function.
SINGLE = {family: op for family, op in OPS.items() if len(ADAPTERS[family].paths) == 1}
ops = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


def results(op: FusedOp, value: Any) -> dict[str, Tensor]:
    """What an op returned, by name; nothing of one that writes to its arguments."""
    return {} if value is None else dict(zip(op.outputs, (value,) if isinstance(value, Tensor) else value, strict=True))


# ---- every op ------------------------------------------------------------------------------------------------------


@ops
def test_opcheck(op: FusedOp) -> None:
    samples = list(op.samples())
    for arguments in samples[:: -(-len(samples) // 2)]:  # the first, and one from the middle
        checks = ("test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(op.target, tuple(arguments.values()), test_utils=checks)
        # whether arguments are written to; opcheck cannot compare FP8, of which a cache in packs has others
        if "layout" in arguments and arguments["key_cache"].dtype is FN:
            continue
        wide = [v.to(BF16) if isinstance(v, Tensor) and v.dtype in (FN, FNUZ) else v for v in arguments.values()]
        checks = ("test_schema", "test_autograd_registration")
        torch.library.opcheck(op.target, (*wide, "reference"), test_utils=checks)


@ops
def test_declaration(op: FusedOp) -> None:
    """Functional, or without a result; no name that a compiler trips over; a documented public function with the same
    arguments."""
    schema = op.target._schema
    assert schema.is_mutable == (not op.outputs)
    names = [argument.name for argument in schema.arguments]
    assert not set(names) & {"out", "self"}
    assert torch.Tag.needs_exact_strides in op.target.tags
    public = getattr(bridge, op.family)
    code = public.__code__
    assert sorted(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]) == sorted(names)
    assert "Args:" in public.__doc__
    assert "Returns:" in public.__doc__
    assert "AITER: ``aiter." in public.__doc__


@ops
def test_fake_equals_real(op: FusedOp) -> None:
    for arguments in op.samples():
        real = results(op, op.target(*arguments.values(), "reference"))
        with FakeTensorMode() as mode:
            faked = [mode.from_tensor(v) if isinstance(v, Tensor) else v for v in arguments.values()]
            fake = results(op, op.target(*faked, "auto"))
        for name in op.outputs:
            assert (real[name].shape, real[name].stride(), real[name].dtype) == (
                fake[name].shape,
                fake[name].stride(),
                fake[name].dtype,
            )


@pytest.mark.parametrize("family", ["gemm_a8w8", "hipb_mm_fp8"])
def test_torch_s_own_product(family: str) -> None:
    models.need_scaled_rows()
    op, count = OPS[family], 0
    for arguments in op.samples():
        if BRIDGE_PROVIDERS["torch"].why_not(op, arguments) is None:
            have = results(op, op.target(*arguments.values(), "torch"))
            assert alike(op.reference(**arguments)["y"], have["y"])
            count += 1
    assert count >= 3


def test_compiled() -> None:
    """The provider is chosen when the op runs, so a graph has no break."""

    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        y, s = bridge.add_rms_norm(x, x, w, 1e-5)
        return y + 1, s, *bridge.topk_softmax(y, 2)

    x, w = torch.randn(3, 64).to(BF16), torch.ones(64, dtype=BF16)
    compiled = torch.compile(fn, backend="aot_eager", fullgraph=True)
    for want, have in zip(fn(x, w), compiled(x, w), strict=True):
        assert torch.equal(want, have)


def test_unknown_names() -> None:
    x, w = torch.randn(3, 64).to(BF16), torch.ones(64, dtype=BF16)
    with pytest.raises(ValueError, match="unknown provider 'cutlass'; known are auto, aiter, torch, reference"):
        bridge.rms_norm(x, w, 1e-5, provider="cutlass")
    arguments = next(OPS["fused_moe"].samples())
    with pytest.raises(ValueError, match="'relu' is none of silu, gelu"):
        OPS["fused_moe"].target(*(arguments | {"activation": "relu"}).values(), "reference")
    with pytest.raises(RuntimeError, match="rms_norm by aiter: AITER needs a ROCm build of PyTorch"):
        bridge.rms_norm(x, w, 1e-5, provider="aiter")
    with pytest.raises(RuntimeError, match="rms_norm by torch: it declares no kernel for rms_norm"):
        bridge.rms_norm(x, w, 1e-5, provider="torch")
    with pytest.raises(ValueError, match=r"a weight of 16 x 48 .* has no shuffled form"):
        shuffled(torch.zeros(16, 48, dtype=FN))


# ---- references against other formulations -------------------------------------------------------------------------

sizes = st.integers(1, 6)


@settings(max_examples=12, deadline=None)
@given(rows=st.integers(1, 5), experts=st.integers(2, 9), seed=sizes, topk=st.integers(1, 2), gelu=st.booleans())
def test_moe_is_mixtral_s(rows: int, experts: int, seed: int, topk: int, gelu: bool) -> None:
    """transformers' router and experts, in float32."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=16 * seed,
        intermediate_size=24,
        num_local_experts=experts,
        num_experts_per_tok=topk,
        hidden_act="gelu" if gelu else "silu",
    )
    block: Any = MixtralSparseMoeBlock(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        x = torch.randn(1, rows, config.hidden_size, generator=generator)
        want = block(x)[0]
        weights, ids = bridge.topk_softmax(F.linear(x[0], block.gate.weight), topk, provider="reference")
        expert = block.experts
        have = bridge.fused_moe(
            x[0],
            expert.gate_up_proj,
            expert.down_proj,
            weights,
            ids,
            activation="gelu" if gelu else "silu",
            provider="reference",
        )
    assert alike(want, have)


@settings(max_examples=25, deadline=None)
@given(
    rows=sizes,
    groups=st.sampled_from([2, 4, 8]),
    size=st.integers(2, 5),
    keep=st.integers(1, 2),
    topk=st.integers(1, 4),
    seed=sizes,
    renormalize=st.booleans(),
)
def test_routing_is_deepseek_s(
    rows: int, groups: int, size: int, keep: int, topk: int, seed: int, renormalize: bool
) -> None:
    """transformers' DeepSeek-V3 router with any bias, and DeepSeek-V2's groups by their best expert."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    experts, topk = groups * size, min(topk, keep * size)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_local_experts": experts, "num_experts_per_tok": topk}
    sizes |= {"n_group": groups, "topk_group": keep, "norm_topk_prob": renormalize, "routed_scaling_factor": 2.5}
    router: Any = DeepseekV3TopkRouter(DeepseekV3Config(**sizes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        router.weight.copy_(torch.randn(experts, 32, generator=generator))
        router.e_score_correction_bias.copy_(torch.randn(experts, generator=generator))
        logits, weights, ids = router(torch.randn(rows, 32, generator=generator))
    have = bridge.biased_grouped_topk(
        logits, router.e_score_correction_bias, topk, groups, keep, renormalize, 2.5, provider="reference"
    )
    assert same_routing((weights, ids), have)

    scores = logits.softmax(-1)
    best = scores.view(rows, groups, size).amax(-1).sort(-1, descending=True).indices[:, :keep]
    for row in range(rows):
        allowed = [g * size + e for g in best[row].tolist() for e in range(size)]
        order = sorted(allowed, key=lambda e: -float(scores[row, e]))[:topk]
        share = scores[row, order]
        share = (share / share.sum() if renormalize else share) * 1.5
        one = bridge.grouped_topk(
            logits[row : row + 1], topk, groups, keep, renormalize, True, 1.5, provider="reference"
        )
        assert same_routing((share[None], torch.tensor([order])), one)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(3, 17), min_size=1, max_size=4),
    tokens=st.integers(1, 3),
    page_size=st.integers(1, 5),
    heads=sizes,
    seed=sizes,
    cap=st.sampled_from([0.0, 5.0]),
)
def test_mla_is_attention(lengths: list[int], tokens: int, page_size: int, heads: int, seed: int, cap: float) -> None:
    """Naive attention over the tokens in order: scaled_dot_product_attention, or by hand with a cap."""
    arguments = mla.sample(tuple(lengths), tokens, page_size, heads, 40, 24, F32, seed, cap)
    have = bridge.mla_decode_fwd(**arguments, provider="reference")
    scale = 40**-0.5 if arguments["sm_scale"] is None else arguments["sm_scale"]
    flat = arguments["kv_buffer"].flatten(0, 1)[:, 0]
    for index, length in enumerate(lengths):
        pages = arguments["kv_indices"][arguments["kv_indptr"][index] : arguments["kv_indptr"][index + 1]]
        slots = [int(page) * page_size + slot for page in pages for slot in range(page_size)][:length]
        keys = flat[slots]
        q = arguments["q"][index * tokens : (index + 1) * tokens].transpose(0, 1)
        mask = torch.ones(tokens, length).tril(length - tokens).bool()
        if cap:
            scores = (q @ keys.t() * scale / cap).tanh() * cap
            want = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ keys[:, :24]
        else:
            k, v = (t.expand(heads, *t.shape) for t in (keys, keys[:, :24].contiguous()))
            want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        assert alike(want.transpose(0, 1).contiguous(), have[index * tokens : (index + 1) * tokens])


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 40), columns=st.integers(1, 6), seed=sizes)
def test_shuffled_is_undone(rows: int, columns: int, seed: int) -> None:
    weight = torch.randint(0, 255, (16 * rows, 32 * columns), generator=torch.Generator().manual_seed(seed))
    weight = weight.to(torch.uint8).view(FN)
    tiles = shuffled(weight)
    assert tiles.shape == (rows, columns, 16, 32)
    assert torch.equal(unshuffled(tiles).view(torch.uint8), weight.view(torch.uint8))


def test_norms_are_torch_s() -> None:
    for arguments in OPS["add_rms_norm"].samples():
        x, residual, weight, eps = arguments.values()
        y, summed = bridge.add_rms_norm(x, residual, weight, eps, provider="reference")
        assert torch.equal(summed, x + residual)
        exact = F.rms_norm(x.double() + residual.double(), weight.shape, weight.double(), eps)
        assert alike(exact.to(x.dtype), y)
        plain = F.rms_norm(x.double(), weight.shape, weight.double(), eps).to(x.dtype)
        assert alike(plain, bridge.rms_norm(x, weight, eps))


def test_blockscale_is_the_product_of_what_was_quantised() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 256, generator=generator), torch.randn(384, 256, generator=generator)
    q, scale = moe.quantise_weight(w[None], "block_128", FN)
    assert scale is not None
    xs = x.view(5, 2, 128).abs().amax(-1) / 448
    xq = (x.view(5, 2, 128) / xs[..., None]).to(FN).view(5, 256)
    y = bridge.gemm_a8w8_blockscale(xq, q[0], xs, scale[0])
    assert (y.float() - x @ w.t()).norm() / (x @ w.t()).norm() < 0.05  # e4m3 keeps four bits


@pytest.mark.parametrize("quantisation", [q for q in moe.QUANTISATIONS if q != "none"])
@pytest.mark.parametrize("dtype", [FN, FNUZ, torch.int8], ids=str)
def test_quantised_experts_are_near_those_that_were_quantised(quantisation: str, dtype: torch.dtype) -> None:
    if dtype is torch.int8 and quantisation != "per_token":
        pytest.skip("AITER's int8 experts have scales per token")
    if quantisation == "mxfp4" and dtype is not FN:
        pytest.skip("its values are not of the dtype")
    generator = torch.Generator().manual_seed(0)
    x, w1 = torch.randn(6, 256, generator=generator), torch.randn(4, 256, 256, generator=generator) * 0.1
    w2 = torch.randn(4, 256, 128, generator=generator) * 0.1
    weights, ids = bridge.topk_softmax(torch.randn(6, 4, generator=generator), 2)
    want = bridge.fused_moe(x, w1, w2, weights, ids)
    (q1, s1), (q2, s2) = (moe.quantise_weight(w, quantisation, dtype) for w in (w1, w2))
    have = bridge.fused_moe(x, q1, q2, weights, ids, w1_scale=s1, w2_scale=s2, quantisation=quantisation)
    # two products of values with four bits; of MXFP4 with three
    assert (want - have).norm() / want.norm() < (0.4 if quantisation == "mxfp4" else 0.08)


def test_expert_parallel_parts_add_up() -> None:
    """Two ranks with two experts each, not next to each other."""
    arguments = next(OPS["fused_moe"].samples())
    whole = bridge.fused_moe(*list(arguments.values())[:5], provider="reference")
    parts = []
    for mine in ([0, 2], [1, 3]):
        mask = torch.zeros(4, dtype=torch.int32)
        mask[mine] = 1
        w1, w2 = arguments["w1"][mine], arguments["w2"][mine]
        x, weights, ids = arguments["hidden"], arguments["topk_weights"], arguments["topk_ids"]
        parts.append(bridge.fused_moe(x.float(), w1.float(), w2.float(), weights, ids, expert_mask=mask))
    assert alike(whole, (parts[0] + parts[1]).to(BF16))


# ---- by AITER ------------------------------------------------------------------------------------------------------


def for_aiter(op: FusedOp, double: Double) -> Iterator[dict[str, Any]]:
    """The op's samples in the GPU's FP8 format, and of the sizes that it takes."""
    if op.family in attention_samples.FOR_AITER:
        yield from attention_samples.FOR_AITER[op.family](double)
        return
    for arguments in op.samples():
        given: dict[str, Any] = {
            name: value.float().clamp(-240, 240).to(double.fp8).as_strided(value.shape, value.stride())
            if isinstance(value, Tensor) and value.dtype is FN and value.is_contiguous()
            else value.t().float().clamp(-240, 240).to(double.fp8).t()
            if isinstance(value, Tensor) and value.dtype is FN
            else double.fp8
            if value is FN
            else value
            for name, value in arguments.items()
        }
        if given.get("quantisation", "none") != "none" and not given["weights_are_shuffled"]:
            given |= {name: moe.shuffled_experts(given[name])[0] for name in ("w1", "w2")}
            given["weights_are_shuffled"] = True
        if given.get("doweight_stage1"):
            given |= {name: given[name][:, :1].contiguous() for name in ("topk_weights", "topk_ids")}
        yield given


def arch_of(family: str) -> str:
    """The first of the GPUs that AITER supports for which it has a kernel of an op."""
    return next(arch for arch in SUPPORTED if arch in RUNS_ON[family])


def apart(op: FusedOp, arguments: dict[str, Any]) -> float:
    """How far an output may be from the reference's; 0: as usual."""
    is_quantised = op.family == "asm_moe_tkw1" or arguments.get("quantisation", "none") != "none"
    return APART_QUANTISED if is_quantised else 0.0


@ops
def test_aiter(op: FusedOp, make: Callable[..., Double]) -> None:
    """Its function is called by keyword with what binds, and the result is the reference's; nothing is written to."""
    double, count = make(arch=arch_of(op.family)), 0
    for arguments in for_aiter(op, double):
        if AITER.refuse(op, arguments) is not None:
            continue
        # what writes to its arguments has nothing else to compare
        compared = {name: name for name, kind in op.arguments.items() if "!" in kind}
        given = {name: value.clone() if name in compared else value for name, value in arguments.items()}
        tensors = [value for name, value in given.items() if isinstance(value, Tensor) and name not in compared]
        before = [t.clone() for t in tensors]
        called = len(double.calls)
        want, have = op.reference(**arguments), results(op, op.target(*given.values(), "aiter"))
        for name in compared:
            assert alike(arguments[name], given[name]), name
        for name in op.outputs:
            if name == "metadata":  # AITER's own, which the reference does not need
                continue
            assert have[name].stride() == want[name].stride()
            if name == "ids":
                assert same_routing((want["weights"], want["ids"]), (have["weights"], have["ids"]))
            elif name != "weights":
                count_there = arguments.get("num_local_tokens")
                rows = slice(None if count_there is None else int(count_there))  # the others are not specified
                assert alike(want[name][rows], have[name][rows], apart(op, arguments)), name
        first = next(value for value in arguments.values() if isinstance(value, Tensor))
        if first.numel() and all(tensor.numel() for tensor in want.values()):
            assert {path.entry.name for path in ADAPTERS[op.family].paths} & set(double.called[called:])
        assert all(map(same_bits, before, tensors)), "an argument was written to"
        count += 1
    assert count >= 2


def arguments_of(family: str, double: Double, index: int = 0, **changes: Any) -> dict[str, Any]:
    return next(itertools.islice(for_aiter(OPS[family], double), index, None)) | changes


E4 = torch.zeros(5, 64)
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "the weight is torch.float32, and the kernel needs torch.bfloat16, like x": (
        "rms_norm",
        {"weight": torch.ones(64)},
    ),
    "the hidden size is 8200, and the kernel takes up to 8192": ("rms_norm", {"x": torch.zeros(2, 8200, dtype=BF16)}),
    "the hidden size is 12, and the kernel loads 8 elements at once": (
        "rms_norm",
        {"x": torch.zeros(2, 12, dtype=BF16)},
    ),
    "x is torch.float32": ("rms_norm", {"x": E4}),
    "x is not contiguous (strides (128, 1))": ("rms_norm", {"x": torch.zeros(5, 128, dtype=BF16)[:, :64]}),
    "residual is torch.float32, and the kernel needs torch.bfloat16, like x": ("add_rms_norm", {"residual": E4}),
    "this GPU's formats are torch.float8_e4m3fnuz and torch.int8": ("gemm_a8w8", {"x": E4.to(FN), "w": E4.to(FN)}),
    "x is torch.int8, w torch.float8_e4m3fnuz": ("gemm_a8w8", {"x": E4.to(torch.int8)}),
    "the result is torch.float32": ("gemm_a8w8", {"dtype": F32}),
    "x_scale has 1 elements for 5 rows": ("gemm_a8w8", {"x_scale": torch.ones(1)}),
    "w_scale is torch.float64": ("gemm_a8w8", {"w_scale": torch.ones(48, 1).double()}),
    "the bias is torch.float32, and the kernel needs torch.bfloat16, like the result": (
        "gemm_a8w8",
        {"bias": torch.ones(48)},
    ),
    "N is 192, not a multiple of 128": ("gemm_a8w8_blockscale", {"w": torch.zeros(192, 128).to(FNUZ)}),
    "K is 64, not a multiple of 128": ("gemm_a8w8_blockscale", {"w": torch.zeros(128, 64).to(FNUZ)}),
    "x_scale is [5, 2], not [5, 1]": ("gemm_a8w8_blockscale", {"x_scale": torch.ones(5, 2)}),
    "x is torch.int8, and the kernel with scales for blocks takes FP8": (
        "gemm_a8w8_blockscale",
        {"x": torch.zeros(5, 128, dtype=torch.int8)},
    ),
    "topk is 9, and there are 8 experts": ("topk_softmax", {"topk": 9}),
    "32 experts cannot be divided into 5 groups": ("grouped_topk", {"num_expert_group": 5}),
    "always renormalises": ("biased_grouped_topk", {"renormalize": False}),
    "correction_bias is torch.bfloat16, and the kernel needs torch.float32, like gating": (
        "biased_grouped_topk",
        {"correction_bias": torch.zeros(32, dtype=BF16)},
    ),
    "quantisation 'fp4' is none of": ("fused_moe", {"quantisation": "fp4"}),
    "activation 'relu' is none of": ("fused_moe", {"activation": "relu"}),
    "the weights are quantised and have no scales": ("fused_moe", {"quantisation": "per_token"}),
    "the weights are torch.float32, and without quantisation they must be torch.bfloat16, like hidden": (
        "fused_moe",
        {"w1": torch.zeros(4, 64, 64), "w2": torch.zeros(4, 64, 32)},
    ),
    "not in blocks of 128": ("fused_moe", {"quantisation": "block_128"}),
    "topk_ids is torch.int64, not torch.int32": ("fused_moe", {"topk_ids": torch.zeros(5, 2, dtype=torch.int64)}),
    "topk_weights is torch.bfloat16, not torch.float32": ("fused_moe", {"topk_weights": torch.zeros(5, 2, dtype=BF16)}),
    "doweight_stage1 is for one expert a token": ("fused_moe", {"doweight_stage1": True}),
    "the heads have 576 and 256 elements, not 576 and 512": ("mla_decode_fwd", {"value_dim": 256}),
    "logit_cap is 5.0, and the kernel has no cap": ("mla_decode_fwd", {"logit_cap": 5.0, "max_seqlen_k": None}),
    "q is FP8 without a scale": ("mla_decode_fwd", {"q": torch.zeros(3, 4, 576).to(FNUZ)}),
    "the cache is torch.float16": ("mla_decode_fwd", {"kv_buffer": torch.zeros(17, 1, 1, 576, dtype=torch.float16)}),
    "kv_indices is torch.int64, not torch.int32": (
        "mla_decode_fwd",
        {"kv_indices": torch.zeros(15, dtype=torch.int64)},
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusal(reason: str, make: Callable[..., Double]) -> None:
    family, changes = REFUSED[reason]
    arguments = arguments_of(family, make(), **changes)
    assert reason in str(AITER.refuse(OPS[family], arguments))
    assert reason in str(bridge.why_not(family, **arguments))


@pytest.mark.parametrize("off", ["AITER", "LINEAR", "LINEAR_HIPBMM"])
def test_hipb_mm_says_all_that_stands_against_it(
    off: str, make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    double = make()
    op = OPS["hipb_mm_fp8"]
    monkeypatch.setenv("AITER_FUSION_LINEAR_HIPBMM", "1")
    arguments = arguments_of("hipb_mm_fp8", double)
    assert (AITER.refuse(op, arguments), AITER.unwanted(op, arguments)) == (None, None)
    wrong = {"b": torch.zeros(8, 40).to(FNUZ).t(), "a": torch.zeros(5, 40).to(FNUZ), "dtype": torch.float16}
    wrong |= {"b_is_shuffled": True, "a_scale": torch.ones(1, 1)}
    found = str(AITER.refuse(op, arguments | wrong)).split("; ")
    assert found == [
        "the result is torch.float16, and with scales for rows hipBLASLt makes bfloat16",
        "a has 1 scales, not one for each of its 5 rows",
        "b has 48 scales, not one for each of its 8 columns",
        "N is 8, below 16",
        "N is 8, not a multiple of 16",
        "K is 40, not a multiple of 16",
        "K is 40, not a multiple of 32, which a shuffled b needs",
    ]
    monkeypatch.setenv(f"AITER_FUSION_{off}", "0")
    assert AITER.unwanted(op, arguments) == f"AITER_FUSION_{off} is off (set it to 1)"
    # by name it works whatever is preferred; unasked, the next provider computes it
    assert alike(op.reference(**arguments)["y"], op.target(*arguments.values(), "aiter"))
    called = len(double.calls)
    assert alike(op.reference(**arguments)["y"], op.target(*arguments.values(), "auto"))
    assert len(double.calls) == called
    double.arch = "gfx1201"
    assert str(AITER.refuse(op, arguments)).startswith(
        "the GPU is gfx1201, and AITER's hipb_mm_fp8 is for gfx942, gfx950; a and b are"
    )


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def hipb(m: int, n: int = 48, k: int = 64, *, is_shuffled: bool = True, bias: bool = False) -> dict[str, Any]:
    """Arguments of ``hipb_mm_fp8``, in its order, and under ``weight`` the weight row by row."""
    generator = torch.Generator().manual_seed(m)
    weight = torch.randn(n, k, generator=generator).to(FNUZ)
    return {
        "a": torch.randn(m, k, generator=generator).to(FNUZ),
        "b": (shuffled(weight).view(n, k) if is_shuffled else weight).t(),
        "a_scale": torch.rand(m, 1, generator=generator) + 0.5,
        "b_scale": torch.rand(1, n, generator=generator) + 0.5,
        "bias": torch.randn(n, generator=generator).to(BF16) if bias else None,
        "dtype": BF16,
        "b_is_shuffled": is_shuffled,
        "weight": weight,
    }


def by_hipb(given: dict[str, Any], provider: str = "aiter") -> Tensor:
    return OPS["hipb_mm_fp8"].target(*(given[name] for name in OPS["hipb_mm_fp8"].arguments), provider)


def otherwise(given: dict[str, Any], provider: str = "aiter") -> Tensor:
    """What ``gemm_a8w8`` makes of the same operands."""
    scales = given["a_scale"], given["b_scale"]
    return OPS["gemm_a8w8"].target(given["a"], given["weight"], *scales, given["bias"], BF16, provider)


@pytest.mark.parametrize("is_shuffled", [True, False], ids=["shuffled", "in rows"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_shape_without_a_kernel_is_computed_otherwise(
    is_shuffled: bool, bias: bool, make: Callable[..., Double], caplog: pytest.LogCaptureFixture
) -> None:
    """Where AITER says that hipBLASLt has none, and there only; said once for a weight's size."""
    double = make()
    double.has_kernel = lambda rows, n, k: rows not in (5, 7)
    bits = {}
    for m in (5, 16, 7, 5):
        given = hipb(m, is_shuffled=is_shuffled, bias=bias)
        before = given["b"].t().contiguous().view(torch.uint8).clone()
        bits[m] = by_hipb(given)
        assert same_bits(bits[m], otherwise(given))
        assert torch.equal(before, given["b"].t().view(torch.uint8))
    # asked once for each number of rows; what follows each failure, and each comparison, is the other product
    assert [name for name in double.called if name == "hipb_mm"] == ["hipb_mm"] * 3
    (warning,) = warnings_of(caplog)
    assert warning.startswith(
        f"hipBLASLt cannot compute 5 x 64 by a {'shuffled ' if is_shuffled else ''}weight of 48 x 64 in "
        f"torch.float8_e4m3fnuz{', with a bias' if bias else ''} (hipblasLtMatmulAlgoGetHeuristic found 0 valid"
    )
    assert "computed by aiter_fusion::gemm_a8w8 of provider aiter instead" in warning


UNSOLVED_FAULTS: dict[str, Callable[..., Any]] = {
    "tiles taken for rows": lambda arguments: {"w": shuffled(arguments["w"]).view(48, 64)},
    "the bias forgotten": lambda arguments: {"bias": None},
    "scales swapped": lambda arguments: {"x_scale": arguments["x_scale"].flip(0)},
}


@pytest.mark.parametrize("fault", UNSOLVED_FAULTS)
def test_a_faulty_detour_is_caught(fault: str, make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch) -> None:
    double, given = make(), hipb(5, bias=True)
    double.has_kernel = lambda rows, n, k: False
    want = otherwise(given)
    assert same_bits(by_hipb(given), want)
    run = BRIDGE_PROVIDERS["aiter"].run
    faulty = UNSOLVED_FAULTS[fault]

    def wrong(op: FusedOp) -> Callable[..., Any]:
        return run(op) if op.family != "gemm_a8w8" else lambda **arguments: run(op)(**(arguments | faulty(arguments)))

    monkeypatch.setitem(hipblaslt.BRIDGE_PROVIDERS, "aiter", dataclasses.replace(AITER, run=wrong))
    assert not same_bits(by_hipb(given), want)


def test_the_detour_without_aiter_s_other_product(
    make: Callable[..., Double], caplog: pytest.LogCaptureFixture
) -> None:
    models.need_scaled_rows()
    double, given = make(signatures={"gemm_a8w8": "(a, b)"}), hipb(5)
    double.has_kernel = lambda rows, n, k: False
    assert alike(OPS["gemm_a8w8"].reference(**arguments_of_gemm(given))["y"], by_hipb(given))
    assert same_bits(otherwise(given, "torch"), by_hipb(given))
    assert "computed by aiter_fusion::gemm_a8w8 of provider torch instead" in warnings_of(caplog)[0]


def arguments_of_gemm(given: dict[str, Any]) -> dict[str, Any]:
    names = {"x": "a", "w": "weight", "x_scale": "a_scale", "w_scale": "b_scale", "bias": "bias", "dtype": "dtype"}
    return {name: given[other] for name, other in names.items()}


def test_other_errors_of_hipb_mm_are_raised(make: Callable[..., Double]) -> None:
    double = make()

    def broken(double: Double, a: Any) -> Tensor:
        raise RuntimeError("HIP error: an illegal memory access was encountered")

    double.computes["hipb_mm"] = broken
    with pytest.raises(RuntimeError, match="illegal memory access"):
        by_hipb(hipb(5))


def test_one_handle_in_a_process(
    make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """AITER has one, of the device of the first call; another device's calls go to the other product."""
    double = make()
    by_hipb(hipb(5))
    assert (double.extensions, hipblaslt.known.device) == (1, 0)
    monkeypatch.setattr(hipblaslt.known, "device", 1)
    given = hipb(6)
    assert same_bits(by_hipb(given), otherwise(given))
    assert double.extensions == 1
    assert "(AITER has one handle of hipBLASLt in a process, and it is of device 1)" in warnings_of(caplog)[0]


def test_tuning(make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only if wanted, for shapes that have a kernel; its file where it is wanted, the process as it was afterwards."""
    double, here = make(), Path.cwd()
    double.has_kernel = lambda rows, n, k: rows != 7
    monkeypatch.delenv("HIP_ONLINE_TUNING", raising=False)
    for _ in range(2):
        by_hipb(hipb(5))
    assert double.tuned == []
    assert double.called == ["hipb_create_extension", "hipb_mm", "hipb_mm"]

    folder = tmp_path / "tuned"
    monkeypatch.setenv("AITER_FUSION_TUNING", str(folder))
    for m in (5, 5, 7, 600):  # what has no kernel would end the process, were it tuned
        given = hipb(m)
        assert alike(otherwise(given), by_hipb(given))
    assert double.tuned == [(5, 48, 64)] * 2
    head, *rows = (folder / "hip_online_tuning_res.csv").read_text().splitlines()
    assert head.startswith("preshuffle, use_rowwise, trans_a, trans_b, m, n, k, A_data_type")
    assert [row.split(",")[:7] for row in rows] == [["true", "true", "T", "N", "48", "5", "64"]]  # one of two calls
    assert Path.cwd() == here
    assert "HIP_ONLINE_TUNING" not in os.environ
    assert double.extensions == 1

    monkeypatch.delenv("AITER_FUSION_TUNING")
    monkeypatch.setenv("HIP_ONLINE_TUNING", "true")  # asked of AITER itself: in the current directory
    monkeypatch.chdir(tmp_path)
    for m in (6, 7):
        by_hipb(hipb(m))
    assert double.tuned[2:] == [(6, 48, 64)]
    assert os.environ["HIP_ONLINE_TUNING"] == "true"


def test_one_variable_for_hipblaslt_and_its_tuning(
    make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder for what it tunes turns it on; an explicit 0 does not."""
    double = make()
    arguments = arguments_of("hipb_mm_fp8", double)
    assert AITER.unwanted(OPS["hipb_mm_fp8"], arguments) == "AITER_FUSION_LINEAR_HIPBMM is off (set it to 1)"
    monkeypatch.setenv("AITER_FUSION_TUNING", str(tmp_path / "tuned"))
    assert AITER.unwanted(OPS["hipb_mm_fp8"], arguments) is None
    by_hipb(hipb(5), "auto")
    assert double.tuned == [(5, 48, 64)]
    monkeypatch.setenv("AITER_FUSION_LINEAR_HIPBMM", "0")
    assert AITER.unwanted(OPS["hipb_mm_fp8"], arguments) == "AITER_FUSION_LINEAR_HIPBMM is off (set it to 1)"


def test_tuning_by_releases_that_cannot(
    make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    double = make("v0.1.10.post1")
    arguments = arguments_of("hipb_mm_fp8", double)
    said = "AITER_FUSION_TUNING is set, and AITER 0.1.10.post1 cannot tune: it can from v0.1.10.post2 on"
    assert said not in str(AITER.refuse(OPS["hipb_mm_fp8"], arguments))
    monkeypatch.setenv("AITER_FUSION_TUNING", str(tmp_path / "tuned"))
    assert said in str(AITER.refuse(OPS["hipb_mm_fp8"], arguments)).split("; ")


def test_tuning_that_has_no_effect(
    make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By one that does not tell its version, or has no memory left to tune with."""
    double = make()
    monkeypatch.setenv("AITER_FUSION_TUNING", str(tmp_path / "tuned"))
    double.computes["hipb_mm"] = lambda double, a: torch.zeros(a.mat1.shape[0], a.mat2.shape[1], dtype=BF16)
    monkeypatch.setattr(installation, "aiter_version", lambda: None)
    for m in (5, 6):
        by_hipb(hipb(m))
    (warning,) = warnings_of(caplog)
    assert warning.startswith("AITER of unknown version has tuned nothing, there is no ")
    assert "it tunes from v0.1.10.post2 on, with more than 128 MiB of the GPU's memory free" in warning


FIRST_ONES = "scales all rows and columns by the first one's scales (ROCm/aiter#1258, in 0.1.6.post2)"
ENDS = "ends the process where hipBLASLt has no kernel for a shape (ROCm/aiter#2252, in 0.1.12)"


@pytest.mark.parametrize(
    ("version", "faults"),
    [("v0.1.6.post1", f"{FIRST_ONES}, and {ENDS}"), ("v0.1.6.post2", ENDS), ("v0.1.11.post1", ENDS), ("v0.1.12", None)],
)
def test_hipb_mm_of_older_releases(version: str, faults: str | None, make: Callable[..., Double]) -> None:
    """It binds in all of these."""
    double = make(version)
    why = AITER.refuse(OPS["hipb_mm_fp8"], arguments_of("hipb_mm_fp8", double))
    assert why == (faults and f"aiter.hipb_mm of AITER {version} {faults}: upgrade AITER")


def test_preferences_choose_for_every_feature(make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch) -> None:
    double = make()
    monkeypatch.setenv("AITER_FUSION_LINEAR_HIPBMM", "1")
    wanted = {"RMSNORM": 2, "LINEAR": 8, "TOPK": 6, "MOE": 3, "MLA": 4, "MHA": 3, "PAGED_ATTN": 2}
    wanted |= {"LAYERNORM": 2, "ROTARY": 2, "QUANT": 4, "SAMPLING": 3}
    for feature, count in wanted.items():
        monkeypatch.setenv(f"AITER_FUSION_{feature}", "0")
        refused = [f for f in OPS if AITER.unwanted(OPS[f], arguments_of(f, double)) is not None]
        assert len(refused) == count, feature
        monkeypatch.setenv(f"AITER_FUSION_{feature}", "1")


# ---- versions and faults -------------------------------------------------------------------------------------------

# The versions with which every function of the bridge binds: from, and up to (None: to the newest).
BINDS = {
    "layer_norm": "v0.1.5",
    "add_layer_norm": "v0.1.1",
    "rotary_embedding": "v0.1.1",
    "rotary_embedding_": "v0.1.1",
    "token_quant": "v0.1.5",
    "group_quant": "v0.1.5",
    "tensor_quant": "v0.1.3",
    "static_quant": "v0.1.3",
    "greedy_sample": "v0.1.5.post4",
    "mixed_sample": "v0.1.8",
    "top_k_renorm_probs": "v0.1.5",
    "gemm_a8w8_bpreshuffle": "v0.1.4",
    "gemm_a8w8_blockscale_bpreshuffle": "v0.1.5.post3",
    "batched_gemm_a8w8": "v0.1.1",
    "gemm_a4w4": "v0.1.9",
    "gemm_a8wfp4": "v0.1.10",
    "fused_topk": "v0.1.1",
    "topk_sigmoid": "v0.1.6.post2",
    "topk_gating": "v0.1.14",
    "asm_moe_tkw1": "v0.1.1",
    "moe_sum": "v0.1.1",
    "rms_norm": "v0.1.1",
    "add_rms_norm": "v0.1.1",
    "gemm_a8w8": "v0.1.4",
    "gemm_a8w8_blockscale": "v0.1.4",
    "hipb_mm_fp8": "v0.1.6.post1",
    "topk_softmax": "v0.1.1, not v0.1.5 to v0.1.5.post2",
    "grouped_topk": "v0.1.5",
    "biased_grouped_topk": "v0.1.1, not v0.1.3 to v0.1.4",
    "fused_moe": "v0.1.1",
} | attention_samples.BINDS
# Those with which it is called, where it is known to be wrong in some that it binds with.
CALLED = {"add_rms_norm": "v0.1.1, not v0.1.10.post1 to v0.1.10.post1", "hipb_mm_fp8": "v0.1.12"}


def spans(good: list[bool]) -> str:
    """``first, not a to b`` for the versions in which something holds; it must hold in the newest."""
    versions = aiter_double.VERSIONS
    first = good.index(True)
    assert good[-1]
    gaps = [i for i in range(first, len(good)) if not good[i]]
    return versions[first] + (f", not {versions[gaps[0]]} to {versions[gaps[-1]]}" if gaps else "")


def is_bound(path: Adapter, version: str) -> bool:
    return aiter_double.binds([path.entry, *path.others], version)


def is_called(path: Adapter, version: str) -> bool:
    return is_bound(path, version) and releases.known_bad(path.entry.name, version) is None


def test_binding_table(record_property: Callable[[str, object], None]) -> None:
    found, called = {}, {}
    for family in ADAPTERS:
        for index, path in enumerate(ADAPTERS[family].paths):
            # of several functions, each by its place
            name = family if family in SINGLE else f"{family} {index}: {path.entry.name}"
            found[name] = spans([is_bound(path, version) for version in aiter_double.VERSIONS])
            called[name] = spans([is_called(path, version) for version in aiter_double.VERSIONS])
            unlike = f" (called from {called[name]} on)" if called[name] != found[name] else ""
            record_property("row", f"binds with AITER from {found[name]:36} on: {name}{unlike}")
    assert found == BINDS
    assert called == BINDS | CALLED


@pytest.mark.parametrize(
    "version",
    ["v0.1.5", "v0.1.16.post6", *(pytest.param(version, marks=pytest.mark.slow) for version in ("v0.1.3", "v0.1.10"))],
)
def test_an_older_version(version: str, make: Callable[..., Double]) -> None:
    double = make(version)
    for family, op in SINGLE.items():
        if arch_of(family) != double.arch:
            double.forget()
            double = make(version, arch_of(family))
        arguments = arguments_of(family, double)
        why = AITER.refuse(op, arguments)
        (path,) = ADAPTERS[family].paths
        assert (why is None) == is_called(path, version), family
        if why is None:
            have = results(op, op.target(*arguments.values(), "aiter"))
            if op.outputs and not {"ids", "metadata"} & have.keys():
                assert alike(op.reference(**arguments)[op.outputs[0]], have[op.outputs[0]], apart(op, arguments))
        else:
            assert f"AITER {version}" in why


Change = Callable[[dict[str, Any]], Any]
FAULTS: dict[str, tuple[str, str, Change]] = {
    "scales swapped": ("gemm_a8w8", "x_scale", lambda g: g["x_scale"].flip(0)),
    "operands swapped": ("gemm_a8w8", "XQ", lambda g: g["WQ"]),
    "bias forgotten": ("gemm_a8w8", "bias", lambda g: None),
    "column-major scales": ("gemm_a8w8_blockscale", "x_scale", lambda g: g["x_scale"].t().contiguous().t()),
    "shuffling not said": ("hipb_mm_fp8", "bpreshuffle", lambda g: not g["bpreshuffle"]),
    "the weight not transposed": ("hipb_mm_fp8", "mat2", lambda g: g["mat2"].t()),
    "outputs swapped": ("add_rms_norm", "out", lambda g: g["residual_out"]),
    "another eps": ("rms_norm", "epsilon", lambda g: 1.0),
    "not renormalised": ("topk_softmax", "need_renorm", lambda g: not g["need_renorm"]),
    "sigmoid for softmax": ("grouped_topk", "is_softmax", lambda g: not g["is_softmax"]),
    "groups swapped": ("grouped_topk", "topk_group", lambda g: 1),
    "not scaled": ("biased_grouped_topk", "routed_scaling_factor", lambda g: 1.0),
    "no bias": ("biased_grouped_topk", "correction_bias", lambda g: g["correction_bias"] * 0),
    "experts' weights swapped": ("fused_moe", "topk_weight", lambda g: g["topk_weight"].flip(1)),
    "gelu for silu": ("fused_moe", "activation", lambda g: aiter_double.ActivationType.Gelu),
}
FAULTY_SAMPLE = {"gemm_a8w8": 1, "hipb_mm_fp8": 7, "topk_softmax": 1, "fused_moe": 0}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_adapter_is_caught(fault: str, make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch) -> None:
    family, argument, change = FAULTS[fault]
    op, double = OPS[family], make()
    arguments = next(
        a
        for a in list(for_aiter(op, double))[FAULTY_SAMPLE.get(family, 0) :]
        if AITER.refuse(op, a) is None and (fault != "bias forgotten" or a["bias"] is not None)
    )
    if fault == "column-major scales":
        x, scale = torch.randn(3, 384).to(FNUZ), torch.rand(3, 3) + 0.5
        arguments |= {"x": x, "x_scale": scale, "w": torch.randn(128, 384).to(FNUZ), "w_scale": torch.rand(1, 3)}
    real = entry_points.call
    (path,) = ADAPTERS[family].paths
    faulty = path.entry

    def call(entry: entry_points.EntryPoint, **given: Any) -> Any:
        return real(entry, **(given | {argument: change(given)} if entry is faulty else given))

    def problem() -> str | None:
        want = op.reference(**arguments)
        try:
            have = results(op, op.target(*arguments.values(), "aiter"))
        except (AssertionError, RuntimeError) as error:
            return str(error)
        if "ids" in have:
            same = same_routing((want["weights"], want["ids"]), (have["weights"], have["ids"]))
            return None if same else "routing"
        return next((name for name in op.outputs if not alike(want[name], have[name])), None)

    assert problem() is None
    for module in (adapter, hipblaslt):
        monkeypatch.setattr(module, "call", call)
    assert problem() is not None


def test_aiter_runs_on_the_device_of_its_tensors(make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch) -> None:
    """It launches on the one that is current."""
    within, seen = [], []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        within.append(tensor)
        yield
        within.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    double = None
    for arch in SUPPORTED:
        if double is not None:
            double.forget()
        double = make(arch=arch)
        for name, run in double.computes.items():
            if name == "get_mla_metadata_info_v1":  # counts, and launches nothing
                continue
            double.computes[name] = lambda double, a, run=run: (seen.append(len(within)), run(double, a))[1]
        for family in (family for family in OPS if arch_of(family) == arch):
            OPS[family].target(*arguments_of(family, double).values(), "aiter")
    assert len(seen) >= len(OPS)
    assert all(seen)


def test_what_aiter_returns_is_checked(make: Callable[..., Double]) -> None:
    double = make()
    double.computes["gemm_a8w8"] = lambda double, a: torch.zeros(a.WQ.shape[0], a.XQ.shape[0], dtype=a.dtype)
    arguments = arguments_of("gemm_a8w8", double)
    with pytest.raises(RuntimeError, match=r"aiter.gemm_a8w8 returned \[48, 5\] of torch.bfloat16 as y, and \[5, 48\]"):
        OPS["gemm_a8w8"].target(*arguments.values(), "aiter")


def test_a_module_of_linear_layers() -> None:
    """A model's own code can call it, and its weights be parameters."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(32, 64).to(FN), requires_grad=False)
            self.scale = nn.Parameter(torch.rand(32, 1), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            scale = x.abs().amax(-1, keepdim=True).float() / 448
            return bridge.gemm_a8w8((x / scale).to(FN), self.weight, scale, self.scale)

    model, x = Linear(), torch.randn(5, 64)
    assert alike(model(x), torch.compile(model, backend="aot_eager", fullgraph=True)(x))
