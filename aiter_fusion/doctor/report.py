"""What was found, as text that a person reads and sends: no folders, no names of users or hosts."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.text import Text

from ..tables import plain, table
from .calls import AGREES, DIFFERS, FAILED, Case, Outcome
from .examine import Examination

# The colours of what calls gave, on a terminal.
STYLES = {AGREES: "green", DIFFERS: "red", FAILED: "red"}
Cells = Sequence[Sequence["str | Text"]]


class Section(NamedTuple):
    """A table with a title. folds: its columns that fold where a terminal is too narrow."""

    title: str
    headers: tuple[str, ...]
    rows: Cells
    folds: tuple[str, ...] = ()
    right: tuple[str, ...] = ()

    def drawn(self, markdown: bool) -> RenderableType:
        """The table; in Markdown every table has names of columns."""
        return table(
            self.headers,
            self.rows,
            left=[name for name in self.headers if name not in self.right],
            folds=dict.fromkeys(self.folds),
            header=markdown or self.headers != ("name", "value"),
            markdown=markdown,
        )


def sections(machine: Cells, found: Examination) -> list[Section]:
    """All tables. machine: names and values that describe it."""
    about: list[Sequence[str | Text]] = [
        ["system", f"{platform.system()} {platform.release()} {platform.machine()}"],
        *machine,
        *([["Triton compiles for", found.triton]] if found.triton else []),
        *([["ranks of all-reduces", str(found.ranks)]] if found.ranks else []),
        ["torch.compile", _status(found.backend) + f": {found.backend.said}"],
    ]
    refused = ((case, f"{provider}: {why}") for case, provider, why in found.refused)
    made = [
        Section("Machine", ("name", "value"), about, ("value",)),
        Section("Calls", CALLS, _calls(found), ("result",), ("s",)),
        Section("Not taken", ("calls", "reason"), _by_reason(found.left), ("reason",)),
        Section("Refused", ("calls", "reason"), _by_reason(refused), ("reason",)),
        Section("Not tried", ("calls", "reason"), _by_reason(found.untried), ("reason",)),
    ]
    return [section for section in made if section.rows]


# taken: whether graphs take the call from this provider; s: seconds until the first result, compilation included.
CALLS = ("op", "variant", "provider", "taken", "s", "status", "result")


def _calls(found: Examination) -> Cells:
    return [
        [
            case.family,
            case.variant,
            provider,
            "yes" if chosen else "no",
            _seconds(outcome),
            _status(outcome),
            outcome.said,
        ]
        for case, provider, chosen, outcome in found.rows
    ]


def _status(outcome: Outcome) -> Text:
    return Text(outcome.status, STYLES[outcome.status])


def _seconds(outcome: Outcome) -> str:
    return "" if outcome.seconds is None else f"{outcome.seconds:.1f}"


def _by_reason(pairs: Iterable[tuple[Case, str]]) -> Cells:
    """Calls of one reason in one row."""
    groups: dict[str, list[str]] = {}
    for case, reason in pairs:
        groups.setdefault(reason, []).append(str(case))
    return [[_span(names), reason] for reason, names in groups.items()]


def _span(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 3 else f"{names[0]} ... {names[-1]} ({len(names)})"


def verdict(found: Examination) -> str:
    """The last line: how many calls agree."""
    taken = [row for row in found.rows if row.chosen]
    agreeing = sum(row.outcome.status == AGREES for row in taken)
    others = [row for row in found.rows if not row.chosen]
    more = f", {sum(row.outcome.status == AGREES for row in others)} of {len(others)} others" if others else ""
    return f"{agreeing} of {len(taken)} calls that graphs take agree with the reference{more}; {found.seconds:.0f} s"


def text(machine: Cells, found: Examination) -> RenderableType:
    """The report as rich draws it."""
    parts: list[RenderableType] = []
    for section in sections(machine, found):
        parts += [Text(section.title, "bold"), "", section.drawn(False), ""]
    return Group(*parts, verdict(found))


def markdown(machine: Cells, found: Examination) -> str:
    """The report in GitHub's Markdown."""
    parts = ["# aiter-fusion doctor"]
    for section in sections(machine, found):
        parts += [f"## {section.title}", plain(section.drawn(True))]
    return "\n\n".join([*parts, verdict(found)]) + "\n"


FORMS: dict[str, Callable[[Cells, Examination], str]] = {
    ".txt": lambda machine, found: plain(text(machine, found)) + "\n",
    ".md": markdown,
}
