"""Output on standard output and standard error, which may be terminals, files, or closed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType

PROGRAM = "aiter-fusion"


def show(shown: str | RenderableType, stream: TextIO | None) -> None:
    """Print on a stream; a closed stream discards it.

    Args:
        shown: a string, which is printed as it is, or what rich can draw, which has colours on a terminal.
        stream: where to print. Characters that its encoding lacks become escape sequences.
    """
    if stream is None:
        return
    if not isinstance(shown, str):
        from .. import tables  # imports rich, which JSON and --version do not need

        shown = tables.shown(shown, stream)
    encoding = stream.encoding or "utf-8"
    print(shown.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def complain(problem: str) -> None:
    """Print an error, one line, on standard error."""
    from rich.text import Text

    show(Text.assemble(f"{PROGRAM}: ", ("error:", "red"), f" {problem}"), sys.stderr)
