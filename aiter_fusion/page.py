"""A report as one HTML file: no network, no other file. The template is ``page.html`` beside this module."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

from .graph_text import NodeText

if TYPE_CHECKING:
    from .report import FusionReport

TEMPLATE = Path(__file__).with_suffix(".html")

# What a page says where it has no nodes to show, and how to have them.
ASK = (
    "Graphs are recorded by aiter_fusion.explain(model, args), within aiter_fusion.dump(folder), and by the command "
    "aiter-fusion run --report FILE.html."
)
NOT_RECORDED = f"The graphs were not recorded. {ASK}"
FROM_CACHE = (
    "The compiled code came from Inductor's cache and the passes did not run: the sites are those of the run that "
    f"filled the cache, and there are neither nodes nor times to show. {ASK}"
)


def render(report: FusionReport) -> str:
    """The page, as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    sites = [
        {
            "status": site.status,
            "family": site.family,
            "variant": site.variant,
            "where": site.where,
            "op": site.op,
            "provider": site.provider,
            "reason": site.reason,
            "code": site.code,
        }
        for site in report.sites
    ]
    choices = {name: sorted({site[name] for site in sites} - {""}) for name in ("family", "status", "code")}
    missing = "" if report.recorded else FROM_CACHE if report.from_cache else NOT_RECORDED
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report, sites=sites, choices=choices, missing=missing, data=_data(report)
    )


def _data(report: FusionReport) -> dict[str, Any]:
    """What the page's script shows on demand. Values, modules and source lines repeat: they are numbers in ``strings``.

    graphs: name, before, after (nodes: name, code, value, where, source) and sites (positions of the original and the
    new nodes in these); places: for each site its graph and its position there, or null where it was not recorded.
    """
    strings: dict[str, int] = {}

    def packed(nodes: Iterable[NodeText]) -> list[list[Any]]:
        return [[n.name, n.code, *(strings.setdefault(text, len(strings)) for text in n[2:])] for n in nodes]

    graphs, places = [], [None] * len(report.sites)
    for number, graph in enumerate(report.recorded):
        before = {node.name: position for position, node in enumerate(graph.before)}
        after = {node.name: position for position, node in enumerate(graph.after)}
        sites = [([before[n] for n in old], [after[n] for n in new if n in after]) for old, new in graph.sites]
        graphs.append(
            {"name": graph.name, "before": packed(graph.before), "after": packed(graph.after), "sites": sites}
        )
        for position in range(len(sites)):
            places[graph.first + position] = [number, position]  # type: ignore[call-overload]
    return {"strings": list(strings), "graphs": graphs, "places": places}
