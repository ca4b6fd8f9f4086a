"""Output on standard output and standard error, with colours on terminals."""

from __future__ import annotations

import os
import re
import sys
from typing import TextIO

PROGRAM = "aiter-fusion"
# Words of reports and errors, and their colours.
COLOURS = {"replaced": 32, "skipped": 33, "bare": 2, "error:": 31, "cannot run": 33, "can run": 32}


def _painted(text: str, stream: TextIO) -> str:
    """The text with colours, if the stream is a terminal and https://no-color.org does not forbid it."""
    if os.environ.get("NO_COLOR") or not stream.isatty():
        return text
    words = "|".join(map(re.escape, COLOURS))
    coloured = rf"^({words})(?=  )|(?<=: )(error:)|(?<=  )(cannot run|can run)"
    return re.sub(coloured, lambda m: f"\x1b[{COLOURS[m[0]]}m{m[0]}\x1b[0m", text, flags=re.MULTILINE)


def show(text: str, stream: TextIO | None) -> None:
    """Print, also what the stream's encoding lacks; a stream that is closed takes nothing."""
    if stream is not None:
        encoding = stream.encoding or "utf-8"
        said = _painted(text, stream).encode(encoding, "backslashreplace").decode(encoding)
        print(said, file=stream, flush=True)


def complain(problem: str) -> None:
    """Print an error on standard error."""
    show(f"{PROGRAM}: error: {problem}", sys.stderr)
