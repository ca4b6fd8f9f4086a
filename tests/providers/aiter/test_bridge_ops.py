"""Products with shuffled weights, experts, routing, norms, rotary embedding, quantisers and sampling of the bridge.

Their references against PyTorch's and transformers' own code, what they refuse, what releases lack, and seeded faults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from aiter_fusion import bridge
from aiter_fusion.ops import microscaling, moe
from aiter_fusion.passes.verify import same_bits
from aiter_fusion.providers import BRIDGE_PROVIDERS
from aiter_fusion.providers.aiter import entry_points, installation
from aiter_fusion.providers.aiter import provider as provider_aiter
from aiter_fusion.providers.aiter.bridge import ADAPTERS, adapter, quantisers
from aiter_fusion.providers.architectures import ARCHITECTURES, RUNS_ON, SUPPORTED
from aiter_fusion.providers.tiles import gates_and_ups, interleaved, shuffled_scales, unshuffled_scales
from aiter_fusion.registry import REGISTRY
from support import aiter_double, aiter_double_ops
from support.aiter_double import Double
from support.bridge_results import APART_QUANTISED, alike, same_routing

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FNUZ, FN = torch.float8_e4m3fnuz, torch.float8_e4m3fn
AITER = BRIDGE_PROVIDERS["aiter"]
OPS = {family: op for (family, _), op in REGISTRY.bridge.items()}


def sample(family: str, fp8: torch.dtype = FNUZ, index: int = 0, **changes: Any) -> dict[str, Any]:
    """A sample of an op in a GPU's own FP8."""
    given = list(OPS[family].samples())[index]
    for name, value in given.items():
        if isinstance(value, Tensor) and value.dtype is FN:
            given[name] = value.float().clamp(-240, 240).to(fp8)
        elif value is FN:
            given[name] = fp8
    return given | changes


# ---- references against other code ---------------------------------------------------------------------------------


def test_layer_norm_is_torch_s() -> None:
    for given in OPS["add_layer_norm"].samples():
        x, residual, weight, bias, eps = given.values()
        exact = F.layer_norm((x.double() + residual.double()), weight.shape, weight.double(), bias.double(), eps)
        y, summed = bridge.add_layer_norm(x, residual, weight, bias, eps)
        assert alike(exact.to(x.dtype), y)
        assert torch.equal(summed, x + residual)
        alone = F.layer_norm(x.double(), weight.shape, weight.double(), bias.double(), eps)
        assert alike(alone.to(x.dtype), bridge.layer_norm(x, weight, bias, eps))


@pytest.mark.parametrize("neox", [True, False], ids=["NeoX", "GPT-J"])
def test_rotary_embedding_is_transformers(neox: bool) -> None:
    """Llama turns halves, GPT-J neighbours."""
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as of_gpt_j
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as of_llama

    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(6, 4, 16, generator=generator), torch.randn(6, 2, 16, generator=generator)
    angles, positions = torch.rand(20, 8, generator=generator) * 6, torch.tensor([3, 0, 19, 7, 7, 1])
    have = bridge.rotary_embedding(q, k, angles.cos(), angles.sin(), positions, neox)
    cos, sin = angles.cos()[positions][None], angles.sin()[positions][None]
    if neox:
        full = (torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
        turned = of_llama(q[None].transpose(1, 2), k[None].transpose(1, 2), full[0], full[1])
        want = tuple(x[0].transpose(0, 1) for x in turned)
    else:
        want = tuple(of_gpt_j(x[None], sin, cos)[0] for x in (q, k))
    assert all(map(alike, want, have))


def test_rotary_embedding_in_place() -> None:
    """Of parts of one projection, which are views; also compiled."""
    given = sample("rotary_embedding", index=2)
    q, k, *more = given.values()
    together = torch.cat((q, k), 1)
    want = bridge.rotary_embedding(q, k, *more)
    for call in (
        bridge.rotary_embedding_,
        torch.compile(bridge.rotary_embedding_, backend="aot_eager", fullgraph=True),
    ):
        qk = together.clone()
        assert call(qk[:, : q.shape[1]], qk[:, q.shape[1] :], *more) is None
        assert same_bits(torch.cat(want, 1), qk)


@pytest.mark.parametrize("dtype", [FN, FNUZ, torch.int8], ids=str)
def test_quantisers_are_near_what_they_quantise(dtype: torch.dtype) -> None:
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(0)).to(BF16) * torch.logspace(-3, 3, 7)[:, None]
    x = x.to(BF16)
    for q, scale in (
        bridge.token_quant(x, dtype),
        bridge.tensor_quant(x, dtype),
        *(
            (q, scale.repeat_interleave(64, 1))
            for q, scale in (bridge.group_quant(x, dtype, 64, column) for column in (False, True))
        ),
        (bridge.static_quant(x, torch.tensor([40.0]), dtype), torch.tensor([40.0])),
    ):
        back, most = q.float() * scale, scale.expand(7, 256) * 1.0
        # half a step of int8, or of FP8's three bits; of its smallest numbers half of one
        step = 0.5 * most if dtype is torch.int8 else x.float().abs() * 2**-4 + most * 2**-9
        assert bool(((back - x.float()).abs() <= step * 1.001).all())


