"""What the passes did to each compiled graph: sites, counts, reasons, and the line in the log."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tabulate import tabulate

from .record import Recorded

logger = logging.getLogger("aiter_fusion")

REPLACED, SKIPPED, BARE = "replaced", "skipped", "bare"

# Every reason why a site is not replaced starts with one of these codes and a colon; what follows is particular to it.
REASONS = {
    "producer": "what is quantised comes from an operation that no fusion takes",
    "boundary": "the value comes from outside the graph: its producer is an input or in the graph before a break",
    "unquantised": "the value is not quantised to FP8",
    "unnormalised": "no RMSNorm reads the all-reduced value",
    "unknown": "a cast to FP8 whose arithmetic no form describes",
    "rows": "only some rows of a value are quantised, and the others are needed too or cannot be left out",
    "starved": "another site has taken the value that this one would fuse with",
    "level": "the optimisation level does not include this fusion",
    "disabled": "the fusion is switched off by name",
    "training": "the graph is compiled for training",
    "collective": "the reduction or its group is none that a fused op takes, or its processes do not compile alike",
    "numerics": "the provider rounds differently from the graph, and numerics='exact' was asked for",
    "no_kernel": "no provider on this machine has a kernel",
    "provider": "the provider refuses this call",
    "preference": "the provider is to be used only if it is asked for by name",
    "unmeasured": "nobody has measured whether the provider's kernel is faster on this GPU",
    "slower": "by the provider's measurements, the graph's own code is faster",
    "overload": "no overload of the fused op takes these inputs and returns these outputs",
    "layout": "an output of the fused op differs in shape, stride, dtype or device from the value it replaces",
    "order": "an output is read before the last input exists",
    "mutation": "an input is written to between the nodes that would become one",
    "error": "planning the site raised an exception",
}


@dataclass(frozen=True)
class Site:
    """One place that a fusion could take, or a record that none applies to.

    family:   the fusion's family; for a bare site the kind of its record.
    variant:  what distinguishes it within the family, e.g. ``add+token``.
    op:       the fused op, e.g. ``aiter_fusion::rms_norm_quant.add``; empty unless replaced.
    provider: what computes it; empty unless replaced.
    status:   ``replaced``, ``skipped`` or ``bare``.
    reason:   why it was not replaced: a code of ``REASONS``, a colon, the particulars. For a replaced site empty, or
              what it goes without and why: ``without residual_add: the residual is broadcast``.
    where:    the module whose computation it is, e.g. ``model.layers.0.input_layernorm``.
    records:  how many recognised forms it accounts for.
    products: how many matrix products its op computes, or would; 0 in a family whose ops compute none.
    """

    family: str
    variant: str
    op: str
    provider: str
    status: str
    reason: str
    where: str
    records: int = 1
    products: int = 0


@dataclass(frozen=True)
class FusionReport:
    """What was done to one compiled graph (or to several: ``merge``).

    sites:        every site, in graph order.
    records:      how many forms were recognised; every one of them belongs to exactly one site.
    milliseconds: time that the passes took; 0 where the compiled graph came from the cache and they did not run.
    from_cache:   whether the compiled graph came from Inductor's cache.
    note:         what concerns the whole graph: a training graph, an exception while matching.
    recorded:     the graphs as text, if they were asked for (``recording``) and the passes ran.
    """

    sites: tuple[Site, ...] = ()
    records: int = 0
    milliseconds: float = 0.0
    from_cache: bool = False
    note: str = ""
    recorded: tuple[Recorded, ...] = field(default=(), compare=False, repr=False)

    @property
    def replaced(self) -> dict[str, int]:
        """Replaced sites by family; only families with a count."""
        return dict(Counter(site.family for site in self._with(REPLACED)))

    @property
    def skipped(self) -> tuple[Site, ...]:
        """Sites that a fusion applies to and that were refused; each has a reason."""
        return self._with(SKIPPED)

    @property
    def bare(self) -> tuple[Site, ...]:
        """Records that no fusion applies to; each has a reason."""
        return self._with(BARE)

    @property
    def unaccounted(self) -> int:
        """Recognised forms that belong to no site: always 0, or the report is wrong."""
        return self.records - sum(site.records for site in self.sites)

    def _with(self, status: str) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.status == status)

    def summary(self) -> str:
        """One line, e.g. ``replaced 9 of 12 sites (rms_norm_quant 9); 3 skipped; 5 bare; provider triton; 6.1 ms``; the
        note alone where there was nothing to count."""
        if self.note and not self.records:
            return self.note
        replaced, skipped = self._with(REPLACED), self.skipped
        counts = ", ".join(f"{family} {count}" for family, count in self.replaced.items())
        parts = [
            f"replaced {len(replaced)} of {len(replaced) + len(skipped)} sites" + (f" ({counts})" if counts else ""),
            f"{len(skipped)} skipped",
            f"{len(self.bare)} bare",
        ]
        if launches := [site for site in replaced if site.products]:
            parts.append(f"{sum(site.products for site in launches)} products in {len(launches)} launches")
        if providers := sorted({site.provider for site in replaced}):
            parts.append(f"provider {', '.join(providers)}")
        parts.append("from cache" if self.from_cache else f"{self.milliseconds:.1f} ms")
        if self.note:
            parts.append(self.note)
        return "; ".join(parts)

    def __str__(self) -> str:
        """A table: equal sites in one row, with their number and where the first of them is."""
        groups: dict[tuple[str, ...], list[Site]] = {}
        for site in self.sites:
            variant = f"{site.variant}, {site.products} products" if site.products > 1 else site.variant
            key = (site.status, site.family, variant, site.provider, site.reason)
            groups.setdefault(key, []).append(site)
        rows = [
            [status, len(sites), family, variant, provider, _span([s.where for s in sites]), reason]
            for (status, family, variant, provider, reason), sites in groups.items()
        ]
        order = [REPLACED, SKIPPED, BARE]
        rows.sort(key=lambda row: order.index(str(row[0])))
        table = tabulate(
            rows,
            headers=["status", "sites", "family", "variant", "provider", "where", "reason"],
            maxcolwidths=[None, None, None, None, None, 44, 60],
        )
        return f"{self.summary()}\n{table}\n{self.records} records, {self.unaccounted} unaccounted for"

    def to_json(self) -> str:
        """The report as a JSON object: this class's fields but ``recorded``, the sites as objects, ``replaced``."""
        content = asdict(replace(self, recorded=())) | {"replaced": self.replaced, "unaccounted": self.unaccounted}
        del content["recorded"]
        return json.dumps(content)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one HTML file that loads nothing else.

        It has the sites, and of graphs that were recorded the original nodes of every site beside the fused op, and
        all nodes before and after. Graphs are recorded by ``aiter_fusion.explain``, within ``aiter_fusion.dump`` and by
        the command ``run --report FILE.html``; of others the page says that they were not.

        Raises:
            OSError: the file cannot be written.
        """
        from .page import render

        write(path, render(self))


def write(path: str | os.PathLike[str], text: str) -> None:
    """Write a file in UTF-8, all of it or nothing: whatever fails, what was there before stays.

    Half a surrogate pair, which Python has in names that are no UTF-8, is written as its escape sequence.

    Raises:
        OSError: the file cannot be written.
    """
    content = text.encode("utf-8", "backslashreplace")
    file = Path(path).resolve()  # behind a link, which stays
    if file.exists() and not file.is_file():  # a device or a pipe: nothing to put in its place
        file.write_bytes(content)
        return
    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def merge(reports: Iterable[FusionReport]) -> FusionReport:
    """Several reports as one: all sites, the time of all, from the cache only if all were."""
    reports = list(reports)
    recorded: list[Recorded] = []
    first = 0
    for report in reports:
        recorded += [replace(graph, first=first + graph.first) for graph in report.recorded]
        first += len(report.sites)
    return FusionReport(
        sites=tuple(site for report in reports for site in report.sites),
        records=sum(report.records for report in reports),
        milliseconds=sum(report.milliseconds for report in reports),
        from_cache=bool(reports) and all(report.from_cache for report in reports),
        note="; ".join(dict.fromkeys(report.note for report in reports if report.note)),
        recorded=tuple(recorded),
    )


def _span(places: list[str]) -> str:
    places = [place for place in places if place]
    if len(set(places)) <= 1:
        return places[0] if places else ""
    return f"{places[0]} ... {places[-1]}"


# ---- Through Inductor's cache --------------------------------------------------------------------------------
# On a cache hit no pass runs. Inductor stores the increments of counters["inductor"] with a compiled graph and applies
# them again when it is loaded, so a report travels as the name of a counter. It is taken out as soon as it has arrived:
# counters are for ever, and a report is many kilobytes.

_COUNTER = "aiter_fusion "


def to_counter(report: FusionReport) -> str:
    """The name of the counter that carries a report."""
    content = {
        "sites": [list(asdict(site).values()) for site in report.sites],
        "records": report.records,
        "note": report.note,
    }
    return _COUNTER + json.dumps(content, separators=(",", ":"))


def from_counter(name: str) -> FusionReport:
    """The report that the counter of this name carries, as one from the cache."""
    content = json.loads(name.removeprefix(_COUNTER))
    return FusionReport(
        sites=tuple(Site(*values) for values in content["sites"]),
        records=content["records"],
        note=content["note"],
        from_cache=True,
    )


def _take(counters: MutableMapping[str, int]) -> list[tuple[str, int]]:
    """Take the counters that carry reports out of these; each with how often it grew."""
    return [(name, counters.pop(name)) for name in list(counters) if name.startswith(_COUNTER)]


# ---- Reports of this process and the log ---------------------------------------------------------------------


@dataclass
class _Store:
    reports: list[FusionReport] = field(default_factory=list)
    # what the passes reported in this process: counter name -> one report for each run
    fresh: dict[str, list[FusionReport]] = field(default_factory=dict)
    recording: int = 0  # how many ask for graphs


_STORE = _Store()


def reports() -> list[FusionReport]:
    """The reports of this process, one for each compiled graph, oldest first."""
    return list(_STORE.reports)


def reset() -> None:
    """Forget the reports, also those that passes sent where no backend collects them."""
    from torch._dynamo.utils import counters

    begin(counters["inductor"])
    _STORE.reports.clear()


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
    for site in report.sites:
        logger.debug(
            "aiter_fusion: %s %s %s at %s: %s",
            site.status,
            site.family,
            site.variant,
            site.where or "?",
            "; ".join(filter(None, [site.op and f"{site.op} ({site.provider})", site.reason])),
        )
