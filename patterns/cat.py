"""Columns of two tensors beside each other, each maybe activated, as parallel layers of diffusion models have them."""

from __future__ import annotations

from typing import Any

from torch import fx

from .act import activations
from .form import Completion, Form
from .fx_facts import FLOATS, aten, dtype, same_shape, shape
from .language import Attr, Call, Found, Items, OneOf, Pattern, Var, With


def _is_last(node: fx.Node, dim: Any) -> bool:
    rank = len(shape(node))
    return type(dim) is int and rank > 0 and dim % rank == rank - 1


def _part(name: str) -> Pattern:
    """A tensor, activated or as it is."""
    acts = (With(pattern, {f"{name}_act": act}) for act, pattern in activations(name).items())
    return OneOf((*acts, With(Var(name), {f"{name}_act": ""})))


def _complete(root: fx.Node, found: Found) -> Completion | str:
    parts = [found.inputs[name] for name in ("first", "second")]
    for part in parts:
        if dtype(part) not in FLOATS:
            return f"{part.name}, a part of what is concatenated, is {dtype(part)}"
        if not same_shape(shape(part)[:-1], shape(root)[:-1]):
            return f"{part.name}, a part of what is concatenated, has other rows"
        if not isinstance(shape(part)[-1], int):
            return f"{part.name}, a part of what is concatenated, has rows of a length that only a run tells"
    acts = {name: found.attributes[name] for name in ("first_act", "second_act")}
    if any(not acts[f"{name}_act"] and dtype(found.inputs[name]) is not dtype(root) for name in ("first", "second")):
        return f"{root.name} converts a part of what it concatenates"
    return Completion({**acts, "dtype": dtype(root)})


FORMS = (
    Form(
        "cat",
        "two",
        Call((aten.cat.default,), (Items((_part("first"), _part("second"))), Attr("", _is_last))),
        output="value",
        complete=_complete,
        rows=("first", "second"),
        serves=("fp8_quant",),
    ),
)
