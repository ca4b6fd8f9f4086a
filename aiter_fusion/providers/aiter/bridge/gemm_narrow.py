"""Batches of products of int8, and products with 4-bit weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...tiles import SCALE_BLOCK, TILE, shuffled_scales
from ..entry_points import Value, same
from ..installation import load_aiter
from .adapter import F32, HALVES, Adapter, Arguments, Condition, contiguous, entry, of_dtype

# Elements that share a scale.
GROUP = 32
BYTES = (torch.uint8, torch.float4_e2m1fn_x2)


def _batched(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    for name in ("x", "w"):
        yield of_dtype(name, a[name], torch.int8)
        yield contiguous(name, a[name])
    for name in ("x_scale", "w_scale"):
        yield of_dtype(name, a[name], F32)
    yield a["dtype"] in HALVES, f"the result is {a['dtype']}, and the kernel makes bfloat16 and float16"
    bias = a["bias"]
    found = None if bias is None else bias.dtype
    yield found in (None, a["dtype"]), f"the bias is {found}, and the kernel needs {a['dtype']}, like the result"


def _bytes(name: str, tensor: Tensor) -> Iterator[Condition]:
    yield tensor.dtype in BYTES, f"{name} is {tensor.dtype}, and 4-bit values are {', two in a '.join(map(str, BYTES))}"
    yield contiguous(name, tensor)


def _scales(name: str, scale: Tensor, sizes: tuple[int, int]) -> Iterator[Condition]:
    byte = scale.element_size() == 1 and not scale.dtype.is_signed
    yield byte or scale.dtype == torch.float8_e8m0fnu, f"{name} is {scale.dtype}, and scales are E8M0 bytes"
    found = tuple(scale.shape)
    holds = len(found) == 2 and all(
        statically_known_true(have == want) for have, want in zip(found, sizes, strict=True)
    )
    yield holds, f"{name} is {list(found)}, not {list(sizes)}"
    yield contiguous(name, scale)


def _a4w4(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    (m, half), n = a["x"].shape, a["w"].shape[0]
    yield from _bytes("x", a["x"])
    yield from _bytes("w", a["w"])
    yield a["dtype"] == torch.bfloat16, f"the result is {a['dtype']}, and the kernel makes bfloat16"
    yield n % TILE[0] == 0, f"N is {n}, not a multiple of {TILE[0]}, which a shuffled weight needs"
    yield half % TILE[1] == 0, f"K is {2 * half}, not a multiple of {2 * TILE[1]}, which a shuffled weight needs"
    groups = 2 * half // GROUP
    yield from _scales("x_scale", a["x_scale"], (m, groups))
    yield from _scales("w_scale", a["w_scale"], (n + -n % SCALE_BLOCK[0], groups + -groups % SCALE_BLOCK[1]))


def _a8wfp4(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    (m, k), n = a["x"].shape, a["w"].shape[0]
    yield a["x"].dtype == native, f"x is {a['x'].dtype}, and this GPU's FP8 format is {native}"
    yield from _bytes("w", a["w"])
    yield a["dtype"] in HALVES, f"the result is {a['dtype']}, and the kernel makes bfloat16 and float16"
    yield k % GROUP == 0, f"K is {k}, not a multiple of {GROUP}"
    yield of_dtype("x_scale", a["x_scale"], F32)
    count = a["x_scale"].numel()
    yield statically_known_true(count == m), f"x_scale has {count} elements for {m} rows"
    yield from _scales("w_scale", a["w_scale"], (n, k // GROUP))


def _as(dtype: str, of: Value) -> Value:
    """A tensor of bytes as AITER's dtype of this name."""

    def value(given: Arguments) -> Tensor:
        tensor = given[of] if isinstance(of, str) else of(given)
        return tensor.view(getattr(load_aiter().dtypes, dtype))

    return value


ADAPTERS = {
    "batched_gemm_a8w8": Adapter(
        entry(
            "aiter.batched_gemm_a8w8_CK",
            {
                "XQ": "x",
                "WQ": "w",
                "x_scale": lambda a: a["x_scale"].contiguous(),
                "w_scale": lambda a: a["w_scale"].contiguous(),
                "bias": "bias",
                "dtype": "dtype",
            },
        ),
        _batched,
        returns="y",
    ),
    "gemm_a4w4": Adapter(
        entry(
            "aiter.gemm_a4w4",
            {
                "A": _as("fp4x2", "x"),
                "B": _as("fp4x2", "w"),
                "A_scale": _as("fp8_e8m0", lambda a: shuffled_scales(a["x_scale"])),
                "B_scale": _as("fp8_e8m0", "w_scale"),
                "dtype": "dtype",
            },
        ),
        _a4w4,
        returns="y",
    ),
    "gemm_a8wfp4": Adapter(
        entry(
            "aiter.ops.triton.gemm.basic.gemm_a8wfp4.gemm_a8wfp4",
            {
                **same("x", "y", "dtype"),
                "w": lambda a: a["w"].view(torch.uint8),
                "x_scales": lambda a: a["x_scale"].reshape(-1, 1),
                "w_scales": lambda a: a["w_scale"].view(torch.uint8),
            },
        ),
        _a8wfp4,
    ),
}
