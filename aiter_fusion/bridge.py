"""AITER's kernels as functional PyTorch operators, to be called from a model's own code.

Every function here is one operator ``torch.ops.aiter_fusion.<name>``: it writes to none of its arguments, has a fake
and a reference in plain PyTorch, and can be compiled. ``provider`` says who computes it:

``auto``       AITER where it can run, is wanted (``AITER_FUSION_LINEAR`` and so on) and takes the call, else PyTorch's
               own scaled product where it computes the same, else the reference. Decided at every call.
``aiter``      AITER whatever the environment prefers; a RuntimeError lists every condition that the call does not meet.
``torch``      PyTorch's own scaled product, or a RuntimeError.
``reference``  plain PyTorch, on any device: correct, slow.

Source of contracts: ROCm/aiter up to v0.1.20.post1. ``why_not`` says in advance what a provider objects to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops  # noqa: F401  (importing it registers the operators)
from .providers import BRIDGE_PROVIDERS
from .providers import why_not as _why_not
from .providers.tiles import shuffled, unshuffled  # noqa: F401  (public here)
from .registry import REGISTRY

_OPS: Any = torch.ops.aiter_fusion


def why_not(name: str, *, provider: str = "aiter", **arguments: Any) -> str | None:
    """Why a provider cannot compute a call of an operator, every condition that fails, or None if it can.

    Args:
        name: of an operator here, e.g. ``"hipb_mm_fp8"``; arguments: all of that operator's, by name.

    Raises:
        KeyError: there is no such operator or provider.
    """
    op = REGISTRY.bridge[name, frozenset()]
    return _why_not(BRIDGE_PROVIDERS[provider], op, {argument: arguments.get(argument) for argument in op.arguments})


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, provider: str = "auto") -> Tensor:
    """``x * rsqrt(mean(x**2, -1) + eps) * weight`` in float32, rounded once.

    Args:
        x: ``[..., H]`` bfloat16 or float16 (reference: any float). weight: ``[H]`` of the same dtype.

    Returns:
        ``[..., H]`` of the dtype of x, contiguous.

    AITER: ``aiter.rms_norm``; H up to 8192 and a multiple of 8, x contiguous.
    """
    return _OPS.rms_norm(x, weight, eps, provider)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, provider: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``rms_norm`` of ``x + residual``, and that sum: the sum is normalised in float32, and rounded on its way out.

    Args:
        x, residual: ``[..., H]``, and weight ``[H]``, of one dtype: bfloat16 or float16 (reference: any float).

    Returns:
        (normalised, sum), each ``[..., H]`` of the dtype of x, contiguous.

    AITER: ``aiter.rmsnorm2d_fwd_with_add``; limits of ``rms_norm``.
    """
    return _OPS.add_rms_norm(x, residual, weight, eps, provider)


def gemm_a8w8(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    provider: str = "auto",
) -> Tensor:
    """``(x @ w.T) * x_scale * w_scale.T + bias``: 8-bit values, a scale for each row of both.

    Args:
        x: ``[M, K]``, w: ``[N, K]``, both int8 or both FP8. x_scale: ``[M, 1]``, w_scale: ``[N, 1]`` or ``[1, N]``,
        float32 dequantisation scales. bias: ``[N]`` of ``dtype``. dtype: of the result, bfloat16 or float16.

    Returns:
        ``[M, N]`` of ``dtype``, contiguous.

    AITER: ``aiter.gemm_a8w8``; the GPU's own FP8 format, weights as they are (not shuffled).
    """
    return _OPS.gemm_a8w8(x, w, x_scale, w_scale, bias, dtype, provider)


