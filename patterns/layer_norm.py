"""LayerNorm: ``(x - mean(x)) * rsqrt(var(x) + eps) * weight + bias``, as Inductor decomposes it."""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx

from .form import Completion, Form
from .fx_facts import FLOATS, HALVES, aten, dtype, same_shape, same_size, shape
from .language import (
    Attr,
    Call,
    Const,
    Found,
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
)
from .rms_norm import EPS

F32 = torch.float32

X = in_float32(Var("x"))
WEIGHT, BIAS = in_float32(Var("weight")), in_float32(Var("bias"))


def _part(index: int) -> Call:
    """The variance (0) or the mean (1) of the rows of x."""
    both = Call((aten.var_mean.correction,), (X, last_dim(), Const(0), Const(True)))
    return Call((getitem,), (both, Attr("", lambda node, value: value == index)), dtype=F32)


# (x - mean) * rsqrt(var + eps), all in float32
NORMALISED = mul(
    Call((aten.sub.Tensor,), (X, _part(1)), dtype=F32),
    Call((aten.rsqrt.default,), (add(_part(0), EPS),)),
    dtype=F32,
)
WEIGHTED = mul(NORMALISED, WEIGHT, dtype=F32)


def _complete(root: fx.Node, found: Found) -> Completion | str:
    x = found.inputs["x"]
    if dtype(x) not in FLOATS:
        return f"the normalised tensor is {dtype(x)}"
    for name in ("weight", "bias"):
        row = found.inputs.get(name)
        if row is not None and not (len(shape(row)) == 1 and same_size(shape(row)[0], shape(x)[-1])):
            return f"{row.name}, the {name} after the normalisation, is not one number per column"
    if not same_shape(shape(root), shape(x)):
        return "the normalisation changes the shape"
    eps = found.inputs.get("eps_tensor")
    if eps is not None and (len(shape(eps)) > 0 or dtype(eps) not in (*FLOATS, torch.float64)):
        return f"what is added to the variance, {eps.name}, is not one floating-point number"
    return Completion(found.attributes)


def rounded(value: Pattern) -> Pattern:
    """The value in float32 rounded to half precision, or left so; a permuted tensor's is copied."""
    copied = OneOf((value, Call((aten.clone.default,), (value, anything()))))
    return OneOf((convert_to(copied, "dtype", HALVES), With(value, {"dtype": F32})))


def _form(name: str, value: Pattern) -> Form:
    return Form("layer_norm", name, rounded(value), output="value", complete=_complete, rows=("x",))


FORMS = (
    _form("weight_and_bias", add(WEIGHTED, BIAS, dtype=F32)),
    _form("bias", add(NORMALISED, BIAS, dtype=F32)),
    _form("weight", WEIGHTED),
    _form("no_weight", NORMALISED),
)
