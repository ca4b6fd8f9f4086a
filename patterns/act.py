"""Activations. They are written as Inductor decomposes them, since their rounding is part of the contract; their names
are the values of the ops' argument ``act``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from .form import Completion, Form
from .fx_facts import FLOATS, HALVES, Target, aten, dtype
from .language import Call, Const, Found, OneOf, Pattern, Var, With, add, convert_to, in_float32, mul

F32 = torch.float32


def call(target: Target, *args: Pattern) -> Call:
    """A call whose result is in float32."""
    return Call((target,), args, dtype=F32)


def _mul(a: Pattern, b: Pattern) -> Call:
    return mul(a, b, dtype=F32)


def _add(a: Pattern, b: Pattern) -> Call:
    return add(a, b, dtype=F32)


# Every step is in float32.
IN_FLOAT32: dict[str, Callable[[Pattern], Pattern]] = {
    # x / (1 + exp(-x)): torch's decomposition of silu
    "silu": lambda x: call(aten.div.Tensor, x, _add(call(aten.exp.default, call(aten.neg.default, x)), Const(1))),
    # x * sigmoid(x): written by hand
    "swish": lambda x: _mul(x, call(aten.sigmoid.default, x)),
    # 0.5 x * (1 + tanh(sqrt(2/pi) (x + 0.044715 x**3)))
    "gelu_tanh": lambda x: _mul(
        _mul(x, Const(0.5)),
        _add(
            call(
                aten.tanh.default,
                _mul(_add(x, _mul(_mul(_mul(x, x), x), Const(0.044715))), Const(0.7978845608028654)),
            ),
            Const(1),
        ),
    ),
    # 0.5 x * (1 + erf(x / sqrt(2)))
    "gelu": lambda x: _mul(
        _mul(x, Const(0.5)), _add(call(aten.erf.default, _mul(x, Const(0.7071067811865476))), Const(1))
    ),
}


def _of(target: Target, *args: Pattern) -> Call:
    return Call((target,), args)


# Every step is in the dtype of x, and rounds to it.
IN_STEPS: dict[str, Callable[[Pattern], Pattern]] = {
    "relu": lambda x: _of(aten.relu.default, x),
    # Nemotron
    "squared_relu": lambda x: _of(aten.pow.Tensor_Scalar, _of(aten.relu.default, x), Const(2)),
    "sigmoid": lambda x: _of(aten.sigmoid.default, x),
    # CLIP: x * sigmoid(1.702 x)
    "quick_gelu": lambda x: mul(x, _of(aten.sigmoid.default, mul(x, Const(1.702)))),
    # transformers' NewGELUActivation: gelu_tanh with a power
    "gelu_new": lambda x: mul(
        mul(x, Const(0.5)),
        add(
            _of(
                aten.tanh.default,
                mul(
                    add(x, mul(_of(aten.pow.Tensor_Scalar, x, Const(3)), Const(0.044715))),
                    Const(0.7978845608028654),
                ),
            ),
            Const(1),
        ),
    ),
}


def _complete(root: fx.Node, found: Found) -> Completion | str:
    x = found.inputs["x"]
    if dtype(x) not in FLOATS:
        return f"what is activated, {x.name}, is {dtype(x)}"
    return Completion({"dtype": dtype(root)} | dict(found.attributes))


def _form(act: str, pattern: Pattern) -> Form:
    return Form(
        "act",
        act,
        With(pattern, {"act": act}),
        output="value",
        complete=_complete,
        rows=("x",),
        # one alone is worth no opaque op, and belongs to no report
        serves=("fp8_quant",),
    )


def activations(name: str, dtype: str = "dtype") -> dict[str, Pattern]:
    """By name, all activations of the input ``name``; ``dtype``: the attribute for what half precision the result of
    those in float32 is rounded to."""

    def rounded(activated: Pattern) -> Pattern:
        return OneOf((convert_to(activated, dtype, HALVES), activated))

    wide = {act: rounded(written(in_float32(Var(name)))) for act, written in IN_FLOAT32.items()}
    return wide | {act: written(Var(name)) for act, written in IN_STEPS.items()}


FORMS = tuple(_form(act, pattern) for act, pattern in activations("x").items())