def test_column_major_scales_are_the_same_numbers() -> None:
    x = torch.randn(2, 3, 256)
    (q, rows), (p, columns) = bridge.group_quant(x, FN, 64), bridge.group_quant(x, FN, 64, True)
    assert same_bits(q, p)
    assert torch.equal(rows, columns)
    assert (rows.stride(), columns.stride()) == ((12, 4, 1), (3, 1, 6))


def test_zeros() -> None:
    q, scale = bridge.token_quant(torch.zeros(2, 128), FN)
    assert not q.float().any()
    assert not scale.any()
    q, scale = bridge.group_quant(torch.zeros(2, 128), FN)
    assert not q.float().any()
    assert torch.equal(scale, torch.full((2, 1), 1e-10) / 448)


def test_sampling_follows_the_generator() -> None:
    """The tokens' shares are their probabilities, and the same numbers give the same tokens."""
    logits, count = torch.tensor([0.0, 1.0, 2.0, -1.0]), 20_000
    rows = logits.expand(count, 4).contiguous()
    noise = torch.empty(count, 4).exponential_(generator=torch.Generator().manual_seed(0))
    heat = torch.full((count,), 0.7)
    tokens = bridge.mixed_sample(rows, heat, noise)
    shares = torch.bincount(tokens.long(), minlength=4) / count
    assert (shares - (logits / 0.7).softmax(0)).abs().max() < 0.01
    assert torch.equal(tokens, bridge.mixed_sample(rows, heat, noise))
    assert torch.equal(bridge.mixed_sample(rows, heat * 0, noise), bridge.greedy_sample(rows))
    kept = bridge.top_k_renorm_probs(logits.softmax(0)[None], 2)
    assert alike(logits[1:3].softmax(0)[None], kept[:, 1:3])
    assert not kept[:, [0, 3]].any()


def test_experts_are_gpt_oss_s() -> None:
    """transformers' experts with their clamp and biases, gate and up in turn by column there."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=32, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2)
    experts: Any = GptOssExperts(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        x = torch.randn(5, 32, generator=generator) * 3  # so that some values are cut off
        scores = torch.randn(5, 4, generator=generator).softmax(-1)
        weights, ids = scores.topk(2, -1)
        want = experts(x, ids, weights)
        first = experts.gate_up_proj.mT  # [E, 2 I, D], gate and up in turn
        w1 = torch.cat((first[:, ::2], first[:, 1::2]), 1)
        bias1 = torch.cat((experts.gate_up_proj_bias[:, ::2], experts.gate_up_proj_bias[:, 1::2]), 1)
        have = bridge.fused_moe(
            x,
            w1.contiguous(),
            experts.down_proj.mT.contiguous(),
            weights,
            ids.int(),
            activation="swiglu",
            bias1=bias1,
            bias2=experts.down_proj_bias,
        )
    assert alike(want, have, 1e-4)


def test_experts_of_llama_4() -> None:
    """Its weights are multiplied in before the experts' first product: the same, because they are before the
    activation."""
    given = sample("asm_moe_tkw1", FN)
    plain = given | {name: _in_rows(given[name]) for name in ("w1", "w2")}
    scores = plain.pop("topk_weights")
    weighted = plain | {"hidden": plain["hidden"].float() * scores, "topk_weights": torch.ones_like(scores)}
    options = {"quantisation": "per_token", "w1_scale": given["w1_scale"], "w2_scale": given["w2_scale"]}
    named = {name: weighted[name] for name in ("hidden", "w1", "w2", "topk_weights", "topk_ids")}
    want = bridge.fused_moe(**named, **options).to(BF16)
    assert alike(want, OPS["asm_moe_tkw1"].reference(**given)["y"], APART_QUANTISED)


def _in_rows(weight: Tensor) -> Tensor:
    return aiter_double_ops.bytes_in_rows(weight)


def test_routing_with_shared_experts_is_qwen_s() -> None:
    """transformers: the shared expert's gate is a logit of its own, and its sigmoid the weight."""
    gating = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    weights, ids = bridge.topk_softmax(gating, 3, True, 1)
    of_routed, chosen = gating[:, :8].softmax(-1).topk(3, -1)
    assert torch.equal(ids, torch.cat((chosen, torch.full((6, 1), 8)), 1).int())
    assert alike(torch.cat((of_routed / of_routed.sum(-1, keepdim=True), gating[:, 8:].sigmoid()), 1), weights)


