"""A graph that no tracer gives in this order: with a write, or with a reader before the last input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from support import cases


def hand_built(write: str = "") -> tuple[fx.GraphModule, list[Tensor]]:
    """residual + x, read by a product that the weight is computed from.

    With ``write`` there is a write instead: to an input ``before`` the norm, or to the sum ``inside`` it.
    """
    aten, prims = torch.ops.aten, torch.ops.prims
    args = cases.tensors(("x", "r", "w"), (4,), torch.bfloat16, "normal")
    graph = fx.Graph()

    def call(target: Callable, *operands: Any) -> fx.Node:
        node = graph.call_function(target, operands)
        node.meta["val"] = target(*(o.meta["val"] if isinstance(o, fx.Node) else o for o in operands))
        return node

    nodes = []
    for name, value in zip("xrw", args, strict=True):
        node = graph.placeholder(name)
        node.meta["val"] = value.clone()
        nodes.append(node)
    x, r, w = nodes
    if write == "before":
        call(aten.mul_.Tensor, x, 2)
    summed = call(aten.add.Tensor, r, x)
    weight = w if write else call(aten.mul.Tensor, w, call(aten.amax.default, summed, [0]))
    wide = call(prims.convert_element_type.default, summed, torch.float32)
    mean = call(aten.mean.dim, call(aten.pow.Tensor_Scalar, wide, 2), [-1], True)
    normal = call(aten.mul.Tensor, wide, call(aten.rsqrt.default, call(aten.add.Tensor, mean, 1e-6)))
    if write == "inside":
        call(aten.mul_.Tensor, summed, 2)
    value = call(aten.mul.Tensor, weight, call(prims.convert_element_type.default, normal, torch.bfloat16))
    top = call(aten.amax.default, call(aten.abs.default, value), [-1], True)
    scale = call(aten.div.Tensor, call(prims.convert_element_type.default, top, torch.float32), 448.0)
    quotient = call(aten.div.Tensor, call(prims.convert_element_type.default, value, torch.float32), scale)
    q = call(prims.convert_element_type.default, quotient, cases.FN)
    graph.output((q, scale, summed))
    return fx.GraphModule(torch.nn.Module(), graph), args
