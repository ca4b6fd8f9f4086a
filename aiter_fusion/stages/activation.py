"""Activations, and gated ones, ``act(gate) * up``, of two tensors, or of the halves or every other column of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..domains import Activations
from ..op import Spec, columns
from ..stage import Sample, Setting, Stage, Value

F32 = torch.float32

# By the names in patterns/act.py, in the arithmetic of torch's decompositions (not of its eager kernels). The first are
# computed in float32, and only their result is rounded ...
IN_FLOAT32: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (torch.exp(-x) + 1),
    "swish": lambda x: x * torch.sigmoid(x),
    "gelu_tanh": lambda x: (x * 0.5) * (torch.tanh((x + (x * x * x) * 0.044715) * 0.7978845608028654) + 1),
    "gelu": lambda x: (x * 0.5) * (torch.erf(x * 0.7071067811865476) + 1),
}
# ... and of these every operation's result is rounded to the dtype of the values.
IN_STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "squared_relu": lambda x: torch.relu(x).pow(2),
    "sigmoid": torch.sigmoid,
    "quick_gelu": lambda x: x * torch.sigmoid(x * 1.702),
    "gelu_new": lambda x: (x * 0.5) * (torch.tanh((x + x.pow(3.0) * 0.044715) * 0.7978845608028654) + 1.0),
}
ACTIVATIONS = IN_FLOAT32 | IN_STEPS
CLAMPED = "clamped_swiglu="  # alpha and limit follow, so that any are possible: "clamped_swiglu=1.702,7.0"
ALONE = Activations(dict.fromkeys(ACTIVATIONS, ()))
KNOWN = Activations({**ALONE.numbers, CLAMPED.removesuffix("="): ("alpha", "limit")})
PRODUCT = {"act": "str", "cast_first": "bool", "dtype": "ScalarType"}


def activate(x: Tensor, act: str, dtype: torch.dtype) -> Tensor:
    """``act(x)`` of ``dtype``, x ``[..., H]`` of any floating dtype.

    act: a key of ``IN_FLOAT32``, rounded once, or of ``IN_STEPS``, of which every operation's result is rounded.

    Raises:
        ValueError: there is no such activation.

    Sources: Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016; So et al., "Primer", 2021 (squared ReLU).
    """
    if act in IN_STEPS:
        return IN_STEPS[act](x.to(dtype))
    if act not in IN_FLOAT32:
        raise ValueError(f"unknown activation {act!r}; known are {', '.join(KNOWN.written())}")
    return IN_FLOAT32[act](x.to(F32)).to(dtype)


def act_mul(gate: Tensor, up: Tensor, act: str, cast_first: bool, dtype: torch.dtype) -> Tensor:
    """``act(gate) * up``.

    gate, up ``[..., H]``; act: as in ``activate``, or a clamped swiglu.
    cast_first: ``activate(gate, act, dtype) * up`` (of the promoted dtype), else the activation and the product are in
    float32, and the product is rounded to dtype.

    ``clamped_swiglu=<alpha>,<limit>`` is ``(clamp(up, -limit, limit) + 1) * (g * sigmoid(g * alpha))`` with
    ``g = clamp(gate, max=limit)``. cast_first: the result of every operation (the two clamps of up are one) is rounded
    to dtype, else all are in float32 and the last is.

    Sources: Shazeer, "GLU Variants Improve Transformer", 2020; OpenAI, gpt-oss, 2025.
    """
    if act.startswith(CLAMPED):
        alpha, limit = map(float, act.removeprefix(CLAMPED).split(","))
        return clamped_swiglu(gate, up, alpha, limit, dtype if cast_first else F32).to(dtype)
    activated = activate(gate, act, dtype if cast_first else F32)
    return activated * up if cast_first else (activated * up.to(F32)).to(dtype)


def clamped_swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float, dtype: torch.dtype) -> Tensor:
    """Every operation's result in ``dtype``; clamped in float32, which matters where ``dtype`` lacks the limit."""
    gate = gate.to(F32).clamp_max(limit).to(dtype)
    up = up.to(F32).clamp_min(-limit).clamp_max(limit).to(dtype)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


def parts(gate_up: Tensor, gate_first: bool, interleaved: bool) -> tuple[Tensor, Tensor]:
    """gate and up of ``gate_up`` ``[..., 2 H]``: its halves, or interleaved its even and odd columns; gate_first says
    whether the first of them is the gate."""
    first, second = (gate_up[..., ::2], gate_up[..., 1::2]) if interleaved else gate_up.tensor_split(2, -1)
    return (first, second) if gate_first else (second, first)


