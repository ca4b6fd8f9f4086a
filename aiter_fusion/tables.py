"""Tables as text, drawn by rich: in plain text nothing folds unless it is asked to, on a terminal long cells do."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from io import StringIO
from types import MappingProxyType
from typing import TextIO

from rich.box import MARKDOWN, Box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

# A rule of dashes under the header, and nothing else: every terminal and encoding has these characters.
RULED = Box("    \n    \n -  \n    \n    \n    \n    \n    \n", ascii=True)
# Characters in a line of plain text. Rich needs a limit; no table comes near this one.
UNLIMITED = 1 << 20


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    left: Collection[str],
    folds: Mapping[str, int | None] = MappingProxyType({}),
    header: bool = True,
    markdown: bool = False,
) -> Table:
    """A table that ``plain`` and ``shown`` turn into text.

    Args:
        headers: the columns' names.
        rows: one cell for each column; a ``Text`` may have colours.
        left: names of the columns that are aligned left; the others are aligned right.
        folds: names of the columns whose cells fold where a terminal is too narrow, each with the width in characters
            at which they fold everywhere, or None.
        header: whether the names are shown.
        markdown: whether it is drawn as a table in GitHub's Markdown.
    """
    cells = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    drawn = Table(box=RULED, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="", show_header=header)
    if markdown:
        drawn = Table(box=MARKDOWN, header_style="")
    for place, name in enumerate(headers):
        # Rich would cut what does not fold, so such a column is never narrower than its cells.
        widest = max((row[place].cell_len for row in cells), default=0)
        drawn.add_column(
            Text(name),
            justify="left" if name in left else "right",
            overflow="fold",
            no_wrap=name not in folds,
            min_width=None if name in folds else max(widest, Text(name).cell_len),
            max_width=folds.get(name),
        )
    for row in cells:
        drawn.add_row(*row)
    return drawn


def plain(drawn: RenderableType) -> str:
    """The text without colours; a row of a table is one line, unless ``folds`` gives a width."""
    return _text(drawn, Console(file=StringIO(), width=UNLIMITED, color_system=None))


def shown(drawn: RenderableType, stream: TextIO) -> str:
    """The text as a stream shows it: a terminal folds it to its width and has colours, unless NO_COLOR is set.

    On a terminal that is too narrow for the columns that do not fold, lines are longer than the terminal is wide.
    """
    if not stream.isatty():
        return plain(drawn)
    least = Console(width=UNLIMITED).measure(drawn).minimum
    terminal = Console(file=stream)
    colours = None if os.environ.get("NO_COLOR") else "auto"  # with it rich would still show dim and bold
    return _text(drawn, Console(file=stream, width=max(least, terminal.width), color_system=colours))


def _text(drawn: RenderableType, console: Console) -> str:
    with console.capture() as captured:
        console.print(drawn, crop=False, no_wrap=True, overflow="ignore")  # cells of a table have their own wrapping
    return "\n".join(row.rstrip(" ") for row in captured.get().split("\n")).strip("\n")
