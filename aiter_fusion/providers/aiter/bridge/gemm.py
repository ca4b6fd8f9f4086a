"""Matrix products of 8-bit tensors with scales."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .... import config
from ....op import is_contiguous
from .. import hipblaslt, releases
from .adapter import F32, HALVES, Adapter, Arguments, Condition, contiguous, entry, formats, of_dtype

BLOCK = 128


def _operands(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    x, w = a["x"], a["w"]
    yield x.dtype == w.dtype, f"x is {x.dtype}, w {w.dtype}, but both must have one dtype"
    known = formats(native, torch.int8)
    yield x.dtype in known, f"x is {x.dtype}, and this GPU's formats are {' and '.join(map(str, known))}"
    yield a["dtype"] in HALVES, f"the result is {a['dtype']}, and the kernel makes bfloat16 and float16"
    yield contiguous("x", x)
    yield contiguous("w", w)


def _bias(a: Arguments) -> Condition:
    bias, dtype = a["bias"], a["dtype"]
    found = None if bias is None else bias.dtype
    return found in (None, dtype), f"the bias is {found}, and the kernel needs {dtype}, like the result"


def _per_row(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield from _operands(a, native)
    for name, rows in (("x_scale", a["x"].shape[0]), ("w_scale", a["w"].shape[0])):
        yield of_dtype(name, a[name], F32)
        count = a[name].numel()
        yield statically_known_true(count == rows), f"{name} has {count} elements for {rows} rows"
    yield _bias(a)


def _per_block(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    yield from _operands(a, native)
    n, k = a["w"].shape
    yield a["x"].dtype != torch.int8, f"x is torch.int8, and the kernel with scales for blocks takes FP8, here {native}"
    yield n % BLOCK == 0, f"N is {n}, not a multiple of {BLOCK}"
    yield k % BLOCK == 0, f"K is {k}, not a multiple of {BLOCK}"
    for name, rows in (("x_scale", a["x"].shape[0]), ("w_scale", n // BLOCK)):
        yield of_dtype(name, a[name], F32)
        count = a[name].numel() == rows * (k // BLOCK)
        yield statically_known_true(count), f"{name} is {list(a[name].shape)}, not {[rows, k // BLOCK]}"


def _hipblaslt(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    x, b = a["a"], a["b"]
    (m, k), n = x.shape, b.shape[1]
    yield a["dtype"] is torch.bfloat16, f"the result is {a['dtype']}, and with scales for rows hipBLASLt makes bfloat16"
    yield x.dtype == b.dtype == native, f"a and b are {x.dtype} and {b.dtype}, and this GPU's format is {native}"
    for name, size, what in (("a", m, "rows"), ("b", n, "columns")):
        count = a[f"{name}_scale"].numel()
        yield statically_known_true(count == size), f"{name} has {count} scales, not one for each of its {size} {what}"
        yield of_dtype(f"{name}_scale", a[f"{name}_scale"], F32)
    yield n >= 16, f"N is {n}, below 16"
    yield n % 16 == 0, f"N is {n}, not a multiple of 16"
    yield k % 16 == 0, f"K is {k}, not a multiple of 16"
    yield not a["b_is_shuffled"] or k % 32 == 0, f"K is {k}, not a multiple of 32, which a shuffled b needs"
    yield _bias(a)
    yield contiguous("a", x)
    yield is_contiguous(b.t()), f"b is not the transpose of a contiguous weight (strides {tuple(b.stride())})"
    library = hipblaslt.library_version()
    for needed, first, what in (
        (True, hipblaslt.SCALES_ROWS_FROM, "scales for rows"),
        (a["b_is_shuffled"], hipblaslt.READS_TILES_FROM, "shuffled weights"),
    ):
        knows = not needed or library is None or library >= first
        yield knows, f"hipBLASLt is {library}, and it has {what} from {first} on: upgrade ROCm"
    if config.tuning() is not None:
        version, first = releases.installed(), hipblaslt.TUNES_FROM
        tunes = version is None or version >= first
        yield tunes, f"AITER_FUSION_TUNING is set, and AITER {version} cannot tune: it can from v{first} on"


ADAPTERS = {
    "gemm_a8w8": Adapter(
        entry(
            "aiter.gemm_a8w8",
            {
                "XQ": "x",
                "WQ": "w",
                "x_scale": lambda a: a["x_scale"].reshape(-1, 1).contiguous(),
                "w_scale": lambda a: a["w_scale"].reshape(-1, 1).contiguous(),
                "bias": "bias",
                "dtype": "dtype",
            },
        ),
        _per_row,
        returns="y",
    ),
    "gemm_a8w8_blockscale": Adapter(
        entry(
            "aiter.gemm_a8w8_blockscale",
            {
                "XQ": "x",
                "WQ": "w",
                # the kernel reads scales row by row, whatever their strides
                "x_scale": lambda a: a["x_scale"].reshape(a["x"].shape[0], -1).contiguous(),
                "w_scale": lambda a: a["w_scale"].contiguous(),
                "dtype": "dtype",
            },
        ),
        _per_block,
        returns="y",
    ),
    "hipb_mm_fp8": Adapter(hipblaslt.MULTIPLY, _hipblaslt, compute=hipblaslt.compute, others=(hipblaslt.CREATE,)),
}
