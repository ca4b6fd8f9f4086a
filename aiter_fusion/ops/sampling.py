"""Choosing the next token from logits, as far as the result follows from the arguments.

AITER's samplers that draw random numbers themselves (``top_k_top_p_sampling_from_probs``,
``top_p_sampling_from_probs``, ``random_sample``) are left out: an op whose result depends on a hidden generator cannot
be compared, replayed from a CUDA graph or compiled. ``mixed_sample`` takes the random numbers as a tensor, drawn by
PyTorch's generator: the same one gives the same tokens, whoever computes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .bridge import bridge_op

__all__ = ["greedy_sample", "mixed_sample", "top_k_renorm_probs"]

F32 = torch.float32
# The kernel's smallest temperature.
COLDEST = 1e-5


def _logits() -> Iterator[Tensor]:
    for seed, (rows, vocabulary, dtype) in enumerate(
        ((5, 100, torch.bfloat16), (1, 4099, torch.float16), (0, 64, F32), (3, 513, F32))
    ):
        yield torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)).to(dtype) * 3


def _mixed_samples() -> Iterator[dict[str, Any]]:
    for seed, logits in enumerate(_logits()):
        generator = torch.Generator().manual_seed(seed)
        temperatures = torch.rand(len(logits), generator=generator) + 0.3
        temperatures[::2] = 0
        exponentials = torch.empty(logits.shape).exponential_(generator=generator)
        yield {"logits": logits, "temperatures": temperatures, "exponentials": exponentials, "eps": 1e-10}


def _renorm_samples() -> Iterator[dict[str, Any]]:
    for logits in _logits():
        yield {"probs": logits.to(F32).softmax(-1), "topk": 7}


@bridge_op(
    "tokens",
    shape=lambda logits: {"tokens": ([logits.shape[0]], torch.int32)},
    samples=lambda: ({"logits": logits} for logits in _logits()),
)
def greedy_sample(logits: Tensor, *, provider: str = "auto") -> Tensor:
    """``argmax(logits, -1)``.

    Args:
        logits: ``[M, V]`` bfloat16, float16 or float32, contiguous for AITER.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[M]`` int32; of equal logits any.

    AITER: ``aiter.greedy_sample`` (v0.1.5.post4 on).
    """
    return logits.to(F32).argmax(-1).to(torch.int32)


@bridge_op(
    "tokens",
    shape=lambda logits, **_: {"tokens": ([logits.shape[0]], torch.int32)},
    samples=_mixed_samples,
)
def mixed_sample(
    logits: Tensor, temperatures: Tensor, exponentials: Tensor, eps: float = 1e-10, *, provider: str = "auto"
) -> Tensor:
    """``argmax(softmax(logits / temperature) / (exponentials + eps))``; ``argmax(logits)`` where a temperature is 0.

    With ``exponentials = torch.empty(M, V).exponential_(generator=generator)`` a token is drawn with its probability
    (the Gumbel-max trick), by the generator of the caller.

    Args:
        logits: ``[M, V]`` bfloat16, float16 or float32.
        temperatures: ``[M]`` float32; below 1e-5 and above 0 they count as 1e-5.
        exponentials: ``[M, V]`` float32, numbers of the exponential distribution of rate 1.
        eps: added to the exponentials.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[M]`` int32.

    AITER: ``aiter.mixed_sample_outer_exponential`` (v0.1.8 on).
    """
    values = logits.to(F32)
    shares = (values / temperatures.clamp_min(COLDEST)[:, None]).softmax(-1) / (exponentials + eps)
    return torch.where(temperatures == 0, values.argmax(-1), shares.argmax(-1)).to(torch.int32)


@bridge_op("y", shape=lambda probs, **_: {"y": (probs.shape, F32)}, samples=_renorm_samples)
def top_k_renorm_probs(probs: Tensor, topk: int, *, provider: str = "auto") -> Tensor:
    """Probabilities below the ``topk``-th largest of their row set to 0, the others divided by their sum.

    Args:
        probs: ``[M, V]`` float32.
        topk: how many probabilities of a row stay; equal ones at the limit all stay.
        provider: see ``aiter_fusion.bridge``.

    Returns:
        ``[M, V]`` float32, contiguous.

    AITER: ``aiter.ops.sampling.top_k_renorm_probs`` (v0.1.5 on).
    """
    least = probs.topk(min(topk, probs.shape[1]), -1).values[:, -1:]
    kept = torch.where(probs >= least, probs, 0.0)
    return kept / kept.sum(-1, keepdim=True)