def test_scores_of_deepseek_v4_and_llama_4() -> None:
    gating = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    weights, ids = bridge.topk_gating(gating, 3, None, True, 1.5)
    scores = torch.log1p(gating.exp()).sqrt()
    want, chosen = scores.topk(3, -1)
    assert same_routing((want / want.sum(-1, keepdim=True) * 1.5, chosen), (weights, ids))
    assert same_routing(bridge.topk_sigmoid(gating, 2), bridge.topk_gating(gating, 2, None, False, 1.0, "sigmoid"))
    assert same_routing(bridge.fused_topk(gating, 2), bridge.topk_gating(gating, 2, None, True, 1.0, "softmax"))
    with pytest.raises(ValueError, match="'tanh' is none of sqrtsoftplus, sigmoid, softmax"):
        OPS["topk_gating"].target(gating, 2, None, True, 1.0, "tanh", "reference")


def test_microscaling_is_torchao_s() -> None:
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 64)[:, None]
    x[3] = 0
    for quantise, dtype in ((microscaling.to_mxfp4, torch.float4_e2m1fn_x2), (microscaling.to_mxfp8, FN)):
        values, scales = quantise(x)
        want_scales, want = to_mx(x, dtype, 32, ScaleCalculationMode.RCEIL)
        assert torch.equal(scales, want_scales.view(torch.uint8))
        assert torch.equal(values.view(torch.uint8), want.view(torch.uint8).view(values.shape))
    back = microscaling.dequantised(*microscaling.to_mxfp4(x))
    assert (back - x).norm() / x.norm() < 0.13


