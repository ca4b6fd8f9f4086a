"""Gated activations: ``act(gate) * up``, from two tensors or from the halves of one.

Each activation is written as Inductor decomposes it, since its rounding is part of the contract; the names are the
values of the ops' argument ``act``.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem

import torch
from torch import fx

from .language import (
    FLOATS,
    HALVES,
    Attr,
    Call,
    Completion,
    Const,
    Form,
    Found,
    OneOf,
    Pattern,
    Target,
    Var,
    With,
    add,
    aten,
    convert_to,
    dtype,
    in_float32,
    is_last_dim,
    mul,
    same_shape,
    same_size,
    shape,
)

F32 = torch.float32


def _is_half(node: fx.Node, size: object) -> bool:
    """``size`` (of a split) is half of the last dimension."""
    width = shape(node.args[0])[-1]  # type: ignore[arg-type]
    sizes = size if isinstance(size, (list, tuple)) else [size, size]
    return len(sizes) == 2 and all(isinstance(s, int) and same_size(2 * s, width) for s in sizes)


def _starts_at(half: int):
    def test(node: fx.Node, start: object) -> bool:
        width = shape(node.args[0])[-1]  # type: ignore[arg-type]
        return isinstance(start, int) and same_size(2 * start, half * width)

    return test


def _ends_at(half: int):
    def test(node: fx.Node, end: object) -> bool:
        width = shape(node.args[0])[-1]  # type: ignore[arg-type]
        if half == 1 and end == torch.iinfo(torch.int64).max:  # "to the end"
            return True
        return isinstance(end, int) and same_size(2 * end, (half + 1) * width)

    return test


def _half(half: int) -> Pattern:
    """The first or second half of the columns of ``gate_up``, by split, split_with_sizes, chunk or slice."""
    packed, last = Var("gate_up"), Attr("", is_last_dim)
    split = Call(
        (aten.split.Tensor, aten.split_with_sizes.default),
        (packed, Attr("", _is_half), last),
    )
    cut = Call(
        (aten.slice.Tensor,),
        (packed, last, Attr("", _starts_at(half)), Attr("", _ends_at(half))),
    )
    return OneOf((Call((getitem,), (split, Const(half))), cut))


def _call(target: Target, *args: Pattern) -> Call:
    return Call((target,), args, dtype=F32)


def _mul(a: Pattern, b: Pattern) -> Call:
    return mul(a, b, dtype=F32)


def _add(a: Pattern, b: Pattern) -> Call:
    return add(a, b, dtype=F32)


# Every step is in float32: an activation computed in half precision rounds at each of them, and is another function.
ACTIVATIONS: dict[str, Callable[[Pattern], Pattern]] = {
    # x / (1 + exp(-x)): torch's decomposition of silu
    "silu": lambda x: _call(aten.div.Tensor, x, _add(_call(aten.exp.default, _call(aten.neg.default, x)), Const(1))),
    # x * sigmoid(x): written by hand
    "swish": lambda x: _mul(x, _call(aten.sigmoid.default, x)),
    # 0.5 x * (1 + tanh(sqrt(2/pi) (x + 0.044715 x**3)))
    "gelu_tanh": lambda x: _mul(
        _mul(x, Const(0.5)),
        _add(
            _call(
                aten.tanh.default,
                _mul(_add(x, _mul(_mul(_mul(x, x), x), Const(0.044715))), Const(0.7978845608028654)),
            ),
            Const(1),
        ),
    ),
    # 0.5 x * (1 + erf(x / sqrt(2)))
    "gelu": lambda x: _mul(
        _mul(x, Const(0.5)), _add(_call(aten.erf.default, _mul(x, Const(0.7071067811865476))), Const(1))
    ),
}

# gate and up are the two halves of one tensor, in either order, or two tensors: With lets no other pair match.
PACKED = [_half(0), _half(1)]
GATE = OneOf(
    (
        With(PACKED[0], {"packed": True, "gate_first": True}),
        With(PACKED[1], {"packed": True, "gate_first": False}),
        With(Var("gate"), {"packed": False}),
    )
)
UP = OneOf(
    (
        With(PACKED[1], {"packed": True, "gate_first": True}),
        With(PACKED[0], {"packed": True, "gate_first": False}),
        With(Var("up"), {"packed": False}),
    )
)


def _pattern(act: str) -> Pattern:
    """The activation rounded before the product, or the product rounded (or left in float32)."""
    activated = ACTIVATIONS[act](in_float32(GATE))
    early = With(mul(convert_to(activated, "dtype", HALVES), UP), {"act": act, "cast_first": True})
    product = With(_mul(activated, in_float32(UP)), {"act": act, "cast_first": False})
    return OneOf((early, convert_to(product, "dtype", HALVES), With(product, {"dtype": F32})))


def _complete(root: fx.Node, found: Found) -> Completion | str:
    packed = found.attributes["packed"]
    tensors = list(found.inputs.values())
    if any(dtype(t) not in FLOATS for t in tensors) or len({dtype(t) for t in tensors}) != 1:
        return "gate and up are not of one floating-point dtype"
    if not packed and not all(same_shape(shape(t), shape(root)) for t in tensors):
        return "gate and up are broadcast"
    return Completion(found.attributes, frozenset({"packed"}) if packed else frozenset())


FORMS = tuple(Form("act_mul", act, _pattern(act), output="value", complete=_complete) for act in ACTIVATIONS)
