"""Mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .... import machine
from ..entry_points import Value, constant, same
from ..installation import load_aiter
from .adapter import (
    F32,
    HALVES,
    Adapter,
    Arguments,
    Condition,
    Optional,
    contiguous,
    entry,
    formats,
    of_dtype,
    optional,
)

# Our names -> those of AITER's enumerations.
ACTIVATIONS = {"silu": "Silu", "gelu": "Gelu", "swiglu": "Swiglu"}
QUANTISATIONS = {
    "none": "No",
    "per_tensor": "per_Tensor",
    "per_token": "per_Token",
    "block_128": "per_128x128",
    "mxfp4": "per_1x32",
    "mxfp8": "per_1x32",
}
MICROSCALING = ("mxfp4", "mxfp8")
# Rows and columns of 8-bit weights are in multiples of these where microscaling shares their scales.
WHOLE = 256


def _experts(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    hidden, quantisation = a["hidden"], a["quantisation"]
    yield a["activation"] in ACTIVATIONS, f"activation {a['activation']!r} is none of {', '.join(ACTIVATIONS)}"
    yield quantisation in QUANTISATIONS, f"quantisation {quantisation!r} is none of {', '.join(QUANTISATIONS)}"
    yield hidden.dtype in HALVES, f"hidden is {hidden.dtype}, and the kernel takes bfloat16 and float16"
    result = a["dtype"]
    yield result in (None, *HALVES), f"the result is {result}, and the kernel makes bfloat16 and float16"
    yield from _weights(a, native)
    yield from _order(a)
    yield from _activation(a)
    yield from _shared(a)
    yield from _chosen(a)
    for name in ("hidden", "w1", "w2"):
        yield contiguous(name, a[name])


def _chosen(a: Arguments) -> Iterator[Condition]:
    """The experts of each token."""
    yield of_dtype("topk_ids", a["topk_ids"], torch.int32)
    yield of_dtype("topk_weights", a["topk_weights"], F32)
    each = a["topk_ids"].shape[1]
    yield not a["doweight_stage1"] or each == 1, f"doweight_stage1 is for one expert a token, and there are {each}"
    count = a["num_local_tokens"]
    found = None if count is None else (count.dtype, count.numel())
    yield found in (None, (torch.int32, 1)), f"num_local_tokens is {found}, not one element of torch.int32"


def _weights(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    w1, w2, hidden, quantisation = a["w1"], a["w2"], a["hidden"], a["quantisation"]
    yield w1.dtype == w2.dtype, f"w1 is {w1.dtype}, w2 {w2.dtype}, but both must have one dtype"
    if quantisation == "none":
        same_dtype = w1.dtype == hidden.dtype
        yield (
            same_dtype,
            f"the weights are {w1.dtype}, and without quantisation they must be {hidden.dtype}, like hidden",
        )
        return
    allowed = formats(native, torch.int8) if quantisation == "per_token" else formats(native)
    if quantisation == "mxfp4":
        allowed = (torch.uint8, torch.float4_e2m1fn_x2)
    known = ", ".join(map(str, allowed)) or "an FP8 that this GPU has"
    yield w1.dtype in allowed, f"the weights are {w1.dtype}, not one of {known}"
    yield a["w1_scale"] is not None and a["w2_scale"] is not None, "the weights are quantised and have no scales"
    if quantisation == "block_128":
        sizes = (*w1.shape[1:], *w2.shape[1:])
        blocks = all(size % 128 == 0 for size in sizes)
        yield blocks, f"the weights are {list(w1.shape)} and {list(w2.shape)}, not in blocks of 128"


def _order(a: Arguments) -> Iterator[Condition]:
    """How the weights lie in memory."""
    w1, w2, quantisation = a["w1"], a["w2"], a["quantisation"]
    is_shuffled = a["weights_are_shuffled"]
    said = any(getattr(w, MARK, False) for w in (w1, w2))
    yield is_shuffled or not said, f"a weight has AITER's mark {MARK}, and weights_are_shuffled is False"
    # some kernels, which are taken for some numbers of tokens, read tiles without asking
    rows_do = quantisation == "none" and w1.shape[1] == 2 * w2.shape[2]
    what = "quantised weights" if quantisation != "none" else "weights without up"
    yield is_shuffled or rows_do, f"the weights lie in rows, and AITER reads {what} shuffled: bridge.shuffled_experts"
    if quantisation in MICROSCALING:
        arch = machine.architecture(a["hidden"].device.index or 0)
        yield arch == "gfx950", f"the GPU is {arch}, and microscaling is for gfx950"
        per_byte = 2 if quantisation == "mxfp4" else 1
        sizes = (w1.shape[1], w1.shape[2] * per_byte, w2.shape[1], w2.shape[2] * per_byte)
        whole = all(size % WHOLE == 0 for size in sizes)
        yield whole, f"the weights are {list(sizes[:2])} and {list(sizes[2:])}, not in multiples of {WHOLE}"
        for name in ("w1_scale", "w2_scale"):
            scale = a[name]
            tiled = scale is not None and scale.dim() == 2 and scale.element_size() == 1
            yield tiled, f"{name} is not as bridge.shuffled_experts gives it"


def _activation(a: Arguments) -> Iterator[Condition]:
    is_swiglu, quantisation = a["activation"] == "swiglu", a["quantisation"]
    yield not is_swiglu or quantisation in MICROSCALING, "swiglu is for weights with microscaling alone"
    yield (
        a["swiglu_limit"] is None or is_swiglu,
        f"swiglu_limit is given with {a['activation']}, and only some of its kernels cut off then",
    )
    for name in ("bias1", "bias2"):
        bias = a[name]
        yield bias is None or is_swiglu, f"{name} is given with {a['activation']}, and it is added with swiglu alone"
        yield bias is None or bias.dtype == F32, f"{name} is {bias.dtype if bias is not None else None}, not {F32}"


def _shared(a: Arguments) -> Iterator[Condition]:
    """A shared expert in FP8 beside routed ones in MXFP4."""
    names = ("shared_w1", "shared_w2", "shared_w1_scale", "shared_w2_scale")
    given = [name for name in names if a[name] is not None]
    if not given:
        return
    lacking = [name for name in names if a[name] is None]
    yield not lacking, f"{', '.join(given)} without {', '.join(lacking)}"
    ordinary = (a["quantisation"], a["activation"]) == ("mxfp4", "silu")
    yield ordinary, f"a shared expert is for mxfp4 and silu, not {a['quantisation']} and {a['activation']}"
    yield a["expert_mask"] is None, "a shared expert cannot be combined with expert_mask"
    for name in ("shared_w1", "shared_w2"):
        if a[name] is not None:
            yield of_dtype(name, a[name], torch.float8_e4m3fn)


def _enumerated(enumeration: str, name: str) -> Any:
    return getattr(getattr(load_aiter(), enumeration), name)


# The attribute of a tensor by which AITER knows a shuffled weight. Parameters, ``to`` and compiled graphs lose it.
MARK = "is_shuffled"


def _weight(name: str) -> Value:
    """A weight, marked if it is shuffled; the mark is on a view, so that the caller's tensor stays as it is."""

    def value(a: Arguments) -> Tensor:
        weight = a[name]
        # its dtype of 4-bit values is its own name of PyTorch's, or of bytes
        dtype = load_aiter().dtypes.fp4x2 if a.get("quantisation") == "mxfp4" else weight.dtype
        view = weight.detach().view(dtype)
        setattr(view, MARK, a.get("weights_are_shuffled", True))
        return view

    return value


