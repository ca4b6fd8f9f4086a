"""A report as one HTML file: no network, no other file. The template is ``page.html`` beside this module."""

from __future__ import annotations

import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, StrictUndefined

from . import machine
from .graph_text import NodeText, short
from .reasons import CODES, Reason

if TYPE_CHECKING:
    from .report import FusionReport, Site

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

WORDS = {
    "site": "one place in a graph that a fusion could take, or a recognised form that no fusion applies to",
    "replaced": "a fused op computes it",
    "skipped": "a fusion applies to it and was refused, for the reason that is given",
    "bare": "a form was recognised here, but no fusion applies to it",
    "form": "one way in which a model spells a computation, such as a norm or a quantiser; each belongs to one site",
    "fusion": "the family of fused ops; of a bare site the kind of the form",
    "variant": "what distinguishes sites of one family: what is added or returned as well, and what has a scale",
    "module": "the module of the model whose computation it is; {0..3} stands for layers 0 to 3",
    "moved": "bytes read and written: by the original nodes if each ran alone (Inductor fuses some of them itself, so "
    "its code moves less), and by what takes their place",
    "provider": "what computes the fused op: aiter, triton or reference, which is plain PyTorch",
    "reason": "why a site was not replaced; of a replaced one, what it goes without",
    "passes": "the time that recognising, planning and rewriting took while compiling",
} | {reason.code: reason.sentence for reason in Reason}


def render(report: FusionReport) -> str:
    """The page, as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    moved = _moved(report)

    def in_all(positions: Iterable[int]) -> tuple[int, int]:
        pairs = [moved[position] for position in positions if position in moved]
        return sum(before for before, _ in pairs), sum(after for _, after in pairs)

    environment.filters |= {"amount": amount, "in_all": in_all}
    replaced = [position for position, site in enumerate(report.sites) if site.status == "replaced"]
    choices = {
        "status": sorted({site.status for site in report.sites}),
        "family": sorted({site.family for site in report.sites}),
        "code": sorted({site.code for site in report.sites} - {""}),
    }
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        about=_about(report),
        groups=list(_groups(report.sites)),
        maps=list(_maps(report.sites)),
        moved=moved,
        replaced=in_all(replaced),
        choices=choices,
        words={name: sentence for name, sentence in WORDS.items() if name not in CODES or name in choices["code"]},
        missing="" if report.recorded else FROM_CACHE if report.from_cache else NOT_RECORDED,
        data=_data(report) | {"words": WORDS, "text": str(report)},
    )


def _about(report: FusionReport) -> dict[str, str]:
    """What was compiled, when, by which command and on which machine."""
    models = dict.fromkeys(graph.model for graph in report.recorded if graph.model)
    return {
        "model": ", ".join(models),
        "made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "by": _command(sys.orig_argv),
        "with": machine.software(),
        "on": machine.device(),
    }


def _command(arguments: Sequence[str]) -> str:
    """How this process was started, in at most 200 characters."""
    first, *rest = map(short, arguments)
    program = [] if rest and rest[0] == "aiter-fusion" else [Path(first).name]
    return shorten(shlex.join([*program, *rest]), 200, placeholder=" ...")


# ---- Equal sites, layer by layer -----------------------------------------------------------------------------------


class _Group(NamedTuple):
    """Sites that differ in nothing but their layer; positions are those in the report."""

    sites: dict[int, Site]
    where: str
    reason: str

    @property
    def first(self) -> Site:
        return next(iter(self.sites.values()))


def _groups(sites: Sequence[Site]) -> Iterator[_Group]:
    """Equal sites together, in the order of the first of each."""
    groups: dict[tuple[str, ...], dict[int, Site]] = defaultdict(dict)
    for position, site in enumerate(sites):
        where, reason = (re.sub(r"\d+", "#", text) for text in (site.where, site.reason))
        groups[site.status, site.family, site.described, site.op, site.provider, where, reason][position] = site
    for group in groups.values():
        reasons = list(dict.fromkeys(site.reason for site in group.values()))
        alike = " (others differ in its numbers)" if len(reasons) > 1 else ""
        yield _Group(group, _together([site.where for site in group.values()]), reasons[0] + alike)


def _together(places: Sequence[str]) -> str:
    """``layers.{0..2}.mlp`` of ``layers.0.mlp``, ``layers.1.mlp`` and ``layers.2.mlp``."""
    columns = zip(*(place.split(".") for place in places), strict=True)
    return ".".join(same.pop() if len(same := set(column)) == 1 else f"{{{_ranges(column)}}}" for column in columns)


def _ranges(numbers: Iterable[str]) -> str:
    """``0..2, 5`` of 0, 1, 2 and 5; of what are no numbers, all."""
    ordered = sorted(set(numbers), key=lambda text: (not text.isdecimal(), int(text) if text.isdecimal() else 0, text))
    if not all(map(str.isdecimal, ordered)):
        return ", ".join(ordered)
    values = list(map(int, ordered))
    starts = [values[0], *(later for earlier, later in pairwise(values) if later != earlier + 1)]
    ends = [*(earlier for earlier, later in pairwise(values) if later != earlier + 1), values[-1]]
    return ", ".join(f"{a}..{b}" if b > a else str(a) for a, b in zip(starts, ends, strict=True))


# Of several sites in one cell of a map, the first of these shows.
WORST = ("skipped", "bare", "replaced")


class _Cell(NamedTuple):
    """The sites of one kind in one layer: the position of one to look at, its status, and all of them in words."""

    position: int
    status: str
    words: str


# So many layers of a map stand side by side, also on paper.
BROAD = 40

_Map = tuple[str, Sequence[int], dict[str, list["_Cell | None"]]]


def _maps(sites: Sequence[Site]) -> Iterator[_Map]:
    """For each stack of layers (``model.layers``) its name, their numbers, and a row of cells for each kind of site."""
    stacks: dict[str, dict[str, dict[int, list[int]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for position, site in enumerate(sites):
        if found := re.match(r"(?:(.*?)\.)??(\d+)(?:\.(.*))?$", site.where):
            stack, layer, rest = found.groups("")
            kind = " ".join(filter(None, [re.sub(r"\d+", "*", rest), site.family]))
            stacks[stack][kind][int(layer)].append(position)
    for stack, kinds in stacks.items():
        layers = sorted({layer for cells in kinds.values() for layer in cells})
        for start in range(0, len(layers) if len(layers) > 1 else 0, BROAD):
            some = layers[start : start + BROAD]
            rows = {kind: [_cell(sites, cells.get(layer, ())) for layer in some] for kind, cells in kinds.items()}
            yield stack, some, rows


def _cell(sites: Sequence[Site], positions: Sequence[int]) -> _Cell | None:
    if not positions:
        return None
    counts = {status: sum(sites[position].status == status for position in positions) for status in WORST}
    words = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    shown = min(positions, key=lambda position: WORST.index(sites[position].status))
    return _Cell(shown, sites[shown].status, words)


# ---- Bytes ---------------------------------------------------------------------------------------------------------


def _moved(report: FusionReport) -> dict[int, tuple[int, int]]:
    """For each site whose graph was recorded the bytes that its nodes move, and those in their place."""
    found = {}
    for graph in report.recorded:
        before, after = ({node.name: node.moved for node in nodes} for nodes in (graph.before, graph.after))
        for position, (old, new) in enumerate(graph.sites, graph.first):
            was = sum(before[name] for name in old)
            found[position] = was, sum(after.get(name, 0) for name in new) if new else was
    return found if any(was for was, _ in found.values()) else {}


def amount(count: int) -> str:
    """A number of bytes, e.g. ``24.6 KiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.3g}\N{NO-BREAK SPACE}{unit}"
        size /= 1024
    return f"{size:,.3g}\N{NO-BREAK SPACE}GiB"


