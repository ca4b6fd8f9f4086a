"""One call of every fused op, by every provider that can compute it here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..providers.collective import WORLDS
from .calls import AGREES, FAILED, Case, Outcome, attempt, choose, through_the_backend, triton_target
from .team import Failed, Team

# Where there is no GPU, gloo's processes stand for ranks.
CPU_RANKS = 2


class Row(NamedTuple):
    """A call by a provider. chosen: whether graphs take this one, by the preferences here."""

    case: Case
    provider: str
    chosen: bool
    outcome: Outcome


class Examination(NamedTuple):
    """What was found.

    triton:  what Triton compiles for, or why for nothing; empty where it is not installed.
    backend: what the backend did with a norm and its quantiser.
    ranks:   how many processes tried all-reduces together; 0 if none did.
    rows:    the calls.
    left:    (call, why graphs take nobody for it).
    refused: (call, provider, why that one cannot compute it).
    untried: (call, why nobody tried it).
    seconds: that all this took.
    """

    triton: str
    backend: Outcome
    ranks: int
    rows: tuple[Row, ...]
    left: tuple[tuple[Case, str], ...]
    refused: tuple[tuple[Case, str, str], ...]
    untried: tuple[tuple[Case, str], ...]
    seconds: float

    @property
    def is_well(self) -> bool:
        """Whether all that graphs take here is computed as it should be."""
        outcomes = [self.backend, *(row.outcome for row in self.rows if row.chosen)]
        return all(outcome.status == AGREES for outcome in outcomes)


def examine(cases: Sequence[Case], folder: Path, tell: Callable[[str], None]) -> Examination:
    """Try every call on this machine.

    Args:
        cases: the calls.
        folder: an empty one, for caches and logs.
        tell: called with the name of each call before it is tried, and of the backend, which comes first.
    """
    started = time.perf_counter()
    rows: list[Row] = []
    left: list[tuple[Case, str]] = []
    refused: list[tuple[Case, str, str]] = []

    def one(team: Team, case: Case) -> None:
        tell(str(case))
        try:
            choice = team.ask(choose, case)[0]
        except Failed as failed:
            rows.append(Row(case, "", True, Outcome(FAILED, str(failed))))
            return
        left.extend([(case, choice.reason)] if choice.reason else [])
        refused.extend((case, *pair) for pair in choice.refused)
        for provider in choice.able:
            outcome = _worst(team, attempt, case, provider)
            rows.append(Row(case, provider, provider == choice.provider, outcome))

    alone = Team(1, folder)
    try:
        tell("the backend")
        triton, backend = _triton(alone), _worst(alone, through_the_backend)
        for case in cases:
            if not case.op.is_collective:
                one(alone, case)
    finally:
        alone.close()
    together = [case for case in cases if case.op.is_collective]
    world, why_none = ranks() if together else (0, "")
    team = Team(world, folder)
    try:
        for case in together if world else ():
            one(team, case)
    finally:
        team.close()
    untried = () if world else tuple((case, why_none) for case in together)
    took = time.perf_counter() - started
    return Examination(triton, backend, world, tuple(rows), tuple(left), tuple(refused), untried, took)


def ranks() -> tuple[int, str]:
    """With how many processes an all-reduce is tried, or 0, and why."""
    if not torch.cuda.is_available():
        return CPU_RANKS, ""
    count = torch.cuda.device_count()
    need = ", ".join(map(str, WORLDS))
    return max((n for n in WORLDS if n <= count), default=0), f"its ranks need {need} GPUs, and PyTorch sees {count}"


def _triton(team: Team) -> str:
    try:
        return team.ask(triton_target)[0]
    except Failed as failed:
        return f"none: {failed}"


def _worst(team: Team, function: Callable[..., Outcome], *given: object) -> Outcome:
    """What the first member of the team found that did not find agreement, or else the first."""
    try:
        found: list[Outcome] = team.ask(function, *given)
    except Failed as failed:
        return Outcome(FAILED, str(failed))
    for rank, outcome in enumerate(found):
        if outcome.status != AGREES:
            return outcome._replace(said=f"rank {rank}: {outcome.said}") if team.world > 1 else outcome
    return found[0]
