"""RMSNorm: ``x * rsqrt(mean(x**2) + eps) * weight`` in the orders of rounding that models use.

README.md has a code for each form: R1 rounds before the weight, R2 after it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from .all_reduce import is_reduced
from .form import Branch, Completion, Form
from .fx_facts import FLOATS, HALVES, aten, dtype, same_shape, same_size, shape
from .language import (
    Call,
    Const,
    Found,
    Named,
    OneOf,
    Pattern,
    Var,
    With,
    add,
    anything,
    convert_to,
    in_float32,
    last_dim,
    mul,
    number,
)
from .modulate import is_once

F32 = torch.float32

X = in_float32(Var("x"))
WEIGHT = Var("weight")

# x * rsqrt(mean(x**2, -1, keepdim) + eps), all in float32
MEAN_OF_SQUARES = Call(
    (aten.mean.dim,),
    (Call((aten.pow.Tensor_Scalar,), (X, Const(2)), dtype=F32), last_dim(), Const(True)),
)
# A tensor where Dynamo makes a module's floats inputs of the graph, in float64: under dynamic=True, and for a class of
# modules or a function that it has seen with two values.
EPS = OneOf((number("eps"), in_float32(Var("eps_tensor"))))
NORMALISED = mul(X, Call((aten.rsqrt.default,), (add(MEAN_OF_SQUARES, EPS),)), dtype=F32)
ROUNDED = convert_to(NORMALISED, "dtype", HALVES)

# weight + offset in float32, where Gemma stores weights around zero
OFFSET_WEIGHT = Call((aten.add.Tensor, aten.add.Scalar), (in_float32(WEIGHT), number("offset")), dtype=F32)


def _either(product: Call) -> Pattern:
    """The product rounded to half precision, or left in float32; F.rms_norm copies that of a permuted tensor."""
    copied = OneOf((product, Call((aten.clone.default,), (product, anything()))))
    return OneOf((convert_to(copied, "dtype", HALVES), With(product, {"dtype": F32})))


def _complete(root: fx.Node, found: Found) -> Completion | str:
    x, weight = found.inputs["x"], found.inputs.get("weight")
    if dtype(x) not in FLOATS:
        return f"the normalised tensor is {dtype(x)}"
    if weight is not None and not (len(shape(weight)) == 1 and same_size(shape(weight)[0], shape(x)[-1])):
        return "the factor after the normalisation is not one weight per column"
    if not same_shape(shape(root), shape(x)):
        return "the normalisation changes the shape"
    eps = found.inputs.get("eps_tensor")
    if eps is not None and (len(shape(eps)) > 0 or dtype(eps) not in (*FLOATS, torch.float64)):
        return f"what is added to the mean square, {eps.name}, is not one floating-point number"
    attributes = {"offset": None, "cast_first": False} | dict(found.attributes)
    features = frozenset() if attributes["offset"] is None else frozenset({"offset"})
    return Completion(attributes, features)


def _form(name: str, pattern: Pattern) -> Form:
    return Form("rms_norm", name, pattern, output="value", complete=_complete, rows=("x",))


FORMS = (
    # Llama, Qwen, Mistral, T5: weight * (x32 * rsqrt(..)).to(dtype)
    _form("round_then_weight", With(mul(WEIGHT, ROUNDED), {"cast_first": True})),
    # Gemma: (x32 * rsqrt(..) * (1 + weight)).to(dtype)
    _form("offset_weight", _either(mul(NORMALISED, OFFSET_WEIGHT, dtype=F32))),
    # torch.nn.RMSNorm, OLMo2, GPT-OSS: (x32 * rsqrt(..) * weight).to(dtype)
    _form("weight_then_round", _either(mul(NORMALISED, WEIGHT, dtype=F32))),
    # Llama-4's q and k: no weight
    _form("no_weight", OneOf((ROUNDED, With(NORMALISED, {"dtype": F32})))),
)


def _complete_residual(root: fx.Node, found: Found) -> Completion | str:
    x, residual = found.inputs["x"], found.inputs["residual"]
    if not same_shape(shape(x), shape(residual)):
        return "the residual is broadcast"
    for node in (x, residual):
        if dtype(node) not in FLOATS:
            return f"{node.name}, which is added, is {dtype(node)}"
    if is_reduced(residual) and not is_reduced(x):
        return "the residual is the all-reduced value"  # it is the other way round
    # one rounding of the exact sum, whether the operands were converted by the graph or by type promotion
    return Completion({"sum_dtype": dtype(root), "residual_dtype": dtype(root)}, frozenset({"add"}))


def _complete_gated(root: fx.Node, found: Found) -> Completion | str:
    x, residual, gate = (found.inputs[name] for name in ("x", "residual", "gate"))
    for node in (x, residual):
        if not same_shape(shape(node), shape(root)):
            return f"{node.name}, which is added, is broadcast"
    if not is_once(gate, shape(root)):
        return f"the gate {gate.name} has no row for equally many rows of {root.name}"
    for node in (x, residual, gate):
        if dtype(node) not in FLOATS:
            return f"{node.name}, which is added, is {dtype(node)}"
    dtypes = {"product_dtype": dtype(found.named["product"]), "sum_dtype": dtype(root), "residual_dtype": dtype(root)}
    return Completion(dtypes, frozenset({"gated_add"}))


GATED_SUM = Call(
    (aten.add.Tensor,),
    (
        in_float32(Var("residual")),
        in_float32(Named("product", mul(in_float32(Var("gate")), in_float32(Var("x"))))),
    ),
    commute=True,
)
SERVED = ("rms_norm", "layer_norm", "fp8_quant")

RESIDUAL_FORMS = (
    Form(
        "residual_add",
        "gated",
        OneOf((GATED_SUM, convert_to(replace(GATED_SUM, dtype=F32), "residual_dtype", HALVES))),
        output="residual_out",
        complete=_complete_gated,
        serves=SERVED,
    ),
    Form(
        "residual_add",
        "residual_add",
        Named("sum", Call((aten.add.Tensor,), (in_float32(Var("residual")), in_float32(Var("x"))), commute=True)),
        output="residual_out",
        complete=_complete_residual,
        # inference engines normalise the float32 sum, and pass on its rounded copy
        branches=(
            Branch(
                "residual_out",
                source="sum",
                attribute="residual_dtype",
                test=lambda node, steps: steps in ("bfloat16", "float16"),
                value=lambda node, steps: dtype(node),
            ),
        ),
        rows=("x", "residual"),
        serves=SERVED,
    ),
)
