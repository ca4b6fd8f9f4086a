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
    x: Tensor,
    weight: Tensor | None,
    eps: float | None,
    offset: float | None,
    cast_first: bool,
    dtype: torch.dtype,
    eps_tensor: Tensor | None = None,
) -> Tensor:
    """``y = x32 * rsqrt(mean(x32**2, -1) + eps)``, weighted and rounded in the order that the arguments say.

    x ``[..., H]`` of any floating dtype, x32 its float32; weight ``[H]`` or None; eps, rounded to float32, is added to
    the mean square. In place of the number (then None), eps_tensor ``[]`` has it, of any floating dtype, on x's device
    or on the CPU.
    cast_first: ``weight * y.to(dtype)`` (the result is of the promoted dtype), else ``(y * weight).to(dtype)``.
    offset: the weight is ``weight.float() + offset`` (Gemma stores ``weight - 1``).

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    x32 = x.to(F32)
    added: Any = eps if eps_tensor is None else eps_tensor.to(F32)
    y = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + added)
    if cast_first:
        y = y.to(dtype)
    if weight is not None:
        y = y * (weight if offset is None else weight.to(F32) + offset)
    return y if cast_first else y.to(dtype)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    dtype: torch.dtype,
    eps_tensor: Tensor | None = None,
) -> Tensor:
    """``((x32 - mean) * rsqrt(var + eps) * weight + bias).to(dtype)`` with mean and (biased) variance of each row.

    x ``[..., H]`` of any floating dtype, x32 its float32; weight and bias ``[H]`` or None; eps, eps_tensor: as in
    ``rms_norm``, added to the variance.

    Source: Ba et al., "Layer Normalization", 2016.
    """
    x32 = x.to(F32)
    added: Any = eps if eps_tensor is None else eps_tensor.to(F32)
    variance, mean = torch.var_mean(x32, [-1], correction=0, keepdim=True)
    y = (x32 - mean) * torch.rsqrt(variance + added)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(dtype)


def _check(eps: float | None, eps_tensor: Tensor | None) -> None:
    """Raise a ValueError unless eps is given once, and its tensor, if it is one, has no dimensions."""
    if (eps is None) == (eps_tensor is None):
        raise ValueError("a norm's eps is given once: as a number, eps, or as a tensor, eps_tensor; the other is None")
    if eps_tensor is not None and eps_tensor.dim():
        raise ValueError(f"eps_tensor is one number, without dimensions, and has shape {list(eps_tensor.shape)}")


def _compute(value: Tensor, **norm: Any) -> tuple[Tensor, dict[str, Tensor]]:
    _check(norm["eps"], norm["eps_tensor"])
    return rms_norm(value, **norm).contiguous(), {}


def _spec(
    value: Value,
    weight: Tensor | None,
    eps: float | None,
    eps_tensor: Tensor | None,
    cast_first: bool,
    dtype: torch.dtype,
    **_: Any,
) -> tuple[Value, dict[str, Spec]]:
    _check(eps, eps_tensor)
    promoted = torch.promote_types(weight.dtype, dtype) if cast_first and weight is not None else dtype
    return Value(value.sizes, promoted), {}


def _samples(sample: Sample) -> Sequence[dict[str, Any]]:
    weight, dtype = sample.weight(), sample.dtype
    number = {"eps": 1e-6, "eps_tensor": None}
    tensor = {"eps": None, "eps_tensor": torch.tensor(1e-6, dtype=torch.float64)}
    return [
        {"weight": weight, **number, "offset": None, "cast_first": True, "dtype": dtype},
        {"weight": weight.to(F32), **number, "eps": 1e-5, "offset": 1.0, "cast_first": False, "dtype": dtype},
        {"weight": None, **tensor, "offset": None, "cast_first": False, "dtype": dtype},
    ]


def _typical(setting: Setting) -> Mapping[str, Any]:
    weight = setting.random(setting.hidden)
    eps = {"eps": 1e-6, "eps_tensor": None}
    return {"weight": weight, **eps, "offset": None, "cast_first": True, "dtype": torch.bfloat16}


def _compute_layer(value: Tensor, **norm: Any) -> tuple[Tensor, dict[str, Tensor]]:
    _check(norm["eps"], norm["eps_tensor"])
    return layer_norm(value, **norm).contiguous(), {}


def _spec_layer(
    value: Value, eps: float | None, eps_tensor: Tensor | None, dtype: torch.dtype, **_: Any
) -> tuple[Value, dict[str, Spec]]:
    _check(eps, eps_tensor)
    return Value(value.sizes, dtype), {}


def _samples_layer(sample: Sample) -> Sequence[dict[str, Any]]:
    weight, bias, dtype = sample.weight(), sample.weight().flip(0), sample.dtype
    number = {"eps": 1e-6, "eps_tensor": None}
    tensor = {"eps": None, "eps_tensor": torch.tensor(1e-5, dtype=torch.float64)}
    return [
        {"weight": weight, "bias": bias, **number, "dtype": dtype},
        {"weight": None, "bias": None, **number, "dtype": dtype},
        {"weight": weight.to(F32), "bias": None, **tensor, "dtype": dtype},
        {"weight": None, "bias": bias.to(F32), **number, "dtype": F32},
    ]


def _typical_layer(setting: Setting) -> Mapping[str, Any]:
    """With both, as most models have them."""
    weight, bias = setting.random(setting.hidden), setting.random(setting.hidden)
    return {"weight": weight, "bias": bias, "eps": 1e-6, "eps_tensor": None, "dtype": torch.bfloat16}


# eps is a number or, in its place, a tensor of one: Dynamo makes a module's float an input of the graph, in float64 on
# the CPU, once it has seen two values of it, or under dynamic=True.
RMS_NORM = Stage(
    "rms_norm",
    {
        "weight": "Tensor?",
        "eps": "float?",
        "eps_tensor": "Tensor?",
        "offset": "float?",
        "cast_first": "bool",
        "dtype": "ScalarType",
    },
    _compute,
    _spec,
    _samples,
    _typical,
    traits=("offset",),
    returns="value",
    levels={"offset": 2, "value": 2},
)
LAYER_NORM = Stage(
    "layer_norm",
    {
        "weight": "Tensor?",
        "bias": "Tensor?",
        "eps": "float?",
        "eps_tensor": "Tensor?",
        "dtype": "ScalarType",
    },
    _compute_layer,
    _spec_layer,
    _samples_layer,
    _typical_layer,
    returns="value",
    levels={"value": 2},
    cancels=True,  # x and the mean, and a bias
)
