"""Routing of tokens to experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .adapter import F32, HALVES, Adapter, Arguments, Condition, Value, contiguous, entry


def _topk(a: Arguments, native: torch.dtype) -> Iterator[Condition]:
    gating, experts = a["gating"], a["gating"].shape[1]
    yield (
        gating.dtype in (*HALVES, F32),
        f"gating is {gating.dtype}, and the kernel takes bfloat16, float16 and float32",
    )
    yield contiguous("gating", gating)
    yield a["topk"] <= experts, f"topk is {a['topk']}, and there are {experts} experts"


def _grouped(a: Arguments, native: torch.dtype) -> Iterator[Condition]:
    yield from _topk(a, native)
    experts, groups = a["gating"].shape[1], a["num_expert_group"]
    yield experts % groups == 0, f"{experts} experts cannot be divided into {groups} groups"


def _biased(a: Arguments, native: torch.dtype) -> Iterator[Condition]:
    yield from _grouped(a, native)
    bias, gating = a["correction_bias"].dtype, a["gating"].dtype
    yield bias == gating, f"correction_bias is {bias}, and the kernel needs {gating}, like gating"
    # for many tokens AITER takes another kernel, which renormalises in any case
    yield a["renormalize"], "renormalize is False, and its kernel for many tokens always renormalises"


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
                "topk_weights": "weights",
                "topk_indices": "ids",
                "token_expert_indices": lambda a: torch.empty_like(a["ids"]),  # scratch
                "gating_output": "gating",
                "need_renorm": "renormalize",
            },
        ),
        _topk,
    ),
    "grouped_topk": Adapter(entry("aiter.grouped_topk", _GROUPED | {"is_softmax": "softmax"}), _grouped),
    # what it returns depends on the number of tokens, what it writes does not
    "biased_grouped_topk": Adapter(
        entry("aiter.biased_grouped_topk", _GROUPED | {"correction_bias": "correction_bias"}), _biased
    ),
}
