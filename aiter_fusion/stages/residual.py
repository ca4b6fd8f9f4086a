"""What a norm reads: a tensor as it is, or its sum with the residual stream, to which a gate may let it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..op import Spec
from ..stage import Sample, Setting, Stage, Value
from .modulate import once, row_by_row

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


def _compute_gated(
    value: Tensor,
    residual: Tensor,
    gate: Tensor,
    product_dtype: torch.dtype,
    sum_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, dict[str, Tensor]]:
    product = row_by_row(torch.mul, value.reshape(residual.shape).to(F32), gate.to(F32)).to(product_dtype)
    summed = (residual.to(F32) + product.to(F32)).to(sum_dtype)
    return summed, {"residual_out": summed.to(residual_dtype).contiguous()}


def _samples_gated(sample: Sample) -> Sequence[dict[str, Any]]:
    gate, dtype = once(sample), sample.dtype
    return [
        {"gate": gate, "product_dtype": dtype} | _samples(sample)[0],
        {"gate": gate.to(F32), "product_dtype": F32} | _samples(sample)[1],
    ]


def _typical_gated(setting: Setting) -> Mapping[str, Any]:
    """Of one image."""
    gate = setting.random(1, setting.hidden)
    return {**RESIDUAL.typical(setting), "gate": gate, "product_dtype": torch.bfloat16}


# ``product = (gate * value).to(product_dtype)``, and ``summed = (residual + product).to(sum_dtype)``, both computed in
# float32, in the place of the value; gate: as ``once`` in ``row_by_row``.
GATED_RESIDUAL = replace(
    RESIDUAL,
    arguments={"residual": "Tensor", "gate": "Tensor", "product_dtype": "ScalarType"}
    | {"sum_dtype": "ScalarType", "residual_dtype": "ScalarType"},
    compute=_compute_gated,
    spec=lambda value, residual, gate, product_dtype, **dtypes: _spec(value, residual, **dtypes),
    samples=_samples_gated,
    typical=_typical_gated,
    feature="gated_add",
    once=("gate",),
)
