"""Modulation after a norm: ``norm(x) * (1 + gain) + shift``, with one row of gain and shift for several of x.

It is part of the norm's record: of one normalised value there may be several modulations, each of which computes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import fx

from .form import Completion, Form
from .fx_facts import FLOATS, HALVES, dtype, is_promoted, same_size, shape
from .language import Const, Found, Named, OneOf, Pattern, Var, With, add, convert_to, in_float32, mul

SHIFT = in_float32(Var("shift"))
# 1 is added in the gain's own dtype, so not to what it was converted from.
GAIN = OneOf((With(add(Var("gain"), Const(1)), {"plus_one": True}), With(in_float32(Var("gain")), {"plus_one": False})))


def is_once(node: fx.Node, of: Any) -> bool:
    """Whether a tensor that meets one of the shape ``of`` has a row for equally many consecutive rows of that: its
    first dimensions are those of ``of``, and the others but the last are 1."""
    own = shape(node)
    if not own or len(own) > len(of) or not same_size(own[-1], of[-1]):
        return False
    rows = [1] * (len(of) - len(own)) + list(own[:-1])
    while rows and same_size(rows[-1], 1):
        rows.pop()
    return all(same_size(size, all_) for size, all_ in zip(rows, of, strict=False))


def _complete(norm: Form):
    def complete(root: fx.Node, found: Found) -> Completion | str:
        value = found.named["normed"]
        completed = norm.complete(value, found)
        if isinstance(completed, str):
            return completed
        for name in ("gain", "shift"):
            node = found.inputs.get(name)
            if node is not None and dtype(node) not in FLOATS:
                return f"{node.name}, the {name} of the modulation, is {dtype(node)}"
            if node is not None and not is_once(node, shape(value)):
                return f"{node.name}, the {name} of the modulation, has no row for equally many rows of {value.name}"
        if len(shape(root)) != len(shape(value)):
            return "the modulation changes the shape"
        steps = {"scaled": (value, found.inputs["gain"]), "shifted": (found.named["scaled"], found.inputs.get("shift"))}
        for name, (left, right) in steps.items():
            step = found.named.get(name)
            if step is not None and not is_promoted(step, left, right):
                return f"{step.name} rounds to {dtype(step)}, which is not the promoted dtype of what it reads"
        attributes = {"modulated_dtype": dtype(root)} | dict(completed.attributes)
        return replace(completed, attributes=attributes, features=completed.features | {"modulate"})

    return complete


def modulated(norms: Iterable[Form]) -> tuple[Form, ...]:
    """The forms of norms, each with a modulation."""
    return tuple(
        Form(
            norm.kind,
            f"{norm.name}_modulated",
            _modulated(Named("normed", norm.pattern)),
            output=norm.output,
            complete=_complete(norm),
            serves=("fp8_quant",),  # elsewhere it may be a rotary embedding, which is no modulation
        )
        for norm in norms
    )


def _modulated(norm: Pattern) -> Pattern:
    scaled = Named("scaled", mul(in_float32(norm), GAIN))
    shifted = OneOf((Named("shifted", add(scaled, SHIFT)), scaled))
    return OneOf((shifted, convert_to(shifted, "modulated_dtype", HALVES)))