@pytest.mark.parametrize(("rows", "columns"), [(70, 11), (256, 8), (1, 3), (300, 16)])
def test_shuffled_scales_are_undone(rows: int, columns: int) -> None:
    scales = torch.randint(0, 255, (rows, columns)).to(torch.uint8)
    stored = shuffled_scales(scales)
    assert stored.shape == (-(-rows // 256) * 256, -(-columns // 8) * 8)
    assert torch.equal(unshuffled_scales(stored, rows, columns), scales)
    assert torch.equal(aiter_double_ops.e8m0_in_rows(stored, rows, columns), microscaling.scales_as_numbers(scales))


def test_interleaving_is_undone() -> None:
    weight = torch.arange(2 * 64 * 3).view(2, 64, 3)
    turns = interleaved(weight)
    assert torch.equal(turns[0, 16:32], weight[0, 32:48])
    assert torch.equal(gates_and_ups(turns), weight)


# ---- what is refused -----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "weight is torch.float32, and the kernel needs torch.bfloat16, like x": (
        "layer_norm",
        "gfx942",
        {"weight": torch.ones(64)},
    ),
    "residual is not contiguous": ("add_layer_norm", "gfx942", {"residual": torch.zeros(5, 128, dtype=BF16)[:, ::2]}),
    "cos is torch.float32, and the kernel needs torch.bfloat16, like q": (
        "rotary_embedding",
        "gfx942",
        {"cos": torch.zeros(20, 8)},
    ),
    "cos turns 32 elements of a head of 16": (
        "rotary_embedding",
        "gfx942",
        {"cos": torch.zeros(20, 16, dtype=BF16)},
    ),
    "positions is torch.int32, not torch.int64": (
        "rotary_embedding_",
        "gfx942",
        {"positions": torch.zeros(5, dtype=torch.int32)},
    ),
    "the hidden size is 9000, and the kernel takes up to 8192": (
        "token_quant",
        "gfx942",
        {"x": torch.zeros(2, 9000, dtype=BF16)},
    ),
    "the values are torch.float8_e4m3fn, and the kernel takes torch.float8_e4m3fnuz, torch.int8": (
        "tensor_quant",
        "gfx942",
        {"dtype": FN},
    ),
    "groups are of 48, and the kernel takes 32, 64, 128": ("group_quant", "gfx942", {"group": 48}),
    "the hidden size is 192, not a multiple of 128": ("group_quant", "gfx942", {"x": torch.zeros(2, 192, dtype=BF16)}),
    "scale has 2 elements, not one": ("static_quant", "gfx942", {"scale": torch.ones(2)}),
    "logits are torch.float64": ("greedy_sample", "gfx942", {"logits": torch.zeros(2, 4).double()}),
    "temperatures is [3], not [5]": ("mixed_sample", "gfx942", {"temperatures": torch.ones(3)}),
    "topk is 0, and at least one probability must stay": ("top_k_renorm_probs", "gfx942", {"topk": 0}),
    "w is torch.float8_e4m3fn, and this GPU's FP8 format is torch.float8_e4m3fnuz": (
        "gemm_a8w8_bpreshuffle",
        "gfx942",
        {"w": torch.zeros(48, 64).to(FN)},
    ),
    "K is 48, not a multiple of 32, which a shuffled weight needs": (
        "gemm_a8w8_bpreshuffle",
        "gfx942",
        {"w": torch.zeros(48, 48).to(FNUZ)},
    ),
    "x_scale is [5, 3], not [5, 2]": (
        "gemm_a8w8_blockscale_bpreshuffle",
        "gfx942",
        {"x_scale": torch.ones(5, 3)},
    ),
    "x is torch.float8_e4m3fnuz, not torch.int8": (
        "batched_gemm_a8w8",
        "gfx942",
        {"x": torch.zeros(3, 5, 64).to(FNUZ)},
    ),
    "the GPU is gfx942, and AITER's gemm_a4w4 is for gfx950": ("gemm_a4w4", "gfx942", {}),
    "the result is torch.float16, and the kernel makes bfloat16": ("gemm_a4w4", "gfx950", {"dtype": F16}),
    "w_scale is [48, 8], not [256, 8]": ("gemm_a4w4", "gfx950", {"w_scale": torch.zeros(48, 8, dtype=torch.uint8)}),
    "x_scale is torch.float32, and scales are E8M0 bytes": ("gemm_a4w4", "gfx950", {"x_scale": torch.zeros(5, 8)}),
    "w_scale is [48, 4], not [48, 8]": ("gemm_a8wfp4", "gfx950", {"w_scale": torch.zeros(48, 4, dtype=torch.uint8)}),
    "num_shared_experts is 3, and kernels are for 0, 1, 2, 4, 8": ("topk_softmax", "gfx942", {"num_shared_experts": 3}),
    "topk is 65, and the kernel takes up to 64": ("topk_gating", "gfx942", {"topk": 65}),
    "correction_bias is torch.float16, and with torch.float32 it must be torch.float32": (
        "topk_gating",
        "gfx942",
        {"correction_bias": torch.zeros(32, dtype=F16)},
    ),
    "gating is torch.float64": ("topk_sigmoid", "gfx942", {"gating": torch.zeros(2, 8).double()}),
    "num_expert_group is 4, and of 2 or 4 groups the kernel computes wrong scores (ROCm/aiter#2153, open)": (
        "biased_grouped_topk",
        "gfx942",
        {"num_expert_group": 4},
    ),
    "x is torch.float64": ("moe_sum", "gfx942", {"x": torch.zeros(2, 2, 8).double()}),
    "activation 'swiglu' is none of silu, gelu": ("asm_moe_tkw1", "gfx942", {"activation": "swiglu"}),
    "swiglu is for weights with microscaling alone": ("fused_moe", "gfx942", {"activation": "swiglu"}),
    "swiglu_limit is given with silu, and only some of its kernels cut off then": (
        "fused_moe",
        "gfx942",
        {"swiglu_limit": 7.0},
    ),
    "bias1 is given with silu, and it is added with swiglu alone": (
        "fused_moe",
        "gfx942",
        {"bias1": torch.zeros(4, 64)},
    ),
    "bias2 is torch.bfloat16, not torch.float32": ("fused_moe", "gfx942", {"bias2": torch.zeros(4, 64, dtype=BF16)}),
    "num_local_tokens is (torch.int64, 1), not one element of torch.int32": (
        "fused_moe",
        "gfx942",
        {"num_local_tokens": torch.tensor([3])},
    ),
    "the GPU is gfx942, and microscaling is for gfx950": ("fused_moe", "gfx942", {"quantisation": "mxfp4"}),
    "w1_scale is not as bridge.shuffled_experts gives it": ("fused_moe", "gfx950", {"quantisation": "mxfp8"}),
    "the weights lie in rows, and AITER reads quantised weights shuffled: bridge.shuffled_experts": (
        "fused_moe",
        "gfx942",
        {"quantisation": "per_token"},
    ),
    "the weights lie in rows, and AITER reads weights without up shuffled": (
        "fused_moe",
        "gfx942",
        {"w1": torch.zeros(4, 32, 64, dtype=BF16)},
    ),
    "shared_w1 without shared_w2, shared_w1_scale, shared_w2_scale; a shared expert is for mxfp4 and silu": (
        "fused_moe",
        "gfx950",
        {"shared_w1": torch.zeros(1, 64, 64).to(FN)},
    ),
    "the result is torch.float32, and the kernel makes bfloat16 and float16": ("fused_moe", "gfx942", {"dtype": F32}),
}