def gemm_a8w8_blockscale(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    provider: str = "auto",
) -> Tensor:
    """``dequantised(x) @ dequantised(w).T``: FP8 values, a scale for each 128 columns of a row of x and for each block
    of 128 x 128 of w.

    Args:
        x: ``[M, K]``, w: ``[N, K]`` FP8. x_scale: ``[M, K / 128]`` or what can be reshaped to that, w_scale:
        ``[ceil(N / 128), K / 128]``, float32 dequantisation scales, of any true strides. dtype: of the result.

    Returns:
        ``[M, N]`` of ``dtype``, contiguous.

    AITER: ``aiter.gemm_a8w8_blockscale``; N and K multiples of 128.
    """
    return _OPS.gemm_a8w8_blockscale(x, w, x_scale, w_scale, dtype, provider)


def hipb_mm_fp8(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    b_is_shuffled: bool = False,
    provider: str = "auto",
) -> Tensor:
    """``(a @ b) * a_scale * b_scale + bias`` by hipBLASLt.

    Args:
        a: ``[M, K]`` FP8. b: ``[K, N]`` FP8, a transposed weight; with ``b_is_shuffled`` the transpose of
        ``shuffled(weight).view(N, K)``. a_scale: ``[M, 1]``, b_scale: ``[1, N]``, float32 dequantisation scales.
        bias: ``[N]`` of ``dtype``. dtype: of the result, bfloat16.

    Returns:
        ``[M, N]`` of ``dtype``, contiguous.

    AITER: ``aiter.hipb_mm`` (v0.1.12 on; releases before end the process where hipBLASLt has no kernel for a shape);
    gfx942 and gfx950, N at least 16, N and K multiples of 16 (K of 32 if shuffled). A shape without a kernel is
    computed as ``gemm_a8w8`` is, which a warning says once; so are calls on other devices than that of the process's
    first, because AITER has one handle of hipBLASLt. With ``AITER_FUSION_TUNING`` the first call of every shape of up
    to 512 rows takes minutes, and prints.
    """
    return _OPS.hipb_mm_fp8(a, b, a_scale, b_scale, bias, dtype, b_is_shuffled, provider)


