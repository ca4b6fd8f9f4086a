"""AITER's kernels as functional PyTorch operators, to be called from a model's own code.

Every function here is one operator ``torch.ops.aiter_fusion.<name>``: it writes to none of its arguments, has a fake
and a reference in plain PyTorch, and can be compiled. ``provider`` chooses who computes it:

``auto``       the first that can and is wanted, at every call: AITER where it can run, is wanted
               (``AITER_FUSION_LINEAR`` and so on) and takes the call, PyTorch's own scaled product where it computes
               the same, else the reference.
``aiter``      AITER, whatever the environment prefers, or a RuntimeError with every condition that the call fails.
``torch``      PyTorch's own scaled product, or a RuntimeError.
``reference``  plain PyTorch, on any device: correct, slow.

Source of contracts: ROCm/aiter up to v0.1.20.post1. ``why_not`` says in advance what a provider objects to.
"""

from __future__ import annotations

from typing import Any

import torch

from .ops.attention_flash import *  # noqa: F403
from .ops.attention_paged import *  # noqa: F403
from .ops.gemm import *  # noqa: F403
from .ops.gemm_narrow import *  # noqa: F403
from .ops.gemm_shuffled import *  # noqa: F403
from .ops.layer_norm import *  # noqa: F403
from .ops.mla import *  # noqa: F403
from .ops.moe import *  # noqa: F403
from .ops.norm import *  # noqa: F403
from .ops.quantisers import *  # noqa: F403
from .ops.rotary import *  # noqa: F403
from .ops.routing import *  # noqa: F403
from .ops.sampling import *  # noqa: F403
from .providers import BRIDGE_PROVIDERS
from .providers import why_not as _why_not
from .providers.kv_cache import kv_cache as kv_cache
from .providers.kv_cache import preferred_kv_layout as preferred_kv_layout
from .providers.kv_cache import shuffled_kv_cache as shuffled_kv_cache
from .providers.kv_cache import unshuffled_kv_cache as unshuffled_kv_cache
from .providers.tiles import shuffled as shuffled
from .providers.tiles import shuffled_scales as shuffled_scales
from .providers.tiles import unshuffled as unshuffled
from .providers.tiles import unshuffled_scales as unshuffled_scales
from .registry import REGISTRY


def why_not(name: str, *, provider: str = "aiter", **arguments: Any) -> str | None:
    """Why a provider cannot compute a call of an operator, every condition that fails, or None if it can.

    Args:
        name: of an operator here, e.g. ``"hipb_mm_fp8"``.
        provider: ``aiter``, ``torch`` or ``reference``.
        arguments: all arguments of the operator, by name; one that is left out counts as None.

    Raises:
        KeyError: there is no such operator or provider.
    """
    op = REGISTRY.bridge[name, frozenset()]
    return _why_not(BRIDGE_PROVIDERS[provider], op, {argument: arguments.get(argument) for argument in op.arguments})


def routes(name: str, **arguments: Any) -> list[tuple[str, str | None]]:
    """AITER's functions for an operator, in the order in which they are asked, each with every condition that a call
    fails, or None if it takes the call. The first that takes it computes it.

    Args:
        name: of an operator here, e.g. ``"paged_attention"``.
        arguments: all arguments of the operator, by name; one that is left out counts as None.

    Raises:
        KeyError: there is no such operator, or AITER has no function for it.
    """
    from .providers.aiter import provider  # not before: only who asks for AITER pays for it

    op = REGISTRY.bridge[name, frozenset()]
    return provider.routes(op, {argument: arguments.get(argument) for argument in op.arguments})


def mla_decode_metadata_size(
    batch: int, max_seqlen_q: int, heads: int, q_dtype: torch.dtype, kv_dtype: torch.dtype
) -> int:
    """The size of ``mla_decode_metadata`` of the current GPU; 0 where AITER cannot run, or has no such metadata.

    Args:
        batch: how many sequences.
        max_seqlen_q: the queries of each.
        heads: query heads.
        q_dtype: of the queries.
        kv_dtype: of the cache.
    """
    if BRIDGE_PROVIDERS["aiter"].missing() is not None:
        return 0
    from .providers.aiter.bridge import mla  # not before: only who asks for AITER pays for it

    return mla.size(mla.Work(batch, max_seqlen_q, heads, q_dtype, kv_dtype))
