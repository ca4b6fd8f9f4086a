"""Norms of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..op import Spec
from ..stage import Sample, Setting, Stage, Value

F32 = torch.float32


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, offset: float | None, cast_first: bool, dtype: torch.dtype
) -> Tensor:
    """``y = x32 * rsqrt(mean(x32**2, -1) + eps)``, weighted and rounded in the order that the arguments say.

    x ``[..., H]`` of any floating dtype, x32 its float32; weight ``[H]`` or None; eps is added to the mean square.
    cast_first: ``weight * y.to(dtype)`` (the result is of the promoted dtype), else ``(y * weight).to(dtype)``.
    offset: the weight is ``weight.float() + offset`` (Gemma stores ``weight - 1``).

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    x32 = x.to(F32)
    y = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    if cast_first:
        y = y.to(dtype)
    if weight is not None:
        y = y * (weight if offset is None else weight.to(F32) + offset)
    return y if cast_first else y.to(dtype)


def _compute(value: Tensor, **norm: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return rms_norm(value, **norm).contiguous(), {}


def _spec(
    value: Value, weight: Tensor | None, cast_first: bool, dtype: torch.dtype, **_: Any
) -> tuple[Value, dict[str, Spec]]:
    promoted = torch.promote_types(weight.dtype, dtype) if cast_first and weight is not None else dtype
    return Value(value.sizes, promoted), {}


def _samples(sample: Sample) -> Sequence[dict[str, Any]]:
    weight, dtype = sample.weight(), sample.dtype
    return [
        {"weight": weight, "eps": 1e-6, "offset": None, "cast_first": True, "dtype": dtype},
        {"weight": weight.to(F32), "eps": 1e-5, "offset": 1.0, "cast_first": False, "dtype": dtype},
        {"weight": None, "eps": 1e-6, "offset": None, "cast_first": False, "dtype": dtype},
    ]


def _typical(setting: Setting) -> Mapping[str, Any]:
    weight = setting.random(setting.hidden)
    return {"weight": weight, "eps": 1e-6, "offset": None, "cast_first": True, "dtype": torch.bfloat16}


RMS_NORM = Stage(
    "rms_norm",
    {"weight": "Tensor?", "eps": "float", "offset": "float?", "cast_first": "bool", "dtype": "ScalarType"},
    _compute,
    _spec,
    _samples,
    _typical,
    traits=("offset",),
    returns="value",
    levels={"offset": 2, "value": 2},
)
