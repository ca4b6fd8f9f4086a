"""The provider ``torch``: PyTorch's own scaled matrix product, for the ops of the bridge that it computes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import platform
from ..op import FusedOp, Implementation


def _operands(op: FusedOp, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a ``[M, K]``, b ``[K, N]``, and their scales."""
    if op.family == "gemm_a8w8":
        return arguments["x"], arguments["w"].t(), arguments["x_scale"], arguments["w_scale"]
    return arguments["a"], arguments["b"], arguments["a_scale"], arguments["b_scale"]


def refuse(op: FusedOp, arguments: Mapping[str, Any]) -> str | None:
    """Why PyTorch has no product for a call, or None."""
    if op.family not in ("gemm_a8w8", "hipb_mm_fp8"):
        return "PyTorch has no one operation for it"
    if arguments.get("b_is_shuffled"):
        return "PyTorch does not read shuffled weights"
    a, b, a_scale, b_scale = _operands(op, arguments)
    if a.dtype.itemsize != 1 or not a.dtype.is_floating_point:
        return f"its scaled product is of FP8 tensors, not of {a.dtype}"
    if b.stride(0) != 1 or a.stride(-1) != 1:
        return "its scaled product wants rows of a and columns of b without gaps"
    if a.numel() == 0:
        return "there are no rows"
    if a_scale.dtype != torch.float32 or b_scale.dtype != torch.float32:
        return "its scales are float32"
    if a.device.type == "cpu" and platform.release(torch.__version__) < (2, 12):
        return "before torch 2.12, on a CPU it takes one scale for the whole tensor"
    if a.device.type != "cpu":
        if arguments["dtype"] is not torch.bfloat16:
            return "with scales for rows its result is bfloat16"
        if b.shape[0] % 16 or b.shape[1] % 16:
            return f"it takes multiples of 16, not {b.shape[0]} x {b.shape[1]}"
        if torch.version.hip is None and torch.cuda.get_device_capability(a.device) < (8, 9):
            return "this GPU has no FP8 units"
    return None


def run(op: FusedOp) -> Implementation:
    """What computes a call."""
    return functools.partial(_run, op)


def _run(op: FusedOp, **arguments: Any) -> dict[str, Tensor]:
    a, b, a_scale, b_scale = _operands(op, arguments)
    y = torch.ops.aten._scaled_mm.default(
        a,
        b,
        scale_a=a_scale.reshape(-1, 1).contiguous(),
        scale_b=b_scale.reshape(1, -1).contiguous(),
        bias=arguments["bias"],
        out_dtype=arguments["dtype"],
    )
    return {"y": y}
