"""An op of the bridge as a call of AITER's: a table of keywords, conditions, and what is returned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....op import FusedOp, is_contiguous
from ..entry_points import EntryPoint, Value, call, probe

F32 = torch.float32
HALVES = (torch.bfloat16, torch.float16)

Arguments = Mapping[str, Any]
Outputs = dict[str, Tensor]
# (whether it holds, the message if it does not)
Condition = tuple[bool, str]
# (arguments, the GPU's FP8 format) -> the conditions that a call must meet
Conditions = Callable[[Arguments, torch.dtype], Iterator[Condition]]


@dataclass(frozen=True)
class Adapter:
    """How AITER computes an op of the bridge.

    entry:      its function. ``takes`` has a value for each keyword: the name of an argument or an output of the op, or
                a function of all of these by name.
    conditions: those that a call must meet.
    returns:    the output that the function returns, or a function (what it returned, outputs) -> outputs by name. By
                default it writes to outputs that it was given.
    compute:    computes a call instead of ``entry``, where that takes more than one call.
    others:     functions that ``compute`` calls besides.
    """

    entry: EntryPoint
    conditions: Conditions
    returns: str | Callable[[Any, Outputs], Outputs] = lambda returned, outputs: outputs
    compute: Callable[[Arguments], Outputs] | None = None
    others: tuple[EntryPoint, ...] = ()

    @property
    def paths(self) -> tuple[Adapter, ...]:
        """Itself, the only function that there is (``Routes`` has several)."""
        return (self,)

    def path(self, arguments: Arguments, native: torch.dtype) -> Adapter:
        """What computes a call: itself."""
        return self

    def why_not(self, arguments: Arguments, native: torch.dtype) -> str | None:
        """All conditions that a call does not meet, and what the installed version lacks, or None."""
        failed = [message for holds, message in self.conditions(arguments, native) if not holds]
        failed += [found for entry in (self.entry, *self.others) if isinstance(found := probe(entry), str)]
        return "; ".join(failed) or None

    def run(self, op: FusedOp, arguments: Arguments) -> Outputs:
        """Compute a call that meets all conditions.

        Raises:
            RuntimeError: AITER returned something else than the op's outputs.
        """
        outputs = op.allocate(**arguments)
        first = next(value for value in arguments.values() if isinstance(value, Tensor))
        if any(tensor.numel() == 0 for tensor in (first, *outputs.values())):
            return outputs  # kernels cannot be launched for nothing
        returned = self._computed(arguments, outputs)
        for name, want in outputs.items():
            have = returned.get(name)
            if have is None or have.shape != want.shape or have.dtype != want.dtype:
                what = "nothing" if have is None else f"{list(have.shape)} of {have.dtype}"
                raise RuntimeError(
                    f"{self.entry} returned {what} as {name}, and {list(want.shape)} of {want.dtype} was expected: "
                    "this version of AITER is not supported"
                )
        return {name: returned[name].contiguous() for name in outputs}

    def _computed(self, arguments: Arguments, outputs: Outputs) -> Outputs:
        if self.compute is not None:
            return self.compute(arguments)
        returned = call(self.entry, **self.entry.arguments({**arguments, **outputs}))
        return {self.returns: returned} if isinstance(self.returns, str) else self.returns(returned, outputs)


@dataclass(frozen=True)
class Routes:
    """Several of AITER's functions that compute an op, each within limits of its own; the first that takes a call
    computes it."""

    paths: tuple[Adapter, ...]

    def path(self, arguments: Arguments, native: torch.dtype) -> Adapter:
        """The first that takes a call which one of them takes."""
        return next(path for path in self.paths if path.why_not(arguments, native) is None)

    def why_not(self, arguments: Arguments, native: torch.dtype) -> str | None:
        """What each function objects to, or None if one takes the call."""
        reasons = []
        for path in self.paths:
            why = path.why_not(arguments, native)
            if why is None:
                return None
            reasons.append(f"{path.entry.name}: {why}")
        return "; ".join(reasons)


def entry(path: str, takes: Mapping[str, Value], *before: str) -> EntryPoint:
    """The function at ``module.name``; in older versions in the modules ``before``."""
    home, _, name = path.rpartition(".")
    return EntryPoint(name, (home, *before), takes)


def flat(name: str) -> Value:
    """A tensor as ``[M, H]``, a view."""
    return lambda given: given[name].view(-1, given[name].shape[-1])


def score_scale(name: str) -> Value:
    """The scale of attention's scores, an argument; where it is None ``D ** -0.5``."""
    return lambda given: given["q"].shape[-1] ** -0.5 if given[name] is None else given[name]


def contiguous(name: str, tensor: Tensor) -> Condition:
    """The condition that a tensor is contiguous."""
    return is_contiguous(tensor), f"{name} is not contiguous (strides {tuple(tensor.stride())})"


def of_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> Condition:
    """The condition that a tensor has a dtype."""
    return tensor.dtype == dtype, f"{name} is {tensor.dtype}, not {dtype}"
