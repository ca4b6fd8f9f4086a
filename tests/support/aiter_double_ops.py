"""What AITER's functions for products with shuffled weights, experts, routing, norms, rotary embedding, quantisers and
sampling are documented to compute: the further half of ``aiter_double``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .aiter_double import COMPUTES, F32, VERSIONS, Double, column_major_bytes, computes, dense, product, supported

E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def in_rows(stored: Tensor) -> Tensor:
    """A weight ``[N, bytes]`` from its tiles, byte by byte as their index says."""
    n, k = stored.shape
    assert n % 16 == k % 32 == 0
    row, byte = torch.meshgrid(torch.arange(n), torch.arange(k), indexing="ij")
    at = ((row // 16 * (k // 32) + byte // 32) * 2 + byte % 32 // 16) * 256 + row % 16 * 16 + byte % 16
    return stored.reshape(-1)[at]


def bytes_in_rows(stored: Tensor) -> Tensor:
    rows = stored.contiguous().view(torch.uint8).reshape(-1, stored.shape[-1] * stored.element_size())
    return in_rows(rows).view(stored.dtype).view(stored.shape)


def e8m0(scale: Tensor) -> Tensor:
    return torch.pow(2.0, scale.view(torch.uint8).double() - 127).to(F32)


def e8m0_in_rows(stored: Tensor, rows: int, columns: int) -> Tensor:
    """Scales from AITER's order, one by one as their index says."""
    assert stored.shape[0] % 256 == stored.shape[1] % 8 == 0
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    block = r // 32 * (stored.shape[1] // 8) + c // 8
    at = block * 256 + c % 4 * 64 + r % 16 * 4 + c % 8 // 4 * 2 + r % 32 // 16
    return e8m0(stored.reshape(-1).view(torch.uint8)[at])


