"""Whether all processes of a distributed job compile alike, as they must before a fused collective is put in.

A process that calls a fused collective waits for the others; if one of them has the original one instead, all hang.
What a graph becomes follows from the graph, the options and the versions, so these are what is compared: through the
store of ``torch.distributed``, which needs no GPU and no collective, once for each set of options.

Every process writes what it compiles with when it begins to compile, whether or not it wants fused collectives. The
first to have compared all of them, or to have waited for too long, writes the verdict, and that one holds for all.
"""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

# How long a process waits for the others to begin compiling: they may be compiling something else, or loading weights.
PATIENCE = timedelta(minutes=10)

Facts = Mapping[str, str]


@dataclass
class _Exchange:
    """What was exchanged through one store; rounds are numbered alike on all processes."""

    store: Any
    rank: int
    size: int
    rounds: list[str] = field(default_factory=list)  # the facts of this process
    verdicts: dict[int, str | None] = field(default_factory=dict)
    hosts: list[str] = field(default_factory=list)  # by rank, once known
    attempts: Counter[str] = field(default_factory=Counter)  # at each thing that only some ranks do together


_exchange: _Exchange | None = None


def _current() -> _Exchange | None:
    """The exchange of the default group; None for a process on its own."""
    global _exchange
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return None
    if dist.get_world_size() == 1 or dist.get_backend() == "fake":  # PyTorch's fake group is one process
        return None
    store = dist.distributed_c10d._get_default_store()
    if _exchange is None or _exchange.store is not store:
        _exchange = _Exchange(store, dist.get_rank(), dist.get_world_size())
    return _exchange


def publish(facts: Facts) -> None:
    """Tell the other processes what this one compiles with; does not wait."""
    exchange = _current()
    if exchange is not None:
        _round(exchange, facts)


def _round(exchange: _Exchange, facts: Facts) -> int:
    mine = json.dumps(facts, sort_keys=True)
    if mine not in exchange.rounds:
        told = json.dumps({"facts": dict(facts), "host": _host()})
        exchange.store.set(f"aiter_fusion/{len(exchange.rounds)}/{exchange.rank}", told)
        exchange.rounds.append(mine)
    return exchange.rounds.index(mine)


def _host() -> str:
    """The machine, as far as a process can tell: two containers on one count as two."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def why_unlike(facts: Facts) -> str | None:
    """Why the processes of the default group do not all compile with these facts, or None if they do.

    The same on every process that asks. Waits for the others to ``publish``, at most ``PATIENCE``.
    """
    exchange = _current()
    if exchange is None:
        return None
    number = _round(exchange, facts)
    if number not in exchange.verdicts:
        exchange.verdicts[number] = _settled(exchange, str(number), range(exchange.size), _difference)
    return exchange.verdicts[number]


def _difference(exchange: _Exchange, told: Mapping[int, str]) -> str | None:
    processes = {rank: json.loads(text) for rank, text in told.items()}
    exchange.hosts = [process["host"] for process in processes.values()]
    first = processes[0]["facts"]
    for rank, process in processes.items():
        for name in first:
            if process["facts"].get(name) != first[name]:
                return f"{name} is {first[name]} on rank 0 and {process['facts'].get(name)} on rank {rank}"
    return None


def _settled(
    exchange: _Exchange,
    what: str,
    ranks: Sequence[int],
    judge: Callable[[_Exchange, Mapping[int, str]], str | None],
) -> str | None:
    """What ``judge`` finds wrong with what the ranks have told about ``what``, or None: whoever is first says it."""
    told: dict[int, str] = {}
    wrong = None
    for rank in ranks:
        key = f"aiter_fusion/{what}/{rank}"
        try:
            exchange.store.wait([key], PATIENCE)
        except RuntimeError:  # each store has another error for it
            wrong = f"rank {rank} has not come that far in the {PATIENCE.total_seconds():.0f} s that were waited"
            break
        told[rank] = exchange.store.get(key).decode()
    else:
        wrong = judge(exchange, told)
    verdict = exchange.store.compare_set(f"aiter_fusion/{what}/verdict", "", wrong or "well").decode()
    return None if verdict == "well" else verdict


def joint(what: str, ranks: Sequence[int], problem: str | None) -> str | None:
    """Why something that all of these ranks have tried did not succeed on one of them, or None; the same on all.

    ``what`` names the attempt; these ranks make as many of that name. ``problem`` is this rank's own, or None.
    """
    exchange = _current()
    if exchange is None:
        return problem
    what = f"{what}/{'-'.join(map(str, ranks))}"
    exchange.attempts[what] += 1
    what = f"{what}/{exchange.attempts[what]}"
    exchange.store.set(f"aiter_fusion/{what}/{exchange.rank}", problem or "")

    def first_problem(exchange: _Exchange, told: Mapping[int, str]) -> str | None:
        return next((f"rank {rank}: {text}" for rank, text in told.items() if text), None)

    return _settled(exchange, what, ranks, first_problem)


def on_one_host(ranks: Sequence[int]) -> bool:
    """Whether these ranks of the default group are on one machine, as compared by the last ``why_unlike``."""
    exchange = _current()
    return exchange is None or (bool(exchange.hosts) and len({exchange.hosts[rank] for rank in ranks}) == 1)
