"""Which of AITER's functions takes a call: limits as data, asked in order of preference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from packaging.version import Version

from ...domains import (
    ANYTHING,
    FLAG,
    GROUP,
    TENSOR,
    TOKEN,
    Activations,
    Blocks,
    Domain,
    Number,
    OneOf,
    Sizes,
    Steps,
    Tensors,
)
from ...formats import DTYPES
from ...op import FusedOp
from ..terms import Terms
from . import quantiser, releases
from .entry_points import EntryPoint, probe
from .kernel_call import HALVES, KernelCall, describe, why_zeros

FLOATS = (*HALVES, torch.float32)

# (longest row, elements that a thread of AITER's HIP kernels takes of it). A group must be a whole number of threads,
# and that number a power of two. The activation with a quantiser does not check this, and is silently wrong.
THREADS = ((2048, 8), (4096, 16), (6144, 24), (8192, 32))
WAVE = 64


@dataclass(frozen=True)
class Limits:
    """The calls that a function takes.

    scales:  granularities: ``token``, ``group``, ``static``, or ``none`` where nothing is quantised.
    needs:   features that a call must have: ``add``, ``offset``, ``value``.
    may:     features that it may have besides: ``add``, ``value``.
    widest:  the largest hidden size.
    dense:   whether rows must follow each other without gaps, in whole packs of 8 elements.
    by_wave: whether groups are divided among threads as ``THREADS`` says.
    alike:   whether the weight must have the dtype of x: the kernel reinterprets its bytes without a check.
    powers:  granularities for which the elements that share a scale must be a power of two.
    acts:    our name of an activation -> AITER's.
    bytes:   the first release that writes scales of groups as bytes, their exponents; None: none does.
    """

    scales: frozenset[str]
    needs: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    widest: int = 8192
    dense: bool = False
    by_wave: bool = False
    alike: bool = False
    powers: frozenset[str] = frozenset()
    acts: Mapping[str, str] | None = None
    bytes: str | None = None


@dataclass(frozen=True)
class Candidate:
    """A function that computes calls of a fused op, within its limits."""

    family: str
    entry: EntryPoint
    limits: Limits

    def is_for(self, call: KernelCall) -> bool:
        """Whether it computes such calls at all: their granularity, inputs and outputs."""
        needs = self.limits.needs
        return call.scales in self.limits.scales and needs <= call.features <= needs | self.limits.may

    def why_not(self, call: KernelCall) -> str | None:
        """Why the function, which is for such calls, cannot take one, as the end of a sentence that begins with its
        name; or None."""
        limits = self.limits
        if self.entry.homes == ("aiter",) and (why := why_zeros(call)) is not None:
            return why
        if call.width > limits.widest:
            return f"takes hidden sizes up to {limits.widest}, not {call.width}"
        if call.format == "mxfp8" and (why := _why_no_bytes(limits.bytes)) is not None:
            return why
        if limits.acts is not None and call["act"] not in limits.acts:
            return f"has no activation {call['act']}"
        if limits.dense and call.gaps:
            return f"needs rows without gaps, and {', '.join(call.gaps)} has gaps"
        if limits.dense and call.width % 8:
            return f"loads 8 elements at once, and the hidden size is {call.width}"
        if limits.alike and call["weight"].dtype != call.x.dtype:
            return f"needs a weight of {call.x.dtype}, like x, and the weight is {call['weight'].dtype}"
        if limits.by_wave and call.scales == "group" and (why := _why_no_threads(call)) is not None:
            return why
        if call.scales in limits.powers and call.block & (call.block - 1):
            return f"takes groups of a power of two of elements, not of {call.block}"
        return None


def _why_no_bytes(since: str | None) -> str | None:
    if since is None:
        return "writes scales in float32, and here they are bytes"
    version = releases.installed()
    if version is not None and version < Version(since):
        return f"writes scales in float32 before {since}, and this is {version}: upgrade AITER"
    return None


def _why_no_threads(call: KernelCall) -> str | None:
    each = next(taken for widest, taken in THREADS if call.width <= widest)
    threads = call.block // each
    if call.block % each or threads & (threads - 1) or threads > WAVE:
        return (
            f"gives each thread {each} elements of a hidden size of {call.width}, and groups of {call.block} are not "
            f"{each} times a power of two up to {WAVE}"
        )
    return None


C = TypeVar("C", bound=Candidate)


def first_of(candidates: Sequence[C], op: FusedOp, arguments: Mapping[str, Any]) -> tuple[C, KernelCall] | str:
    """The first candidate that takes a call and that the installed version has, or why there is none."""
    call = describe(op, arguments)
    if isinstance(call, str):
        return call
    fitting = [candidate for candidate in candidates if candidate.family == op.family and candidate.is_for(call)]
    if not fitting:
        also = f" with {', '.join(sorted(call.features))}" if call.features else ""
        return f"AITER has no kernel for it with a scale per {call.scales}{also}"
    refusals = []
    for candidate in fitting:
        why = candidate.why_not(call)
        if why is None and isinstance(found := probe(candidate.entry), str):
            why = found
        if why is None:
            return candidate, call
        refusals.append(f"{candidate.entry.name} {why}")
    return "; ".join(refusals)


def terms(candidates: Sequence[Candidate], op: FusedOp) -> Terms | None:
    """The calls of an op that at least one of the candidates might take, or None if none is for the op."""
    limits = [candidate.limits for candidate in candidates if candidate.family == op.family]
    if not limits:
        return None
    scales = frozenset().union(*(limit.scales for limit in limits))
    features = frozenset({"packed"}).union(scales & {"static"}, *(limit.needs | limit.may for limit in limits))
    acts = dict.fromkeys((act for limit in limits for act in limit.acts or ()), ())
    arguments: dict[str, Domain] = {
        **dict.fromkeys(("x", "residual", "gate", "up", "gate_up"), Tensors(HALVES)),
        **dict.fromkeys(("dtype", "residual_dtype"), OneOf(HALVES)),
        **dict.fromkeys(("cast_first", "gate_first", "interleaved", "column_major"), FLAG),
        **dict.fromkeys(("other", "group"), ANYTHING),  # ``all_reduce.refuse`` looks at them
        "weight": Tensors(FLOATS),
        "sum_dtype": OneOf(FLOATS),
        "eps": Number(optional=True),  # ``describe`` refuses a tensor in its place, and says why
        "eps_tensor": ANYTHING,
        "offset": OneOf((None, 1.0)),
        "act": Activations(acts),
        "block": Blocks(tuple(name for name in (TENSOR, TOKEN, GROUP) if name in scales)),
        "scale": Tensors((torch.float32,), elements=1),
        "scale_steps": Steps((*quantiser.STEPS, *quantiser.BYTES)),
        "factor_steps": Steps((*quantiser.STEPS, *quantiser.BYTES)),
        "value_steps": Steps((*quantiser.STEPS, "round", *quantiser.COMBINING)),
        "quant_dtype": OneOf(DTYPES),  # ``quantiser`` says why int8 is refused
    }
    return Terms(arguments, features - {"offset"}, Sizes(8, max(limit.widest for limit in limits)))
