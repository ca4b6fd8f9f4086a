"""Choosing the next token."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..entry_points import constant
from .adapter import F32, HALVES, Adapter, Arguments, Condition, contiguous, entry, of_dtype


def _logits(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    logits = a["logits"]
    known = (*HALVES, F32)
    yield logits.dtype in known, f"logits are {logits.dtype}, and the kernel takes bfloat16, float16 and float32"
    yield contiguous("logits", logits)


def _mixed(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield from _logits(a, native)
    rows = a["logits"].shape[0]
    for name, sizes in (("temperatures", (rows,)), ("exponentials", tuple(a["logits"].shape))):
        yield of_dtype(name, a[name], F32)
        yield contiguous(name, a[name])
        yield tuple(a[name].shape) == sizes, f"{name} is {list(a[name].shape)}, not {list(sizes)}"


def _probs(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield of_dtype("probs", a["probs"], F32)
    yield contiguous("probs", a["probs"])
    yield a["topk"] >= 1, f"topk is {a['topk']}, and at least one probability must stay"


ADAPTERS = {
    "greedy_sample": Adapter(entry("aiter.greedy_sample", {"out": "tokens", "input": "logits"}), _logits),
    "mixed_sample": Adapter(
        entry(
            "aiter.mixed_sample_outer_exponential",
            {
                "out": "tokens",
                "input": "logits",
                "exponentials": "exponentials",
                "temperature": "temperatures",
                "eps": "eps",
            },
        ),
        _mixed,
    ),
    "top_k_renorm_probs": Adapter(
        entry(
            "aiter.ops.sampling.top_k_renorm_probs",
            {"probs": "probs", "maybe_top_k_arr": constant(None), "top_k_val": "topk"},
        ),
        _probs,
        returns="y",
    ),
}
