"""Gated activations: ``act(gate) * up``, from two tensors, or from the halves or every other column of one.

Each activation is written as Inductor decomposes it, since its rounding is part of the contract; the names are the
values of the ops' argument ``act``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import getitem

import torch
from torch import fx

from .form import Completion, Form
from .fx_facts import FLOATS, HALVES, Target, aten, dtype, is_last_dim, same_shape, same_size, shape
from .language import Attr, Call, Const, Found, OneOf, Pattern, Var, With, add, convert_to, in_float32, mul, number

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


def _is_offset(offset: int):
    """Every other column from ``offset`` on is half of them only if their number is even."""

    def test(node: fx.Node, start: object) -> bool:
        return start == offset and same_size(shape(node.args[0])[-1] % 2, 0)  # type: ignore[arg-type]

    return test


def _part(half: int, interleaved: bool) -> Pattern:
    """One half of the columns of ``gate_up``: the first or second by split, split_with_sizes, chunk or slice, or,
    interleaved, the even or odd ones."""
    packed, last = Var("gate_up"), Attr("", is_last_dim)
    if interleaved:
        return Call(
            (aten.slice.Tensor,),
            (packed, last, Attr("", _is_offset(half)), Attr("", _ends_at(1)), Const(2)),
        )
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


def _operand(name: str, first: bool) -> Pattern:
    """gate and up are parts of one tensor, in either order, or two tensors: With lets no other pair match."""
    parts = [
        With(_part(half, interleaved), {"packed": True, "gate_first": (half == 0) == first, "interleaved": interleaved})
        for interleaved in (False, True)
        for half in (0, 1)
    ]
    return OneOf((*parts, With(Var(name), {"packed": False})))


GATE, UP = _operand("gate", True), _operand("up", False)


def _either(early: Pattern, product: Pattern) -> Pattern:
    """The rounding before the product, or the product, in float32, rounded (or left so)."""
    late = With(product, {"cast_first": False})
    return OneOf(
        (With(early, {"cast_first": True}), convert_to(late, "dtype", HALVES), With(late, {"dtype": F32})),
    )


def _pattern(act: str) -> Pattern:
    """The activation rounded before the product, or the product rounded."""
    activated = ACTIVATIONS[act](in_float32(GATE))
    either = _either(mul(convert_to(activated, "dtype", HALVES), UP), _mul(activated, in_float32(UP)))
    return With(either, {"act": act})


# GPT-OSS: (clamp(up, -limit, limit) + 1) * (g * sigmoid(g * alpha)) with g = clamp(gate, max=limit). Half precision is
# clamped in float32; every step rounds.
CLAMPED_GATE = _call(aten.clamp_max.default, in_float32(GATE), number("limit"))
CLAMPED_UP = _call(
    aten.clamp_max.default, _call(aten.clamp_min.default, in_float32(UP), number("lower")), number("limit")
)


def _clamped_swiglu(gate: Pattern, up: Pattern) -> Pattern:
    return mul(add(up, Const(1)), mul(gate, Call((aten.sigmoid.default,), (mul(gate, number("alpha")),))))


def _complete(root: fx.Node, found: Found) -> Completion | str:
    packed = found.attributes["packed"]
    tensors = list(found.inputs.values())
    if any(dtype(t) not in FLOATS for t in tensors):
        return "gate and up are not of bfloat16, float16 or float32"
    if not packed and not all(same_shape(shape(t), shape(root)) for t in tensors):
        return "gate and up are broadcast"
    return Completion(found.attributes, frozenset({"packed"}) if packed else frozenset())


def _complete_clamped(root: fx.Node, found: Found) -> Completion | str:
    alpha, limit, lower = (float(found.attributes[name]) for name in ("alpha", "limit", "lower"))
    if lower != -limit:
        return f"up is clamped to {lower} and {limit}, which are not opposite"
    completed = _complete(root, found)
    if isinstance(completed, str):
        return completed
    return replace(completed, attributes={**completed.attributes, "act": f"clamped_swiglu={alpha!r},{limit!r}"})


def _form(name: str, pattern: Pattern, complete: Callable[[fx.Node, Found], Completion | str]) -> Form:
    return Form("act_mul", name, pattern, output="value", complete=complete, rows=("gate_up", "gate", "up"))


FORMS = (
    *(_form(act, _pattern(act), _complete) for act in ACTIVATIONS),
    _form(
        "clamped_swiglu",
        _either(
            _clamped_swiglu(convert_to(CLAMPED_GATE, "dtype", HALVES), convert_to(CLAMPED_UP, "dtype", HALVES)),
            _clamped_swiglu(CLAMPED_GATE, CLAMPED_UP),
        ),
        _complete_clamped,
    ),
)
