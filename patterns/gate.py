"""A gate after a norm, ``norm(x) * act(z)``. It is part of the norm's record."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import fx

from .act import activations
from .form import Completion, Form
from .fx_facts import FLOATS, HALVES, dtype, is_promoted, same_shape, shape
from .language import Found, Named, OneOf, Pattern, With, convert_to, in_float32, mul


def _complete(norm: Form):
    def complete(root: fx.Node, found: Found) -> Completion | str:
        value, activated, z = found.named["normed"], found.named["activated"], found.inputs["z"]
        completed = norm.complete(value, found)
        if isinstance(completed, str):
            return completed
        if dtype(z) not in FLOATS or not same_shape(shape(z), shape(value)):
            return f"the gate {z.name} is no number for each of {value.name}"
        product = found.named["product"]
        if not is_promoted(product, value, activated):
            return f"{product.name} rounds to {dtype(product)}, which is not the promoted dtype of what it reads"
        attributes = {"gated_dtype": dtype(root), "act_dtype": dtype(activated)} | dict(completed.attributes)
        return replace(completed, attributes=attributes, features=completed.features | {"gated"})

    return complete


def _gated(norm: Pattern) -> Pattern:
    acts = OneOf(tuple(With(pattern, {"act": act}) for act, pattern in activations("z", "act_dtype").items()))
    product = Named("product", mul(in_float32(Named("normed", norm)), in_float32(Named("activated", acts))))
    return OneOf((product, convert_to(product, "gated_dtype", HALVES)))


def gated(norms: Iterable[Form]) -> tuple[Form, ...]:
    """The forms of norms, each with a gate."""
    return tuple(
        Form(
            norm.kind,
            f"{norm.name}_gated",
            _gated(norm.pattern),
            output=norm.output,
            complete=_complete(norm),
            rows=(*norm.rows, "z"),
        )
        for norm in norms
    )
