"""Parsers whose errors take one line, and which import a command's module when that command is given."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

Run = Callable[[argparse.Namespace], "int | None"]


class Parser(argparse.ArgumentParser):
    """A parser that accepts no abbreviated option, and whose arguments are added when it is first used.

    Importing the compiler takes longer than importing PyTorch, and ``--version`` needs neither.
    """

    fill: Callable[[Any], Run | None] | None = None
    example = ""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **given})

    def parse_known_args(self, *args: Any, **given: Any) -> Any:
        if self.fill is not None:
            fill, self.fill = self.fill, None
            run = fill(self)
            if run is not None:
                self.add_argument("--debug", action="store_true", help="show the traceback of an error")
                self.set_defaults(run=run)
        return super().parse_known_args(*args, **given)

    def format_help(self) -> str:
        """What argparse writes, and the example, which is not folded."""
        return super().format_help() + (f"\nexample:\n  {self.example}\n" if self.example else "")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def add_command(
    commands: Any, name: str, summary: str, fill: Callable[[Parser], Run | None], example: str = ""
) -> None:
    """Add a command to subparsers.

    Args:
        commands: what ``add_subparsers`` returned.
        name: the word that selects the command.
        summary: one line for ``--help``.
        fill: adds the arguments, and returns the function that runs the command; None if it added commands instead.
        example: a command line, for ``--help``.
    """
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.fill, parser.example = fill, example


def positive(text: str) -> int:
    """The type of an argument that is a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