@pytest.mark.parametrize("arch", SUPPORTED)
def test_refusal(arch: str, make: Callable[..., Double]) -> None:
    double = make(arch=arch)
    for reason, (family, wanted, changes) in REFUSED.items():
        if wanted == arch:
            assert reason in str(bridge.why_not(family, **sample(family, double.fp8, **changes)))


def test_every_objection_at_once(make: Callable[..., Double]) -> None:
    double = make()
    given = sample("gemm_a8w8_bpreshuffle", double.fp8)
    wrong = {"x": torch.zeros(5, 40), "w": torch.zeros(8, 40).to(FNUZ), "dtype": F32, "w_scale": torch.ones(3).double()}
    assert str(bridge.why_not("gemm_a8w8_bpreshuffle", **(given | wrong))).split("; ") == [
        "x is torch.float32, and this GPU's FP8 format is torch.float8_e4m3fnuz",
        "the result is torch.float32, and the kernel makes bfloat16 and float16",
        "N is 8, not a multiple of 16, which a shuffled weight needs",
        "K is 40, not a multiple of 32, which a shuffled weight needs",
        "w_scale is torch.float64, not torch.float32",
        "w_scale has 3 elements for 8 rows",
    ]


def test_a_mark_of_aiter_s_is_not_overlooked(make: Callable[..., Double]) -> None:
    """A weight that AITER's own ``shuffle_weight`` made, called as if it lay in rows."""
    make()
    given = sample("fused_moe")
    given["w1"] = given["w1"].clone()
    given["w1"].is_shuffled = True  # type: ignore[attr-defined]
    why = bridge.why_not("fused_moe", **given)
    assert why == "a weight has AITER's mark is_shuffled, and weights_are_shuffled is False"


def test_the_caller_s_weights_get_no_mark(make: Callable[..., Double]) -> None:
    double = make()
    given = sample("fused_moe", index=20)
    assert given["weights_are_shuffled"]
    bridge.fused_moe(**given, provider="aiter")
    (passed,) = [a for name, a in double.calls if name == "fused_moe"]
    assert passed.w1.is_shuffled
    assert passed.w1.data_ptr() == given["w1"].data_ptr()
    assert not hasattr(given["w1"], "is_shuffled")


def test_one_row_of_scales_has_their_strides_too(make: Callable[..., Double]) -> None:
    """Of one row the bytes are the same, and a stride other than 1 would be taken for scales that lie."""
    double = make()
    given = sample("gemm_a8w8_blockscale_bpreshuffle", double.fp8, index=2)
    assert given["x_scale"].shape == (1, 2)
    bridge.gemm_a8w8_blockscale_bpreshuffle(**given, provider="aiter")
    (passed,) = [a for name, a in double.calls if name == "gemm_a8w8_blockscale_bpreshuffle"]
    assert passed.x_scale.stride() == (1, 1)


# ---- releases ------------------------------------------------------------------------------------------------------

# Arguments that not all releases with the function have: the first that has them.
SINCE = {
    ("fused_moe", "num_local_tokens"): "v0.1.4",
    ("fused_moe", "dtype"): "v0.1.4",
    ("fused_moe", "moe_sorting_dispatch_policy"): "v0.1.5",
    ("fused_moe", "hidden_pad"): "v0.1.6.post2",
    ("fused_moe", "intermediate_pad"): "v0.1.6.post2",
    ("fused_moe", "bias1"): "v0.1.6.post2",
    ("fused_moe", "bias2"): "v0.1.6.post2",
    ("fused_moe", "swiglu_limit"): "v0.1.14",
    ("fused_moe", "gate_mode"): "v0.1.14",
    ("fused_moe", "shared_w1"): "v0.1.19.post1",
    ("fused_moe", "shared_w2"): "v0.1.19.post1",
    ("fused_moe", "shared_w1_scale"): "v0.1.19.post1",
    ("fused_moe", "shared_w2_scale"): "v0.1.19.post1",
    ("fused_moe", "shared_expert_id"): "v0.1.19.post1",
    ("topk_softmax", "num_shared_experts"): "v0.1.12",
    ("topk_softmax", "shared_expert_scoring_func"): "v0.1.12",
}


