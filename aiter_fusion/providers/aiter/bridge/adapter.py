"""An op of the bridge as a call of AITER's: a table of keywords, conditions, and what is returned."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
# (arguments, the GPU's FP8 format, if it has one) -> the conditions that a call must meet
Conditions = Callable[[Arguments, torch.dtype | None], Iterator[Condition]]


class Optional(NamedTuple):
    """A keyword that is passed in some calls.

    argument: of the op, which decides.
    value:    of the keyword.
    said:     the values of the argument with which it is passed; None: all but None and 0.
    """

    argument: str
    value: Value
    said: tuple[Any, ...] | None = None

    def is_said(self, arguments: Arguments) -> bool:
        """Whether a call needs the keyword."""
        given = arguments[self.argument]
        if isinstance(given, Tensor):
            return True
        return given not in (None, 0) if self.said is None else given in self.said


def optional(argument: str, value: Value | None = None) -> Optional:
    """A keyword whose value is an argument, or made of it; not passed where that is None or 0."""
    return Optional(argument, argument if value is None else value)


@dataclass(frozen=True, eq=False)  # hashed by identity: its tables have no hash
class Adapter:
    """How AITER computes an op of the bridge.

    entry:      its function. ``takes`` has a value for each keyword: the name of an argument or an output of the op, or
                a function of all of these by name.
    conditions: those that a call must meet.
    returns:    the output that the function returns, or a function (what it returned, outputs) -> outputs by name. By
                default it writes to outputs that it was given.
    compute:    computes a call instead of ``entry``, where that takes more than one call.
    others:     functions that ``compute`` calls besides.
    optional:   further keywords of ``entry``, which not all releases have. They are passed, and must bind, in calls
                that say something by them.
    """

    entry: EntryPoint
    conditions: Conditions
    returns: str | Callable[[Any, Outputs], Outputs] = lambda returned, outputs: outputs
    compute: Callable[[Arguments], Outputs] | None = None
    others: tuple[EntryPoint, ...] = ()
    optional: Mapping[str, Optional] = field(default_factory=dict)

    def entry_for(self, arguments: Arguments) -> EntryPoint:
        """The function, with the keywords that a call needs."""
        return self.entry_with(frozenset(key for key, optional in self.optional.items() if optional.is_said(arguments)))

    @functools.cache  # noqa: B019 (adapters live as long as the process)
    def entry_with(self, keywords: frozenset[str]) -> EntryPoint:
        """The function, with these of the optional keywords."""
        if not keywords:
            return self.entry
        more = {key: optional.value for key, optional in self.optional.items() if key in keywords}
        return EntryPoint(self.entry.name, self.entry.homes, {**self.entry.takes, **more})

    @property
    def paths(self) -> tuple[Adapter, ...]:
        """Itself, the only function that there is (``Routes`` has several)."""
        return (self,)

    def path(self, arguments: Arguments, native: torch.dtype | None) -> Adapter:
        """What computes a call: itself."""
        return self

    def why_not(self, arguments: Arguments, native: torch.dtype | None) -> str | None:
        """All conditions that a call does not meet, and what the installed version lacks, or None."""
        failed = [message for holds, message in self.conditions(arguments, native) if not holds]
        entries = (self.entry_for(arguments), *self.others)
        failed += [found for entry in entries if isinstance(found := probe(entry), str)]
        return "; ".join(failed) or None

    def run(self, op: FusedOp, arguments: Arguments) -> Outputs:
        """Compute a call that meets all conditions.

        Raises:
            RuntimeError: AITER returned something else than the op's outputs.
        """
        outputs = op.allocate(**arguments)
        first = next(value for value in arguments.values() if isinstance(value, Tensor))
        if any(tensor.numel() == 0 for tensor in (first, *outputs.values())):
            return op.reference(**arguments)  # kernels cannot be launched for nothing
        returned = self._computed(arguments, outputs)
        for name, want in outputs.items():
            have = returned.get(name)
            if have is None or have.shape != want.shape or have.dtype != want.dtype:
                what = "nothing" if have is None else f"{list(have.shape)} of {have.dtype}"
                raise RuntimeError(
                    f"{self.entry} returned {what} as {name}, and {list(want.shape)} of {want.dtype} was expected: "
                    "this version of AITER is not supported"
                )
        return {name: _laid_out(returned[name], want) for name, want in outputs.items()}

    def _computed(self, arguments: Arguments, outputs: Outputs) -> Outputs:
        if self.compute is not None:
            return self.compute(arguments)
        entry = self.entry_for(arguments)
        returned = call(entry, **entry.arguments({**arguments, **outputs}))
        return {self.returns: returned} if isinstance(self.returns, str) else self.returns(returned, outputs)


def _laid_out(have: Tensor, want: Tensor) -> Tensor:
    """A result with the strides that the op promises."""
    return have if have.stride() == want.stride() else want.copy_(have)


@dataclass(frozen=True)
class Routes:
    """Several of AITER's functions that compute an op, each within limits of its own; the first that takes a call
    computes it."""

    paths: tuple[Adapter, ...]

    def path(self, arguments: Arguments, native: torch.dtype | None) -> Adapter:
        """The first that takes a call which one of them takes."""
        return next(path for path in self.paths if path.why_not(arguments, native) is None)

    def why_not(self, arguments: Arguments, native: torch.dtype | None) -> str | None:
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


def formats(native: torch.dtype | None, *others: torch.dtype) -> tuple[torch.dtype, ...]:
    """The formats that a kernel takes: the GPU's FP8, if it has any, and others."""
    return others if native is None else (native, *others)


def one_of(what: str, found: torch.dtype, known: tuple[torch.dtype, ...]) -> Condition:
    """The condition that a dtype is one of those that a kernel takes."""
    return found in known, f"{what} {found}, and the kernel takes {', '.join(map(str, known)) or 'FP8, which it lacks'}"
