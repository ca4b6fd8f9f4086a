"""Gated activations: ``act(gate) * up``, from two tensors, or from the halves or every other column of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import getitem
from typing import Any

import torch
from torch import fx

from .act import IN_FLOAT32, IN_STEPS, call
from .form import Completion, Form
from .fx_facts import FLOATS, HALVES, aten, dtype, is_last_dim, same_shape, same_size, shape
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
    activated = IN_FLOAT32[act](in_float32(GATE))
    product = mul(activated, in_float32(UP), dtype=F32)
    return With(_either(mul(convert_to(activated, "dtype", HALVES), UP), product), {"act": act})


def _pattern_in_steps(act: str) -> Pattern:
    return With(mul(IN_STEPS[act](GATE), UP), {"act": act, "cast_first": True})


# GPT-OSS: (clamp(up, -limit, limit) + 1) * (g * sigmoid(g * alpha)) with g = clamp(gate, max=limit). Half precision is
# clamped in float32; every step rounds.
CLAMPED_GATE = call(aten.clamp_max.default, in_float32(GATE), number("limit"))
CLAMPED_UP = call(
    aten.clamp_max.default, call(aten.clamp_min.default, in_float32(UP), number("lower")), number("limit")
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
    gate = found.inputs["gate_up" if packed else "gate"]
    return Completion({"dtype": dtype(gate)} | dict(found.attributes), frozenset({"packed"} if packed else ()))


def _complete_clamped(root: fx.Node, found: Found) -> Completion | str:
    alpha, limit, lower = (float(found.attributes[name]) for name in ("alpha", "limit", "lower"))
    if lower != -limit:
        return f"up is clamped to {lower} and {limit}, which are not opposite"
    completed = _complete(root, found)
    if isinstance(completed, str):
        return completed
    return replace(completed, attributes={**completed.attributes, "act": f"clamped_swiglu={alpha!r},{limit!r}"})


def _form(
    name: str, pattern: Pattern, complete: Callable[[fx.Node, Found], Completion | str] = _complete, **more: Any
) -> Form:
    return Form("act_mul", name, pattern, output="value", complete=complete, rows=("gate_up", "gate", "up"), **more)


FORMS = (
    *(_form(act, _pattern(act)) for act in IN_FLOAT32),
    _form("gelu_new", _pattern_in_steps("gelu_new")),  # T5
    _form(
        "clamped_swiglu",
        _either(
            _clamped_swiglu(convert_to(CLAMPED_GATE, "dtype", HALVES), convert_to(CLAMPED_UP, "dtype", HALVES)),
            _clamped_swiglu(CLAMPED_GATE, CLAMPED_UP),
        ),
        _complete_clamped,
    ),
)
# Any product with a sigmoid, of which there are many that nobody quantises: Qwen3-Next's attention.
SERVING_FORMS = (_form("sigmoid", _pattern_in_steps("sigmoid"), serves=("fp8_quant",)),)
