"""Quantisers: ``q = cast(clamp(x / scale))`` with the scale from the maximum of a block, or given.

A block is the set of elements that share a scale: consecutive elements of a row (a whole row is per token), or the
whole tensor (``block`` 0). The arithmetic between maximum, scale and values differs from model to model and is
captured as programs (``aiter_fusion/scale_program.py``), not enumerated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import getitem
from typing import Any

import torch
from torch import fx

from ..formats import FORMATS
from ..scale_program import cast, is_inverse, parse
from ..stages.quantise import Granularity, named_format
from .form import Branch, Completion, Form
from .fx_facts import FLOATS, FP8, QUANTISED, aten, dtype, same_shape, same_size, shape
from .language import (
    Attr,
    Call,
    Found,
    Named,
    OneOf,
    Pattern,
    Steps,
    Var,
    Views,
    With,
    anything,
    constant,
    convert_to,
    in_float32,
)

SCALES = frozenset(format.scale for format in FORMATS)
Complete = Callable[[fx.Node, Found], Completion | str]

X = Views(in_float32(Views(Var("x"))))
FIRST = Attr("", lambda node, index: index == 0)

# The maximum of |x| over the block. Conversions before it are exact for a maximum, in either direction.
ABSOLUTE = Named("blocks", Views(in_float32(Views(Call((aten.abs.default,), (X,))))))
MAXIMUM = Named(
    "maximum",
    OneOf(
        (
            Call((aten.amax.default,), (ABSOLUTE, anything("dims"), anything())),
            Call((aten.max.default,), (ABSOLUTE,)),
            Call((getitem,), (Call((aten.max.dim,), (ABSOLUTE, anything("dims"), anything())), FIRST)),
        )
    ),
)
# The same from the least and the greatest value (torchao's int8), apart from the sign of a zero.
_EXTREMES = [
    Named(extreme, Call((target,), (Named("blocks", X), anything("dims"), anything())))
    for extreme, target in (("least", aten.amin.default), ("greatest", aten.amax.default))
]
_BELOW = Call((aten.neg.default,), (Call((aten.minimum.default,), (_EXTREMES[0], constant(0))),))
_ABOVE = Call((aten.maximum.default,), (_EXTREMES[1], constant(0)))
OF_EXTREMES = Named("maximum", Call((aten.maximum.default,), (_BELOW, _ABOVE)))


def _factor(maximum: Pattern) -> Pattern:
    """What the values are divided by or multiplied with: one factor for each block, or one for each element, spread
    over the block (torchao's block-wise quantiser)."""
    factor = Named("factor", Steps("factor_steps", maximum))
    return OneOf((factor, Views(Named("spread", Call((aten.expand.default,), (factor, anything()))))))


def _quantised(multiplier: Pattern) -> Pattern:
    """The values combined with the multiplier, what follows, and the cast."""
    elements, multiplier = Named("elements", X), Named("multiplier", multiplier)
    combined = OneOf(
        (
            With(Call((aten.div.Tensor,), (elements, multiplier)), {"combine": "div_scale"}),
            With(Call((aten.mul.Tensor,), (elements, multiplier)), {"combine": "mul_scale"}),
            With(Call((aten.mul.Tensor,), (multiplier, elements)), {"combine": "scale_mul"}),
        )
    )
    return convert_to(Steps("after", Named("combined", combined)), "quant_dtype", QUANTISED)


def _blocks(found: Found) -> list[int]:
    """How many consecutive elements share a maximum, 0 meaning all of them; both where there is one row."""
    sizes = shape(found.named["blocks"])
    if not sizes:
        return [0]
    dims = found.attributes.get("dims", [])  # none named: all
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    reduced = {d % len(sizes) for d in dims} or set(range(len(sizes)))
    wide = {d for d in range(len(sizes)) if not same_size(sizes[d], 1)}
    last = len(sizes) - 1
    blocks = []
    if last in reduced and reduced & wide <= {last} and isinstance(sizes[last], int):
        blocks.append(sizes[last])
    if wide <= reduced:
        blocks.append(0)
    return blocks


def _aligned(found: Found, block: int) -> bool:
    """Whether every element meets the factor of its own block."""
    elements, multiplier = shape(found.named["elements"]), shape(found.named["multiplier"])
    if not same_shape(shape(found.named["combined"]), elements):
        return False
    if block == 0:
        return all(same_size(s, 1) for s in multiplier)
    if "spread" in found.named:
        factor = shape(found.named["factor"])
        return (
            same_shape(shape(found.named["spread"]), (*factor[:-1], block))
            and same_shape(multiplier, elements)
            and same_size(factor[-1], 1)
            and same_size(elements[-1] % block, 0)
        )
    return same_shape(multiplier, (*elements[:-1], 1)) and same_size(elements[-1], block)


def _width(found: Found) -> int:
    """The length of the rows that are quantised: the greatest that a view of them has before they are quantised, since
    heads and groups are parts of rows."""
    node: fx.Node = found.named["elements"]
    widths: list[int] = []
    while True:
        widths += [size for size in shape(node)[-1:] if isinstance(size, int)]
        if node is found.inputs["x"]:
            return max(widths, default=1)
        node = node.args[0]  # type: ignore[assignment]  # of a view; its sizes may be nodes too


def _start(found: Found) -> tuple[str, ...]:
    """How programs of the maximum begin: with a conversion, if it was taken in another dtype than the values'."""
    converted = dtype(found.named["maximum"])
    return () if converted == dtype(found.inputs["x"]) else (cast(converted),)


def _value_steps(found: Found) -> str:
    """The program of the values. Type promotion by the factor is a conversion of the values."""
    x, combined = dtype(found.inputs["x"]), dtype(found.named["combined"])
    converted = [] if x == combined else [cast(combined)]
    return " ".join([*converted, found.attributes["combine"], *found.attributes["after"]])


def _complete_dynamic(root: fx.Node, found: Found) -> Completion | str:
    if dtype(found.inputs["x"]) not in FLOATS:
        return f"the quantised tensor is {dtype(found.inputs['x'])}"
    blocks = _blocks(found)
    if not blocks:
        return f"{found.named['maximum'].name} is the maximum neither of rows of known size nor of the whole tensor"
    block = next((block for block in blocks if _aligned(found, block)), None)
    if block is None:
        return f"{found.named['combined'].name} does not give each element the scale of its own block"
    factor_steps = " ".join([*_start(found), *found.attributes["factor_steps"]])
    width = _width(found)
    attributes = {
        "block": block,
        "row": width,
        "scale_steps": factor_steps,  # unless a branch says otherwise
        "factor_steps": factor_steps,
        "value_steps": _value_steps(found),
        "quant_dtype": found.attributes["quant_dtype"],
    }
    return Completion(attributes, variant=str(Granularity.of(block, width)), called=_called(attributes))


def _complete_of_extremes(root: fx.Node, found: Found) -> Completion | str:
    maximum, least, greatest = (found.named[name] for name in ("maximum", "least", "greatest"))
    alike = all(same_shape(shape(extreme), shape(maximum)) for extreme in (least, greatest))
    if not alike or dtype(maximum) is not dtype(least):
        return f"{maximum.name} is not of the least and the greatest value"
    if not _is_floored(" ".join(found.attributes["factor_steps"])):
        return f"the sign of a zero of {maximum.name} matters without a floor above 0"
    return _complete_dynamic(root, found)


def _called(attributes: Mapping[str, Any]) -> str:
    return f"{named_format(attributes).name}_quant"


def _complete_static(root: fx.Node, found: Found) -> Completion | str:
    scale = found.inputs["scale"]
    if dtype(found.inputs["x"]) not in FLOATS:
        return f"the quantised tensor is {dtype(found.inputs['x'])}"
    if not all(same_size(s, 1) for s in shape(scale)):
        return f"the scale {scale.name} is not one number, nor computed from the maximum in known steps"
    if dtype(scale) is not torch.float32:
        return f"the scale {scale.name} is {dtype(scale)}, not float32"
    if not _aligned(found, 0):
        return f"{found.named['combined'].name} changes the shape"
    attributes = {
        "block": 0,
        "factor_steps": " ".join(found.attributes["factor_steps"]),
        "value_steps": _value_steps(found),
        "quant_dtype": found.attributes["quant_dtype"],
    }
    return Completion(attributes, features=frozenset({"static"}), called=_called(attributes))


def _is_scale(node: fx.Node, steps: str) -> bool:
    """A dequantisation scale: of a dtype that formats have, the maximum times a constant up to bounds and rounding."""
    scaled = any(name in ("mul", "div") for name, _ in parse(steps))
    return dtype(node) in SCALES and scaled and not is_inverse(steps)


def _is_floored(steps: str) -> bool:
    """Whether a number above 0 takes the place of a maximum of 0."""
    return any(name == "clamp_min" and number is not None and number > 0 for name, number in parse(steps))


def _dynamic(name: str, maximum: Pattern, complete: Complete, test: Callable[[fx.Node, str], bool]) -> Form:
    branch = Branch("scale", source="maximum", attribute="scale_steps", test=test, start=_start)
    return Form("fp8_quant", name, _quantised(_factor(maximum)), output="q", complete=complete, branches=(branch,))


# A maximum that is itself kept in FP8, perhaps divided by a scale for all of them, as NVFP4 keeps its scales.
SCALE = OneOf((MAXIMUM, Call((aten.div.Tensor,), (Steps("factor_steps", MAXIMUM), Var("outer")))))

FORMS = (
    _dynamic("dynamic", MAXIMUM, _complete_dynamic, _is_scale),
    _dynamic(
        "of extremes",
        OF_EXTREMES,
        _complete_of_extremes,
        lambda node, steps: _is_scale(node, steps) and _is_floored(steps),
    ),
    Form("fp8_quant", "scale", convert_to(Steps("after", SCALE), "quant_dtype", FP8), output="q", listed=False),
    Form(
        "fp8_quant",
        "static",
        _quantised(Named("factor", Steps("factor_steps", Var("scale")))),
        output="q",
        complete=_complete_static,
        several=("scale",),
    ),
)
