"""Gated activation and FP8 quantisation, from two tensors or from the halves of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

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
ACT = {"act": "str", "cast_first": "bool", "dtype": "ScalarType"}


def act_mul(gate: Tensor, up: Tensor, act: str, cast_first: bool, dtype: torch.dtype) -> Tensor:
    """``act(gate) * up`` with the activation in float32.

    gate, up ``[..., H]``; act: a key of ``ACTIVATIONS``, else a ValueError names the keys.
    cast_first: ``act(gate32).to(dtype) * up``, else ``(act(gate32) * up32).to(dtype)``.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"unknown activation {act!r}; known are {', '.join(ACTIVATIONS)}")
    activated = ACTIVATIONS[act](gate.to(F32))
    return activated.to(dtype) * up if cast_first else (activated * up.to(F32)).to(dtype)


def _halves(gate_up: Tensor, gate_first: bool) -> tuple[Tensor, Tensor]:
    first, second = gate_up.tensor_split(2, -1)
    return (first, second) if gate_first else (second, first)


def _declaration(features: frozenset[str]) -> FusedOp:
    packed = "packed" in features
    inputs = {"gate_up": "Tensor", "gate_first": "bool"} if packed else {"gate": "Tensor", "up": "Tensor"}

    def reference(**arguments: Any) -> dict[str, Tensor]:
        given = [arguments.pop(name) for name in inputs]
        gate, up = _halves(*given) if packed else given
        value = act_mul(gate, up, **{name: arguments.pop(name) for name in ACT}).contiguous()
        return {**fp8_quant.reference(value, **arguments), "value": value}

    def shape(**arguments: Any) -> dict[str, Spec]:
        given = [arguments.pop(name) for name in inputs]
        act = {name: arguments.pop(name) for name in ACT}
        sizes = [*given[0].shape[:-1], given[0].shape[-1] // 2] if packed else given[0].shape
        dtype = torch.promote_types(act["dtype"], given[0].dtype) if act["cast_first"] else act["dtype"]
        return fp8_quant.shape(sizes, dtype, **arguments)

    def samples() -> Iterator[dict[str, Any]]:
        for seed, (sizes, dtype) in enumerate(
            [
                ((9, 64), torch.bfloat16),
                ((2, 4, 64), torch.float16),
                ((1, 64), F32),
                ((0, 64), torch.bfloat16),
                ((64,), F32),
            ]
        ):
            rows = torch.Size(sizes[:-1]).numel()
            both = fp8_quant.hostile_rows(rows, 128, dtype, seed).reshape(*sizes[:-1], 128)
            gate, up = _halves(both, True)
            for index, act in enumerate(ACTIVATIONS):
                tensors = {"gate_up": both, "gate_first": index % 2 == 0} if packed else {"gate": gate, "up": up}
                for quant in fp8_quant.sample_arguments(features, 64):
                    yield tensors | {"act": act, "cast_first": index < 2, "dtype": dtype} | quant

    return FusedOp(
        family="act_mul_quant",
        features=features,
        arguments=inputs | ACT | fp8_quant.arguments(features),
        outputs=fp8_quant.outputs(features),
        reference=reference,
        shape=shape,
        samples=samples,
    )


fp8_quant.declare_all(("packed", "static", "value"), _declaration)