def optional_keywords() -> Iterator[tuple[str, str, adapter.Adapter]]:
    for family, known in ADAPTERS.items():
        for path in known.paths:
            yield from ((family, keyword, path) for keyword in path.optional)


def test_since_when_arguments_bind(record_property: Callable[[str, object], None]) -> None:
    found = {}
    for family, keyword, path in optional_keywords():
        entry = path.entry_with(frozenset({keyword}))
        binds = [aiter_double.binds([entry], version) for version in aiter_double.VERSIONS]
        found[family, keyword] = aiter_double.VERSIONS[binds.index(True)]
        assert all(binds[binds.index(True) :])
        record_property("row", f"binds with AITER from {found[family, keyword]:36} on: {family}, {keyword}")
    assert found == SINCE


def test_an_argument_that_a_release_lacks(make: Callable[..., Double]) -> None:
    """Only calls that need it are refused."""
    double = make("v0.1.3")
    given = sample("fused_moe", double.fp8)
    assert bridge.why_not("fused_moe", **given) is None
    said = {"num_local_tokens": torch.tensor([3], dtype=torch.int32), "sorting_policy": 1}
    why = bridge.why_not("fused_moe", **(given | said))
    assert (
        why
        == "aiter.fused_moe.fused_moe of AITER v0.1.3 takes no argument num_local_tokens, moe_sorting_dispatch_policy"
    )


@pytest.mark.parametrize(("version", "fault"), [("v0.1.19.post2", True), ("v0.1.20", False)])
def test_softmax_that_is_not_renormalised(version: str, fault: bool, make: Callable[..., Double]) -> None:
    make(version)
    given = sample("topk_gating", index=4)
    assert (given["score"], given["renormalize"]) == ("softmax", True)
    why = bridge.why_not("topk_gating", **given)
    said = f"AITER {version} does not renormalise softmax (ROCm/aiter#4460, in 0.1.20)"
    assert why == (said if fault else None)
    for other in ({"renormalize": False}, {"score": "sigmoid"}):
        arguments: dict[str, Any] = given | other
        assert bridge.why_not("topk_gating", **arguments) is None


# ---- architectures -------------------------------------------------------------------------------------------------


def test_every_op_has_its_row() -> None:
    assert RUNS_ON.keys() == ADAPTERS.keys()
    for family, architectures in RUNS_ON.items():
        assert set(architectures) <= ARCHITECTURES.keys(), family


def on_mi200() -> list[tuple[str, int, dict[str, Any]]]:
    """The samples without FP8 of every op that gfx90a has."""
    found = []
    for family in (family for family, known in RUNS_ON.items() if "gfx90a" in known):
        if "attn" in family or "attention" in family or "cache" in family:
            continue  # theirs are in test_bridge_attention
        for index, given in enumerate(OPS[family].samples()):
            values = [v.dtype if isinstance(v, Tensor) else v for v in given.values()]
            if FN not in values and FNUZ not in values:
                found.append((family, index, given))
    return found