# ---- Nodes ---------------------------------------------------------------------------------------------------------


def _data(report: FusionReport) -> dict[str, Any]:
    """What the page's script shows on demand. Values, modules and source lines repeat: they are numbers in ``strings``.

    graphs: name, before, after (nodes: name, code, value, where, source) and sites (positions of the original and the
    new nodes in these); places: for each site its graph and its position there, or null where it was not recorded.
    A fused op is in the module that its site is in.
    """
    strings: dict[str, int] = {}

    def packed(nodes: Iterable[NodeText]) -> list[list[Any]]:
        return [[n.name, n.code, *(strings.setdefault(text, len(strings)) for text in n[2:5])] for n in nodes]

    graphs, places = [], [None] * len(report.sites)
    for number, graph in enumerate(report.recorded):
        before = {node.name: position for position, node in enumerate(graph.before)}
        after = {node.name: position for position, node in enumerate(graph.after)}
        sites = [([before[n] for n in old], [after[n] for n in new if n in after]) for old, new in graph.sites]
        modules = {
            name: report.sites[position].where
            for position, (_, new) in enumerate(graph.sites, graph.first)
            for name in new
        }
        fused = [node._replace(where=modules.get(node.name, node.where)) for node in graph.after]
        graphs.append({"name": graph.name, "before": packed(graph.before), "after": packed(fused), "sites": sites})
        for position in range(len(sites)):
            places[graph.first + position] = [number, position]  # type: ignore[call-overload]
    return {"strings": list(strings), "graphs": graphs, "places": places}
