"""Gated activation and FP8 quantisation, from two tensors, or from the halves or every other column of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..domains import Activations
from ..op import FusedOp, Spec
from . import fp8_quant

F32 = torch.float32

# By the names in patterns/act_mul.py, in the arithmetic of torch's decompositions (not of its eager kernels).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (torch.exp(-x) + 1),
    "swish": lambda x: x * torch.sigmoid(x),
    "gelu_tanh": lambda x: (x * 0.5) * (torch.tanh((x + (x * x * x) * 0.044715) * 0.7978845608028654) + 1),
    "gelu": lambda x: (x * 0.5) * (torch.erf(x * 0.7071067811865476) + 1),
}
CLAMPED = "clamped_swiglu="  # alpha and limit follow, so that any are possible: "clamped_swiglu=1.702,7.0"
KNOWN = Activations({**dict.fromkeys(ACTIVATIONS, ()), CLAMPED.removesuffix("="): ("alpha", "limit")})
ACT = {"act": "str", "cast_first": "bool", "dtype": "ScalarType"}


def act_mul(gate: Tensor, up: Tensor, act: str, cast_first: bool, dtype: torch.dtype) -> Tensor:
    """``act(gate) * up`` with the activation in float32.

    gate, up ``[..., H]``; act: a key of ``ACTIVATIONS`` or a clamped swiglu, else a ValueError names them.
    cast_first: ``act(gate32).to(dtype) * up`` (of the promoted dtype), else ``(act(gate32) * up32).to(dtype)``.

    ``clamped_swiglu=<alpha>,<limit>`` is ``(clamp(up, -limit, limit) + 1) * (g * sigmoid(g * alpha))`` with
    ``g = clamp(gate, max=limit)``. cast_first: the result of every operation (the two clamps of up are one) is rounded
    to dtype, else all are in float32 and the last is.

    Sources: Shazeer, "GLU Variants Improve Transformer", 2020; OpenAI, gpt-oss, 2025.
    """
    if act.startswith(CLAMPED):
        alpha, limit = map(float, act.removeprefix(CLAMPED).split(","))
        return clamped_swiglu(gate, up, alpha, limit, dtype if cast_first else F32).to(dtype)
    if act not in ACTIVATIONS:
        raise ValueError(f"unknown activation {act!r}; known are {', '.join(KNOWN)}")
    activated = ACTIVATIONS[act](gate.to(F32))
    return activated.to(dtype) * up if cast_first else (activated * up.to(F32)).to(dtype)


def clamped_swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float, dtype: torch.dtype) -> Tensor:
    """Every operation's result in ``dtype``; clamped in float32, which matters where ``dtype`` lacks the limit."""
    gate = gate.to(F32).clamp_max(limit).to(dtype)
    up = up.to(F32).clamp_min(-limit).clamp_max(limit).to(dtype)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


def _value_dtype(up: Tensor, act: str, cast_first: bool, dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, up.dtype) if cast_first and act in ACTIVATIONS else dtype


def _parts(gate_up: Tensor, gate_first: bool, interleaved: bool) -> tuple[Tensor, Tensor]:
    """gate and up of ``gate_up`` ``[..., 2 H]``: its halves, or interleaved its even and odd columns; gate_first says
    whether the first of them is the gate."""
    first, second = (gate_up[..., ::2], gate_up[..., 1::2]) if interleaved else gate_up.tensor_split(2, -1)
    return (first, second) if gate_first else (second, first)


def _declaration(features: frozenset[str]) -> FusedOp:
    packed = "packed" in features
    columns = {"gate_up": "Tensor", "gate_first": "bool", "interleaved": "bool"}
    inputs = columns if packed else {"gate": "Tensor", "up": "Tensor"}

    def reference(**arguments: Any) -> dict[str, Tensor]:
        given = [arguments.pop(name) for name in inputs]
        gate, up = _parts(*given) if packed else given
        value = act_mul(gate, up, **{name: arguments.pop(name) for name in ACT}).contiguous()
        return {**fp8_quant.reference(value, **arguments), "value": value}

    def shape(**arguments: Any) -> dict[str, Spec]:
        given = [arguments.pop(name) for name in inputs]
        act = {name: arguments.pop(name) for name in ACT}
        sizes = [*given[0].shape[:-1], given[0].shape[-1] // 2] if packed else given[0].shape
        return fp8_quant.shape(sizes, _value_dtype(given[0 if packed else 1], **act), **arguments)

    def samples() -> Iterator[dict[str, Any]]:
        for seed, (sizes, dtype) in enumerate(fp8_quant.SAMPLE_SIZES):
            rows = torch.Size(sizes[:-1]).numel()
            both = fp8_quant.hostile_rows(rows, 128, dtype, seed).reshape(*sizes[:-1], 128)
            gate, up = _parts(both, True, False)
            for index, act in enumerate([*ACTIVATIONS, f"{CLAMPED}1.702,7.0"]):
                columns = {"gate_up": both, "gate_first": index % 2 == 0, "interleaved": index % 3 == 1}
                wide = {2: {"up": up.to(F32)}, 3: {"gate": gate.to(F32)}}.get(index, {})
                tensors = columns if packed else {"gate": gate, "up": up} | wide
                for quant in fp8_quant.sample_arguments(features, 64):
                    yield tensors | {"act": act, "cast_first": index % 2 == 0, "dtype": dtype} | quant

    return FusedOp(
        family="act_mul_quant",
        features=features,
        arguments=inputs | ACT | fp8_quant.arguments(features),
        outputs=fp8_quant.outputs(features),
        reference=reference,
        shape=shape,
        samples=samples,
        layouts=fp8_quant.layouts(features),
        domains={"act": KNOWN} | fp8_quant.domains(features),
    )


fp8_quant.declare_all(("packed", "static", "value"), _declaration)
