"""The journal of this process: its reports, how they travel through Inductor's counters, and the line in the log."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from .report import COUNTER, FusionReport, from_counter, merge, to_counter

logger = logging.getLogger("aiter_fusion")


@dataclass
class _Store:
    reports: list[FusionReport] = field(default_factory=list)
    # what the passes reported in this process: counter name -> one report for each run
    fresh: dict[str, list[FusionReport]] = field(default_factory=dict)
    recording: int = 0  # how many ask for graphs
    advised: set[str] = field(default_factory=set)  # what has been said once


_STORE = _Store()


def reports() -> list[FusionReport]:
    """The reports of this process, one for each compiled graph, oldest first."""
    return list(_STORE.reports)


def reset() -> None:
    """Forget the reports, also those that passes sent where no backend collects them."""
    from torch._dynamo.utils import counters

    begin(counters["inductor"])
    _STORE.reports.clear()
    _STORE.advised.clear()


@contextmanager
def recording(wanted: bool = True) -> Iterator[None]:
    """Within, reports keep their graphs as text, and graphs are compiled anew: from a cache there is nothing to keep.

    Else nothing is kept, since to write a graph down takes time and memory.
    """
    _STORE.recording += wanted
    try:
        yield
    finally:
        _STORE.recording -= wanted


def is_recording() -> bool:
    """Whether somebody asks for graphs."""
    return _STORE.recording > 0


def passed(report: FusionReport, counters: MutableMapping[str, int]) -> None:
    """Called by the pass after a graph: send the report through Inductor's counters, and note that it is fresh."""
    name = to_counter(report)
    counters[name] = counters.get(name, 0) + 1
    _STORE.fresh.setdefault(name, []).append(report)


def begin(counters: MutableMapping[str, int]) -> None:
    """Called before compiling. Forgets what passes reported elsewhere: Inductor can be called without a backend."""
    _STORE.fresh.clear()
    _take(counters)


def collect(counters: MutableMapping[str, int]) -> FusionReport | None:
    """The report of what was compiled since ``begin``: kept, and logged on rank 0. None if no pass ran."""
    found = []
    for name, count in _take(counters):
        fresh = _STORE.fresh.pop(name, [])
        found += [fresh.pop(0) if fresh else from_counter(name) for _ in range(count)]
    if not found:
        return None
    return keep(merge(found))


def keep(report: FusionReport) -> FusionReport:
    """Add a report to those of this process and log it."""
    from torch._logging._internal import trace_structured

    _STORE.reports.append(report)
    log(report)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "aiter_fusion_summary", "encoding": "json"},
        payload_fn=report.to_json,
    )
    return report


def discard(report: FusionReport) -> None:
    """Forget the report of a graph that is compiled anew."""
    _STORE.reports.remove(report)


def _take(counters: MutableMapping[str, int]) -> list[tuple[str, int]]:
    """Take the counters that carry reports out of these; each with how often it grew."""
    return [(name, counters.pop(name)) for name in list(counters) if name.startswith(COUNTER)]


class _Handler(logging.StreamHandler):
    """Standard error, until the program configures logging itself."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            self.stream = sys.stderr
            super().emit(record)


def configure_logging() -> None:
    """Make the summary line visible, unless the program has configured logging; called when first compiling."""
    wanted = os.environ.get("AITER_FUSION_LOG", "").upper()
    if wanted:
        if not isinstance(logging.getLevelName(wanted), int):
            raise ValueError(f"AITER_FUSION_LOG={wanted!r}: use DEBUG, INFO, WARNING or ERROR")
        logger.setLevel(wanted)
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = _Handler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    if not wanted:
        logger.setLevel(logging.INFO)


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def log(report: FusionReport) -> None:
    """One line on rank 0: INFO, or WARNING with the top reasons if there were sites and none was replaced."""
    if _rank() != 0:
        return
    line = f"aiter_fusion: {report.summary()}"
    if report.skipped and not report.replaced:
        top = Counter(site.reason for site in report.skipped).most_common(3)
        logger.warning("%s; reasons: %s", line, "; ".join(f"{reason} ({count})" for reason, count in top))
    else:
        logger.info("%s", line)
    # Once, and not of the small graphs around one in which something was fused.
    if report.records and report.advice not in {"", *_STORE.advised} and not any(r.replaced for r in _STORE.reports):
        _STORE.advised.add(report.advice)
        logger.warning("aiter_fusion: nothing was fused: %s", report.advice)
    for site in report.sites:
        logger.debug(
            "aiter_fusion: %s %s %s at %s: %s",
            site.status,
            site.family,
            site.variant,
            site.where or "?",
            "; ".join(filter(None, [site.op and f"{site.op} ({site.provider})", site.reason])),
        )
