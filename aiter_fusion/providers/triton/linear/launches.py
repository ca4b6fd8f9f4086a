"""The launches of a product of few rows, from shapes alone: for real tensors and for fakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..gpu import Gpu
from ..launch import Launch, Launches, Ref
from . import rules

# The columns that a program of the second launch adds up, where a weight's columns are whole tiles of so many.
COMBINED = 256


def is_blocked(arguments: Mapping[str, Any]) -> bool:
    """Whether the scales of a call are by block: 1 x 128 of x, 128 x 128 of the weights."""
    scale, weight = arguments["weight_scales"][0], arguments["weights"][0]
    return scale.numel() != 1 and scale.shape[-1] != weight.shape[1]


def of(arguments: Mapping[str, Any], gpu: Gpu) -> Launches:
    """The launches of a call with a number of rows that is known; at most four weights go together."""
    launches: list[Launch] = []
    scratch: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for first in range(0, len(arguments["weights"]), rules.MOST_WEIGHTS):
        together = range(first, min(first + rules.MOST_WEIGHTS, len(arguments["weights"])))
        made, partial = _together(arguments, together, gpu)
        launches += made
        scratch |= partial
    return Launches(tuple(launches), scratch)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _four(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """Arguments ``name0`` to ``name3``; None where there are fewer values."""
    return {f"{name}{i}": values[i] if i < len(values) else None for i in range(rules.MOST_WEIGHTS)}


def _refs(name: str, indices: Sequence[int]) -> list[Ref]:
    return [Ref(f"{name}.{index}") for index in indices]


def _shared(arguments: Mapping[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    """What every kernel of a product reads besides values: scales, biases, sizes, and where results go."""
    weights = [arguments["weights"][index] for index in indices]
    biases: list[Tensor | None] = [arguments["biases"][index] for index in indices]
    of_w = arguments["weight_scales"][indices[0]]
    # any bias stands in for one that is missing: its pointer is not read
    given = next((index for index, bias in zip(indices, biases, strict=True) if bias is not None), None)
    held = [index if bias is not None else given for index, bias in zip(indices, biases, strict=True)]
    return {
        "x_scale": Ref("x_scale"),
        **_four("c", _refs("weight_scales", indices)),
        **_four("b", [Ref(f"biases.{index}") for index in held if index is not None]),
        **_four("y", [Ref(f"y{index}") for index in indices]),
        **_four("n", [weight.shape[1] for weight in weights]),
        # by block, scales are [K / 128, N / 128]; else [1, N]
        "ws_row": 0 if of_w.numel() == 1 else of_w.stride(1),
        "biased": sum(1 << i for i, bias in enumerate(biases) if bias is not None),
        "COUNT": len(weights),
        "BLOCKED": is_blocked(arguments),
        "BIAS": given is not None,
    }


def _values(arguments: Mapping[str, Any], indices: Sequence[int], tile: rules.Tile) -> dict[str, Any]:
    """The values that are multiplied, and how they lie."""
    x_scale, of_w, blocked = arguments["x_scale"], arguments["weight_scales"][indices[0]], is_blocked(arguments)
    k = arguments["x"].shape[1]
    return {
        "x": Ref("x"),
        **_four("w", _refs("weights", indices)),
        **_four("d", [arguments["weights"][index].stride(1) for index in indices]),
        "k": k,
        "xs_block": x_scale.stride(1) if blocked else 0,
        "ws_block": of_w.stride(0) if blocked else 0,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "EVEN": k % tile.block_k == 0,
    }


def _together(
    arguments: Mapping[str, Any], indices: Sequence[int], gpu: Gpu
) -> tuple[list[Launch], dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """The launches of up to four products, and their scratch tensors."""
    x, x_scale = arguments["x"], arguments["x_scale"]
    (m, k), ns = x.shape, [arguments["weights"][index].shape[1] for index in indices]
    fast = arguments["fast_accum"]
    plan = rules.plan(k, ns, m, fast, is_blocked(arguments), gpu.multiprocessors, gpu.shared_memory)
    tile = plan.tile
    common, read = _shared(arguments, indices), _values(arguments, indices, tile)
    tiles = sum(_ceil(n, tile.block_n) for n in ns)
    warps = tile.warps if gpu.nvidia else max(1, tile.warps // 2)
    if tile.rows == 1:
        return [Launch("fp8_gemv", tiles, common | read, warps)], {}
    xs_row = 0 if x_scale.numel() == 1 or m == 1 else x_scale.stride(0)
    length = _ceil(_ceil(k, plan.split), tile.block_k) * tile.block_k
    splits = _ceil(k, length)
    row_blocks, columns = _ceil(m, tile.rows), tiles * tile.block_n
    name = f"partial.{indices[0]}"
    product = {
        "partial_out": Ref(name) if splits > 1 else None,
        "m": m,
        "length": length,
        "row_blocks": row_blocks,
        "tiles": tiles,
        "columns": columns,
        "x_stride": x.stride(0),
        "xs_row": xs_row,
        "ROWS": tile.rows,
        "PRECISE": not fast,
        "STAGES": tile.stages,
        "SPLIT": splits > 1,
        "DEPENDENT": splits > 1 and gpu.dependent,
    }
    if splits > 1:
        product |= {f"y{i}": None for i in range(rules.MOST_WEIGHTS)}
    made = [Launch("fp8_matmul", row_blocks * tiles * splits, common | read | product, warps)]
    if splits == 1:
        return made, {}
    wide = COMBINED if all(n % COMBINED == 0 for n in ns) else tile.block_n
    combining = common | {
        "partial": Ref(name),
        "m": m,
        "tiles": columns // wide,
        "columns": columns,
        "xs_row": xs_row,
        "BLOCK_N": wide,
        "SPLITS": splits,
        "DEPENDENT": gpu.dependent,
    }
    made.append(Launch("fp8_combine", columns // wide * m, combining, max(1, wide // 64), dependent=gpu.dependent))
    return made, {name: ((splits, m, columns), torch.float32)}
