"""What a norm reads: a tensor as it is, or its sum with the residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..op import Spec
from ..stage import Sample, Stage, Value

F32 = torch.float32


# The tensor ``x`` ``[..., H]``.
INPUT = Stage(
    "",
    {"x": "Tensor"},
    lambda value, x: (x, {}),
    lambda value, x: (Value(x.shape, x.dtype), {}),
    lambda sample: [{"x": sample.rows()}],
    lambda setting: {"x": setting.random()},
    follows=False,
)


def _compute(
    value: Tensor, residual: Tensor, sum_dtype: torch.dtype, residual_dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    summed = residual.to(sum_dtype) + value.reshape(residual.shape).to(sum_dtype)
    return summed, {"residual_out": summed.to(residual_dtype).contiguous()}


def _spec(
    value: Value, residual: Tensor, sum_dtype: torch.dtype, residual_dtype: torch.dtype
) -> tuple[Value, dict[str, Spec]]:
    return Value(residual.shape, sum_dtype), {"residual_out": (residual.shape, residual_dtype)}


def _samples(sample: Sample) -> Sequence[dict[str, Any]]:
    residual, dtype = sample.rows().flip(-1).contiguous(), sample.dtype
    return [
        {"residual": residual, "sum_dtype": dtype, "residual_dtype": dtype},
        {"residual": residual, "sum_dtype": F32, "residual_dtype": dtype},
        {"residual": residual.to(F32), "sum_dtype": F32, "residual_dtype": F32},
    ]


# ``summed = residual.to(sum_dtype) + value.to(sum_dtype)`` goes on; ``residual_out = summed.to(residual_dtype)``.
RESIDUAL = Stage(
    "residual_add",
    {"residual": "Tensor", "sum_dtype": "ScalarType", "residual_dtype": "ScalarType"},
    _compute,
    _spec,
    _samples,
    lambda setting: {"residual": setting.random(), "sum_dtype": torch.bfloat16, "residual_dtype": torch.bfloat16},
    feature="add",
    outputs=("residual_out",),
)
