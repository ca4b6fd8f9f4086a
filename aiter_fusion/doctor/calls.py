"""One call of a fused op: who computes it here, and whether what it gives is as the reference's.

What has to run on the GPU runs in a process of a ``Team``, which looks these functions up by name.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import agreement, config, ops  # noqa: F401  (importing ops registers them)
from ..backend import Backend, reports
from ..formats import FP8, format_of
from ..op import FusedOp
from ..passes.sites import Refused, check_wanted, provider_for
from ..passes.verify import difference, differing_codes, same_bits
from ..patterns import fusions  # noqa: F401  (importing it registers the families)
from ..providers import PROVIDERS
from ..providers.triton.jit import native_fp8, target
from ..registry import REGISTRY
from ..report import merge
from ..stage import Setting

ROWS, HIDDEN = 8, 4096
# Of scales: the ops that compute any take turns.
GRANULARITIES = ("token", "group128", "tensor")

AGREES, DIFFERS, FAILED = "agrees", "differs", "failed"


class Case(NamedTuple):
    """A call: the op by family and features, and the granularity of its scales, if it computes any."""

    family: str
    features: tuple[str, ...]
    granularity: str = ""

    @property
    def op(self) -> FusedOp:
        """The op that is called."""
        return REGISTRY.ops[self.family, frozenset(self.features)]

    @property
    def variant(self) -> str:
        """As reports name it, e.g. ``add+group128+value``."""
        stages = self.op.stages
        returned = dict.fromkeys(stage.returns for stage in reversed(stages) if stage.returns in self.features)
        return "+".join(filter(None, [*(stage.feature for stage in stages), self.granularity, *returned]))

    def __str__(self) -> str:
        return f"{self.family} {self.variant}".strip()


class Choice(NamedTuple):
    """Who computes a call here.

    provider: whom a graph takes, by the preferences of this process; empty: nobody.
    reason:   why nobody, as in a report.
    able:     all who can compute it.
    refused:  (provider, reason) of all others that can run here.
    """

    provider: str
    reason: str
    able: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]


class Outcome(NamedTuple):
    """What a call gave.

    status:  one of ``AGREES``, ``DIFFERS``, ``FAILED``.
    said:    how near the reference it is, or what went wrong.
    seconds: until the first result was there, compilation included; None if it never was.
    """

    status: str
    said: str
    seconds: float | None = None


def cases(only: str = "") -> list[Case]:
    """A call of every op whose ``<op> <variant>`` contains ``only``.

    Raises:
        ValueError: there is none.
    """
    turns = cycle(GRANULARITIES)
    every = [
        Case(op.family, tuple(sorted(op.features)), _granularity(op, turns))
        for op in REGISTRY.ops.values()
        if op.typical is not None
    ]
    found = [case for case in every if only in str(case)]
    if not found:
        known = ", ".join(dict.fromkeys(case.family for case in every))
        raise ValueError(f"--only {only!r}: no call's name contains that; there are calls of {known}")
    return found


def _granularity(op: FusedOp, turns: Iterator[str]) -> str:
    if "block" not in op.arguments:
        return ""
    # a bound is on the largest value of a row
    return "token" if any(feature.startswith("bounded") for feature in op.features) else next(turns)


def arguments(case: Case) -> dict[str, Any]:
    """The call's arguments, on this process's device; the same in all processes, but for what they sum."""
    typical = case.op.typical
    assert typical is not None
    gpu = torch.cuda.is_available()
    fp8 = native_fp8(torch.cuda.current_device()) if gpu else None
    setting = Setting(ROWS, HIDDEN, _device(), case.granularity or "tensor", format_of(fp8 or FP8[0]))
    torch.manual_seed(0)
    given = typical(setting)
    for name in case.op.order_free:
        if isinstance(summed := given[name], Tensor):
            # whole numbers, of which bfloat16 has all up to 256: the sums of 8 ranks are exact in any order
            given[name] = (4 * summed.roll(torch.distributed.get_rank(), -1)).round().clamp(-16, 16)
    return given


def choose(case: Case) -> Choice:
    """Who computes a call here."""
    op, options = case.op, config.options()
    if op.is_collective:
        agreement.why_unlike({})  # it tells the ranks of a group that they are on one host
    given = arguments(case)
    objections = {
        provider.name: provider.why_not(op, given)
        for provider in PROVIDERS.values()
        # on a GPU the reference is what others are compared with
        if provider.missing() is None and (provider.name != "reference" or _device() == "cpu")
    }
    chosen, reasons = "", []
    for fusion in REGISTRY.fusions.values():
        if fusion.op == op.family and not chosen:
            try:
                check_wanted(fusion, op, (), op.features, options, training=False)
                chosen = provider_for(op, given, options, fusion).name
            except Refused as refused:
                reasons.append(str(refused.refusal))
    reason = "" if chosen else "; ".join(dict.fromkeys(reasons))
    able = tuple(name for name, why in objections.items() if why is None)
    return Choice(chosen, reason, able, tuple((name, why) for name, why in objections.items() if why is not None))


def attempt(case: Case, provider: str) -> Outcome:
    """Compile the call as graphs have it, and compare what it returns with the reference."""
    op, given = case.op, arguments(case)
    want = op.returned(op.reference(**given))
    PROVIDERS[provider].prepare()

    def call(values: list[Any]) -> Any:
        return op.target(*values, provider)

    result, seconds = _first(torch.compile(call, dynamic=False, fullgraph=True), list(given.values()))
    return _compared(op, provider, want, result, seconds)


def through_the_backend() -> Outcome:
    """Compile a norm and its quantiser, in plain PyTorch, by this package's backend with the preferences here."""
    op, given = REGISTRY.ops["rms_norm_quant", frozenset()], arguments(Case("rms_norm_quant", (), "token"))
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}

    def plain(tensors: dict[str, Tensor]) -> Any:
        return op.pack(op.reference(**{**given, **tensors}))

    result, seconds = _first(torch.compile(plain, backend=Backend()), tensors)
    report = merge(reports())
    said = "; ".join([str(report).splitlines()[0], *(site.reason for site in report.sites if site.reason)])
    provider = next((site.provider for site in report.sites if site.provider), None)
    if provider is None:  # Inductor's own code drops roundings
        return Outcome(AGREES, said, seconds)
    outcome = _compared(op, provider, op.returned(op.reference(**given)), result, seconds)
    return outcome._replace(said=said) if outcome.status == AGREES else outcome


