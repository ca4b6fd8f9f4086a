"""Routing of tokens to experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from packaging.version import Version
from torch import Tensor

from .. import installation, releases
from ..entry_points import constant
from .adapter import F32, HALVES, Adapter, Arguments, Condition, Value, contiguous, entry, optional

# The numbers of shared experts that a kernel exists for, and the most experts of a token in ``topk_gating``.
SHARED, MOST = (0, 1, 2, 4, 8), 64
SCORES = ("sqrtsoftplus", "sigmoid", "softmax")
# Before, ``softmax`` is never renormalised, whatever is asked for (ROCm/aiter#4460).
SOFTMAX_FROM = Version("0.1.20")
# Of so many groups their scores are wrong (ROCm/aiter#2153, open).
WRONG_GROUPS = (2, 4)


def _topk(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    gating, experts = a["gating"], a["gating"].shape[1]
    yield (
        gating.dtype in (*HALVES, F32),
        f"gating is {gating.dtype}, and the kernel takes bfloat16, float16 and float32",
    )
    yield contiguous("gating", gating)
    yield a["topk"] <= experts, f"topk is {a['topk']}, and there are {experts} experts"


def _with_shared(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    shared = a["num_shared_experts"]
    experts = a["gating"].shape[1] - shared
    yield from _topk(a, native)
    yield shared in SHARED, f"num_shared_experts is {shared}, and kernels are for {', '.join(map(str, SHARED))}"
    yield a["topk"] <= experts, f"topk is {a['topk']}, and there are {experts} experts besides the shared ones"


def _scored(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield from _topk(a, native)
    yield a["topk"] <= MOST, f"topk is {a['topk']}, and the kernel takes up to {MOST}"
    yield a["score"] in SCORES, f"score {a['score']!r} is none of {', '.join(SCORES)}"
    bias, gating = a["correction_bias"], a["gating"].dtype
    known = (F32,) if gating == torch.float16 else (F32, torch.bfloat16)
    found = None if bias is None else bias.dtype
    yield found in (None, *known), f"correction_bias is {found}, and with {gating} it must be {known[0]}"
    version = releases.installed()
    renormalises = a["score"] != "softmax" or not a["renormalize"] or version is None or version >= SOFTMAX_FROM
    yield (
        renormalises,
        f"AITER {installation.aiter_version()} does not renormalise softmax (ROCm/aiter#4460, in {SOFTMAX_FROM})",
    )


def _grouped(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield from _topk(a, native)
    experts, groups = a["gating"].shape[1], a["num_expert_group"]
    yield experts % groups == 0, f"{experts} experts cannot be divided into {groups} groups"


def _biased(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield from _grouped(a, native)
    bias, gating = a["correction_bias"].dtype, a["gating"].dtype
    yield bias == gating, f"correction_bias is {bias}, and the kernel needs {gating}, like gating"
    groups = a["num_expert_group"]
    yield (
        groups not in WRONG_GROUPS,
        f"num_expert_group is {groups}, and of 2 or 4 groups the kernel computes wrong scores (ROCm/aiter#2153, open)",
    )
    # for many tokens AITER takes another kernel, which renormalises in any case
    yield a["renormalize"], "renormalize is False, and its kernel for many tokens always renormalises"


def _routed_ids(a: Arguments) -> Tensor:
    """The ids that the kernel writes; those of the shared experts, which it leaves alone, are written here."""
    ids, shared = a["ids"], a["num_shared_experts"]
    if not shared:
        return ids
    total = a["gating"].shape[1]
    ids[:, -shared:] = torch.arange(total - shared, total, dtype=ids.dtype, device=ids.device)
    return ids[:, :-shared]


_CHOSEN: dict[str, Value] = {"topk_weights": "weights", "topk_indices": "ids", "gating_output": "gating"}

_GROUPED: dict[str, Value] = {
    "gating_output": "gating",
    "topk_weights": "weights",
    "topk_ids": "ids",
    "num_expert_group": "num_expert_group",
    "topk_group": "topk_group",
    "need_renorm": "renormalize",
    "routed_scaling_factor": "routed_scaling_factor",
}

ADAPTERS = {
    "topk_softmax": Adapter(
        entry(
            "aiter.topk_softmax",
            {
                **_CHOSEN,
                "topk_indices": _routed_ids,
                "token_expert_indices": lambda a: torch.empty_like(_routed_ids(a)),  # scratch
                "need_renorm": "renormalize",
            },
        ),
        _with_shared,
        optional={
            "num_shared_experts": optional("num_shared_experts"),
            "shared_expert_scoring_func": optional("num_shared_experts", value=constant("sigmoid")),
        },
    ),
    "fused_topk": Adapter(
        entry(
            "aiter.fused_moe.fused_topk",
            # of the hidden states it asks the number of rows and the device
            {"hidden_states": "gating", "gating_output": "gating", "topk": "topk", "renormalize": "renormalize"},
        ),
        _topk,
        returns=lambda found, outputs: dict(zip(outputs, found, strict=True)),
    ),
    "topk_sigmoid": Adapter(entry("aiter.topk_sigmoid", _CHOSEN), _topk),
    "topk_gating": Adapter(
        entry(
            "aiter.topk_gating",
            {
                **_CHOSEN,
                "correction_bias": "correction_bias",
                "need_renorm": "renormalize",
                "routed_scaling_factor": "routed_scaling_factor",
                "score_func": "score",
            },
        ),
        _scored,
    ),
    "grouped_topk": Adapter(entry("aiter.grouped_topk", _GROUPED | {"is_softmax": "softmax"}), _grouped),
    # what it returns depends on the number of tokens, what it writes does not
    "biased_grouped_topk": Adapter(
        entry("aiter.biased_grouped_topk", _GROUPED | {"correction_bias": "correction_bias"}), _biased
    ),
}