def _scale(name: str) -> Value:
    def value(a: Arguments) -> Tensor | None:
        scale = a[name]
        return scale.view(load_aiter().dtypes.fp8_e8m0) if a["quantisation"] in MICROSCALING else scale

    return value


def _tkw1(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    given: dict[str, Any] = dict.fromkeys(_ARGUMENTS) | dict(a)
    yield a["activation"] in ("silu", "gelu"), f"activation {a['activation']!r} is none of silu, gelu"
    yield from _experts(
        given | {"quantisation": "per_token", "doweight_stage1": True, "weights_are_shuffled": True}, native
    )


# Those of ``fused_moe`` that ``asm_moe_tkw1`` has not.
_ARGUMENTS = ("a1_scale", "a2_scale", "bias1", "bias2", "swiglu_limit", "num_local_tokens", "dtype")
_ARGUMENTS += ("shared_w1", "shared_w2", "shared_w1_scale", "shared_w2_scale")

_COMMON: dict[str, Value] = {
    "hidden_states": "hidden",
    "topk_weight": "topk_weights",
    "activation": lambda a: _enumerated("ActivationType", ACTIVATIONS[a["activation"]]),
    "w1": _weight("w1"),
    "w2": _weight("w2"),
    **same("topk_ids", "expert_mask"),
}


def _summands(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    x = a["x"]
    known = (*HALVES, F32)
    yield x.dtype in known, f"x is {x.dtype}, and the kernel takes bfloat16, float16 and float32"
    yield contiguous("x", x)


ADAPTERS = {
    "fused_moe": Adapter(
        entry(
            "aiter.fused_moe.fused_moe",
            {
                **_COMMON,
                "quant_type": lambda a: _enumerated("QuantType", QUANTISATIONS[a["quantisation"]]),
                "w1_scale": _scale("w1_scale"),
                "w2_scale": _scale("w2_scale"),
                **same("doweight_stage1", "a1_scale", "a2_scale"),
            },
        ),
        _experts,
        returns="y",
        optional={
            **{name: optional(name) for name in ("bias1", "bias2", "swiglu_limit", "num_local_tokens", "dtype")},
            **{name: optional(name) for name in ("hidden_pad", "intermediate_pad")},
            "moe_sorting_dispatch_policy": optional("sorting_policy"),
            # their gate and up are interleaved
            "gate_mode": Optional("quantisation", constant("interleave"), said=("mxfp8",)),
            **{name: optional(name) for name in ("shared_w1", "shared_w2", "shared_w1_scale", "shared_w2_scale")},
            "shared_expert_id": optional("shared_w1", value=lambda a: a["w1"].shape[0] - 1),
        },
    ),
    "asm_moe_tkw1": Adapter(
        entry("aiter.fused_moe_bf16_asm.asm_moe_tkw1", {**_COMMON, "fc1_scale": "w1_scale", "fc2_scale": "w2_scale"}),
        _tkw1,
        returns="y",
    ),
    "moe_sum": Adapter(entry("aiter.moe_sum", {"input": "x", "output": "y"}), _summands),
}
