"""The ops of the bridge by AITER's functions: conditions as readable lists, calls by keyword only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ... import config, platform
from ...op import FusedOp, is_contiguous
from . import hipblaslt
from .entry_points import EntryPoint, call, installed, probe

F32 = torch.float32
HALVES = (torch.bfloat16, torch.float16)
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Bridge:
    """How an op of the bridge is computed.

    entry:      the function of AITER's; ``others`` those that are called besides it.
    conditions: (condition holds, what to say if it does not) for a call.
    run:        computes a call whose conditions hold; gets the op's outputs, allocated.
    """

    entry: EntryPoint
    conditions: Callable[[Arguments, torch.dtype], Iterator[tuple[bool, str]]]
    run: Callable[[EntryPoint, Arguments, dict[str, Tensor]], dict[str, Tensor]]
    others: tuple[EntryPoint, ...] = ()


def _dense(name: str, tensor: Tensor) -> tuple[bool, str]:
    return is_contiguous(tensor), f"{name} is not contiguous (strides {tuple(tensor.stride())})"


def refuse(op: FusedOp, arguments: Arguments, native: torch.dtype) -> str | None:
    """All conditions that a call does not meet, or None."""
    bridge = BRIDGES[op.family]
    failed = [message for holds, message in bridge.conditions(arguments, native) if not holds]
    failed += [found for entry in (bridge.entry, *bridge.others) if isinstance(found := probe(entry), str)]
    return "; ".join(failed) or None


def run(op: FusedOp, arguments: Arguments) -> dict[str, Tensor]:
    """Compute a call that ``refuse`` does not refuse."""
    outputs = op.allocate(**arguments)
    if any(tensor.numel() == 0 for tensor in outputs.values()):
        return outputs
    bridge = BRIDGES[op.family]
    returned = bridge.run(bridge.entry, arguments, outputs)
    for name, tensor in outputs.items():
        have = returned.get(name)
        if have is None or have.shape != tensor.shape or have.dtype != tensor.dtype:
            what = "nothing" if have is None else f"{list(have.shape)} of {have.dtype}"
            raise RuntimeError(
                f"{bridge.entry} returned {what} as {name}, and {list(tensor.shape)} of {tensor.dtype} was expected: "
                "this version of AITER is not supported"
            )
    return {name: returned[name].contiguous() for name in outputs}


# ---- norms ----------------------------------------------------------------------------------------------------------


def _norm_conditions(a: Arguments, native: torch.dtype) -> Iterator[tuple[bool, str]]:
    x, weight = a["x"], a["weight"]
    yield x.dtype in HALVES, f"x is {x.dtype}, and it takes bfloat16 and float16"
    yield weight.dtype == x.dtype, f"the weight is {weight.dtype}, and would be read as {x.dtype}"
    yield x.shape[-1] <= 8192, f"rows of {x.shape[-1]}, and its kernel takes up to 8192"
    yield x.shape[-1] % 8 == 0, f"rows of {x.shape[-1]}, and its kernel loads 8 elements at a time"
    yield _dense("x", x)
    yield _dense("weight", weight)
    if "residual" in a:
        yield a["residual"].dtype == x.dtype, f"residual is {a['residual'].dtype}, x {x.dtype}"
        yield _dense("residual", a["residual"])


def _flat(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1])


def _rms_norm(entry: EntryPoint, a: Arguments, out: dict[str, Tensor]) -> dict[str, Tensor]:
    y = call(entry, input=_flat(a["x"]), weight=a["weight"], epsilon=a["eps"])
    return {"y": y.view(out["y"].shape)}


def _add_rms_norm(entry: EntryPoint, a: Arguments, out: dict[str, Tensor]) -> dict[str, Tensor]:
    call(
        entry,
        out=_flat(out["y"]),
        input=_flat(a["x"]),
        residual_in=_flat(a["residual"]),
        residual_out=_flat(out["residual_out"]),
        weight=a["weight"],
        epsilon=a["eps"],
    )
    return out


# ---- matrix products ------------------------------------------------------------------------------------------------


def _gemm_conditions(a: Arguments, native: torch.dtype) -> Iterator[tuple[bool, str]]:
    x, w = a["x"], a["w"]
    yield x.dtype == w.dtype, f"x is {x.dtype}, w {w.dtype}"
    yield x.dtype in (native, torch.int8), f"x is {x.dtype}, and this GPU's formats are {native} and torch.int8"
    yield a["dtype"] in HALVES, f"the result is {a['dtype']}, and it makes bfloat16 and float16"
    yield _dense("x", x)
    yield _dense("w", w)
    if "bias" in a:
        for name, rows in (("x_scale", x.shape[0]), ("w_scale", w.shape[0])):
            yield a[name].dtype == F32, f"{name} is {a[name].dtype}, not float32"
            count = a[name].numel()
            yield statically_known_true(count == rows), f"{name} has {count} elements for {rows} rows"
        yield a["bias"] is None or a["bias"].dtype == a["dtype"], "the bias is of another dtype than the result"


def _blockscale_conditions(a: Arguments, native: torch.dtype) -> Iterator[tuple[bool, str]]:
    yield from _gemm_conditions(a, native)
    n, k = a["w"].shape
    yield a["x"].dtype != torch.int8, "blocks with scales are of FP8 values, not of integers"
    yield n % 128 == 0, f"N is {n}, not a multiple of 128"
    yield k % 128 == 0, f"K is {k}, not a multiple of 128"
    for name, rows in (("x_scale", a["x"].shape[0]), ("w_scale", n // 128)):
        yield a[name].dtype == F32, f"{name} is {a[name].dtype}, not float32"
        count = a[name].numel() == rows * (k // 128)
        yield statically_known_true(count), f"{name} is {list(a[name].shape)}, not {[rows, k // 128]}"


def _gemm_a8w8(entry: EntryPoint, a: Arguments, out: dict[str, Tensor]) -> dict[str, Tensor]:
    y = call(
        entry,
        XQ=a["x"],
        WQ=a["w"],
        x_scale=a["x_scale"].reshape(-1, 1).contiguous(),
        w_scale=a["w_scale"].reshape(-1, 1).contiguous(),
        bias=a["bias"],
        dtype=a["dtype"],
    )
    return {"y": y}


def _blockscale(entry: EntryPoint, a: Arguments, out: dict[str, Tensor]) -> dict[str, Tensor]:
    # it reads the scales of x by rows, whatever their strides
    y = call(
        entry,
        XQ=a["x"],
        WQ=a["w"],
        x_scale=a["x_scale"].reshape(a["x"].shape[0], -1).contiguous(),
        w_scale=a["w_scale"].contiguous(),
        dtype=a["dtype"],
    )
    return {"y": y}


def _hipb_conditions(a: Arguments, native: torch.dtype) -> Iterator[tuple[bool, str]]:
    x, b = a["a"], a["b"]
    (m, k), n = x.shape, b.shape[1]
    arch = platform.architecture(x.device.index or 0) or "unknown"
    yield arch in platform.SUPPORTED, f"the GPU is {arch}, not an MI300 or MI350"
    yield a["dtype"] is torch.bfloat16, f"the result is {a['dtype']}, and with scales for rows it makes bfloat16"
    yield x.dtype == b.dtype == native, f"a and b are {x.dtype} and {b.dtype}, and this GPU's format is {native}"
    for name, size, what in (("a", m, "rows"), ("b", n, "columns")):
        count = a[f"{name}_scale"].numel()
        yield statically_known_true(count == size), f"{name} has {count} scales, not one for each of its {size} {what}"
    yield a["a_scale"].dtype == a["b_scale"].dtype == F32, "the scales are not float32"
    yield n >= 16, f"N is {n}, below 16"
    yield n % 16 == 0, f"N is {n}, not a multiple of 16"
    yield k % 16 == 0, f"K is {k}, not a multiple of 16"
    yield not a["b_is_shuffled"] or k % 32 == 0, f"K is {k}, not a multiple of 32, and b is shuffled"
    yield a["bias"] is None or a["bias"].dtype == a["dtype"], "the bias is of another dtype than the result"
    yield _dense("a", x)
    yield is_contiguous(b.t()), f"b is not the transpose of a contiguous weight (strides {tuple(b.stride())})"
    if config.tuning() is not None:
        version, first = installed(), hipblaslt.TUNES_FROM
        tunes = version is None or version >= first
        yield tunes, f"AITER_FUSION_TUNING is set, and AITER {version} tunes nothing: it does from v{first} on"


# ---- routing and experts --------------------------------------------------------------------------------------------


def _topk_conditions(a: Arguments, native: torch.dtype) -> Iterator[tuple[bool, str]]:
    gating = a["gating"]
    yield gating.dtype in (*HALVES, F32), f"gating is {gating.dtype}"
    yield _dense("gating", gating)
    yield a["topk"] <= gating.shape[1], f"{a['topk']} of {gating.shape[1]} experts"
    if "num_expert_group" in a:
        groups = a["num_expert_group"]
        yield gating.shape[1] % groups == 0, f"{gating.shape[1]} experts in {groups} groups"
    if "correction_bias" in a:
        yield a["correction_bias"].dtype == gating.dtype, "gating and its bias differ in dtype"
        # for many tokens AITER takes another kernel, which always does
        yield a["renormalize"], "its kernel for many tokens always renormalises"


def _topk_softmax(entry: EntryPoint, a: Arguments, out: dict[str, Tensor]) -> dict[str, Tensor]:
    call(
        entry,
        topk_weights=out["weights"],
        topk_indices=out["ids"],
        token_expert_indices=torch.empty_like(out["ids"]),  # scratch
        gating_output=a["gating"],
        need_renorm=a["renormalize"],
    )
    return out


def _grouped_topk(entry: EntryPoint, a: Arguments, out: dict[str, Tensor]) -> dict[str, Tensor]:
    call(
        entry,
        gating_output=a["gating"],
        topk_weights=out["weights"],
        topk_ids=out["ids"],
        num_expert_group=a["num_expert_group"],
        topk_group=a["topk_group"],
        need_renorm=a["renormalize"],
        is_softmax=a["softmax"],
        routed_scaling_factor=a["routed_scaling_factor"],
    )
    return out


def _biased_grouped_topk(entry: EntryPoint, a: Arguments, out: dict[str, Tensor]) -> dict[str, Tensor]:
    call(
        entry,
        gating_output=a["gating"],
        correction_bias=a["correction_bias"],
        topk_weights=out["weights"],
        topk_ids=out["ids"],
        num_expert_group=a["num_expert_group"],
        topk_group=a["topk_group"],
        need_renorm=a["renormalize"],
        routed_scaling_factor=a["routed_scaling_factor"],
    )
    return out  # what it returns depends on the number of tokens; what it writes does not


# Names of AITER's enumerations.
ACTIVATIONS = {"silu": "Silu", "gelu": "Gelu"}
QUANTISATIONS = {"none": "No", "per_tensor": "per_Tensor", "per_token": "per_Token", "block_128": "per_128x128"}


def _moe_conditions(a: Arguments, native: torch.dtype) -> Iterator[tuple[bool, str]]:
    hidden, w1, w2 = a["hidden"], a["w1"], a["w2"]
    yield a["activation"] in ACTIVATIONS, f"activation {a['activation']!r} is none of {', '.join(ACTIVATIONS)}"
    known = a["quantisation"] in QUANTISATIONS
    yield known, f"quantisation {a['quantisation']!r} is none of {', '.join(QUANTISATIONS)}"
    yield hidden.dtype in HALVES, f"hidden is {hidden.dtype}, and it takes bfloat16 and float16"
    yield w1.dtype == w2.dtype, f"w1 is {w1.dtype}, w2 {w2.dtype}"
    if a["quantisation"] == "none":
        yield w1.dtype == hidden.dtype, f"the weights are {w1.dtype}, and hidden {hidden.dtype}"
    else:
        allowed = (native, torch.int8) if a["quantisation"] == "per_token" else (native,)
        yield w1.dtype in allowed, f"the weights are {w1.dtype}, not one of {', '.join(map(str, allowed))}"
        yield a["w1_scale"] is not None and a["w2_scale"] is not None, "the weights have no scales"
    if a["quantisation"] == "block_128":
        sizes = (*w1.shape[1:], *w2.shape[1:])
        yield all(size % 128 == 0 for size in sizes), f"the weights are {list(w1.shape)}, not in blocks of 128"
    yield a["topk_ids"].dtype == torch.int32, f"topk_ids are {a['topk_ids'].dtype}, not int32"
    yield a["topk_weights"].dtype == F32, f"topk_weights are {a['topk_weights'].dtype}, not float32"
    one = a["topk_ids"].shape[1] == 1
    yield not a["doweight_stage1"] or one, "doweight_stage1 is for one expert a token"
    for name in ("hidden", "w1", "w2"):
        yield _dense(name, a[name])


def _fused_moe(entry: EntryPoint, a: Arguments, out: dict[str, Tensor]) -> dict[str, Tensor]:
    library: Any = platform.load_aiter()
    y = call(
        entry,
        hidden_states=a["hidden"],
        w1=a["w1"],
        w2=a["w2"],
        topk_weight=a["topk_weights"],
        topk_ids=a["topk_ids"],
        expert_mask=a["expert_mask"],
        activation=getattr(library.ActivationType, ACTIVATIONS[a["activation"]]),
        quant_type=getattr(library.QuantType, QUANTISATIONS[a["quantisation"]]),
        doweight_stage1=a["doweight_stage1"],
        w1_scale=a["w1_scale"],
        w2_scale=a["w2_scale"],
        a1_scale=a["a1_scale"],
        a2_scale=a["a2_scale"],
    )
    return {"y": y}


# ---- attention ------------------------------------------------------------------------------------------------------


def _mla_conditions(a: Arguments, native: torch.dtype) -> Iterator[tuple[bool, str]]:
    q, kv = a["q"], a["kv_buffer"]
    yield (
        (q.shape[-1], a["value_dim"]) == (576, 512),
        f"heads of {q.shape[-1]} and {a['value_dim']}, not of 576 and 512",
    )
    yield a["logit_cap"] <= 0, f"it has no cap of logits, and {a['logit_cap']} is asked for"
    yield q.dtype in (torch.bfloat16, native), f"q is {q.dtype}, not torch.bfloat16 or {native}"
    yield kv.dtype in (torch.bfloat16, native), f"the cache is {kv.dtype}, not torch.bfloat16 or {native}"
    yield q.dtype != native or a["q_scale"] is not None, "q is FP8 without a scale"
    yield kv.dtype != native or a["kv_scale"] is not None, "the cache is FP8 without a scale"
    for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_lens"):
        yield a[name].dtype == torch.int32, f"{name} is {a[name].dtype}, not int32"
    yield _dense("q", q)
    yield _dense("kv_buffer", kv)


def _mla_decode_fwd(entry: EntryPoint, a: Arguments, out: dict[str, Tensor]) -> dict[str, Tensor]:
    call(
        entry,
        q=a["q"],
        kv_buffer=a["kv_buffer"],
        o=out["o"],
        qo_indptr=a["qo_indptr"],
        kv_indptr=a["kv_indptr"],
        kv_indices=a["kv_indices"],
        kv_last_page_lens=a["kv_last_page_lens"],
        max_seqlen_q=a["max_seqlen_q"],
        page_size=a["kv_buffer"].shape[1],
        nhead_kv=a["kv_buffer"].shape[2],
        sm_scale=a["sm_scale"],
        logit_cap=0.0,
        q_scale=a["q_scale"],
        kv_scale=a["kv_scale"],
    )
    return out


def _entry(name: str, *keywords: str, home: str = "aiter") -> EntryPoint:
    return EntryPoint(name, (home,), keywords)


_TOPK = ("topk_weights", "topk_ids", "num_expert_group", "topk_group", "need_renorm", "routed_scaling_factor")

BRIDGES = {
    "rms_norm": Bridge(_entry("rms_norm", "input", "weight", "epsilon"), _norm_conditions, _rms_norm),
    "add_rms_norm": Bridge(
        _entry("rmsnorm2d_fwd_with_add", "out", "input", "residual_in", "residual_out", "weight", "epsilon"),
        _norm_conditions,
        _add_rms_norm,
    ),
    "gemm_a8w8": Bridge(
        _entry("gemm_a8w8", "XQ", "WQ", "x_scale", "w_scale", "bias", "dtype"), _gemm_conditions, _gemm_a8w8
    ),
    "gemm_a8w8_blockscale": Bridge(
        _entry("gemm_a8w8_blockscale", "XQ", "WQ", "x_scale", "w_scale", "dtype"), _blockscale_conditions, _blockscale
    ),
    "hipb_mm_fp8": Bridge(
        hipblaslt.MULTIPLY,
        _hipb_conditions,
        hipblaslt.run,
        others=(hipblaslt.CREATE,),
    ),
    "topk_softmax": Bridge(
        _entry("topk_softmax", "topk_weights", "topk_indices", "token_expert_indices", "gating_output", "need_renorm"),
        _topk_conditions,
        _topk_softmax,
    ),
    "grouped_topk": Bridge(
        _entry("grouped_topk", "gating_output", *_TOPK, "is_softmax"), _topk_conditions, _grouped_topk
    ),
    "biased_grouped_topk": Bridge(
        _entry("biased_grouped_topk", "gating_output", "correction_bias", *_TOPK),
        _topk_conditions,
        _biased_grouped_topk,
    ),
    "fused_moe": Bridge(
        _entry(
            "fused_moe",
            *("hidden_states", "w1", "w2", "topk_weight", "topk_ids", "expert_mask", "activation", "quant_type"),
            *("doweight_stage1", "w1_scale", "w2_scale", "a1_scale", "a2_scale"),
            home="aiter.fused_moe",
        ),
        _moe_conditions,
        _fused_moe,
    ),
    "mla_decode_fwd": Bridge(
        _entry(
            "mla_decode_fwd",
            *("q", "kv_buffer", "o", "qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_lens", "max_seqlen_q"),
            *("page_size", "nhead_kv", "sm_scale", "logit_cap", "q_scale", "kv_scale"),
            home="aiter.mla",
        ),
        _mla_conditions,
        _mla_decode_fwd,
    ),
}
