"""AMD's GPU architectures that this package knows: their FP8 format, and what AITER's kernels lack on them."""

from __future__ import annotations

from typing import NamedTuple

import torch

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz


class Architecture(NamedTuple):
    """One architecture.

    fp8:          the format that its matrix cores read; None: they read none.
    experimental: AITER calls its support so, or builds for it without naming it. Then AITER is used only where it is
                  asked for by name.
    hip_converts: AITER's HIP kernels convert to FP8; where this is False, they write zeros.
    all_reduces:  AITER has fused all-reduces for it.
    """

    fp8: torch.dtype | None
    experimental: bool = True
    hip_converts: bool = True
    all_reduces: bool = True


# Source: ROCm/aiter, v0.1.20.post1.
ARCHITECTURES = {
    #                       FP8   experimental  hip_converts  all_reduces
    "gfx90a": Architecture(None, True, False, False),  # MI200
    "gfx942": Architecture(FNUZ, False, True, True),  # MI300
    "gfx950": Architecture(FN, False, True, True),  # MI350
    "gfx1100": Architecture(FN, True, False, True),
    "gfx1151": Architecture(FN, True, False, True),
    "gfx1201": Architecture(FN, True, True, True),
    "gfx1250": Architecture(FN, True, True, False),
}
SUPPORTED = tuple(name for name, row in ARCHITECTURES.items() if not row.experimental)

_ALL = tuple(ARCHITECTURES)
_CDNA = ("gfx90a", "gfx942", "gfx950")
_FP8 = tuple(name for name, row in ARCHITECTURES.items() if row.fp8 is not None)

# Op of the bridge -> the architectures that AITER has a kernel of it for. What a kernel computes with FP8, it computes
# with the GPU's own format; int8 and 16-bit calls of an op run where ``gfx90a`` is in its row.
RUNS_ON = {
    "rms_norm": _ALL,
    "add_rms_norm": _ALL,
    "layer_norm": _ALL,
    "add_layer_norm": _ALL,
    "rotary_embedding": _ALL,
    "rotary_embedding_": _ALL,
    "token_quant": _ALL,
    "group_quant": _ALL,
    "tensor_quant": _ALL,
    "static_quant": _ALL,
    "greedy_sample": _ALL,
    "mixed_sample": _ALL,
    "top_k_renorm_probs": _ALL,
    "gemm_a8w8": _ALL,
    "gemm_a8w8_blockscale": _FP8,
    "gemm_a8w8_bpreshuffle": SUPPORTED,
    "gemm_a8w8_blockscale_bpreshuffle": SUPPORTED,
    "hipb_mm_fp8": SUPPORTED,
    "batched_gemm_a8w8": _CDNA,
    "gemm_a4w4": ("gfx950",),
    "gemm_a8wfp4": ("gfx950",),
    "topk_softmax": _ALL,
    "fused_topk": _ALL,
    "topk_sigmoid": _ALL,
    "topk_gating": SUPPORTED,
    "grouped_topk": _ALL,
    "biased_grouped_topk": _ALL,
    "fused_moe": _ALL,
    "asm_moe_tkw1": SUPPORTED,
    "moe_sum": _ALL,
    "flash_attn": _ALL,
    "flash_attn_varlen": _ALL,
    "flash_attn_varlen_lse": _ALL,
    "paged_attention": _ALL,
    "reshape_and_cache": _ALL,
    "mla_decode_fwd": _FP8,
    "mla_decode_fwd_lse": _FP8,
    "mla_decode_metadata": _FP8,
    "mla_prefill_fwd": _FP8,
}