def fp4(packed: Tensor) -> Tensor:
    assert packed.dtype in (torch.float4_e2m1fn_x2, torch.uint8)
    codes = packed.contiguous().view(torch.uint8).int()
    table = torch.tensor([*E2M1, *(-v for v in E2M1)])
    out = torch.empty(*packed.shape[:-1], 2 * packed.shape[-1])
    out[..., 0::2], out[..., 1::2] = table[codes % 16], table[codes // 16]
    return out


def micro(values: Tensor, scale: Tensor) -> Tensor:
    return values * scale.repeat_interleave(32, -1)


def rounded_to_micro(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to 4-bit values (``uint8``) or FP8, with the least power of two for each 32 that lets none be cut off."""
    groups = x.reshape(-1, 32).double()
    top = 6.0 if dtype == torch.uint8 else torch.finfo(dtype).max
    scale = torch.pow(2.0, torch.log2(groups.abs().amax(-1, keepdim=True).clamp_min(2.0**-120) / top).ceil())
    scaled = groups / scale
    if dtype == torch.uint8:
        table = torch.tensor(E2M1, dtype=torch.float64)
        away = (scaled.abs()[..., None] - table).abs() + torch.tensor([0, 1e-9] * 4)  # of two as near, the even code
        scaled = table[away.argmin(-1)] * scaled.sign()
    else:
        scaled = scaled.to(F32).to(dtype).double()
    return (scaled * scale).to(F32).view(x.shape)


# ---- products ------------------------------------------------------------------------------------------------------


@computes
def gemm_a8w8_bpreshuffle(double: Double, a: SimpleNamespace) -> Tensor:
    assert a.WQ.dtype == double.fp8, "gemm_a8w8_bpreshuffle only support fp8 now"
    assert a.bias is None, "gemm_a8w8_bpreshuffle does not support bias now"
    y = product(dense(a.XQ), bytes_in_rows(a.WQ)) * a.x_scale.view(-1, 1) * a.w_scale.view(1, -1)
    return y.to(a.dtype)


@computes
def gemm_a8w8_blockscale_bpreshuffle(double: Double, a: SimpleNamespace) -> Tensor:
    """Reads the scales of x column by column, whatever their strides; one of its kernels takes any first stride but 1
    for scales whose strides lie."""
    supported(double, a.XQ, a.WQ)
    (m, k), n, w = a.XQ.shape, a.WQ.shape[0], bytes_in_rows(a.WQ)
    x_scale = a.x_scale.as_strided((m, k // 128), (1, m))
    assert a.x_scale.stride(0) == 1
    y = torch.zeros(m, n, dtype=torch.float64)
    for block in range(k // 128):
        columns = slice(block * 128, block * 128 + 128)
        part = a.XQ[:, columns].double() @ w[:, columns].double().t()
        y += part * x_scale[:, block, None] * dense(a.w_scale)[:, block].repeat_interleave(128)[None]
    return y.to(a.dtype)


@computes
def batched_gemm_a8w8_CK(double: Double, a: SimpleNamespace) -> Tensor:  # noqa: N802
    assert a.XQ.dtype == a.WQ.dtype == torch.int8
    sums = torch.stack([(x.double() @ w.double().t()) for x, w in zip(a.XQ, a.WQ, strict=True)]).to(F32)
    y = sums * a.x_scale * a.w_scale
    return (y if a.bias is None else y + a.bias.to(F32)).to(a.dtype)


@computes
def gemm_a4w4(double: Double, a: SimpleNamespace) -> Tensor:
    """Rows beyond M are computed too, and cut off."""
    if double.arch == "gfx942":
        raise RuntimeError("A4W4 GEMM kernel is not supported on gfx942")
    assert a.A_scale.dtype == a.B_scale.dtype == torch.float8_e8m0fnu
    (m, half), n = a.A.shape, a.B.shape[0]
    x = micro(fp4(a.A), e8m0_in_rows(a.A_scale, m, half // 16))
    stored = bytes_in_rows(a.B) if a.bpreshuffle else a.B
    w = micro(fp4(stored), e8m0_in_rows(a.B_scale, n, half // 16))
    out = torch.zeros(-(-m // 32) * 32, n, dtype=a.dtype)
    out[:m] = (x @ w.t()).to(a.dtype)
    return out[:m]


@computes
def gemm_a8wfp4(double: Double, a: SimpleNamespace) -> None:
    assert a.w.dtype == a.w_scales.dtype == torch.uint8
    w = micro(fp4(a.w), e8m0(a.w_scales))
    a.y.copy_((a.x.to(F32) @ w.t()) * a.x_scales)


# ---- experts -------------------------------------------------------------------------------------------------------


def _codes(x: Tensor, dtype: torch.dtype, given: Tensor | None, group: int) -> Tensor:
    """A row of values, quantised by the maximum of each group, or by a given scale, and back."""
    top = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    groups = x.view(-1, group)
    scale = groups.abs().amax(-1, keepdim=True) / top if given is None else given.view(1, 1)
    scale = scale + (scale == 0)
    q = (groups / scale).clamp(-top, top)
    q = torch.round(q) if dtype == torch.int8 else q.to(dtype).to(F32)
    return (q * scale).view(-1)


def _micro_experts(stored: Tensor, scale: Tensor, interleaved: bool) -> Tensor:
    """``[E, N, K]`` in float32; gate and up stored in turn by 16 rows, if ``interleaved``."""
    values = (
        fp4(bytes_in_rows(stored))
        if stored.element_size() == 1
        and stored.dtype
        in (
            torch.float4_e2m1fn_x2,
            torch.uint8,
        )
        else bytes_in_rows(stored).to(F32)
    )
    experts, rows, columns = values.shape
    assert scale.dtype == torch.float8_e8m0fnu
    w = micro(values, e8m0_in_rows(scale, experts * rows, columns // 32).view(experts, rows, -1))
    if not interleaved:
        return w
    order = [16 * (2 * block + half) + row for half in (0, 1) for block in range(rows // 32) for row in range(16)]
    return w[:, order]


def _gated(a: SimpleNamespace, both: Tensor, inner: int) -> Tensor:
    name, limit = a.activation.name, getattr(a, "swiglu_limit", None)
    if name == "Swiglu":
        gate, up = both.chunk(2)
        cut = limit or 7.0
        gate, up = gate.clamp(max=cut), up.clamp(-cut, cut)
        return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    act = {"Silu": torch.nn.functional.silu, "Gelu": torch.nn.functional.gelu}[name]
    if len(both) == inner:
        return act(both)
    gate, up = both.chunk(2)
    return act(gate) * up


@computes
def fused_moe(double: Double, a: SimpleNamespace) -> Tensor:
    """Token by token. Quantised weights, and those without up, are read as shuffled, whatever they are; others are if
    one of them has the attribute."""
    kind = a.quant_type.name
    out_dtype = getattr(a, "dtype", None) or a.hidden_states.dtype
    assert out_dtype in (torch.bfloat16, torch.float16)
    marked = any(getattr(w, "is_shuffled", False) for w in (a.w1, a.w2))
    w1, w2 = a.w1, a.w2
    interleaved = kind == "per_1x32" and a.w1.dtype == double.fp8
    if kind == "per_1x32":
        assert double.arch == "gfx950", "only there"
        assert marked
        assert (a.gate_mode == "interleave") == interleaved
        w1, w2 = _micro_experts(w1, a.w1_scale, interleaved), _micro_experts(w2, a.w2_scale, False)
        if getattr(a, "shared_w1", None) is not None:
            assert a.shared_expert_id == len(w1) - 1
            w1[-1] = _micro_experts(a.shared_w1, a.shared_w1_scale.view(torch.float8_e8m0fnu), False)[0]
            w2[-1] = _micro_experts(a.shared_w2, a.shared_w2_scale.view(torch.float8_e8m0fnu), False)[0]
    elif kind != "No":
        supported(double, w1, w2)
        w1, w2 = bytes_in_rows(w1), bytes_in_rows(w2)
    elif marked or w1.shape[1] == w2.shape[2]:
        w1, w2 = bytes_in_rows(w1), bytes_in_rows(w2)
    local: list[int | None] = list(range(w1.shape[0]))
    if a.expert_mask is not None:
        local = [int(a.expert_mask[:e].sum()) if a.expert_mask[e] else None for e in range(len(a.expert_mask))]

    def weight(w: Tensor, scale: Tensor | None, e: int) -> Tensor:
        w = w[e].to(F32)
        if kind in ("No", "per_1x32"):
            return w
        assert scale is not None
        if kind == "per_Tensor":
            return w * scale[e]
        if kind == "per_Token":
            return w * scale[e].view(-1, 1)
        return w * torch.kron(scale[e], torch.ones(128, 128))

    tokens = len(a.hidden_states)
    few = a.activation.name == "Swiglu" and tokens < 256 and not interleaved

    def inputs(x: Tensor, like: Tensor, given: Tensor | None) -> Tensor:
        if kind == "No" or (kind == "per_1x32" and few):
            return x
        if kind == "per_1x32":
            return rounded_to_micro(x, like.dtype if interleaved else torch.uint8)
        return _codes(x, like.dtype, given, 128 if kind == "per_128x128" else x.shape[-1])

    hidden, a1, a2 = a.hidden_states.to(F32), a.a1_scale, a.a2_scale
    counted = getattr(a, "num_local_tokens", None)
    there = tokens if counted is None else int(counted)
    pairs = [(t, p, local[e]) for t, row in enumerate(a.topk_ids.tolist()) for p, e in enumerate(row) if t < there]
    known = [(token, place, expert) for token, place, expert in pairs if expert is not None]
    if kind == "per_Tensor" and a1 is None:
        a1 = hidden.abs().max() / torch.finfo(a.w1.dtype).max
    biases = [getattr(a, name, None) for name in ("bias1", "bias2")]
    assert all(bias is None or (bias.dtype == F32 and a.activation.name == "Swiglu") for bias in biases)
    inner = []
    for token, place, expert in known:
        both = weight(w1, a.w1_scale, expert) @ inputs(hidden[token], a.w1, a1)
        both = both * float(a.topk_weight[token, place]) if a.doweight_stage1 else both
        both = both if biases[0] is None else both + biases[0][expert]
        inner.append(_gated(a, both, w2.shape[2]).to(out_dtype).to(F32))
    if kind == "per_Tensor" and a2 is None:
        a2 = torch.stack(inner).abs().max() / torch.finfo(a.w2.dtype).max
    out = torch.zeros(hidden.shape, dtype=F32)
    for (token, place, expert), x in zip(known, inner, strict=True):
        share = 1.0 if a.doweight_stage1 else float(a.topk_weight[token, place])
        result = weight(w2, a.w2_scale, expert) @ inputs(x, a.w2, a2)
        out[token] += (result if biases[1] is None else result + biases[1][expert]) * share
    out[there:] = float("nan")  # not specified
    return out.to(out_dtype)


@computes
def asm_moe_tkw1(double: Double, a: SimpleNamespace) -> Tensor:
    """``a16`` and ``per_tensor_quant_scale`` have no effect."""
    quant_type = SimpleNamespace(name="per_Token")
    more = {"quant_type": quant_type, "doweight_stage1": True, "w1_scale": a.fc1_scale, "w2_scale": a.fc2_scale}
    more |= {"a1_scale": a.fc1_smooth_scale, "a2_scale": a.fc2_smooth_scale}
    return COMPUTES["fused_moe"](double, SimpleNamespace(**(vars(a) | more)))


@computes
def moe_sum(double: Double, a: SimpleNamespace) -> None:
    total = torch.zeros(a.output.shape)
    for place in range(a.input.shape[1]):
        total += a.input[:, place].to(F32)
    a.output.copy_(total)


# ---- routing -------------------------------------------------------------------------------------------------------


@computes
def topk_softmax(double: Double, a: SimpleNamespace) -> None:
    """Shared experts: their weights are written after those of the others, their ids are not written."""
    assert a.token_expert_indices.dtype == a.topk_indices.dtype == torch.int32
    shared, k = getattr(a, "num_shared_experts", 0), a.topk_indices.shape[1]
    experts = a.gating_output.shape[1] - shared
    scores = torch.softmax(a.gating_output[:, :experts].to(F32), -1)
    ids = scores.argsort(-1, descending=True)[:, :k]
    a.topk_indices.copy_(ids)
    a.token_expert_indices.fill_(-1)
    picked = scores.gather(1, ids)
    a.topk_weights[:, :k] = picked / picked.sum(-1, keepdim=True) if a.need_renorm else picked
    if shared:
        assert shared in (1, 2, 4, 8)
        assert a.shared_expert_scoring_func == "sigmoid"
        a.topk_weights[:, k:] = 1 / (1 + torch.exp(-a.gating_output[:, experts:].to(F32)))


@computes
def fused_topk(double: Double, a: SimpleNamespace) -> Any:
    """The buffers of one of its kernels have rows in multiples of four."""
    m = len(a.hidden_states)
    assert m == len(a.gating_output)
    scores = torch.softmax(a.gating_output.to(F32), -1)
    weights, ids = scores.sort(-1, descending=True)
    weights, ids = weights[:, : a.topk], ids[:, : a.topk]
    weights = weights / weights.sum(-1, keepdim=True) if a.renormalize else weights
    padded = torch.zeros(-(-m // 4) * 4, a.topk), torch.zeros(-(-m // 4) * 4, a.topk, dtype=torch.int32)
    padded[0][:m], padded[1][:m] = weights, ids
    return padded[0][:m], padded[1][:m]


@computes
def topk_sigmoid(double: Double, a: SimpleNamespace) -> None:
    order = a.gating_output.to(F32).argsort(-1, descending=True)[:, : a.topk_indices.shape[1]]
    a.topk_indices.copy_(order)
    a.topk_weights.copy_(1 / (1 + torch.exp(-a.gating_output.to(F32).gather(1, order))))


@computes
def topk_gating(double: Double, a: SimpleNamespace) -> None:
    gating = a.gating_output.to(F32)
    assert a.topk_weights.dtype == F32
    assert a.topk_indices.dtype == torch.int32
    scores = {
        "softmax": lambda: torch.softmax(gating, -1),
        "sigmoid": lambda: 1 / (1 + torch.exp(-gating)),
        "sqrtsoftplus": lambda: torch.log1p(torch.exp(gating)).sqrt(),
    }[a.score_func]()
    renorm = a.need_renorm
    if a.score_func == "softmax" and VERSIONS.index(double.version) < VERSIONS.index("v0.1.20"):
        renorm = False
    ranked = scores if a.correction_bias is None else scores + a.correction_bias.to(F32)
    ids = ranked.argsort(-1, descending=True)[:, : a.topk_indices.shape[1]]
    picked = scores.gather(1, ids)
    a.topk_indices.copy_(ids)
    a.topk_weights.copy_((picked / picked.sum(-1, keepdim=True) if renorm else picked) * a.routed_scaling_factor)


# ---- norms, rotary embedding, quantisers, sampling -----------------------------------------------------------------


def _layer_norm(double: Double, a: SimpleNamespace, x: Tensor) -> Tensor:
    dtype = a.input.dtype
    if dtype not in (torch.float16, torch.bfloat16) or not (a.weight.dtype == a.bias.dtype == dtype):
        raise RuntimeError("ck layernorm2d requires weight/bias dtype to match input dtype")
    centred = x - x.mean(-1, keepdim=True)
    y = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + a.epsilon)
    return (y * a.weight.to(F32) + a.bias.to(F32)).to(dtype)


@computes
def layernorm2d_fwd(double: Double, a: SimpleNamespace) -> Tensor:
    return _layer_norm(double, a, dense(a.input).to(F32))


@computes
def layernorm2d_fwd_with_add(double: Double, a: SimpleNamespace) -> None:
    x = dense(a.input).to(F32) + dense(a.residual_in).to(F32)
    a.residual_out.copy_(x)
    a.out.copy_(_layer_norm(double, a, x))


def _turned(a: SimpleNamespace, x: Tensor, out: Tensor) -> Tensor:
    """Element by element of a head."""
    assert a.reuse_freqs_front_part
    assert a.positions.stride(1) == 1
    half, width = a.cos.shape[3], x.shape[3]
    first = width - 2 * half if a.nope_first else 0
    out.copy_(x)
    cos, sin = (table[a.positions[:, 0], 0, 0].to(F32)[:, None, None] for table in (a.cos, a.sin))
    for i in range(half):
        one, two = (first + i, first + half + i) if a.rotate_style == 0 else (first + 2 * i, first + 2 * i + 1)
        p, q = x[..., one].to(F32), x[..., two].to(F32)
        out[..., one], out[..., two] = p * cos[..., i] - q * sin[..., i], q * cos[..., i] + p * sin[..., i]
    return out


@computes
def rope_cached_positions_2c_fwd(double: Double, a: SimpleNamespace) -> Any:
    return tuple(_turned(a, x, torch.empty_like(x)) for x in (a.input_x, a.input_y))


@computes
def rope_cached_positions_2c_fwd_inplace(double: Double, a: SimpleNamespace) -> None:
    for x in (a.input_x, a.input_y):
        x.copy_(_turned(a, x, torch.empty_like(x)))


def _quantised_rows(double: Double, a: SimpleNamespace, scale: Tensor) -> None:
    supported(double, a.out)
    x = a.input.to(F32).reshape(-1, a.input.shape[-1])
    top = 127 if a.out.dtype == torch.int8 else torch.finfo(a.out.dtype).max
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    q = (x * inverse).clamp(-top, top)
    a.out.view(-1)[:] = (q.round() if a.out.dtype == torch.int8 else q).to(a.out.dtype).view(-1)


@computes
def dynamic_per_token_scaled_quant(double: Double, a: SimpleNamespace) -> None:
    """Rows of 32, 64 or 128 are groups, whose maximum counts as at least 1e-10."""
    assert a.input.is_contiguous()
    assert a.out.is_contiguous()
    width = a.input.shape[-1]
    most = a.input.to(F32).abs().amax(-1, keepdim=True).view(-1, 1)
    most = most.clamp_min(1e-10) if width in (32, 64, 128) else most
    scale = most / (127 if a.out.dtype == torch.int8 else torch.finfo(a.out.dtype).max)
    _quantised_rows(double, a, scale)
    groups = a.out.shape[-1] // width
    a.scales.view(-1)[:] = (column_major_bytes(scale.view(-1, groups)) if a.shuffle_scale else scale).view(-1)


@computes
def dynamic_per_tensor_quant(double: Double, a: SimpleNamespace) -> None:
    scale = a.input.to(F32).abs().max() / (127 if a.out.dtype == torch.int8 else torch.finfo(a.out.dtype).max)
    _quantised_rows(double, a, scale)
    a.scale.fill_(scale)


@computes
def static_per_tensor_quant(double: Double, a: SimpleNamespace) -> None:
    _quantised_rows(double, a, a.scale.view(()))


@computes
def greedy_sample(double: Double, a: SimpleNamespace) -> None:
    a.out.copy_(torch.tensor([max(range(len(row)), key=row.__getitem__) for row in a.input.to(F32).tolist()]))


@computes
def mixed_sample_outer_exponential(double: Double, a: SimpleNamespace) -> None:
    for row, (logits, noise) in enumerate(zip(a.input.to(F32), a.exponentials, strict=True)):
        heat = float(a.temperature[row])
        weighed = torch.exp((logits - logits.max()) / max(heat, 1e-5)) / (noise + a.eps)
        a.out[row] = int((logits if heat == 0 else weighed).argmax())


@computes
def top_k_renorm_probs(double: Double, a: SimpleNamespace) -> Tensor:
    assert a.maybe_top_k_arr is None
    kept = a.probs.clone()
    for row in kept:
        row[row < row.sort(descending=True).values[a.top_k_val - 1]] = 0
        row /= row.sum()
    return kept
