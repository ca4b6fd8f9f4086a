"""Modulation: a gain and a shift of one row for several rows of the value, as diffusion models have per image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..op import Spec
from ..stage import Sample, Setting, Stage, Value

F32 = torch.float32


def row_by_row(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, once: Tensor) -> Tensor:
    """``function(x, once)``, where each row of ``once`` stands for equally many consecutive rows of x.

    x ``[..., H]`` of N rows; once ``[..., H]`` of R rows, R a divisor of N: row i of x meets row ``i // (N / R)``.
    """
    width = x.shape[-1]
    count = once.numel() // max(1, width)
    each = x.numel() // max(1, count * width)
    return function(x.reshape(count, each, width), once.reshape(count, 1, width)).reshape(x.shape)


def once(sample: Sample) -> Tensor:
    """A row for each entry of the first of three dimensions, else one."""
    entries = sample.sizes[0] if len(sample.sizes) > 2 else 1
    return torch.stack([sample.weight() * (entry + 1) for entry in range(entries)]).unsqueeze(1)


def modulate(x: Tensor, gain: Tensor, shift: Tensor | None, plus_one: bool, modulated_dtype: torch.dtype) -> Tensor:
    """``(x * (1 + gain) + shift).to(modulated_dtype)``, every operation of the promoted dtype of its operands.

    x ``[..., H]``; gain, shift: as ``once`` in ``row_by_row``, or no shift; plus_one: whether 1 is added to gain.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023.
    """
    y = row_by_row(torch.mul, x, gain + 1 if plus_one else gain)
    y = y if shift is None else row_by_row(torch.add, y, shift)
    return y.to(modulated_dtype)


def _compute(value: Tensor, **modulation: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return modulate(value, **modulation).contiguous(), {}


def _spec(value: Value, modulated_dtype: torch.dtype, **_: Any) -> tuple[Value, dict[str, Spec]]:
    return Value(value.sizes, modulated_dtype), {}


def _samples(sample: Sample) -> Sequence[dict[str, Any]]:
    rows, dtype = once(sample), sample.dtype
    return [
        {"gain": rows, "shift": rows.flip(-1), "plus_one": True, "modulated_dtype": dtype},
        {"gain": rows, "shift": None, "plus_one": True, "modulated_dtype": dtype},
        {"gain": rows.to(F32), "shift": rows.to(F32), "plus_one": False, "modulated_dtype": dtype},
    ]


def _typical(setting: Setting) -> dict[str, Any]:
    """Of one image."""
    gain, shift = setting.random(1, setting.hidden), setting.random(1, setting.hidden)
    return {"gain": gain, "shift": shift, "plus_one": True, "modulated_dtype": torch.bfloat16}


# It is part of the record of the norm before it, whose value two modulations may share.
MODULATE = Stage(
    "",
    {"gain": "Tensor", "shift": "Tensor?", "plus_one": "bool", "modulated_dtype": "ScalarType"},
    _compute,
    _spec,
    _samples,
    _typical,
    feature="modulate",
    returns="value",
    levels={"value": 2},
    once=("gain", "shift"),
    cancels=True,
)
