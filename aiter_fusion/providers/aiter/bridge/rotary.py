"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..entry_points import Value, constant
from .adapter import HALVES, Adapter, Arguments, Condition, Outputs, contiguous, entry, of_dtype

NEOX, GPT_J = 0, 1


def _conditions(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    q = a["q"]
    yield q.dtype in HALVES, f"q is {q.dtype}, and the kernel takes bfloat16 and float16"
    for name in ("k", "cos", "sin"):
        yield a[name].dtype == q.dtype, f"{name} is {a[name].dtype}, and the kernel needs {q.dtype}, like q"
    for name in ("q", "k"):
        yield a[name].stride(-1) == 1, f"the elements of a head of {name} do not follow each other"
    for name in ("cos", "sin", "positions"):
        yield contiguous(name, a[name])
    yield of_dtype("positions", a["positions"], torch.int64)
    turned, width = 2 * a["cos"].shape[1], q.shape[-1]
    yield turned <= width, f"cos turns {turned} elements of a head of {width}"


def _returned(found: Any, outputs: Outputs) -> Outputs:
    return {name: tensor[:, 0] for name, tensor in zip(outputs, found, strict=True)}


def _table(name: str) -> Value:
    return lambda a: a[name][:, None, None]


# rows, batch, heads, elements
_TAKES: dict[str, Value] = {
    "input_x": lambda a: a["q"][:, None],
    "input_y": lambda a: a["k"][:, None],
    "cos": _table("cos"),
    "sin": _table("sin"),
    "positions": lambda a: a["positions"][:, None],
    "rotate_style": lambda a: NEOX if a["neox"] else GPT_J,
    "reuse_freqs_front_part": constant(True),  # a row of cos is of half the elements
    "nope_first": "nope_first",
}

ADAPTERS = {
    "rotary_embedding": Adapter(
        entry("aiter.rope_cached_positions_2c_fwd", _TAKES),
        _conditions,
        returns=_returned,
    ),
    "rotary_embedding_": Adapter(entry("aiter.rope_cached_positions_2c_fwd_inplace", _TAKES), _conditions),
}
