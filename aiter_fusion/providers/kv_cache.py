"""Caches of keys and values in blocks: their layouts, which tell themselves apart by nothing but their shapes.

A cache holds blocks of ``block`` tokens, and a table says which blocks a sequence has. With ``x = 16 / element size``:

``nhd``       both ``[blocks, block, Hk, D]``.
``shuffled``  keys ``[blocks, Hk, D / x, block, x]``, values ``[blocks, Hk, block / x, D, x]``, as AITER's fastest
              kernels read them (AITER calls this ``asm_layout``).

Both have as many bytes, so AITER reads one as the other without a word. Here every op is told the layout, and checks
that the tensors can have it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import config

NHD, SHUFFLED = "nhd", "shuffled"
LAYOUTS = (NHD, SHUFFLED)


def preferred_kv_layout() -> str:
    """The layout in which the environment prefers caches: ``shuffled`` if ``AITER_FUSION_SHUFFLE_KV_CACHE`` is on, else
    ``nhd``. It depends on no other preference."""
    return SHUFFLED if config.preference("SHUFFLE_KV_CACHE") else NHD


def kv_cache(
    blocks: int,
    block: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    layout: str | None = None,
) -> tuple[Tensor, Tensor]:
    """An empty cache, of zeros: keys and values.

    Args:
        blocks: how many blocks of tokens.
        block: tokens in a block.
        kv_heads: heads of keys and of values.
        dim: elements of a head.
        dtype: of the elements.
        device: where it is to be.
        layout: ``nhd`` or ``shuffled``; None is ``preferred_kv_layout()``.

    Raises:
        ValueError: there is no such layout, or none of these sizes.
    """
    layout = layout or preferred_kv_layout()
    key = torch.zeros(blocks, block, kv_heads, dim, dtype=dtype, device=device)
    if layout == NHD:
        return key, torch.zeros_like(key)
    if layout != SHUFFLED:
        raise ValueError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
    return shuffled_kv_cache(key, key)


def pack(dtype: torch.dtype) -> int:
    """Elements of 16 bytes, the innermost size of a shuffled cache."""
    return 16 // dtype.itemsize


def shuffled_kv_cache(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """A shuffled cache of the same tokens as one in layout ``nhd``.

    Raises:
        ValueError: the head or the block cannot be divided into packs of 16 bytes.
    """
    blocks, block, heads, dim = key.shape
    x = pack(key.dtype)
    if dim % x or block % x or value.dtype != key.dtype:
        raise ValueError(
            f"a cache of {key.dtype} and {value.dtype} with heads of {dim} and blocks of {block} has no shuffled form: "
            f"keys and values of one dtype, heads and blocks in multiples of {x}"
        )
    keys = key.view(blocks, block, heads, dim // x, x).permute(0, 2, 3, 1, 4)
    values = value.view(blocks, block // x, x, heads, value.shape[-1]).permute(0, 3, 1, 4, 2)
    return keys.clone(memory_format=torch.contiguous_format), values.clone(memory_format=torch.contiguous_format)


def unshuffled_kv_cache(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """A cache in layout ``nhd`` of the same tokens as a shuffled one."""
    keys, values = rows_of_keys(key).flatten(-2), rows_of_values(value).flatten(1, 2)
    return keys.contiguous(), values.contiguous()


def rows_of_keys(key: Tensor) -> Tensor:
    """Shuffled keys as ``[blocks, block, Hk, D / x, x]``, a view."""
    return key.permute(0, 3, 1, 2, 4)


def rows_of_values(value: Tensor) -> Tensor:
    """Shuffled values as ``[blocks, block / x, x, Hk, D]``, a view."""
    return value.permute(0, 2, 4, 1, 3)


def why_not_of_layout(key: Tensor, value: Tensor, layout: str) -> str | None:
    """Why tensors cannot be a cache in a layout, as far as shapes tell, or None."""
    rank = 4 if layout == NHD else 5
    for name, tensor in (("key_cache", key), ("value_cache", value)):
        if tensor.dim() != rank:
            return f"{name} is {list(tensor.shape)}, and in layout {layout} a cache has {rank} dimensions"
        if tensor.dtype != key.dtype:
            return f"key_cache is {key.dtype}, value_cache {value.dtype}, but both must have one dtype"
    if layout == NHD:
        same = key.shape[:3] == value.shape[:3]
    else:
        x = pack(key.dtype)
        blocks, heads, _, block, innermost = key.shape
        if innermost != x or value.shape[-1] != x:
            found = f"{innermost} and {value.shape[-1]}"
            return f"the innermost sizes of the cache are {found}, and those of a shuffled one of {key.dtype} are {x}"
        same = value.shape[:3] == (blocks, heads, block // x)
    if not same:
        return f"key_cache {list(key.shape)} and value_cache {list(value.shape)} are not one cache in layout {layout}"
    return None


def check_layout(key: Tensor, value: Tensor, layout: str, dim: int) -> None:
    """Check that tensors can be a cache in a layout, with keys of ``dim`` elements.

    Raises:
        ValueError: they cannot.
    """
    why = why_not_of_layout(key, value, layout)
    if why is None and (found := sizes(key, layout).dim) != dim:
        why = f"the cache has keys of {found} elements, and this call of {dim}"
    if why is not None:
        raise ValueError(why)


class Sizes(NamedTuple):
    """Blocks, tokens of a block, heads, and elements of a head of a cache of keys."""

    blocks: int
    block: int
    heads: int
    dim: int


def sizes(key: Tensor, layout: str) -> Sizes:
    """The sizes of a cache of keys."""
    if layout == NHD:
        return Sizes(*key.shape)
    blocks, heads, packs, block, x = key.shape
    return Sizes(blocks, block, heads, packs * x)
