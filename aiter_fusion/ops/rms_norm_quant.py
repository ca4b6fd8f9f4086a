"""RMSNorm and FP8 quantisation, with and without the residual addition before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..op import FusedOp, Spec
from . import fp8_quant

F32 = torch.float32

# eps is a number or, in its place, a tensor of one: Dynamo makes a module's float an input of the graph, in float64 on
# the CPU, once it has seen two values of it, or under dynamic=True.
NORM = {
    "weight": "Tensor?",
    "eps": "float?",
    "eps_tensor": "Tensor?",
    "offset": "float?",
    "cast_first": "bool",
    "dtype": "ScalarType",
}
# summed = residual.to(sum_dtype) + x.to(sum_dtype) is normalised; summed.to(residual_dtype) is returned
ADD = {"residual": "Tensor", "sum_dtype": "ScalarType", "residual_dtype": "ScalarType"}


def norm_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take those of the norm out of an op's arguments.

    Raises:
        ValueError: eps is not given once, or its tensor is not one number.
    """
    norm = {name: arguments.pop(name) for name in NORM}
    number, tensor = norm["eps"], norm["eps_tensor"]
    if (number is None) == (tensor is None):
        raise ValueError("a norm's eps is given once: as a number, eps, or as a tensor, eps_tensor; the other is None")
    if tensor is not None and tensor.dim():
        raise ValueError(f"eps_tensor is one number, without dimensions, and has shape {list(tensor.shape)}")
    return norm


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


def value_dtype(weight: Tensor | None, cast_first: bool, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(weight.dtype, dtype) if cast_first and weight is not None else dtype


def norm_samples(add: bool) -> Iterator[dict[str, Any]]:
    """Arguments up to the quantiser's to test ops with."""
    for seed, (sizes, dtype) in enumerate(fp8_quant.SAMPLE_SIZES):
        rows = torch.Size(sizes[:-1]).numel()
        x = fp8_quant.hostile_rows(rows, 64, dtype, seed).reshape(sizes)
        weight = fp8_quant.hostile_rows(1, 64, dtype, seed + 100)[0]
        residual = x.flip(-1).contiguous()
        sums = [
            {"residual": residual, "sum_dtype": dtype, "residual_dtype": dtype},
            {"residual": residual, "sum_dtype": F32, "residual_dtype": dtype},
            {"residual": residual.to(F32), "sum_dtype": F32, "residual_dtype": F32},
        ]
        number = {"eps": 1e-6, "eps_tensor": None}
        tensor = {"eps": None, "eps_tensor": torch.tensor(1e-6, dtype=torch.float64)}
        norms = [
            {"weight": weight, **number, "offset": None, "cast_first": True, "dtype": dtype},
            {"weight": weight.to(F32), **number, "eps": 1e-5, "offset": 1.0, "cast_first": False, "dtype": dtype},
            {"weight": None, **tensor, "offset": None, "cast_first": False, "dtype": dtype},
        ]
        for norm, summed in zip(norms, sums, strict=True):
            yield {"x": x} | (summed if add else {}) | norm


def _declaration(features: frozenset[str]) -> FusedOp:
    add = "add" in features

    def reference(
        x: Tensor,
        residual: Tensor | None = None,
        sum_dtype: torch.dtype | None = None,
        residual_dtype: torch.dtype | None = None,
        **arguments: Any,
    ) -> dict[str, Tensor]:
        summed = x if residual is None else residual.to(sum_dtype) + x.to(sum_dtype)
        norm = norm_arguments(arguments)
        value = rms_norm(summed, **norm).contiguous()
        return {
            **fp8_quant.reference(value, **arguments),
            "value": value,
            "residual_out": summed.to(residual_dtype).contiguous(),
        }

    def shape(x: Tensor, residual_dtype: torch.dtype | None = None, **arguments: Any) -> dict[str, Spec]:
        norm = norm_arguments(arguments)
        dtype = value_dtype(norm["weight"], norm["cast_first"], norm["dtype"])
        return {**fp8_quant.shape(x.shape, dtype, **arguments), "residual_out": (x.shape, residual_dtype or x.dtype)}

    def samples() -> Iterator[dict[str, Any]]:
        for before in norm_samples(add):
            for quant in fp8_quant.sample_arguments(features, 64):
                yield before | quant

    return FusedOp(
        family="rms_norm_quant",
        features=features,
        arguments={"x": "Tensor"} | (ADD if add else {}) | NORM | fp8_quant.arguments(features),
        outputs=(*fp8_quant.outputs(features), *(("residual_out",) if add else ())),
        reference=reference,
        shape=shape,
        samples=samples,
        layouts=fp8_quant.layouts(features),
        domains=fp8_quant.domains(features),
    )


fp8_quant.declare_all(("add", "static", "value"), _declaration)
