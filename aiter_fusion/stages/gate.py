"""A gate after a norm: its value times an activation of another tensor, as linear attention has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..op import Spec
from ..stage import Sample, Stage, Value
from .activation import ALONE, activate

F32 = torch.float32


def _compute(
    value: Tensor, z: Tensor, act: str, act_dtype: torch.dtype, gated_dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    gated = value * activate(z.reshape(value.shape), act, act_dtype)
    return gated.to(gated_dtype).contiguous(), {}


def _spec(value: Value, gated_dtype: torch.dtype, **_: Any) -> tuple[Value, dict[str, Spec]]:
    return Value(value.sizes, gated_dtype), {}


def _samples(sample: Sample) -> Sequence[dict[str, Any]]:
    z, dtype = sample.rows().flip(-1).contiguous(), sample.dtype
    return [
        {"z": z, "act": "silu", "act_dtype": F32, "gated_dtype": dtype},
        {"z": z, "act": "sigmoid", "act_dtype": dtype, "gated_dtype": dtype},
    ]


# ``(value * activate(z, act, act_dtype)).to(gated_dtype)``, z ``[..., H]``. It is part of the record of the norm.
#
# Source: Yang et al., "Gated Delta Networks", 2024.
GATE = Stage(
    "",
    {"z": "Tensor", "act": "str", "act_dtype": "ScalarType", "gated_dtype": "ScalarType"},
    _compute,
    _spec,
    _samples,
    lambda setting: {"z": setting.random(), "act": "silu", "act_dtype": F32, "gated_dtype": torch.bfloat16},
    feature="gated",
    domains={"act": ALONE},
    returns="value",
    levels={"value": 2},
)
