"""Columns of two tensors beside each other, each maybe activated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..domains import Activations
from ..op import Spec, columns
from ..stage import Sample, Setting, Stage, Value
from .activation import ACTIVATIONS, activate

AS_IT_IS = ""
KNOWN = Activations(dict.fromkeys((AS_IT_IS, *ACTIVATIONS), ()))


def cat(first: Tensor, second: Tensor, first_act: str, second_act: str, dtype: torch.dtype) -> Tensor:
    """``[first_act(first), second_act(second)]`` of ``dtype``.

    first ``[..., G]``, second ``[..., H]`` of as many rows, any floating dtype; acts: as in ``activate``, or empty,
    which converts alone. Returns ``[..., G + H]``.
    """
    parts = ((first, first_act), (second, second_act))
    return torch.cat([activate(x, act, dtype) if act else x.to(dtype) for x, act in parts], -1)


def _compute(value: None, **arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return cat(**arguments), {}


def _width(arguments: Any) -> Any:
    return columns(arguments["first"]) + columns(arguments["second"])


def _spec(value: None, first: Tensor, second: Tensor, dtype: torch.dtype, **_: Any) -> tuple[Value, dict[str, Spec]]:
    return Value((*first.shape[:-1], first.shape[-1] + second.shape[-1]), dtype), {}


def _samples(sample: Sample) -> Sequence[dict[str, Any]]:
    """Together as wide as the sample, so that its quantisers fit."""
    whole = sample.rows()
    made = []
    for width, acts in ((16, (AS_IT_IS, "gelu_tanh")), (40, ("silu", AS_IT_IS)), (32, ("relu", "gelu"))):
        first, second = whole[..., :width].contiguous(), whole[..., width:].contiguous()
        made.append({"first": first, "second": second, "first_act": acts[0], "second_act": acts[1]})
    return [{**arguments, "dtype": sample.dtype} for arguments in made]


HEAD = 128


def _typical(setting: Setting) -> dict[str, Any]:
    """Of FLUX's blocks: attention, in heads of 128, beside an activation of about four times as many columns."""
    width = setting.hidden // 5 // HEAD * HEAD or setting.hidden // 2
    first, second = setting.random(setting.rows, width), setting.random(setting.rows, setting.hidden - width)
    acts = {"first_act": AS_IT_IS, "second_act": setting.said(ACTIVATIONS, "gelu_tanh")}
    return {"first": first, "second": second, **acts, "dtype": torch.bfloat16}


CAT = Stage(
    "cat",
    {"first": "Tensor", "second": "Tensor", "first_act": "str", "second_act": "str", "dtype": "ScalarType"},
    _compute,
    _spec,
    _samples,
    _typical,
    domains=dict.fromkeys(("first_act", "second_act"), KNOWN),
    returns="value",
    levels={"value": 2},
    width=_width,
    follows=False,
)
