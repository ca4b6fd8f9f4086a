"""What the provider ``torch`` declares (``known.py``): PyTorch's scaled matrix product, for two ops of the bridge."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ... import machine
from ...domains import OneOf, Tensors
from ...op import FusedOp, Implementation
from ..terms import Terms


def _operands(op: FusedOp, arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a ``[M, K]``, b ``[K, N]``, and their scales."""
    if op.family == "gemm_a8w8":
        return arguments["x"], arguments["w"].t(), arguments["x_scale"], arguments["w_scale"]
    return arguments["a"], arguments["b"], arguments["a_scale"], arguments["b_scale"]


FP8 = Tensors((torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz))
SCALES = Tensors((torch.float32,))
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
RESULT = {"bias": Tensors(FLOATS, optional=True), "dtype": OneOf(FLOATS)}
# One operation of PyTorch's computes both ops. It reads no shuffled weights.
TERMS: Mapping[str, Terms] = {
    "gemm_a8w8": Terms({"x": FP8, "w": FP8, "x_scale": SCALES, "w_scale": SCALES, **RESULT}),
    "hipb_mm_fp8": Terms(
        {"a": FP8, "b": FP8, "a_scale": SCALES, "b_scale": SCALES, **RESULT, "b_is_shuffled": OneOf((False,))}
    ),
}


def terms(op: FusedOp) -> Terms | None:
    """The calls of an op that PyTorch's product computes, or None."""
    return TERMS.get(op.family)


def refuse(op: FusedOp, arguments: Mapping[str, Any]) -> str | None:
    """Why PyTorch has no product for a call that the terms allow, or None."""
    a, b, _, _ = _operands(op, arguments)
    if b.stride(0) != 1 or a.stride(-1) != 1:
        return "its scaled product needs the elements of a's rows and of b's columns next to each other"
    if a.numel() == 0:
        return "a has no rows, and its scaled product needs one"
    if a.device.type == "cpu" and machine.release(torch.__version__) < (2, 12):
        return "on a CPU its scaled product takes scales for rows from torch 2.12 on"
    if a.device.type != "cpu":
        if arguments["dtype"] is not torch.bfloat16:
            return f"the result is {arguments['dtype']}, and with scales for rows its scaled product makes bfloat16"
        if b.shape[0] % 16 or b.shape[1] % 16:
            return f"b is {b.shape[0]} x {b.shape[1]}, and its scaled product takes multiples of 16"
        if torch.version.hip is None and torch.cuda.get_device_capability(a.device) < (8, 9):
            return "this GPU has no FP8 units, which NVIDIA's have from compute capability 8.9 on"
    return None


def run(op: FusedOp) -> Implementation:
    """The implementation of an op."""
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
