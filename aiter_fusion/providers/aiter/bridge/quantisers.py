"""Quantisers alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..entry_points import Value, call, constant
from .adapter import (
    F32,
    HALVES,
    Adapter,
    Arguments,
    Condition,
    Outputs,
    contiguous,
    entry,
    flat,
    formats,
    of_dtype,
    one_of,
)

WIDEST, GROUPS = 8192, (32, 64, 128)


def _values(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield a["x"].dtype in HALVES, f"x is {a['x'].dtype}, and the kernel takes bfloat16 and float16"
    yield contiguous("x", a["x"])
    yield one_of("the values are", a["dtype"], formats(native, torch.int8))


def _token(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield from _values(a, native)
    width = a["x"].shape[-1]
    yield width <= WIDEST, f"the hidden size is {width}, and the kernel takes up to {WIDEST}"


def _group(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield from _values(a, native)
    width, group = a["x"].shape[-1], a["group"]
    yield group in GROUPS, f"groups are of {group}, and the kernel takes {', '.join(map(str, GROUPS))}"
    yield width % group == 0, f"the hidden size is {width}, not a multiple of {group}"


def _static(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield from _values(a, native)
    yield of_dtype("scale", a["scale"], F32)
    yield a["scale"].numel() == 1, f"scale has {a['scale'].numel()} elements, not one"


def _in_groups(name: str) -> Value:
    return lambda a: a[name].view(-1, a["group"])


_ROWS = {"scale_ub": constant(None), "shuffle_scale": constant(False), "num_rows": constant(None)}
_GROUPED = entry(
    "aiter.dynamic_per_token_scaled_quant", {"out": "q", "input": _in_groups("x"), "scales": "rows", **_ROWS}
)


def _by_groups(a: Arguments) -> Outputs:
    """Scales in rows; AITER's own transposed ones lie about their strides, and for int8 are wrong."""
    x, group = a["x"], a["group"]
    q = x.new_empty(x.shape, dtype=a["dtype"])
    scale = x.new_empty((*x.shape[:-1], x.shape[-1] // group), dtype=F32)
    call(_GROUPED, **_GROUPED.arguments({**a, "q": q, "rows": scale}))
    return {"q": q, "scale": scale}


ADAPTERS = {
    "token_quant": Adapter(
        entry(
            "aiter.dynamic_per_token_scaled_quant",
            {"out": flat("q"), "input": flat("x"), "scales": flat("scale"), **_ROWS},
        ),
        _token,
    ),
    "group_quant": Adapter(_GROUPED, _group, compute=_by_groups),
    "tensor_quant": Adapter(
        entry("aiter.dynamic_per_tensor_quant", {"out": "q", "input": "x", "scale": "scale"}), _values
    ),
    "static_quant": Adapter(
        entry("aiter.static_per_tensor_quant", {"out": "q", "input": "x", "scale": "scale"}), _static
    ),
}
