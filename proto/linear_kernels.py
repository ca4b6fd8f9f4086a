"""Products of a few FP8 rows with up to four FP8 weights in one launch.

``y_i[m, n] = (sum_k x[m, k] * w_i[n, k]) * x_scale[m] * w_scale_i[n] + bias_i[n]``; by block the scales stand inside
the sum, one for each 128 columns of a row of x and each 128 x 128 of a weight.

Three kernels. ``gemv`` multiplies and adds in float32, for one to four rows. ``mm`` has the weights as the first
operand of a dot and the rows of x, padded, as the second. ``combine`` adds the partial sums of ``mm`` where K is
split, always in the same order.

Unused weights: n = 0, with any pointers. One compiled kernel thus serves one to four weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MOST = 4  # weights of a launch
PDL = torch.version.hip is None  # the instructions do nothing in launches without the attribute
UNSPECIALISED = ["m", "n0", "n1", "n2", "n3", "row_blocks", "tiles", "splits", "biased", "columns"]


@triton.jit
def pick(index, a, b, c, d):
    return tl.where(index == 0, a, tl.where(index == 1, b, tl.where(index == 2, c, d)))


@triton.jit
def place(tile, n0, n1, n2, BLOCK_N: tl.constexpr):
    """Which weight a tile of the launch is of, and which of its tiles it is."""
    end0 = tl.cdiv(n0, BLOCK_N)
    end1 = end0 + tl.cdiv(n1, BLOCK_N)
    end2 = end1 + tl.cdiv(n2, BLOCK_N)
    index = (tile >= end0).to(tl.int32) + (tile >= end1).to(tl.int32) + (tile >= end2).to(tl.int32)
    return index, tile - pick(index, 0, end0, end1, end2)


@triton.jit
def rounded_store(y, at, value, mask):
    tl.store(y + at, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=UNSPECIALISED)
def gemv_kernel(
    x, x_scale,
    w0, w1, w2, w3, c0, c1, c2, c3, b0, b1, b2, b3, y0, y1, y2, y3,
    n0, n1, n2, n3, d0, d1, d2, d3,
    m, k, x_stride, xs_row, xs_block, ws_row, ws_block, biased,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
    UNROLL: tl.constexpr, BLOCKED: tl.constexpr, BIAS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_N rows of a weight whole; threads stand along K, 16 bytes each, and add up at the end."""
    CHUNKS: tl.constexpr = BLOCK_K // 16
    index, tile = place(tl.program_id(0), n0, n1, n2, BLOCK_N)
    n = pick(index, n0, n1, n2, n3)
    w, stride = pick(index, w0, w1, w2, w3), pick(index, d0, d1, d2, d3)
    c, y = pick(index, c0, c1, c2, c3), pick(index, y0, y1, y2, y3)
    w += (tile * BLOCK_N).to(tl.int64) * stride
    c_row = tl.minimum(tile * BLOCK_N + tl.arange(0, BLOCK_N), n - 1)
    # (chunk, weight row, row of x, element): the order in which the compiler deals elements to neighbouring threads is
    # the last dimension, then the first
    row = (c_row - tile * BLOCK_N)[None, :, None, None]
    m_row = tl.arange(0, ROWS)[None, None, :, None]
    chunk = tl.arange(0, CHUNKS)[:, None, None, None]
    at = chunk * 16 + tl.arange(0, 16)[None, None, None, :]
    x_at, w_at = m_row * x_stride + at, row * stride + at
    total = tl.zeros([CHUNKS, BLOCK_N, ROWS], tl.float32)
    for start in tl.range(0, k, BLOCK_K, num_stages=STAGES, loop_unroll_factor=UNROLL):
        if EVEN:
            wide_w = tl.load(w + w_at, eviction_policy=FIRST)
            if ROWS == 1:
                wide_x = tl.load(x + x_at)
            else:
                wide_x = tl.load(x + x_at, mask=m_row < m, other=0.0)
        else:
            wide_w = tl.load(w + w_at, mask=at < k - start, other=0.0, eviction_policy=FIRST)
            wide_x = tl.load(x + x_at, mask=(m_row < m) & (at < k - start), other=0.0)
        part = tl.sum(wide_w.to(tl.float32) * wide_x.to(tl.float32), 3)
        if BLOCKED:
            block = (start + tl.arange(0, CHUNKS) * 16) // 128
            block = tl.minimum(block, (k - 1) // 128)
            of_x = tl.load(x_scale + tl.arange(0, ROWS)[None, None, :] * xs_row + block[:, None, None] * xs_block,
                           mask=(tl.arange(0, ROWS) < m)[None, None, :], other=0.0)  # fmt: skip
            of_w = tl.load(c + (c_row // 128)[None, :, None] * ws_row + block[:, None, None] * ws_block)
            total += part * (of_x * of_w)
        else:
            total += part
        w += BLOCK_K
        x += BLOCK_K
    value = tl.sum(total, 0)
    if not BLOCKED:
        value *= tl.load(x_scale + tl.arange(0, ROWS) * xs_row, mask=tl.arange(0, ROWS) < m, other=0.0)[None, :]
        value *= tl.load(c + c_row * ws_row)[:, None]
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if BIAS:
        bias = tl.load(
            pick(index, b0, b1, b2, b3) + column, mask=(column < n) & ((biased >> index) & 1 != 0), other=0.0
        )
        value += bias.to(tl.float32)[:, None]
    out = tl.arange(0, ROWS)[None, :]
    rounded_store(y, out * n + column[:, None], value, (out < m) & (column < n)[:, None])


@triton.jit(do_not_specialize=UNSPECIALISED)
def mm_kernel(
    x, x_scale,
    w0, w1, w2, w3, c0, c1, c2, c3, b0, b1, b2, b3, y0, y1, y2, y3, partial,
    n0, n1, n2, n3, d0, d1, d2, d3,
    m, k, length, row_blocks, tiles, columns, x_stride, xs_row, xs_block, ws_row, ws_block, biased,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FORM: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr, BLOCKED: tl.constexpr, BIAS: tl.constexpr, FIRST: tl.constexpr,
    PDL: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK_N rows of a weight and ``length`` of K.

    FORM: fp8: the accumulator of the tensor cores; promoted: added up in float32 each BLOCK_K; half: of fp16 values;
    sliced: each of SLICES warps takes its part of BLOCK_K (mma.sync, thus products of fp16).
    SPLIT: sums go unscaled to ``partial`` [splits, m, columns], where each weight begins at a multiple of BLOCK_N.
    """
    program = tl.program_id(0)
    rows_from = program % row_blocks * ROWS
    program = program // row_blocks
    launch_tile, split = program % tiles, program // tiles
    index, tile = place(launch_tile, n0, n1, n2, BLOCK_N)
    n = pick(index, n0, n1, n2, n3)
    w, stride = pick(index, w0, w1, w2, w3), pick(index, d0, d1, d2, d3)
    c, y = pick(index, c0, c1, c2, c3), pick(index, y0, y1, y2, y3)
    if PDL and SPLIT:
        gdc_launch_dependents()
    begin = split * length
    end = tl.minimum(begin + length, k)
    w += (tile * BLOCK_N).to(tl.int64) * stride + begin
    x += rows_from.to(tl.int64) * x_stride + begin
    c_row = tl.minimum(tile * BLOCK_N + tl.arange(0, BLOCK_N), n - 1)
    out = rows_from + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK_K)[None, :]
    w_at = (c_row - tile * BLOCK_N)[:, None] * stride + at
    x_at = tl.arange(0, ROWS)[:, None] * x_stride + at
    given = (out < m)[:, None]
    if FORM == "sliced":
        # (slice of BLOCK_K, weight row or row of x, element): a warp takes a slice, and sums are added up at the end
        slice_at = tl.arange(0, SLICES)[:, None, None] * (BLOCK_K // SLICES)
        at = slice_at + tl.arange(0, BLOCK_K // SLICES)[None, None, :]
        w_at = (c_row - tile * BLOCK_N)[None, :, None] * stride + at
        x_at = tl.arange(0, ROWS)[None, :, None] * x_stride + at
        given = (out < m)[None, :, None]
        total = tl.zeros([SLICES, BLOCK_N, ROWS], tl.float32)
    else:
        total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        if EVEN:
            left = tl.load(w + w_at, eviction_policy=FIRST)
            right = tl.load(x + x_at, mask=given, other=0.0)
        else:
            left = tl.load(w + w_at, mask=at < end - start, other=0.0, eviction_policy=FIRST)
            right = tl.load(x + x_at, mask=given & (at < end - start), other=0.0)
        if FORM == "half":
            left, right = left.to(tl.float16), right.to(tl.float16)
        if BLOCKED:
            block = start // BLOCK_K * (BLOCK_K // 128)
            of_x = tl.load(x_scale + out * xs_row + block * xs_block, mask=out < m, other=0.0)
            of_w = tl.load(c + (c_row // 128) * ws_row + block * ws_block)
            total += tl.dot(left, tl.trans(right)) * (of_w[:, None] * of_x[None, :])
        elif FORM == "sliced":
            total = tl.dot(left, tl.permute(right, 0, 2, 1), total)
        elif FORM == "promoted":
            total += tl.dot(left, tl.trans(right))
        else:
            total = tl.dot(left, tl.trans(right), total)
        w += BLOCK_K
        x += BLOCK_K
    if FORM == "sliced":
        total = tl.sum(total, 0)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if SPLIT:
        to = partial + (split * m).to(tl.int64) * columns
        inside = (out < m)[None, :] & (column < n)[:, None]
        tl.store(to + out[None, :] * columns + launch_tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None], total, inside)
    else:
        if not BLOCKED:
            of_x = tl.load(x_scale + out * xs_row, mask=out < m, other=0.0)
            total = total * tl.load(c + c_row * ws_row)[:, None] * of_x[None, :]
        if BIAS:
            wanted = (column < n) & ((biased >> index) & 1 != 0)
            bias = tl.load(pick(index, b0, b1, b2, b3) + column, mask=wanted, other=0.0)
            total += bias.to(tl.float32)[:, None]
        inside = (out < m)[None, :] & (column < n)[:, None]
        rounded_store(y, out.to(tl.int64)[None, :] * n + column[:, None], total, inside)


@triton.jit(do_not_specialize=UNSPECIALISED)
def combine_kernel(
    partial, x_scale,
    c0, c1, c2, c3, b0, b1, b2, b3, y0, y1, y2, y3,
    n0, n1, n2, n3,
    m, tiles, columns, xs_row, ws_row, biased,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, BLOCKED: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program takes one row of one tile of BLOCK_N columns, the same tiles as the launch before it."""
    launch_tile, out = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    index, tile = place(launch_tile, n0, n1, n2, BLOCK_N)
    n = pick(index, n0, n1, n2, n3)
    c, y = pick(index, c0, c1, c2, c3), pick(index, y0, y1, y2, y3)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < n
    scale = tl.full([BLOCK_N], 1.0, tl.float32)
    if not BLOCKED:
        scale = tl.load(c + column * ws_row, mask=inside, other=0.0)
        of_x = tl.load(x_scale + out * xs_row)
        scale *= of_x
    if BIAS:
        wanted = inside & ((biased >> index) & 1 != 0)
        bias = tl.load(pick(index, b0, b1, b2, b3) + column, mask=wanted, other=0.0)
    if PDL:
        gdc_wait()
    at = partial + out.to(tl.int64) * columns + launch_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.load(at, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(at + (split * m).to(tl.int64) * columns, mask=inside, other=0.0)
    total *= scale
    if BIAS:
        total += bias.to(tl.float32)
    rounded_store(y, out.to(tl.int64) * n + column, total, inside)


@dataclass(frozen=True)
class Config:
    """How a product is launched. form: gemv, fp8, promoted, half or sliced; rows: that a program takes, padded."""

    form: str
    rows: int
    block_n: int
    block_k: int
    stages: int
    warps: int
    split: int = 1
    unroll: int = 1
    first: bool = True
    pdl: bool = False

    def __str__(self) -> str:
        extra = f" split {self.split}{' pdl' if self.pdl else ''}" if self.split > 1 else ""
        extra += f" unroll {self.unroll}" if self.unroll > 1 else ""
        extra += "" if self.first else " normal"
        return f"{self.form} {self.rows}r {self.block_n}x{self.block_k} s{self.stages} w{self.warps}{extra}"


@dataclass(frozen=True)
class Step:
    """One kernel of a call: what ``kernel[(grid,)](**arguments, **options)`` takes."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    options: dict[str, Any]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def plan(
    x: Any, weights: list[Any], x_scale: Any, w_scales: list[Any], biases: list[Any], outs: list[Any], partial: Any,
    m: int, k: int, ns: list[int], strides: list[int], x_stride: int, xs: tuple[int, int], ws: tuple[int, int],
    blocked: bool, config: Config,
) -> list[Step]:  # fmt: skip
    """The kernels of a call. Tensors may be dtypes: then the steps are fit for ``warmup``."""
    count = len(weights)

    def four(name: str, given: list[Any], unused: Any = None) -> dict[str, Any]:
        filled = [*given, *[given[0] if unused is None else unused] * (MOST - count)]
        return {f"{name}{i}": value for i, value in enumerate(filled)}

    biased = sum(1 << i for i, bias in enumerate(biases) if bias is not None)
    bias_of = next((bias for bias in biases if bias is not None), outs[0])
    common = {
        **four("c", w_scales), **four("b", [bias_of if b is None else b for b in biases]), **four("y", outs),
        **four("n", ns, 0), "m": m, "x_scale": x_scale, "xs_row": xs[0], "ws_row": ws[0], "biased": biased,
        "BLOCK_N": config.block_n, "BLOCKED": blocked, "BIAS": bool(biased),
    }  # fmt: skip
    read = {
        "x": x, **four("w", weights), **four("d", strides), "k": k, "x_stride": x_stride, "xs_block": xs[1],
        "ws_block": ws[1], "ROWS": config.rows, "BLOCK_K": config.block_k, "STAGES": config.stages,
        "FIRST": "evict_first" if config.first else "",
    }  # fmt: skip
    tiles = sum(cdiv(n, config.block_n) for n in ns)
    if config.form == "gemv":
        even = k % config.block_k == 0
        arguments = {**common, **read, "EVEN": even, "UNROLL": config.unroll}
        return [Step(gemv_kernel, tiles, arguments, {"num_warps": config.warps})]
    length = cdiv(cdiv(k, config.split), config.block_k) * config.block_k
    splits = cdiv(k, length)
    row_blocks, columns = cdiv(m, config.rows), tiles * config.block_n
    arguments = {
        **common, **read, "partial": partial, "length": length, "row_blocks": row_blocks, "tiles": tiles,
        "columns": columns, "FORM": config.form, "SPLIT": splits > 1, "EVEN": k % config.block_k == 0,
        "PDL": PDL, "SLICES": config.warps if config.form == "sliced" else 1,
    }  # fmt: skip
    pdl = {"launch_pdl": True} if config.pdl else {}
    steps = [Step(mm_kernel, row_blocks * tiles * splits, arguments, {"num_warps": config.warps})]
    if splits > 1:
        # tiles of the launch before are taken together where a weight's columns are whole tiles
        wide = 256 if all(n % 256 == 0 for n in ns) and config.block_n <= 256 else config.block_n
        arguments = {
            **common, "partial": partial, "tiles": columns // wide, "columns": columns, "SPLITS": splits,
            "PDL": PDL, "BLOCK_N": wide,
        }  # fmt: skip
        steps.append(Step(combine_kernel, columns // wide * m, arguments, {"num_warps": max(1, wide // 64), **pdl}))
    return steps


def scale_strides(scale: torch.Tensor, rows: int) -> tuple[int, int]:
    """Of a scale of the whole tensor (one number), of rows ([m, 1]) or of blocks ([m, blocks])."""
    if scale.numel() == 1 and rows > 1:
        return 0, 0
    return scale.stride(0), scale.stride(1) if scale.dim() > 1 and scale.shape[1] > 1 else 0


def linear(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    x_scale: torch.Tensor,
    w_scales: list[torch.Tensor],
    biases: list[torch.Tensor | None] | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    fast: bool = True,
    config: Config | None = None,
) -> list[torch.Tensor]:
    """x [m, k], weights [n_i, k]; x_scale [m, 1], [1, 1] or [m, k / 128]; w_scales [n_i, 1], [1, 1] or
    [n_i / 128, k / 128]. Scales are by block where there is more than one for a row of x."""
    (m, k), ns = x.shape, [w.shape[0] for w in weights]
    config = config or Config("gemv" if m == 1 else "fp8" if fast else "half", 1 if m == 1 else 16, 16, 512, 3, 4)
    outs = [torch.empty(m, n, dtype=out_dtype, device=x.device) for n in ns]
    columns = sum(cdiv(n, config.block_n) for n in ns) * config.block_n
    partial = torch.empty(config.split * m * columns if config.split > 1 else 1, device=x.device)
    blocked = x_scale.dim() == 2 and x_scale.shape[1] > 1
    for step in plan(
        x, weights, x_scale, w_scales, biases or [None] * len(weights), outs, partial, m, k, ns,
        [w.stride(0) for w in weights], x.stride(0), scale_strides(x_scale, m),
        scale_strides(w_scales[0], ns[0]), blocked, config,
    ):  # fmt: skip
        step.kernel[(step.grid,)](**step.arguments, **step.options)
    return outs


def mocked(
    count: int, m: int, k: int, config: Config, scales: str = "row", bias: bool = False,
    out_dtype: torch.dtype = torch.bfloat16, fp8: torch.dtype = torch.float8_e4m3fn,
) -> list[Step]:  # fmt: skip
    """The steps of a call, of dtypes instead of tensors, for compiling; specialised as ``linear``'s are."""
    f32 = torch.float32
    xs, ws = {"row": ((1, 0), (1, 0)), "tensor": ((0, 0), (0, 0)), "block": ((k // 128, 1), (k // 128, 1))}[scales]
    return plan(
        fp8, [fp8] * count, f32, [f32] * count, [out_dtype if bias else None] * count, [out_dtype] * count, f32, m, k,
        [4096] * count, [k] * count, k, xs, ws, scales == "block", config,
    )  # fmt: skip


__all__ = ["Config", "Step", "linear", "mocked", "plan", "replace"]