def topk_softmax(
    gating: Tensor, topk: int, renormalize: bool = True, *, provider: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The ``topk`` experts of the highest probability ``softmax(gating)``, best first.

    Args:
        gating: ``[M, E]`` logits. renormalize: divide the weights by their sum.

    Returns:
        (weights ``[M, topk]`` float32, ids ``[M, topk]`` int32).

    AITER: ``aiter.topk_softmax``. Source: Mixtral.
    """
    return _OPS.topk_softmax(gating, topk, renormalize, provider)


def grouped_topk(
    gating: Tensor,
    topk: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool = True,
    softmax: bool = True,
    routed_scaling_factor: float = 1.0,
    *,
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The ``topk`` experts of the highest score among those in the ``topk_group`` groups with the best single expert.

    Args:
        gating: ``[M, E]`` logits, E a multiple of ``num_expert_group``. softmax: scores are ``softmax(gating)``, else
        ``sigmoid(gating)``. routed_scaling_factor: of the weights, after they were renormalised.

    Returns:
        (weights ``[M, topk]`` float32, ids ``[M, topk]`` int32), in no particular order.

    AITER: ``aiter.grouped_topk`` (v0.1.5 on). Source: DeepSeek-V2.
    """
    return _OPS.grouped_topk(
        gating, topk, num_expert_group, topk_group, renormalize, softmax, routed_scaling_factor, provider
    )


def biased_grouped_topk(
    gating: Tensor,
    correction_bias: Tensor,
    topk: int,
    num_expert_group: int,
    topk_group: int,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
    *,
    provider: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Experts chosen by ``sigmoid(gating) + correction_bias``, weighted by ``sigmoid(gating)``: the ``topk`` highest
    among those in the ``topk_group`` groups with the highest sum of their two best.

    Args:
        gating: ``[M, E]`` logits. correction_bias: ``[E]`` of the same dtype. Others as in ``grouped_topk``.

    Returns:
        (weights ``[M, topk]`` float32, ids ``[M, topk]`` int32), in no particular order.

    AITER: ``aiter.biased_grouped_topk``, with ``renormalize``. Source: DeepSeek-V3.
    """
    return _OPS.biased_grouped_topk(
        gating, correction_bias, topk, num_expert_group, topk_group, renormalize, routed_scaling_factor, provider
    )


def fused_moe(
    hidden: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    expert_mask: Tensor | None = None,
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    a1_scale: Tensor | None = None,
    a2_scale: Tensor | None = None,
    activation: str = "silu",
    quantisation: str = "none",
    doweight_stage1: bool = False,
    provider: str = "auto",
) -> Tensor:
    """``sum over a token's experts of weight * (act(x @ gate.T) * (x @ up.T)) @ w2.T`` with gate, up the halves of w1.

    Args:
        hidden: ``[M, D]`` bfloat16 or float16. w1: ``[E, 2 I, D]``, w2: ``[E, D, I]``: of this rank's E experts.
        topk_weights: ``[M, k]`` float32; topk_ids: ``[M, k]`` int32, of all experts. expert_mask: ``[all experts]``
        int32, 1 for those of this rank, in order; others contribute nothing. activation: ``silu`` or ``gelu``.
        quantisation: ``none``: weights of the dtype of hidden. ``per_tensor`` (FP8; scales ``[E]``), ``per_token``
        (FP8 or int8; w1_scale ``[E, 2 I]``, w2_scale ``[E, D]``), ``block_128`` (FP8; a scale for each 128 x 128).
        a1_scale, a2_scale: float32 scales of both inputs; without them they are quantised by their maxima.
        doweight_stage1: multiply with the weights before the activation instead (one expert a token).

    Returns:
        ``[M, D]`` of the dtype of hidden.

    Raises:
        ValueError: an activation or quantisation of another name.

    AITER: ``aiter.fused_moe.fused_moe``.
    """
    return _OPS.fused_moe(
        hidden,
        w1,
        w2,
        topk_weights,
        topk_ids,
        expert_mask,
        w1_scale,
        w2_scale,
        a1_scale,
        a2_scale,
        activation,
        quantisation,
        doweight_stage1,
        provider,
    )


def mla_decode_fwd(
    q: Tensor,
    kv_buffer: Tensor,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    kv_last_page_lens: Tensor,
    max_seqlen_q: int,
    value_dim: int = 512,
    sm_scale: float | None = None,
    logit_cap: float = 0.0,
    q_scale: Tensor | None = None,
    kv_scale: Tensor | None = None,
    *,
    provider: str = "auto",
) -> Tensor:
    """``softmax(q @ k.T * sm_scale) @ k[..., :value_dim]`` over each sequence's pages of latent keys.

    Causal over a sequence's queries: the last sees all keys, the one before it one less, and so on.

    Args:
        q: ``[T, H, 576]``, all sequences' queries, bfloat16 or FP8. kv_buffer: ``[pages, page size, KV heads, 576]``.
        qo_indptr: ``[B + 1]`` int32, where each sequence's queries start; kv_indptr: ``[B + 1]`` int32, the same in
        kv_indices, which lists pages; kv_last_page_lens: ``[B]`` int32, tokens in the last page. max_seqlen_q: the most
        queries of a sequence. sm_scale: None is ``576 ** -0.5``. logit_cap: above 0, scores s become
        ``logit_cap * tanh(s / logit_cap)``. q_scale, kv_scale: ``[1]`` float32 dequantisation scales of FP8 tensors.

    Returns:
        ``[T, H, value_dim]`` of the dtype of q, bfloat16 if that is FP8.

    AITER: ``aiter.mla.mla_decode_fwd`` (v0.1.10.post2 on); heads of 576 and 512, no cap.
    """
    return _OPS.mla_decode_fwd(
        q,
        kv_buffer,
        qo_indptr,
        kv_indptr,
        kv_indices,
        kv_last_page_lens,
        max_seqlen_q,
        value_dim,
        sm_scale,
        logit_cap,
        q_scale,
        kv_scale,
        provider,
    )
