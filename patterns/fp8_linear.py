"""Linear layers of FP8 values: the matrix products that the quantised tensors go to.

``scaled_mm``: ``aten._scaled_mm`` and ``_scaled_mm_v2`` with a scale for each row of both and a weight in rows, read
transposed; ``product``: these calls with whatever scales the op ``fp8_linear`` takes; ``block_mm``: torchao's product
with a scale for each 128 columns of a row and each 128 x 128 of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.nn.functional import ScalingType

from ..scaled_product import BLOCK, BLOCKS, ROWS, TENSORS, granularity
from .form import Completion, Form
from .fx_facts import FP8, aten, dtype, same_shape, same_size, shape
from .language import Attr, Both, Call, Const, Found, Items, OneOf, Pattern, Var, anything

F32 = torch.float32

NOTHING = Attr("", lambda node, value: value is None)
EMPTY = Attr("", lambda node, value: value is None or list(value) == [])
BIAS = OneOf((NOTHING, Var("bias")))
RESULT = Attr("dtype", lambda node, value: isinstance(value, torch.dtype))
FAST = anything("fast_accum")
ANY = anything()

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
BY_ROWS = Items((Const(ScalingType.RowWise.value),))
# What ``_scaled_mm_v2`` is told of the scales of both operands.
RECIPES = {
    TENSORS: (ScalingType.TensorWise.value, ScalingType.TensorWise.value),
    ROWS: (ScalingType.RowWise.value, ScalingType.RowWise.value),
    BLOCKS: (ScalingType.BlockWise1x128.value, ScalingType.BlockWise128x128.value),
}
PLAIN = Attr("", lambda node, value: value is None or not any(value))  # no swizzle


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
    return Completion({**found.attributes, "b_is_shuffled": False}, frozenset({ROWS}))


def _complete_product(root: fx.Node, found: Found) -> Completion | str:
    names = ("x", "b", "x_scale", "w_scale")
    x, weight, x_scale, scale = (found.inputs[name].meta["val"] for name in names)
    if x.dtype not in FP8 or weight.dtype is not x.dtype:
        return f"the operands are {x.dtype} and {weight.dtype}"
    if x_scale.dtype is not F32 or scale.dtype is not F32:
        return f"the scales are {x_scale.dtype} and {scale.dtype}"
    scales = granularity(x, weight, x_scale, scale)
    if scales is None:
        return f"scales {list(x_scale.shape)} and {list(scale.shape)} are none of tensors, rows and columns, or blocks"
    given = tuple(found.attributes.get(name) for name in ("x_recipe", "w_recipe"))
    if given not in ((None, None), RECIPES[scales]):
        return f"scales {list(x_scale.shape)} and {list(scale.shape)} are said to be of other parts"
    return Completion({"dtype": dtype(root), "fast_accum": found.attributes["fast_accum"]}, frozenset({scales}))


def _complete_blocks(root: fx.Node, found: Found) -> Completion | str:
    x, weight = found.inputs["x"], found.inputs["w"]
    if len(shape(x)) != 2:
        return f"{x.name} has more than two dimensions"
    if found.attributes["block_size"] != BLOCK:
        return f"blocks of {found.attributes['block_size']}"
    if dtype(x) not in FP8 or dtype(weight) is not dtype(x):
        return f"the operands are {dtype(x)} and {dtype(weight)}"
    (rows, k), n = shape(x), shape(weight)[0]
    x_scale, w_scale = found.inputs["x_scale"], found.inputs["w_scale"]
    if dtype(x_scale) is not F32 or not same_size(shape(x_scale).numel() * BLOCK, rows * k):
        return f"{x_scale.name} is not one float32 scale for each {BLOCK} columns of a row"
    if dtype(w_scale) is not F32 or not same_shape(shape(w_scale), (-(-n // BLOCK), -(-k // BLOCK))):
        return f"{w_scale.name} is not one float32 scale for each {BLOCK} x {BLOCK} of the weight"
    return Completion({"dtype": dtype(root), "fast_accum": False}, frozenset({BLOCKS}))


def block_scales(inputs: Mapping[str, fx.Node]) -> list[int]:
    """The shape of the scales of a product by blocks, which come as they lie in memory: a row for each of x."""
    return [-1, -(-shape(inputs["x"])[-1] // BLOCK)]


def _form(kind: str, name: str, pattern: Pattern, complete: Any) -> Form:
    return Form(kind, name, pattern, output="y", complete=complete)


FORMS = (
    _form(
        "scaled_mm",
        "rowwise",
        Call(
            (aten._scaled_mm.default,),
            (X, WEIGHT, X_SCALE, W_SCALE, BIAS, NOTHING, RESULT, FAST),
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
                *(BIAS, RESULT, EMPTY, FAST),
            ),
        ),
        _complete_rows,
    ),
    _form(
        "product",
        "scaled_mm",
        Call(
            (aten._scaled_mm.default,), (Var("x"), Var("b"), Var("x_scale"), Var("w_scale"), BIAS, NOTHING, ANY, FAST)
        ),
        _complete_product,
    ),
    _form(
        "product",
        "scaled_mm_v2",
        Call(
            (aten._scaled_mm_v2.default,),
            (
                *(Var("x"), Var("b"), Items((Var("x_scale"),)), Items((anything("x_recipe"),)), PLAIN),
                *(Items((Var("w_scale"),)), Items((anything("w_recipe"),)), PLAIN, BIAS, ANY, EMPTY, FAST),
            ),
        ),
        _complete_product,
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