def triton_target() -> str:
    """What Triton compiles for here; empty where the provider ``triton`` is missing."""
    return "" if PROVIDERS["triton"].missing() is not None else target()


def nearness(want: Mapping[str, Tensor], have: Mapping[str, Tensor]) -> str:
    """How near outputs are to the reference's, in words."""
    said = []
    for name, a in want.items():
        b = have[name]
        if same_bits(a, b):
            continue
        if name == "q":
            count = int((a.view(torch.uint8) != b.view(torch.uint8)).sum())
            said.append(f"{count} of {a.numel()} codes differ, by {differing_codes(a, b)}")
        else:
            said.append(f"{name} is {float((a.double() - b.double()).norm() / a.double().norm()):.0e} apart")
    return "; ".join(said) or "same bits"


def _compared(op: FusedOp, provider: str, want: Mapping[str, Tensor], result: Any, seconds: float) -> Outcome:
    have = dict(zip(want, [result] if isinstance(result, Tensor) else result, strict=True))
    for name in want:
        problem = difference(op, PROVIDERS[provider], name, want[name], have[name])
        if problem is not None:
            return Outcome(DIFFERS, f"{name}: {problem}", seconds)
    return Outcome(AGREES, nearness(want, have), seconds)


def _first(compiled: Any, *given: Any) -> tuple[Any, float]:
    """What the first call of a compiled function returns, and the seconds that it takes."""
    torch._dynamo.reset()
    started = time.perf_counter()
    with torch.no_grad():
        result = compiled(*given)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
