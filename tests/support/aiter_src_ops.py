"""The further parts of ``aiter_src``: AITER's own orders of weights and scales, and its Triton namesakes of products,
norms, rotary embedding and quantisers, against the bridge's references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from aiter_fusion import bridge
from aiter_fusion.providers.aiter.bridge.gemm_shuffled import _column_major
from aiter_fusion.providers.tiles import in_rows, shuffled, shuffled_scales, unshuffled_scales
from aiter_fusion.registry import REGISTRY

FN, F16, BF16 = torch.float8_e4m3fn, torch.float16, torch.bfloat16
Far = Callable[[list[Tensor], Callable[[Any], list[Tensor]], tuple[Any, ...]], str | None]
Moved = Callable[[dict[str, Any]], dict[str, Any]]
Found = Iterator[tuple[str, str | None]]
# No options of AMD's, which other compilers refuse.
TILES = {"BLOCK_SIZE_M": 32, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1}
MORE = {"num_warps": 4, "num_stages": 2, "NUM_KSPLIT": 1, "cache_modifier": None}


def _samples(family: str, moved: Moved) -> Iterator[dict[str, Any]]:
    """Those that have rows."""
    for given in REGISTRY.bridge[family, frozenset()].samples():
        if all(value.numel() for value in given.values() if isinstance(value, Tensor)):
            yield moved(given)


def orders(far: Far, moved: Moved, dtypes: Sequence[torch.dtype]) -> Found:
    """Byte for byte; they are plain PyTorch there."""
    theirs: Any = import_module("aiter.ops.shuffle")

    def same(want: Tensor, have: Tensor) -> str | None:
        return None if torch.equal(want.view(torch.uint8), have.view(torch.uint8)) else "other bytes"

    generator = torch.Generator().manual_seed(0)
    for sizes in ((64, 96), (16, 512)):
        weight = torch.randint(0, 255, sizes, generator=generator).to(torch.uint8)
        want = theirs.shuffle_weight(weight.view(torch.int8), (16, 16))
        yield f"shuffle_weight: {sizes} of a byte", same(want, shuffled(weight).view(sizes))
    for experts, rows, columns in ((3, 64, 256), (2, 512, 128)):
        made = torch.randint(0, 255, (experts, rows, columns), generator=generator).to(torch.uint8)
        what = f"{experts} x {rows} x {columns}"
        for dtype in (torch.int8, BF16):
            weight = made.view(dtype)
            want = theirs.shuffle_weight(weight, (16, 16))
            yield f"shuffle_weight: {what}, {dtype}", same(want, bridge.shuffled_experts(weight)[0])
    for gate_up in (False, True):
        experts, rows, columns = 2, 512, 256
        made = torch.randint(0, 255, (experts, rows, columns), generator=generator).to(torch.uint8)
        scale = torch.randint(0, 255, (experts, rows, columns // 32), generator=generator).to(torch.uint8)
        have, tiled = bridge.shuffled_experts(made, scale, gate_up=gate_up)
        assert tiled is not None
        which = "interleaved" if gate_up else "separated"
        yield f"shuffle_weight_a16w4: {which}", same(theirs.shuffle_weight_a16w4(made, 16, gate_up), have)
        flat = scale.view(experts * rows, -1)
        yield f"shuffle_scale_a16w4: {which}", same(theirs.shuffle_scale_a16w4(flat, experts, gate_up), tiled)
        if not gate_up:
            yield "shuffle_scale: of experts", same(theirs.shuffle_scale(flat), tiled)
    scale = torch.randint(0, 255, (70, 11), generator=generator).to(torch.uint8)
    padded = unshuffled_scales(theirs.shuffle_scale(scale), 70, 11)
    yield "shuffle_scale: 70 x 11, padded", same(scale, padded)


def layer_norms(far: Far, moved: Moved, dtypes: Sequence[torch.dtype]) -> Found:
    theirs: Any = import_module("aiter.ops.triton.normalization.norm")
    for given in _samples("add_layer_norm", moved):
        x, residual, weight, bias, eps = given.values()
        if x.dtype not in dtypes or x.shape[-1] > 4096:
            continue
        x, residual = x.flatten(0, -2), residual.flatten(0, -2)
        what = f"{tuple(x.shape)} {x.dtype}"
        want = bridge.layer_norm(x, weight, bias, eps, provider="reference")
        yield f"layer_norm: {what}", far([want], lambda g: [theirs.layer_norm(*g)], (x, weight, bias, eps))

        def added(g: tuple[Any, ...]) -> list[Tensor]:
            out, summed = torch.empty_like(g[0]), torch.empty_like(g[0])
            theirs.layernorm2d_fwd_with_add(out, g[0], g[1], summed, *g[2:])
            return [out, summed]

        both = bridge.add_layer_norm(x, residual, weight, bias, eps, provider="reference")
        yield f"layernorm2d_fwd_with_add: {what}", far(list(both), added, (x, residual, weight, bias, eps))


def rotary(far: Far, moved: Moved, dtypes: Sequence[torch.dtype]) -> Found:
    """Their Triton function turns one tensor; theirs of HIP turns two."""
    theirs: Any = import_module("aiter.ops.triton.rope.rope")
    for given in _samples("rotary_embedding", moved):
        q, k, cos, sin, positions, neox, nope_first = given.values()
        if q.dtype != dtypes[0] and q.dtype is not F16:
            q, k, cos, sin = (t.to(dtypes[0]) for t in (q, k, cos, sin))
        want = bridge.rotary_embedding(q, k, cos, sin, positions, neox, nope_first, provider="reference")
        if q.shape[-1] not in (2 * cos.shape[1], 4 * cos.shape[1]):
            yield (
                f"rope_cached_positions_fwd: {tuple(q.shape)}",
                "not run: theirs of Triton turns a head, or half of it",
            )
            continue
        tables = [table[:, None, None] for table in (cos, sin)]
        style = "NeoX" if neox else "GPT-J"
        for name, x, turned in (("q", q, want[0]), ("k", k, want[1])):
            what = f"rope_cached_positions_fwd: {style} {name} {tuple(x.shape)}, {2 * cos.shape[1]} turned, {x.dtype}"

            def run(g: tuple[Any, ...]) -> list[Tensor]:
                out = theirs.rope_cached_positions_fwd(g[0][:, None], *g[1:4], 0 if g[4] else 1, True, g[5])
                return [out[:, 0]]

            yield what, far([turned], run, (x, *tables, positions[:, None], neox, nope_first))


def quantisers(far: Far, moved: Moved, dtypes: Sequence[torch.dtype]) -> Found:
    theirs: Any = import_module("aiter.ops.triton.quant.quant")
    for given in _samples("token_quant", moved):
        x, dtype = given["x"].flatten(0, -2), given["dtype"]
        x = x[x.abs().amax(-1) > 0].to(dtypes[0])  # of a row of zeros theirs are not numbers
        what = f"{tuple(x.shape)} {x.dtype} to {dtype}"

        def token(g: tuple[Any, ...]) -> list[Tensor]:
            q, scale = torch.empty_like(g[0], dtype=g[1]), g[0].new_empty(len(g[0]), dtype=torch.float32)
            theirs.dynamic_per_token_quant_fp8_i8(q, g[0], scale)
            return [q, scale[:, None]]

        want = bridge.token_quant(x, dtype, provider="reference")
        yield f"dynamic_per_token_quant_fp8_i8: {what}", far(list(want), token, (x, dtype))

        def tensor(g: tuple[Any, ...]) -> list[Tensor]:
            q, scale = torch.empty_like(g[0], dtype=g[1]), g[0].new_zeros(1, dtype=torch.float32)
            theirs.dynamic_per_tensor_quant_fp8_i8(q, g[0], scale)
            return [q, scale]

        want = bridge.tensor_quant(x, dtype, provider="reference")
        yield f"dynamic_per_tensor_quant_fp8_i8: {what}", far(list(want), tensor, (x, dtype))

        def static(g: tuple[Any, ...]) -> list[Tensor]:
            q = torch.empty_like(g[0], dtype=g[1])
            theirs.static_per_tensor_quant_fp8_i8(q, g[0], g[2])
            return [q]

        scale = want[1] * 1.5  # theirs does not saturate
        fixed = bridge.static_quant(x, scale, dtype, provider="reference")
        yield f"static_per_tensor_quant_fp8_i8: {what}", far([fixed], static, (x, dtype, scale))


def products(far: Far, moved: Moved, dtypes: Sequence[torch.dtype]) -> Found:
    blocks: Any = import_module("aiter.ops.triton.gemm.basic.gemm_a8w8_blockscale")
    batched: Any = import_module("aiter.ops.triton.gemm.batched.batched_gemm_a8w8")
    narrow: Any = import_module("aiter.ops.triton.gemm.basic.gemm_a8wfp4")
    for given in _samples("gemm_a8w8_blockscale_bpreshuffle", moved):
        x, w, x_scale, w_scale, _ = given.values()
        (m, k), n = x.shape, len(w)
        if n % 128:
            continue
        want = bridge.gemm_a8w8_blockscale_bpreshuffle(x, w, x_scale, w_scale, provider="reference")
        config = TILES | MORE | {"BLOCK_SIZE_N": 16, "SPLITK_BLOCK_SIZE": k}

        def by_blocks(g: tuple[Any, ...]) -> list[Tensor]:
            x, w, x_scale, w_scale, config = g
            rows = w.reshape(len(w) // 16, -1)
            transposed = x_scale.stride(0) != 1  # as AITER's own function decides
            more = {"config": config, "is_x_scale_tranposed": transposed}
            return [blocks.gemm_a8w8_blockscale_preshuffle(x, rows, x_scale, w_scale, dtype=BF16, **more)]

        what = f"gemm_a8w8_blockscale_preshuffle: {m} x {n} x {k}, scales {tuple(x_scale.stride())}"
        yield what, far([want], by_blocks, (x, w, _column_major(x_scale), w_scale, config))
    for given in _samples("batched_gemm_a8w8", moved):
        what = f"batched_gemm_a8w8: {tuple(given['x'].shape)} by {given['w'].shape[1]}, {given['dtype']}"
        if given["bias"] is not None and given["dtype"] not in dtypes:
            yield what, "not run: the interpreter adds bfloat16 as integers"
            continue
        want = REGISTRY.bridge["batched_gemm_a8w8", frozenset()].reference(**given)["y"]
        names = {"XQ": "x", "WQ": "w", "x_scale": "x_scale", "w_scale": "w_scale", "bias": "bias", "dtype": "dtype"}
        call = {theirs: given[ours] for theirs, ours in names.items()} | {"config": TILES | {"num_warps": 4}}
        yield what, far([want], lambda g: [batched.batched_gemm_a8w8(**g[0])], (call,))
    for given in _samples("gemm_a8wfp4", moved):
        x, w, x_scale, w_scale, dtype = given.values()
        want = bridge.gemm_a8wfp4(x, w, x_scale, w_scale, dtype, provider="reference")
        config = TILES | MORE | {"SPLITK_BLOCK_SIZE": 2 * x.shape[1]}

        def by_bytes(g: tuple[Any, ...]) -> list[Tensor]:
            x, w, x_scale, w_scale, dtype, config = g
            y = x.new_empty(len(x), len(w), dtype=dtype)
            narrow.gemm_a8wfp4(x, w, y, x_scale, w_scale, dtype, dict(config))
            return [y]

        what = f"gemm_a8wfp4: {len(x)} x {len(w)} x {x.shape[1]} {dtype}"
        yield what, far([want], by_bytes, (x, w, x_scale, w_scale, dtype, config))


def products_of_4_bits(far: Far, moved: Moved, dtypes: Sequence[torch.dtype]) -> Found:
    """Their Triton namesake takes the weight and its scales in rows."""
    theirs: Any = import_module("aiter.ops.triton.gemm.basic.gemm_afp4wfp4")
    for given in _samples("gemm_a4w4", moved):
        x, w, x_scale, w_scale, dtype = given.values()
        n, half = w.shape
        if half % 64:
            continue
        want = bridge.gemm_a4w4(x, w, x_scale, w_scale, dtype, provider="reference")
        rows, scales = in_rows(w.t(), True), unshuffled_scales(w_scale, n, half // 16)
        assert torch.equal(shuffled_scales(scales), w_scale)
        config = TILES | MORE | {"SPLITK_BLOCK_SIZE": 2 * half}
        config |= {"waves_per_eu": 0, "matrix_instr_nonkdim": 16}  # arguments of the kernel, not options of the launch

        def by_rows(g: tuple[Any, ...]) -> list[Tensor]:
            x, w, x_scale, w_scale, config = g
            return [theirs.gemm_afp4wfp4(x, w, x_scale, w_scale, BF16, config=dict(config))]

        what = f"gemm_afp4wfp4: {len(x)} x {n} x {2 * half}"
        yield what, far([want], by_rows, (x, rows, x_scale, scales, config))


PARTS = (orders, layer_norms, rotary, quantisers, products, products_of_4_bits)
