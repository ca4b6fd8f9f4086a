"""The launches of a call of attention, from shapes alone: for real tensors and for fakes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...shapes import power_of_two
from ..gpu import Gpu
from ..launch import Launch, Launches, Ref
from . import rules

# Registers of a program that adds parts up: float32 elements that a warp of 32 threads holds at most.
COMBINED = 2048
# Elements of a row that such a program takes at least; more where there are programs for all multiprocessors.
LEAST_COLUMNS = 32


def of(arguments: Mapping[str, Any], gpu: Gpu) -> Launches:
    """The launches of a call that ``calls.refuse`` accepts, all of whose sizes are known."""
    q, k = arguments["q"], arguments["k"]
    (batch, heads, tokens, size), (key_heads, keys) = q.shape, k.shape[1:3]
    group = heads // key_heads
    mask = arguments["mask"]
    kind = "none" if mask is None else "bool" if mask.dtype is torch.bool else "added"
    plan = rules.plan(batch * key_heads, group, tokens, keys, size, q.dtype.itemsize, gpu, kind == "added")
    tile, splits = plan.tile, plan.splits
    common = {
        "tokens": tokens,
        "position": Ref("position") if arguments["position"] is not None else None,
        "keys": keys,
        **_strides(arguments),
        "SIZE": size,
        "PADDED": power_of_two(size),
        "BLOCK": tile.block,
        "HAS_POSITION": arguments["position"] is not None,
        "WINDOW": arguments["window"],
    }
    row_blocks = -(-group * tokens // tile.rows)
    reading = common | _read(arguments)
    reading |= {
        "scale": float(arguments["scale"]),
        "row_blocks": row_blocks,
        "GROUP": group,
        "ROWS": tile.rows,
        "STAGES": tile.stages,
        "MASK": kind,
        "MASK_BY_ROW": _is_by_row(arguments),
    }
    if plan.kernel == "prefill_attention":
        reading |= {
            "y": Ref("y"),
            "FOLDED": mask is None and not arguments["softcap"] and arguments["scale"] > 0,
            "COMPARED": rules.compared(kind, arguments["window"], gpu),
        }
        return Launches((Launch(plan.kernel, batch * key_heads * row_blocks, reading, tile.warps),))
    reading |= {
        "splits": splits,
        "y": Ref("y") if splits == 1 else None,
        "partial_out": Ref("partial") if splits > 1 else None,
        "sums_out": Ref("sums") if splits > 1 else None,
        "SPLIT": splits > 1,
        "SWAPPED": tile.swapped,
        "DEPENDENT": gpu.dependent,
        "FOLLOWED": splits > 1 and gpu.dependent,
    }
    made = [Launch(plan.kernel, batch * key_heads * row_blocks * splits, reading, tile.warps, gpu.dependent)]
    if splits == 1:
        return Launches(tuple(made))
    slots = power_of_two(splits)
    count, columns = batch * heads * tokens, power_of_two(size)
    while columns > LEAST_COLUMNS and count * (power_of_two(size) // columns) < gpu.multiprocessors:
        columns //= 2
    combining = common | {
        "splits": splits,
        "partial": Ref("partial"),
        "sums": Ref("sums"),
        "y": Ref("y"),
        "heads": heads,
        "SLOTS": slots,
        "COLUMNS": columns,
        "DEPENDENT": gpu.dependent,
    }
    few = max(1, min(16, slots * columns // COMBINED))
    warps = few if gpu.nvidia else max(1, few // 2)
    programs = count * (power_of_two(size) // columns)
    made.append(Launch("attention_combine", programs, combining, warps, gpu.dependent))
    scratch = {"partial": ((count, splits, size), torch.float32), "sums": ((count, 2, splits), torch.float32)}
    return Launches(tuple(made), scratch)


def _strides(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of y, without the last: its memory is contiguous, by heads or by tokens."""
    _, heads, tokens, size = arguments["q"].shape
    by_tokens = arguments["by_tokens"]
    apart = (size, heads * size) if by_tokens else (tokens * size, size)
    return dict(zip(("y_batch", "y_head", "y_token"), (heads * tokens * size, *apart), strict=True))


def _read(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the first launch reads, and how it lies."""
    q, k, v, mask = (arguments[name] for name in ("q", "k", "v", "mask"))
    sizes = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    # a dimension of one element is one for all
    of_mask = (
        (0,) * 4
        if mask is None
        else tuple(0 if mask.shape[d] == 1 and sizes[d] != 1 else mask.stride(d) for d in range(4))
    )
    return {
        **{name: Ref(name) for name in ("q", "k", "v")},
        "mask": Ref("mask") if mask is not None else None,
        "key_heads": k.shape[1],
        **dict(zip(("q_batch", "q_head", "q_token"), q.stride(), strict=False)),
        **dict(zip(("k_batch", "k_head", "k_key"), k.stride(), strict=False)),
        **dict(zip(("v_batch", "v_head", "v_key"), v.stride(), strict=False)),
        **dict(zip(("mask_batch", "mask_head", "mask_token", "mask_key"), of_mask, strict=True)),
        "SOFTCAP": arguments["softcap"],
    }


def _is_by_row(arguments: Mapping[str, Any]) -> bool:
    """Whether heads that share keys, or tokens, have masks of their own."""
    mask, q = arguments["mask"], arguments["q"]
    grouped = q.shape[1] != arguments["k"].shape[1]
    return mask is not None and any(mask.shape[d] > 1 and mask.stride(d) != 0 for d in ((1, 2) if grouped else (2,)))
