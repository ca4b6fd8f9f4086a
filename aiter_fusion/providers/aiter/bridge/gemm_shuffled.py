"""Matrix products of FP8 tensors with a shuffled weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...tiles import TILE
from .adapter import F32, HALVES, Adapter, Arguments, Condition, contiguous, entry, of_dtype

BLOCK = 128


def _operands(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    x, w = a["x"], a["w"]
    for name, tensor in (("x", x), ("w", w)):
        yield tensor.dtype == native, f"{name} is {tensor.dtype}, and this GPU's FP8 format is {native}"
        yield contiguous(name, tensor)
    yield a["dtype"] in HALVES, f"the result is {a['dtype']}, and the kernel makes bfloat16 and float16"
    n, k = w.shape
    yield n % TILE[0] == 0, f"N is {n}, not a multiple of {TILE[0]}, which a shuffled weight needs"
    yield k % TILE[1] == 0, f"K is {k}, not a multiple of {TILE[1]}, which a shuffled weight needs"
    yield of_dtype("x_scale", a["x_scale"], F32)
    yield of_dtype("w_scale", a["w_scale"], F32)


def _per_row(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield from _operands(a, native)
    for name, rows in (("x_scale", a["x"].shape[0]), ("w_scale", a["w"].shape[0])):
        count = a[name].numel()
        yield statically_known_true(count == rows), f"{name} has {count} elements for {rows} rows"


def _per_block(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield from _operands(a, native)
    n, k = a["w"].shape
    yield n % BLOCK == 0, f"N is {n}, not a multiple of {BLOCK}"
    yield k % BLOCK == 0, f"K is {k}, not a multiple of {BLOCK}"
    for name, rows in (("x_scale", a["x"].shape[0]), ("w_scale", n // BLOCK)):
        sizes = (rows, k // BLOCK)
        same = len(a[name].shape) == 2 and all(map(statically_known_true, map(int.__eq__, a[name].shape, sizes)))
        yield same, f"{name} is {list(a[name].shape)}, not {list(sizes)}"


def _column_major(scale: Tensor) -> Tensor:
    """Scales whose columns follow each other, of strides ``(1, M)`` for one row too: some of AITER's kernels read their
    bytes, whatever the strides, and others take any other first stride for scales whose strides lie."""
    rows = scale.shape[0]
    return scale.t().contiguous().as_strided(scale.shape, (1, rows))


_SAME = {"XQ": "x", "WQ": "w", "dtype": "dtype"}

ADAPTERS = {
    "gemm_a8w8_bpreshuffle": Adapter(
        entry(
            "aiter.gemm_a8w8_bpreshuffle",
            {
                **_SAME,
                "x_scale": lambda a: a["x_scale"].reshape(-1, 1).contiguous(),
                "w_scale": lambda a: a["w_scale"].reshape(-1, 1).contiguous(),
            },
        ),
        _per_row,
        returns="y",
    ),
    "gemm_a8w8_blockscale_bpreshuffle": Adapter(
        entry(
            "aiter.gemm_a8w8_blockscale_bpreshuffle",
            {
                **_SAME,
                "x_scale": lambda a: _column_major(a["x_scale"]),
                "w_scale": lambda a: a["w_scale"].contiguous(),
            },
        ),
        _per_block,
        returns="y",
    ),
}
