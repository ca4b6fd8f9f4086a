"""What the passes did to each compiled graph: sites, counts, reasons, and the line in the log."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .graph_text import Recorded
from .reasons import OF_SPEED, Reason

if TYPE_CHECKING:
    from rich.console import RenderableType

REPLACED, SKIPPED, BARE = "replaced", "skipped", "bare"
# The colours of statuses on a terminal, in the order in which reports list them.
STYLES = {REPLACED: "green", SKIPPED: "yellow", BARE: "dim"}

# What to do where nothing was replaced, by why: ``FusionReport.advice``.
TRAIN = "the graph is compiled for training, and fused ops have no gradient: call the model under torch.no_grad()"
QUANTISE = (
    "no activation is quantised to FP8 (weights alone do not count): before compiling, call torchao.quantization's "
    "quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))"
)
ALLOW = "the level or 'disable' leaves out every fusion that applies: give level=3, or name the fusion in enable=[...]"
INSTALL = "no provider on this machine has a kernel for it: the command aiter-fusion info says what each of them lacks"
NAME = 'the graph\'s own code is thought to be as fast here: to use the kernels all the same, give provider="triton"'


@dataclass(frozen=True)
class Site:
    """One place that a fusion could take, or a record that none applies to.

    family:   the fusion's family; for a bare site the kind of its record.
    variant:  what distinguishes it within the family, e.g. ``add+token``.
    op:       the fused op, e.g. ``aiter_fusion::rms_norm_quant.add``; empty unless replaced.
    provider: what computes it; empty unless replaced.
    status:   ``replaced``, ``skipped`` or ``bare``.
    reason:   why it was not replaced: a code of ``reasons.py``, a colon, the particulars. For a replaced site empty, or
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

    @property
    def described(self) -> str:
        """Its variant, and how many products its op computes, if several."""
        return f"{self.variant}, {self.products} products" if self.products > 1 else self.variant

    @property
    def code(self) -> str:
        """The code of its reason; empty if it was replaced."""
        return "" if self.status == REPLACED else self.reason.partition(":")[0]

    @property
    def is_lost(self) -> bool:
        """Whether it was skipped for another reason than speed, which ``strict`` does not allow."""
        return self.status == SKIPPED and self.code not in OF_SPEED


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

    @property
    def advice(self) -> str:
        """What to do, in one line, if nothing was replaced and the report shows why; else empty."""
        codes = {site.code for site in self.sites}
        refused = {site.code for site in self.skipped}
        if self.replaced:
            return ""
        if Reason.TRAINING.code in codes or "training graph" in self.note:
            return TRAIN
        if self.note and not self.records:  # no graph, or one that was left alone: the note says why
            return ""
        if not refused:
            return "" if any(site.family == "fp8_quant" for site in self.bare) else QUANTISE
        causes = (
            (ALLOW, {Reason.LEVEL, Reason.DISABLED}),
            (INSTALL, {Reason.NO_KERNEL}),
            (NAME, {Reason.SLOWER, Reason.UNMEASURED}),
        )
        return next((text for text, reasons in causes if refused <= {reason.code for reason in reasons}), "")

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
        """A table in plain text: equal sites in one row, with their number, and where the first and the last are."""
        from .tables import plain

        return plain(self._drawn({"where": 44, "reason": 60}))

    def __rich__(self) -> RenderableType:
        """The same table for ``rich.print``: it has colours, and folds only where a terminal is too narrow."""
        return self._drawn({"where": None, "reason": None})

    def _drawn(self, folds: Mapping[str, int | None]) -> RenderableType:
        """The table between the summary and the number of records; ``folds``: see ``tables.table``."""
        from rich.console import Group  # here: whoever imports the backend may never look at a report
        from rich.text import Text

        from .tables import table

        groups: dict[tuple[str, ...], list[Site]] = {}
        for site in self.sites:
            key = (site.status, site.family, site.described, site.provider, site.reason)
            groups.setdefault(key, []).append(site)
        order = list(STYLES)
        rows = [
            [Text.assemble((status, STYLES[status])), str(len(sites)), family, variant, provider, _span(sites), reason]
            for (status, family, variant, provider, reason), sites in sorted(
                groups.items(), key=lambda group: order.index(group[0][0])
            )
        ]
        headers = ["status", "sites", "family", "variant", "provider", "where", "reason"]
        drawn = table(headers, rows, left={*headers} - {"sites"}, folds=folds)
        last = [f"{self.records} records, {self.unaccounted} unaccounted for"]
        if self.advice:
            last.append(f"nothing was fused: {self.advice}")
        return Group(Text(self.summary()), drawn, *map(Text, last))

    def to_json(self) -> str:
        """The report as a JSON object: this class's fields but ``recorded``, the sites as objects, ``replaced``,
        ``unaccounted`` and ``advice``."""
        content = asdict(replace(self, recorded=())) | {
            "replaced": self.replaced,
            "unaccounted": self.unaccounted,
            "advice": self.advice,
        }
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


def _span(sites: Iterable[Site]) -> str:
    places = [site.where for site in sites if site.where]
    if len(set(places)) <= 1:
        return places[0] if places else ""
    return f"{places[0]} ... {places[-1]}"


# ---- Through Inductor's cache --------------------------------------------------------------------------------
# On a cache hit no pass runs. Inductor stores the increments of counters["inductor"] with a compiled graph and applies
# them again when it is loaded, so a report travels as the name of a counter. It is taken out as soon as it has arrived:
# counters are for ever, and a report is many kilobytes.

COUNTER = "aiter_fusion "


def to_counter(report: FusionReport) -> str:
    """The name of the counter that carries a report."""
    content = {
        "sites": [list(asdict(site).values()) for site in report.sites],
        "records": report.records,
        "note": report.note,
    }
    return COUNTER + json.dumps(content, separators=(",", ":"))


def from_counter(name: str) -> FusionReport:
    """The report that the counter of this name carries, as one from the cache."""
    content = json.loads(name.removeprefix(COUNTER))
    return FusionReport(
        sites=tuple(Site(*values) for values in content["sites"]),
        records=content["records"],
        note=content["note"],
        from_cache=True,
    )
