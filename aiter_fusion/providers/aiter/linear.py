"""FP8 linear layers that read one value, by AITER's products: one product of weights that lie side by side in memory
(``aiter_fusion.prepare`` can store them so), else one each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import formats
from ...domains import FLAG, Each, OneOf, Tensors
from ...op import FusedOp
from ...registry import REGISTRY
from ...scaled_product import BLOCKS, MOST, ROWS, granularity
from ..terms import Terms
from .bridge import gemm

FP8, SCALES = Tensors(formats.FP8), Tensors((torch.float32,))
HALVES = (torch.bfloat16, torch.float16)
# What shares a scale -> the product, an op of the bridge.
PRODUCTS = {ROWS: "gemm_a8w8", BLOCKS: "gemm_a8w8_blockscale"}

TERMS = Terms(
    {
        "x": FP8,
        "weights": Each(FP8, MOST),
        "x_scale": SCALES,
        "weight_scales": Each(SCALES, MOST),
        "biases": Each(Tensors(HALVES, optional=True), MOST),
        "dtype": OneOf(HALVES),
        "fast_accum": FLAG,  # its kernels sum in float32 in any case
    }
)


def refuse(op: FusedOp, arguments: Mapping[str, Any], native: torch.dtype | None) -> str | None:
    """Why no product takes one of the layers of a call that the terms allow (tensors may be fakes), or None."""
    for index, (name, call) in enumerate(_calls(arguments)):
        if name is None:
            return f"weights[{index}] has other scales than one for each row, or for each block of 128 x 128"
        if call["bias"] is not None and name == PRODUCTS[BLOCKS]:
            return f"biases[{index}] is given, and its product with scales for blocks adds none"
        if (why := gemm.ADAPTERS[name].why_not(call, native)) is not None:
            return f"weights[{index}]: {why}"
    return None


def _calls(a: Mapping[str, Any]) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """For each layer the product that computes it, and the arguments of that."""
    for weight, scale, bias in zip(a["weights"], a["weight_scales"], a["biases"], strict=True):
        name = PRODUCTS.get(granularity(a["x"], weight, a["x_scale"], scale) or "")
        operands = {"x": a["x"], "w": weight.t(), "x_scale": a["x_scale"], "w_scale": scale.t()}
        yield name, {**operands, "bias": bias, "dtype": a["dtype"]}


def compute(op: FusedOp, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The op's outputs, by a call that ``refuse`` does not object to. Each is memory of its own."""
    names, calls = zip(*_calls(arguments), strict=True)
    bridge_op, adapter = REGISTRY.bridge[names[0], frozenset()], gemm.ADAPTERS[names[0]]
    # in the order in which they lie in memory
    order = sorted(range(len(calls)), key=lambda index: calls[index]["w"].data_ptr())
    whole = side_by_side([calls[index]["w"] for index in order]) if len(order) > 1 else None
    if whole is None:
        return {f"y{index}": adapter.run(bridge_op, call)["y"] for index, call in enumerate(calls)}
    scales = [calls[index]["w_scale"] for index in order]
    biases = [calls[index]["bias"] for index in order]
    widths = [calls[index]["w"].shape[0] for index in order]
    if any(bias is not None for bias in biases):
        given = [
            whole.new_zeros(n, dtype=arguments["dtype"]) if bias is None else bias
            for n, bias in zip(widths, biases, strict=True)
        ]
        joined = torch.cat(given)
    else:
        joined = None
    scale = side_by_side(scales)
    call = {**calls[0], "w": whole, "w_scale": torch.cat(scales) if scale is None else scale, "bias": joined}
    parts = adapter.run(bridge_op, call)["y"].split(widths, 1)
    by_layer = dict(zip(order, parts, strict=True))
    return {f"y{index}": by_layer[index].clone(memory_format=torch.contiguous_format) for index in range(len(calls))}


def side_by_side(rows: Sequence[Tensor]) -> Tensor | None:
    """Matrices of equally long rows as one, a view, if each begins in memory where the one before it ends."""
    first, end, count = rows[0], rows[0].data_ptr(), 0
    for matrix in rows:
        alike = matrix.shape[1:] == first.shape[1:] and matrix.dtype == first.dtype and matrix.is_contiguous()
        same = matrix.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not alike or not same or matrix.data_ptr() != end:
            return None
        end, count = end + matrix.nbytes, count + matrix.shape[0]
    return first.as_strided((count, *first.shape[1:]), first.stride())