def test_mi200_computes_what_needs_no_fp8(make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch) -> None:
    double = make(arch="gfx90a")
    double.fp8 = torch.uint8  # AITER's answer for GPUs without
    installation.load_aiter().dtypes.fp8 = torch.uint8  # type: ignore[attr-defined]
    provider_aiter.missing.cache_clear()
    assert AITER.missing() is None
    ran = set()
    for family, _, given in on_mi200():
        op = OPS[family]
        if AITER.refuse(op, given) is None and op.outputs:
            have = op.target(*given.values(), "aiter")
            want = op.reference(**given)
            first = have if isinstance(have, Tensor) else have[0]
            if "ids" not in want and given.get("num_local_tokens") is None and first.numel():
                quantised = given.get("quantisation", "none") != "none"
                assert alike(want[op.outputs[0]], first, APART_QUANTISED if quantised else 0.0), family
            ran.add(family)
    assert ran >= {"rms_norm", "add_rms_norm", "layer_norm", "rotary_embedding", "gemm_a8w8", "batched_gemm_a8w8"}
    assert ran >= {"topk_softmax", "grouped_topk", "biased_grouped_topk", "fused_topk", "topk_sigmoid", "fused_moe"}
    assert ran >= {"moe_sum", "token_quant", "group_quant", "greedy_sample", "mixed_sample", "top_k_renorm_probs"}
    for family in ("gemm_a8w8_bpreshuffle", "hipb_mm_fp8", "gemm_a4w4", "asm_moe_tkw1", "topk_gating"):
        why = str(bridge.why_not(family, **sample(family, FN)))
        assert why.startswith(f"the GPU is gfx90a, and AITER's {family} is for {', '.join(RUNS_ON[family])}")
    why = str(bridge.why_not("gemm_a8w8", **sample("gemm_a8w8", FN)))
    assert why == "x is torch.float8_e4m3fn, and this GPU's formats are torch.int8"
    assert AITER.unwanted(OPS["rms_norm"], sample("rms_norm")) == (
        "AITER's kernels for gfx90a are experimental: ask for provider='aiter' by name to use them"
    )
    fused = REGISTRY.ops["rms_norm_quant", frozenset()]
    x = torch.zeros(2, 64, dtype=BF16)
    assert AITER.refuse(fused, {"x": x, "quant_dtype": FN}) == "gfx90a computes with no FP8"


# ---- seeded faults -------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]
FAULTS: dict[str, tuple[str, int, str, Change]] = {
    "the weight in rows": ("gemm_a8w8_bpreshuffle", 0, "WQ", lambda g: aiter_double_ops.bytes_in_rows(g["WQ"])),
    "scales of rows swapped": ("gemm_a8w8_bpreshuffle", 0, "x_scale", lambda g: g["x_scale"].flip(0)),
    "scales of rows for those of columns": (
        "gemm_a8w8_blockscale_bpreshuffle",
        0,
        "x_scale",
        lambda g: g["x_scale"].contiguous(),
    ),
    "blocks transposed": ("gemm_a8w8_blockscale_bpreshuffle", 0, "w_scale", lambda g: g["w_scale"].flip(1)),
    "the batch reversed": ("batched_gemm_a8w8", 0, "WQ", lambda g: g["WQ"].flip(0)),
    "no bias of the batch": ("batched_gemm_a8w8", 2, "bias", lambda g: None),
    "scales not shuffled": (
        "gemm_a4w4",
        0,
        "A_scale",
        lambda g: unshuffled_scales(g["A_scale"], 256, 8),
    ),
    "4-bit halves swapped": (
        "gemm_a4w4",
        0,
        "A",
        lambda g: (lambda b: (b << 4) | (b >> 4))(g["A"].view(torch.uint8)).view(torch.float4_e2m1fn_x2),
    ),
    "scales of the weight shifted": ("gemm_a8wfp4", 0, "w_scales", lambda g: g["w_scales"].roll(1, 0)),
    "neighbours for halves": ("rotary_embedding", 0, "rotate_style", lambda g: 1 - g["rotate_style"]),
    "sine for cosine": ("rotary_embedding", 0, "cos", lambda g: g["sin"]),
    "the wrong end kept": ("rotary_embedding", 2, "nope_first", lambda g: not g["nope_first"]),
    "positions in order": ("rotary_embedding_", 0, "positions", lambda g: torch.arange(5)[:, None]),
    "no bias of the norm": ("layer_norm", 0, "bias", lambda g: g["bias"] * 0),
    "the residual twice": ("add_layer_norm", 0, "input", lambda g: g["residual_in"]),
    "rows for groups": ("group_quant", 0, "input", lambda g: g["input"].flip(0)),
    "column-major bytes": ("group_quant", 0, "shuffle_scale", lambda g: True),
    "another scale": ("static_quant", 0, "scale", lambda g: g["scale"] * 2),
    "a row's scale for another's": ("token_quant", 0, "input", lambda g: g["input"].flip(0)),
    "half of the tensor": ("tensor_quant", 0, "input", lambda g: g["input"] / 2),
    "the coldest token": ("greedy_sample", 0, "input", lambda g: -g["input"]),
    "no temperature": ("mixed_sample", 0, "temperature", lambda g: g["temperature"] * 0),
    "other noise": ("mixed_sample", 0, "exponentials", lambda g: g["exponentials"].flip(1)),
    "one more stays": ("top_k_renorm_probs", 0, "top_k_val", lambda g: g["top_k_val"] + 1),
    "a shared expert is routed to": ("topk_softmax", 8, "num_shared_experts", lambda g: 0),
    "not renormalised by the best kernel": ("fused_topk", 0, "renormalize", lambda g: not g["renormalize"]),
    "another score": ("topk_gating", 0, "score_func", lambda g: "sigmoid"),
    "no factor": ("topk_gating", 0, "routed_scaling_factor", lambda g: 1.0),
    "no bias of the gate": ("topk_gating", 0, "correction_bias", lambda g: None),
    "logits for experts": ("topk_sigmoid", 0, "gating_output", lambda g: -g["gating_output"]),
    "an expert left out": ("moe_sum", 0, "input", lambda g: g["input"][:, :1]),
    "gate and up not in turn": ("fused_moe", 18, "gate_mode", lambda g: "separated"),
    "an expert's weight in rows": ("fused_moe", 15, "w2", lambda g: aiter_double_ops.bytes_in_rows(g["w2"])),
    "no limit": ("fused_moe", 17, "swiglu_limit", lambda g: 0.5),
    "bias of the other product": ("fused_moe", 17, "bias2", lambda g: g["bias2"] * 0),
    "one token fewer": ("fused_moe", 19, "num_local_tokens", lambda g: g["num_local_tokens"] - 1),
    "the routed expert for the shared one": ("fused_moe", 22, "shared_w1", lambda g: None),
    "weights after the activation": ("asm_moe_tkw1", 0, "topk_weight", lambda g: g["topk_weight"] * 0 + 1),
    "scales of the other weight": ("asm_moe_tkw1", 0, "fc2_scale", lambda g: g["fc2_scale"].flip(1)),
}


