"""Calls of ``decode_attention``: what the kernels take, where they were measured, and calls without Inductor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ....domains import FLAG, Number, Sizes, Tensors
from ....op import FusedOp
from ...terms import Terms
from .. import launcher
from ..gpu import gpu_of
from . import launches, rules

FAMILY = "decode_attention"
HALVES = (torch.bfloat16, torch.float16)
TERMS = Terms(
    {
        **dict.fromkeys("qkv", Tensors(HALVES)),
        "mask": Tensors((torch.bool, torch.float32, *HALVES), optional=True),
        "position": Tensors((torch.int64, torch.int32), optional=True, elements=1),
        "scale": Number(),
        "window": Number(),
        "softcap": Number(),
        "by_tokens": FLAG,
    },
    hidden=Sizes(rules.LEAST_SIZE, rules.MOST_SIZE, multiple=rules.SIZES),
)
# Offsets within a block of keys are computed in 32 bits.
MOST_STRIDE = (1 << 31) // 512


def is_known(arguments: Mapping[str, Any]) -> bool:
    """Whether all sizes are known; else every call chooses its launches."""
    given = [arguments[name] for name in ("q", "k", "v", "mask") if arguments[name] is not None]
    return all(isinstance(n, int) for tensor in given for n in (*tensor.shape, *tensor.stride()))


def refuse(arguments: Mapping[str, Any]) -> str | None:
    """Why the kernels cannot compute a call that their terms allow (tensors may be fakes), or None."""
    q, k, v, mask = (arguments[name] for name in ("q", "k", "v", "mask"))
    if q.device.type != "cuda":
        return f"the tensors are on {q.device.type}, and its kernels are for GPUs"
    for name, tensor in arguments.items():
        if isinstance(tensor, Tensor) and tensor.device != q.device:
            return f"{name} is on {tensor.device}, q on {q.device}"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, and its kernels need one dtype"
    heads, key_heads = q.shape[1], k.shape[1]
    if not isinstance(heads, int) or not isinstance(key_heads, int):
        return "the number of heads is known only at run time"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not statically_known_true(tensor.stride(3) == 1):
            return f"elements of {name} are {tensor.stride(3)} apart, and its kernels need 1"
    for name, tensor in (("k", k), ("v", v)):
        apart = tensor.stride(2)
        if isinstance(apart, int) and not 0 <= apart < MOST_STRIDE:
            return f"keys of {name} are {apart} elements apart, and its kernels allow less than {MOST_STRIDE}"
    for name, tensor in (("q", q), ("k", k)):
        for dim, what in enumerate(("sequences", "heads", "tokens")):
            if isinstance(tensor.shape[dim], int) and tensor.shape[dim] == 0:
                return f"{name} has no {what}, and its kernels need one"
    if arguments["window"] and arguments["position"] is None:
        return "a window without a position: nothing says which keys are in it"
    if mask is not None and mask.dim() != 4:
        return f"the mask has {mask.dim()} dimensions, and its kernels need 4"
    return None


def unmeasured(arguments: Mapping[str, Any]) -> str | None:
    """Why nothing is known about the speed of a call on its GPU, or None."""
    name = torch.cuda.get_device_name(arguments["q"].device.index or 0)
    if name in rules.MEASURED:
        return None
    return f"attention over a cache was not measured on {name}: name the provider to use it there"


def slower(arguments: Mapping[str, Any]) -> str | None:
    """None: wherever it was measured, the graph's own code takes at least 2.9 % longer (8 sequences over 4096 keys, as
    many heads of keys as of queries), and mostly 2 to 20 times as long."""
    return None


def of(arguments: Mapping[str, Any]) -> launches.Launches:
    """The launches of a call, on its GPU."""
    return launches.of(arguments, gpu_of(arguments["q"].device.index or 0))


def has_site(arguments: Mapping[str, Any]) -> bool:
    """Every call finds its launches by all that they depend on, so it does not matter what is symbolic."""
    return True


def site(op: FusedOp) -> Callable[..., Any]:
    """The op without the dispatcher."""

    def call(*values: Any) -> Any:  # the last is the provider
        return op.pack(run(op, **dict(zip(op.arguments, values, strict=False))))

    return call


def run(op: FusedOp, **arguments: Any) -> dict[str, Tensor]:
    """Compute a call by the kernels.

    Raises:
        RuntimeError: a kernel would be compiled while a CUDA graph is captured.
    """
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    pointers = [tensor.data_ptr() for tensor in tensors.values()]
    key = (
        *((name, t.dtype, t.shape, t.stride()) for name, t in tensors.items()),
        launcher.alignment(pointers),
        arguments["q"].device,
        *(arguments[name] for name in ("scale", "window", "softcap", "by_tokens")),
    )
    prepared = _prepared.get(key)
    if prepared is None:
        if len(_prepared) >= MOST_PREPARED:
            _prepared.clear()
        prepared = _prepared[key] = launcher.prepare(op, arguments, of(arguments), list(tensors))
    return prepared(pointers)


# The launchers of calls by what they depend on. A cache that grows has another key for every token.
MOST_PREPARED = 4096
_prepared: dict[tuple[Any, ...], launcher.Launcher] = {}
