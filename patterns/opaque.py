"""Quantisers that a library keeps inside an operator of its own: its arithmetic is declared here, one row each.

No graph shows what such an operator computes, and its kernel may divide or round in a way of its own, so that a fused
op keeps its results up to one code: these are sites of numerics ``kernel``. A test compares the declarations with the
operators themselves where the libraries are installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import getitem
from typing import Any

import torch
from torch import fx

from ..stages.quantise import Granularity, named_format
from .form import Branch, Completion, Form
from .fx_facts import FLOATS, dtype, is_number, same_size, shape
from .language import Attr, Call, Found, Named, OneOf, Pattern, Var, Views


@dataclass(frozen=True)
class Operator:
    """One operator, ``op(x, ...) -> (q, scale)``.

    name:    which one, for reports.
    op:      what a graph calls; ``*`` stands for any text, such as the revision in the namespace of a kernel of Hugging
             Face's hub.
    more:    its arguments after x.
    block:   how many consecutive elements share a scale, from the call and the length of a row.
    scale:   the program of the scale, factor: that of what values are combined with, values: that of these, from their
             maximum in the dtype of x (``aiter_fusion/scale_program.py``).
    bounded: whether one of its arguments, ``bound``, is a tensor that the maximum is at most.
    """

    name: str
    op: str
    more: tuple[Pattern, ...]
    block: Callable[[Mapping[str, Any], int], int]
    scale: str
    factor: str
    values: str
    bounded: bool = False

    def form(self) -> Form:
        """The form that its calls are."""
        call = Named("call", Call((self.op,), (Views(Var("x")), *self.more)))
        return Form(
            "fp8_quant",
            self.name,
            Call((getitem,), (call, Attr("", lambda node, index: index == 0))),
            output="q",
            complete=partial(_complete, self),
            several=("bound",) if self.bounded else (),
            branches=(
                Branch("scale", source="call", attribute="scale_steps", item=1, start=lambda found: (self.scale,)),
            ),
        )


def _complete(self: Operator, root: fx.Node, found: Found) -> Completion | str:
    x, read = found.inputs["x"], found.named["call"].args[0]
    width = shape(read)[-1]  # type: ignore[arg-type]
    if dtype(x) not in FLOATS or not isinstance(width, int):
        return f"{self.name} reads {dtype(x)} rows of {width}"
    block = self.block(found.attributes, width)
    attributes = {
        "block": block,
        "row": width,
        "scale_steps": self.scale,
        "factor_steps": self.factor,
        "value_steps": self.values,
        "quant_dtype": dtype(root),
    }
    bound = found.inputs.get("bound")
    if bound is not None and (dtype(bound) is not torch.float32 or not all(same_size(s, 1) for s in shape(bound))):
        return f"the bound {bound.name} of {self.name} is not one number in float32"
    return Completion(
        attributes,
        features=frozenset({"bounded"} if bound is not None else ()),
        variant=str(Granularity.of(block, width)),
        called=f"{named_format(attributes).name}_quant",
        exact=False,
    )


_NONE = Attr("", lambda node, value: value is None)
_FLOORED = f"float32 div=448.0 clamp_min={1 / (448.0 * 512.0)!r}"

OPERATORS = (
    Operator(
        "hub_fp8_act_quant",  # kernels-community/finegrained-fp8, for transformers' FineGrainedFP8
        "_finegrained_fp8_*.fp8_act_quant.default",
        (Attr("block", is_number),),
        lambda attributes, width: attributes["block"],
        scale="float32 div=448.0",
        factor="float32 div=448.0 clamp_min=1e-12",
        values="float32 div_scale",
    ),
    Operator(
        "fbgemm_per_row",  # FBGEMM's GenAI operators, for transformers' FbgemmFp8, which gives them a bound
        "fbgemm.quantize_fp8_per_row.default",
        (_NONE, OneOf((_NONE, Var("bound")))),
        lambda attributes, width: width,
        scale=_FLOORED,
        factor=_FLOORED,
        values="float32 div_scale clamp_min=-448.0 clamp_max=448.0",  # what a bound leaves above is saturated
        bounded=True,
    ),
)
FORMS = tuple(operator.form() for operator in OPERATORS)
