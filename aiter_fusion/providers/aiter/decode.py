"""A decode step's attention over keys and values in one piece, by AITER's dense kernel.

It takes calls that see every slot, as caches that grow with the sequence give them. Of those that are filled up to a
position, AITER's kernels multiply by what lies beyond it: NaN there reaches the result, which the op excludes (seen of
``flash_attn_with_kvcache`` and ``unified_attention``, v0.1.20.post1, interpreted).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...domains import ANYTHING, FLAG, Number, Sizes, Tensors
from ...op import FusedOp
from ..terms import Terms
from .bridge.attention import WIDEST
from .entry_points import EntryPoint, call, constant, probe, same

HALVES = Tensors((torch.bfloat16, torch.float16))

# On its tensors as ``[B, T, H, D]``.
DENSE = EntryPoint(
    "flash_attn_func", ("aiter",), {**same("q", "k", "v"), "softmax_scale": "scale", "causal": constant(False)}
)

TERMS = Terms(
    {
        **dict.fromkeys(("q", "k", "v"), HALVES),
        # ``refuse`` says what is wrong with any of these
        **dict.fromkeys(("mask", "position", "window", "softcap"), ANYTHING),
        "scale": Number(),
        "by_tokens": FLAG,
    },
    hidden=Sizes(8, WIDEST, 8),
)


def refuse(op: FusedOp, arguments: Mapping[str, Any], native: torch.dtype | None) -> str | None:
    """Why the kernel cannot take a call that its terms allow (tensors may be fakes), or None."""
    if arguments["position"] is not None:
        return "the cache is filled up to a position, and its kernels multiply by what lies beyond it, NaN included"
    if arguments["mask"] is not None:
        return "there is a mask, and its kernel takes none"
    if arguments["softcap"]:
        return f"softcap is {arguments['softcap']}, and its kernel has no cap"
    for name in ("q", "k", "v"):
        apart = arguments[name].stride(-1)
        if not statically_known_true(apart == 1):
            return f"the elements of {name} are {apart} apart, and its kernel needs 1"
        if arguments[name].dtype != arguments["q"].dtype:
            return f"{name} is {arguments[name].dtype}, and its kernel needs {arguments['q'].dtype}, like q"
    found = probe(DENSE)
    return found if isinstance(found, str) else None


def compute(op: FusedOp, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The op's output, by a call that ``refuse`` does not object to."""
    outputs = op.allocate(**arguments)
    if outputs["y"].numel() and arguments["k"].shape[2]:
        by_tokens = {name: arguments[name].transpose(1, 2) for name in ("q", "k", "v")}
        y = call(DENSE, **DENSE.arguments({**arguments, **by_tokens})).transpose(1, 2)
        return {"y": y if y.stride() == outputs["y"].stride() else outputs["y"].copy_(y)}
    return {"y": outputs["y"].zero_()}
