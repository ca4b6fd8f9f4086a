"""Mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..entry_points import same
from ..installation import load_aiter
from .adapter import F32, HALVES, Adapter, Arguments, Condition, contiguous, entry, of_dtype

# Our names -> those of AITER's enumerations.
ACTIVATIONS = {"silu": "Silu", "gelu": "Gelu"}
QUANTISATIONS = {"none": "No", "per_tensor": "per_Tensor", "per_token": "per_Token", "block_128": "per_128x128"}


def _experts(a: Arguments, native: torch.dtype) -> Iterator[Condition]:
    hidden, quantisation = a["hidden"], a["quantisation"]
    yield a["activation"] in ACTIVATIONS, f"activation {a['activation']!r} is none of {', '.join(ACTIVATIONS)}"
    yield quantisation in QUANTISATIONS, f"quantisation {quantisation!r} is none of {', '.join(QUANTISATIONS)}"
    yield hidden.dtype in HALVES, f"hidden is {hidden.dtype}, and the kernel takes bfloat16 and float16"
    yield from _weights(a, native)
    yield of_dtype("topk_ids", a["topk_ids"], torch.int32)
    yield of_dtype("topk_weights", a["topk_weights"], F32)
    each = a["topk_ids"].shape[1]
    yield not a["doweight_stage1"] or each == 1, f"doweight_stage1 is for one expert a token, and there are {each}"
    for name in ("hidden", "w1", "w2"):
        yield contiguous(name, a[name])


def _weights(a: Arguments, native: torch.dtype) -> Iterator[Condition]:
    w1, w2, hidden, quantisation = a["w1"], a["w2"], a["hidden"], a["quantisation"]
    yield w1.dtype == w2.dtype, f"w1 is {w1.dtype}, w2 {w2.dtype}, but both must have one dtype"
    if quantisation == "none":
        same_dtype = w1.dtype == hidden.dtype
        yield (
            same_dtype,
            f"the weights are {w1.dtype}, and without quantisation they must be {hidden.dtype}, like hidden",
        )
    else:
        allowed = (native, torch.int8) if quantisation == "per_token" else (native,)
        yield w1.dtype in allowed, f"the weights are {w1.dtype}, not one of {', '.join(map(str, allowed))}"
        yield a["w1_scale"] is not None and a["w2_scale"] is not None, "the weights are quantised and have no scales"
    if quantisation == "block_128":
        sizes = (*w1.shape[1:], *w2.shape[1:])
        blocks = all(size % 128 == 0 for size in sizes)
        yield blocks, f"the weights are {list(w1.shape)} and {list(w2.shape)}, not in blocks of 128"


def _enumerated(enumeration: str, name: str) -> Any:
    return getattr(getattr(load_aiter(), enumeration), name)


ADAPTERS = {
    "fused_moe": Adapter(
        entry(
            "aiter.fused_moe.fused_moe",
            {
                "hidden_states": "hidden",
                "topk_weight": "topk_weights",
                "activation": lambda a: _enumerated("ActivationType", ACTIVATIONS[a["activation"]]),
                "quant_type": lambda a: _enumerated("QuantType", QUANTISATIONS[a["quantisation"]]),
                **same("w1", "w2", "topk_ids", "expert_mask", "doweight_stage1"),
                **same("w1_scale", "w2_scale", "a1_scale", "a2_scale"),
            },
        ),
        _experts,
        returns="y",
    )
}