def distinct(family: str, given: dict[str, Any], have: dict[str, Tensor]) -> str | None:
    """The first output that is not the reference's."""
    want = OPS[family].reference(**given)
    rows = slice(None if given.get("num_local_tokens") is None else int(given["num_local_tokens"]))
    if "ids" in want:
        same = same_routing((want["weights"], want["ids"]), (have["weights"], have["ids"]))
        return None if same else "routing"
    quantised = family == "asm_moe_tkw1" or given.get("quantisation", "none") != "none"
    apart = APART_QUANTISED if quantised else 0.0
    return next((name for name in want if not alike(want[name][rows], have[name][rows], apart)), None)


@pytest.mark.parametrize("arch", SUPPORTED)
def test_faulty_adapters_are_caught(
    arch: str,
    make: Callable[..., Double],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    double, caught = make(arch=arch), 0
    for fault, (family, index, keyword, change) in FAULTS.items():
        on = "gfx950" if family == "fused_moe" or "gfx942" not in RUNS_ON[family] else "gfx942"
        if on == arch:
            given = sample(family, double.fp8, index)
            assert problem(family, given) is None, fault
            with monkeypatch.context() as patched:
                for module in (adapter, quantisers):
                    patched.setattr(module, "call", changed(keyword, change))
                assert problem(family, given) is not None, fault
            caught += 1
    record_property("row", f"seeded faults of the bridge's further adapters caught on {arch}: {caught}")
    assert caught >= 9


def changed(keyword: str, change: Change) -> Callable[..., Any]:
    """The call of an entry point, with another value of a keyword."""
    return lambda entry, **passed: entry_points.call(entry, **(passed | {keyword: change(passed)}))


def problem(family: str, given: dict[str, Any]) -> str | None:
    """How AITER's result differs from the reference's, or what went wrong."""
    op = OPS[family]
    arguments = {name: v.clone() if isinstance(v, Tensor) and not op.outputs else v for name, v in given.items()}
    try:
        found = op.target(*arguments.values(), "aiter")
    except (AssertionError, RuntimeError, TypeError, ValueError, KeyError) as error:
        return str(error) or "an assertion"
    if not op.outputs:
        want = OPS["rotary_embedding"].reference(**given)
        return None if alike(want["q_out"], arguments["q"]) and alike(want["k_out"], arguments["k"]) else "q or k"
    have = dict(zip(op.outputs, (found,) if isinstance(found, Tensor) else found, strict=True))
    return distinct(family, given, have)


def test_samples_of_experts_are_where_the_faults_are() -> None:
    """The indices above."""
    found = [(case.quantisation, case.activation, sorted(case.more)) for case in moe._CASES]
    assert found[15][0] == found[17][0] == "mxfp4"
    assert found[17][1:] == ("swiglu", ["bias1", "bias2", "swiglu_limit"])
    assert found[18][0] == "mxfp8"
    assert found[19][2] == ["num_local_tokens", "sorting_policy"]
    assert found[20][2] == ["dtype", "weights_are_shuffled"]
    assert found[22][2] == ["shared"]
