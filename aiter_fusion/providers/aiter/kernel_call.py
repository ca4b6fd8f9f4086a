"""A call of a fused op in AITER's terms: granularity, features, hidden size, and whether AITER computes its
arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ... import machine
from ...op import FusedOp, width_of
from ...stages.quantise import named_format
from ..architectures import ARCHITECTURES
from ..shapes import rows_of
from . import quantiser

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class KernelCall:
    """A call that AITER's kernels might take.

    x:       its first tensor.
    gaps:    the tensors that have gaps between their rows.
    width:   the hidden size, elements of a row of values.
    block:   elements that share a scale; 0: the scale is given.
    outputs: what kernels write to, 2-D, by name; empty until the call is computed.
    """

    op: FusedOp
    arguments: Mapping[str, Any]
    x: Tensor
    gaps: tuple[str, ...]
    width: int
    block: int
    outputs: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        """An argument of the op."""
        return self.arguments[name]

    @property
    def scales(self) -> str:
        """The granularity of the scales, ``none`` where nothing is quantised."""
        if "quant_dtype" not in self.op.arguments:
            return "none"
        if "static" in self.op.features:
            return "static"
        return "tensor" if self.block == 0 else "token" if self.block == self.width else "group"

    @property
    def format(self) -> str:
        """The name of the format of the quantised values; empty if nothing is quantised."""
        return named_format(self.arguments).name if "quant_dtype" in self.op.arguments else ""

    @property
    def features(self) -> frozenset[str]:
        """Those of ``add``, ``value`` and ``offset`` that the call has."""
        offset = {"offset"} if self.arguments.get("offset") is not None else set()
        return (self.op.features & {"add", "value"}) | offset

    def rows(self, name: str) -> Tensor | None:
        """A tensor argument as ``[M, H]``, a view, since its rows are evenly spaced; None if the op does not take
        it."""
        if name not in self.arguments:
            return None
        x = self.arguments[name]
        found = rows_of(x)
        assert found is not None
        return x.as_strided((found[0], x.shape[-1]), (found[1], 1))


def why_zeros(call: KernelCall) -> str | None:
    """Why a HIP kernel that converts to FP8 would write zeros on the call's GPU, or None."""
    arch = machine.architecture(call.x.device.index or 0)
    row = ARCHITECTURES.get(arch or "")
    if row is None or row.hip_converts:
        return None
    return f"writes zeros on {arch}: HIP's conversion to FP8 is not implemented for it yet"


def describe(op: FusedOp, arguments: Mapping[str, Any]) -> KernelCall | str:
    """The call, or why none of AITER's kernels can take it."""
    if (eps := arguments.get("eps_tensor")) is not None:
        return f"its norms take eps as a number, and here eps is a {eps.dtype} tensor on {eps.device}"
    tensors = {name: v for name, v in arguments.items() if isinstance(v, Tensor) and name not in ("scale", "weight")}
    x = next(iter(tensors.values()))
    if x.dtype not in HALVES:
        return f"{next(iter(tensors))} is {x.dtype}, and its kernels take bfloat16 and float16"
    gaps = []
    for name, tensor in tensors.items():
        if tensor.dtype != x.dtype:
            return f"{name} is {tensor.dtype}, and its kernels need {x.dtype}, like {next(iter(tensors))}"
        if not isinstance(tensor.shape[-1], int):
            return f"the hidden size of {name} is known only at run time"
        found = rows_of(tensor) if statically_known_true(tensor.stride(-1) == 1) else None
        if found is None:
            return f"the rows of {name} are not evenly spaced (strides {tuple(tensor.stride())})"
        if not statically_known_true(found[1] == tensor.shape[-1]):
            gaps.append(name)
    if (why := _why_other_arithmetic(op, arguments, x)) is not None:
        return why
    width = width_of(op, arguments)
    if width < 8:
        return f"the hidden size is {width}, and its kernels load 8 elements at once"
    return KernelCall(op, arguments, x, tuple(gaps), width, arguments.get("block", 0))


def _why_other_arithmetic(op: FusedOp, arguments: Mapping[str, Any], x: Tensor) -> str | None:
    """Why AITER's kernels compute something else than the call asks for, apart from roundings, or None."""
    value = op.shape(**arguments)["value"][1]
    if value != x.dtype:
        what = "quantised" if "quant_dtype" in op.arguments else "normalised"
        return f"the {what} value is {value}, and its kernels compute it in {x.dtype}, like x"
    why = (_why_other_norm if "weight" in op.arguments else _why_other_activation)(op, arguments, x)
    if why is not None or "quant_dtype" not in op.arguments:
        return why
    steps = {name: arguments[name] for name in ("factor_steps", "value_steps", "quant_dtype")}
    if "static" in op.features:
        return quantiser.why_not_static(**steps)
    return quantiser.why_not_dynamic(arguments["scale_steps"], value=value, **steps)


def _why_other_norm(op: FusedOp, arguments: Mapping[str, Any], x: Tensor) -> str | None:
    if arguments["weight"] is None:
        return "its norms need a weight, and this call has none"
    if not statically_known_true(arguments["weight"].stride(0) == 1):
        return f"the elements of the weight are {arguments['weight'].stride(0)} apart, and its kernels need 1"
    if arguments["offset"] not in (None, 1.0):
        return f"the offset of the weight is {arguments['offset']}, and its kernels add 1 or nothing"
    if "add" in op.features and arguments["residual_dtype"] != x.dtype:
        return (
            f"the residual stream is {arguments['residual_dtype']}, and its kernels round the sum to {x.dtype}, like x"
        )
    return None


def _why_other_activation(op: FusedOp, arguments: Mapping[str, Any], x: Tensor) -> str | None:
    if "packed" not in op.features:
        return "gate and up are two tensors, and its activations take them as halves of one"
    if arguments["interleaved"] or not arguments["gate_first"]:
        return "its activations take gate in the first half of the columns and up in the second"
    return None