def _compute(value: None, gate: Tensor, up: Tensor, **act: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return act_mul(gate, up, **act).contiguous(), {}


def _compute_packed(
    value: None, gate_up: Tensor, gate_first: bool, interleaved: bool, **act: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    return _compute(None, *parts(gate_up, gate_first, interleaved), **act)


def _dtype(up: Tensor, act: str, cast_first: bool, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, up.dtype) if cast_first and act in ACTIVATIONS else dtype


def _spec(value: None, gate: Tensor, up: Tensor, **act: Any) -> tuple[Value, dict[str, Spec]]:
    return Value(gate.shape, _dtype(up, **act)), {}


def _spec_packed(
    value: None, gate_up: Tensor, gate_first: bool, interleaved: bool, **act: Any
) -> tuple[Value, dict[str, Spec]]:
    return Value((*gate_up.shape[:-1], gate_up.shape[-1] // 2), _dtype(gate_up, **act)), {}


def _acts(dtype: torch.dtype) -> list[dict[str, Any]]:
    every = [*IN_FLOAT32, "sigmoid", "gelu_new", f"{CLAMPED}1.702,7.0"]
    return [{"act": act, "cast_first": index % 2 == 0, "dtype": dtype} for index, act in enumerate(every)]


def _samples(sample: Sample) -> Sequence[dict[str, Any]]:
    gate, up = parts(sample.rows(2 * sample.sizes[-1]), True, False)
    wide = {2: {"up": up.to(F32)}, 3: {"gate": gate.to(F32)}}
    return [{"gate": gate, "up": up} | wide.get(i, {}) | act for i, act in enumerate(_acts(sample.dtype))]


def _samples_packed(sample: Sample) -> Sequence[dict[str, Any]]:
    both = sample.rows(2 * sample.sizes[-1])
    return [
        {"gate_up": both, "gate_first": index % 2 == 0, "interleaved": index % 3 == 1} | act
        for index, act in enumerate(_acts(sample.dtype))
    ]


def _typical_act(setting: Setting) -> Mapping[str, Any]:
    return {"act": setting.said(ACTIVATIONS, "silu"), "cast_first": True, "dtype": torch.bfloat16}


def _typical_packed(setting: Setting) -> Mapping[str, Any]:
    gate_up = setting.random(setting.rows, 2 * setting.hidden)
    return {"gate_up": gate_up, "gate_first": True, "interleaved": False, **_typical_act(setting)}


def _compute_alone(value: None, x: Tensor, act: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    return activate(x, act, dtype).contiguous(), {}


def _spec_alone(value: None, x: Tensor, act: str, dtype: torch.dtype) -> tuple[Value, dict[str, Spec]]:
    return Value(x.shape, dtype), {}


def _samples_alone(sample: Sample) -> Sequence[dict[str, Any]]:
    """A third of the activations: the samples take turns."""
    acts = list(ACTIVATIONS)[sample.seed % 3 :: 3]
    return [{"x": sample.rows(), "act": act, "dtype": sample.dtype} for act in acts]


ACT = Stage(
    "act",
    {"x": "Tensor", "act": "str", "dtype": "ScalarType"},
    _compute_alone,
    _spec_alone,
    _samples_alone,
    lambda setting: {"x": setting.random(), "act": setting.said(ACTIVATIONS, "gelu_tanh"), "dtype": torch.bfloat16},
    domains={"act": ALONE},
    returns="value",
    levels={"value": 2},
    follows=False,
)
ACT_MUL = Stage(
    "act_mul",
    {"gate": "Tensor", "up": "Tensor"} | PRODUCT,
    _compute,
    _spec,
    _samples,
    lambda setting: {"gate": setting.random(), "up": setting.random(), **_typical_act(setting)},
    domains={"act": KNOWN},
    returns="value",
    levels={"value": 2},
    follows=False,
)
PACKED_ACT_MUL = replace(
    ACT_MUL,
    arguments={"gate_up": "Tensor", "gate_first": "bool", "interleaved": "bool"} | PRODUCT,
    compute=_compute_packed,
    spec=_spec_packed,
    samples=_samples_packed,
    typical=_typical_packed,
    feature="packed",
    width=lambda arguments: columns(arguments["gate_up"]) // 2,
)
