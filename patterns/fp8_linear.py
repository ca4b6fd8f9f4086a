"""Linear layers of FP8 values: the matrix products that the quantised tensors go to.

``scaled_mm``: ``aten._scaled_mm`` and ``_scaled_mm_v2`` with a scale for each row of both; ``block_mm``: torchao's
product with a scale for each 128 columns of a row and each 128 x 128 of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .form import Completion, Form
from .fx_facts import FP8, aten, dtype, same_shape, same_size, shape
from .language import Attr, Both, Call, Const, Found, Items, OneOf, Pattern, Var, anything

F32 = torch.float32
BLOCK = 128

NOTHING = Attr("", lambda node, value: value is None)
EMPTY = Attr("", lambda node, value: value is None or list(value) == [])
BIAS = OneOf((NOTHING, Var("bias")))
RESULT = Attr("dtype", lambda node, value: isinstance(value, torch.dtype))

# Ops differ in what they call the operands, and in whether they want the weight or its transpose.
X = Both(Var("x"), Var("a"))
X_SCALE = Both(Var("x_scale"), Var("a_scale"))
W_SCALE = Both(Var("w_scale"), Var("b_scale"))
WEIGHT = Both(
    Var("b"),
    OneOf(
        (
            Call((aten.permute.default,), (Var("w"), Attr("", lambda node, dims: list(dims) == [1, 0]))),
            Call((aten.t.default,), (Var("w"),)),
        )
    ),
)
BY_ROWS = Items((Const(1),))  # torch.nn.functional.ScalingType.RowWise


def _complete_rows(root: fx.Node, found: Found) -> Completion | str:
    x, weight = found.inputs["x"], found.inputs["w"]
    if dtype(x) not in FP8 or dtype(weight) is not dtype(x):
        return f"the operands are {dtype(x)} and {dtype(weight)}"
    for name, of, sizes in (
        ("x_scale", "row of the left operand", (shape(x)[0], 1)),
        ("w_scale", "column of the right operand", (1, shape(weight)[0])),
    ):
        scale = found.inputs[name]
        if dtype(scale) is not F32 or not same_shape(shape(scale), sizes):
            return f"{scale.name} is not one float32 scale for each {of}"
    return Completion({"b_is_shuffled": False, "dtype": found.attributes["dtype"]}, frozenset({"rowwise"}))


def _complete_blocks(root: fx.Node, found: Found) -> Completion | str:
    x, weight = found.inputs["x"], found.inputs["w"]
    rows, columns = shape(x)[:-1].numel(), shape(x)[-1]
    if len(shape(x)) != 2:
        return f"{x.name} has more than two dimensions"
    if found.attributes["block_size"] != BLOCK:
        return f"blocks of {found.attributes['block_size']}"
    if dtype(x) not in FP8 or dtype(weight) is not dtype(x):
        return f"the operands are {dtype(x)} and {dtype(weight)}"
    scale = found.inputs["x_scale"]
    if dtype(scale) is not F32 or not same_size(shape(scale).numel() * BLOCK, rows * columns):
        return f"{scale.name} is not one float32 scale for each {BLOCK} columns of a row"
    return Completion({"dtype": dtype(root)}, frozenset({"blockwise"}))


def _form(kind: str, name: str, pattern: Pattern, complete: Any) -> Form:
    return Form(kind, name, pattern, output="y", complete=complete)


FORMS = (
    _form(
        "scaled_mm",
        "rowwise",
        Call(
            (aten._scaled_mm.default,),
            (X, WEIGHT, X_SCALE, W_SCALE, BIAS, NOTHING, RESULT, anything()),
        ),
        _complete_rows,
    ),
    _form(
        "scaled_mm",
        "rowwise_v2",
        Call(
            (aten._scaled_mm_v2.default,),
            (
                *(X, WEIGHT, Items((X_SCALE,)), BY_ROWS, EMPTY, Items((W_SCALE,)), BY_ROWS, EMPTY),
                *(BIAS, RESULT, EMPTY, anything()),
            ),
        ),
        _complete_rows,
    ),
    # torchao's own, a Triton kernel
    _form(
        "block_mm",
        "blockwise_fp8_gemm",
        Call(
            ("ao.blockwise_fp8_gemm.default",),
            (Var("x"), Var("x_scale"), Var("w"), Var("w_scale"), anything("block_size")),
        ),
        _complete_blocks,
    ),
)
