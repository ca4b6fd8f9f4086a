"""All-reduce, optional residual addition, RMSNorm and, in ``all_reduce_rms_norm_quant``, FP8 quantisation.

Every rank of the group calls the op, with tensors of one shape: it is a collective, as what it replaces is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..domains import ANYTHING
from ..op import FusedOp, Spec, fused_op
from ..providers import implementation
from . import fp8_quant
from .rms_norm_quant import ADD, NORM, norm_arguments, norm_samples, rms_norm, value_dtype

# A group's name is PyTorch's: the process that loads a graph looks it up among its own.
REDUCE = {"x": "Tensor", "other": "Tensor?", "group": "str"}


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum of every rank's ``x``, in its dtype."""
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", group))


def reduced_shape(x: Tensor, other: Tensor | None, residual: Tensor | None) -> torch.Size:
    """Rows may be laid out in different dimensions; the last of the three that there is decides for the outputs."""
    return (x if other is None and residual is None else other if residual is None else residual).shape  # type: ignore[union-attr]


def _declaration(features: frozenset[str], quantised: bool) -> FusedOp:
    add, returned = "add" in features, "reduced" in features
    extra = (*(("residual_out",) if add else ()), *(("reduced",) if returned else ()))

    def reference(
        x: Tensor,
        group: str,
        other: Tensor | None = None,
        residual: Tensor | None = None,
        sum_dtype: torch.dtype | None = None,
        residual_dtype: torch.dtype | None = None,
        **arguments: Any,
    ) -> dict[str, Tensor]:
        """``reduced = all_reduce(x)``, or ``all_reduce(x) + all_reduce(other)``; then as ``rms_norm_quant``."""
        sizes = reduced_shape(x, other, residual)
        reduced = all_reduce(x, group).reshape(sizes)
        if other is not None:
            reduced = reduced + all_reduce(other, group).reshape(sizes)
        summed = reduced if residual is None else residual.to(sum_dtype) + reduced.to(sum_dtype)
        norm = norm_arguments(arguments)
        value = rms_norm(summed, **norm).contiguous()
        return {
            **(fp8_quant.reference(value, **arguments) if quantised else {}),
            "value": value,
            "residual_out": summed.to(residual_dtype).contiguous(),
            "reduced": reduced.contiguous(),
        }

    def shape(
        x: Tensor,
        other: Tensor | None = None,
        residual: Tensor | None = None,
        residual_dtype: torch.dtype | None = None,
        **arguments: Any,
    ) -> dict[str, Spec]:
        sizes = reduced_shape(x, other, residual)
        norm = norm_arguments(arguments)
        dtype = value_dtype(norm["weight"], norm["cast_first"], norm["dtype"])
        outputs = fp8_quant.shape(sizes, dtype, **arguments) if quantised else {"value": (sizes, dtype)}
        return {**outputs, "residual_out": (sizes, residual_dtype or x.dtype), "reduced": (sizes, x.dtype)}

    def samples() -> Iterator[dict[str, Any]]:
        """For a process that is the only one of the group called 0."""
        for index, before in enumerate(norm_samples(add)):
            other = before["x"].flip(0).contiguous() if index % 2 else None
            for quant in fp8_quant.sample_arguments(features, 64) if quantised else [{}]:
                yield {**before, "other": other, "group": "0", **quant}

    return FusedOp(
        family="all_reduce_rms_norm" + ("_quant" if quantised else ""),
        features=features,
        arguments=REDUCE | (ADD if add else {}) | NORM | (fp8_quant.arguments(features) if quantised else {}),
        outputs=(*(fp8_quant.outputs(features) if quantised else ("value",)), *extra),
        reference=reference,
        shape=shape,
        samples=samples,
        layouts=fp8_quant.layouts(features) if quantised else ({},),
        domains={"group": ANYTHING} | (fp8_quant.domains(features) if quantised else {}),
        order_free=frozenset({"x", "other"}),
    )


for subset in [(), ("add",), ("reduced",), ("add", "reduced")]:
    fused_op(_declaration(frozenset(subset), quantised=False), implementation)
fp8_quant.declare_all(("add", "reduced", "static", "value"), lambda features: _declaration(features, quantised=True))
