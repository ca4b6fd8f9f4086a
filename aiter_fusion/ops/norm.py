"""RMSNorm without quantisation, as AITER computes it: float32 all through, one rounding at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..op import BridgeOp
from ..providers import bridge_op
from ..stages.norm import rms_norm

F32 = torch.float32


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> dict[str, Tensor]:
    return {"y": rms_norm(x, weight.to(F32), eps, None, False, x.dtype).contiguous()}


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> dict[str, Tensor]:
    summed = x.to(F32) + residual.to(F32)
    y = rms_norm(summed, weight.to(F32), eps, None, False, x.dtype)
    return {"y": y.contiguous(), "residual_out": summed.to(x.dtype).contiguous()}


def _samples(add: bool) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    for sizes, dtype in (
        ((5, 64), torch.bfloat16),
        ((2, 3, 72), torch.float16),
        ((1, 64), F32),
        ((0, 64), torch.bfloat16),
        ((2, 8200), torch.bfloat16),
    ):
        tensors = [torch.randn(sizes, generator=generator).to(dtype) for _ in ("x", "residual")]
        weight = torch.randn(sizes[-1], generator=generator).to(dtype)
        yield {"x": tensors[0]} | ({"residual": tensors[1]} if add else {}) | {"weight": weight, "eps": 1e-5}


RMS_NORM = bridge_op(
    BridgeOp(
        family="rms_norm",
        features=frozenset(),
        arguments={"x": "Tensor", "weight": "Tensor", "eps": "float"},
        outputs=("y",),
        reference=_rms_norm,
        shape=lambda x, **_: {"y": (x.shape, x.dtype)},
        samples=lambda: _samples(add=False),
    )
)

ADD_RMS_NORM = bridge_op(
    BridgeOp(
        family="add_rms_norm",
        features=frozenset(),
        arguments={"x": "Tensor", "residual": "Tensor", "weight": "Tensor", "eps": "float"},
        outputs=("y", "residual_out"),
        reference=_add_rms_norm,
        shape=lambda x, **_: {"y": (x.shape, x.dtype), "residual_out": (x.shape, x.dtype)},
        samples=lambda: _samples(add=True),
    )
)
