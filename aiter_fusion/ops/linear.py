"""FP8 linear layers that read one quantised value: their matrix products as one op, a fused op and none of the bridge.

It is the one op whose numbers of arguments and of outputs vary, so that any few layers are one launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..domains import FLAG, Each, OneOf, Tensors
from ..formats import FP8
from ..op import FusedOp, Spec, define
from ..providers.choice import implementation
from ..scaled_product import BLOCK, BLOCKS, MOST, ROWS, TENSORS, granularity, strided
from ..stage import Setting

F32 = torch.float32


def reference(
    x: Tensor,
    weights: Sequence[Tensor],
    x_scale: Tensor,
    weight_scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dtype: torch.dtype,
    fast_accum: bool,
) -> dict[str, Tensor]:
    """``y[i] = (x @ weights[i]) * x_scale * weight_scales[i] + biases[i]``: FP8 values, scales of one granularity.

    Each is the ``_scaled_mm`` that the graph had, bit for bit; but for scales of blocks that it does not take, on a CPU
    or with a row for each of x in memory: then the dequantised values are multiplied in float32.

    Args:
        x: ``[M, K]`` FP8.
        weights: ``[K, N_i]`` each, of the dtype of x: transposed views of ``[N_i, K]``; 1 to 8 of them.
        x_scale: float32 dequantisation scales: ``[M, 1]``, one element, or ``[M, K / 128]`` of any strides.
        weight_scales: the same for each weight: ``[1, N_i]``, one element, or ``[K / 128, ceil(N_i / 128)]``.
        biases: None or ``[N_i]`` for each weight.
        dtype: of the results.
        fast_accum: whether a GPU may add products up less precisely (``use_fast_accum``).

    Returns:
        For each weight a contiguous ``[M, N_i]`` of ``dtype``, under names in the order of the weights.
    """
    layers = enumerate(zip(weights, weight_scales, biases, strict=True))
    return {f"y{index}": product(x, w, x_scale, scale, bias, dtype, fast_accum) for index, (w, scale, bias) in layers}


def product(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    fast_accum: bool,
) -> Tensor:
    """One of the products of ``reference``."""
    # the usual scales first: this is called at every step, and to ask for the granularity takes longer than to launch
    usual = x_scale.numel() == 1 or weight_scale.shape == (1, weight.shape[1])
    by_blocks = not usual and granularity(x, weight, x_scale, weight_scale) == BLOCKS
    if by_blocks and (x.device.type == "cpu" or x_scale.stride(0) != 1):
        return _by_blocks(x, weight, x_scale, weight_scale, bias, dtype)
    x, x_scale, weight_scale = strided(x, x.shape[1]), strided(x_scale), strided(weight_scale)
    return torch.ops.aten._scaled_mm.default(x, weight, x_scale, weight_scale, bias, None, dtype, fast_accum)


def _by_blocks(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    k, n = weight.shape
    values = x.to(F32) * x_scale.repeat_interleave(BLOCK, 1)[:, :k]
    scales = weight_scale.t().repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
    y = values @ (weight.t().to(F32) * scales).t()
    return (y if bias is None else y + bias.to(F32)).to(dtype)


def shape(x: Tensor, weights: Sequence[Tensor], dtype: torch.dtype, **_: Any) -> dict[str, Spec]:
    """Sizes and dtype of what ``reference`` returns."""
    return {f"y{index}": ((x.shape[0], weight.shape[1]), dtype) for index, weight in enumerate(weights)}


def operands(
    rows: int, k: int, widths: Sequence[int], scales: str, fp8: torch.dtype = torch.float8_e4m3fn, seed: int = 0
) -> dict[str, Any]:
    """A value, weights of these widths as ``[N, K]`` rows read transposed, and their scales, of normal values."""
    generator = torch.Generator().manual_seed(seed)

    def scale(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=generator) * 0.01 + 0.005

    blocks = -(-k // BLOCK)
    sizes = {TENSORS: (1, 1), ROWS: (rows, 1), BLOCKS: (rows, blocks)}[scales]
    of_weight = {TENSORS: lambda n: (1, 1), ROWS: lambda n: (1, n), BLOCKS: lambda n: (blocks, -(-n // BLOCK))}[scales]
    return {
        "x": torch.randn(rows, k, generator=generator).to(fp8),
        "weights": [torch.randn(n, k, generator=generator).to(fp8).t() for n in widths],
        "x_scale": scale(*sizes),
        "weight_scales": [scale(*of_weight(n)) for n in widths],
    }


def samples() -> Iterator[dict[str, Any]]:
    """Calls of every granularity, format and result: one layer and eight, some with biases; one row, many, none."""
    halves, formats, results = (torch.bfloat16, torch.float16), cycle(FP8), cycle((torch.bfloat16, torch.float16, F32))
    for seed, (rows, k, widths) in enumerate(
        ((5, 64, (48,)), (1, 256, (32, 16, 16)), (0, 32, (64,)), (17, 384, (16,) * MOST))
    ):
        for scales in (TENSORS, ROWS, BLOCKS):
            if scales == BLOCKS and k % BLOCK:
                continue
            dtype = next(results)
            biased = seed % 2 and dtype in halves
            biases = [torch.ones(n, dtype=dtype) if biased and n != 32 else None for n in widths]
            given = operands(rows, k, widths, scales, next(formats), seed)
            yield {**given, "biases": biases, "dtype": dtype, "fast_accum": bool(seed % 2)}


def _typical(setting: Setting) -> dict[str, Any]:
    """Queries, keys and values of a Llama, whose four heads of queries share one of keys; a scale for each row."""
    widths = (setting.hidden, setting.hidden // 4, setting.hidden // 4)
    given = operands(setting.rows, setting.hidden, widths, ROWS, setting.format.dtype)
    placed = tree_map(lambda tensor: tensor.to(setting.device), given)
    return {**placed, "biases": [None] * len(widths), "dtype": torch.bfloat16, "fast_accum": True}


LINEAR = define(
    FusedOp(
        family="fp8_linear",
        features=frozenset(),
        arguments={
            "x": "Tensor",
            "weights": "Tensor[]",
            "x_scale": "Tensor",
            "weight_scales": "Tensor[]",
            "biases": "Tensor?[]",
            "dtype": "ScalarType",
            "fast_accum": "bool",
        },
        outputs=("y",),
        reference=reference,
        shape=shape,
        samples=samples,
        typical=_typical,
        domains={
            "x": Tensors(FP8),
            "weights": Each(Tensors(FP8), MOST),
            "x_scale": Tensors((F32,)),
            "weight_scales": Each(Tensors((F32,)), MOST),
            "biases": Each(Tensors((torch.bfloat16, torch.float16, F32), optional=True), MOST),
            "dtype": OneOf((torch.bfloat16, torch.float16, F32, *FP8)),
            "fast_accum": FLAG,
        },
        each="weights",
        products=True,
    ),
    implementation,
)
