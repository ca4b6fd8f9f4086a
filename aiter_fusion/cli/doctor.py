"""``aiter-fusion doctor``: try every fused op on this machine, and write a report to send."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils._pytree import tree_map

from ..doctor import report
from ..doctor.calls import cases
from ..doctor.examine import examine
from ..doctor.team import public
from .info import information, rows_of
from .parser import Parser, Run
from .streams import show


def fill(parser: Parser) -> Run:
    """Add the arguments."""
    text = "also write the report to a file, as text or as Markdown; it names no folder, user or host"
    parser.add_argument("--output", type=_output, metavar="FILE.{txt,md}", help=text)
    text = "try only calls whose name contains TEXT, e.g. 'rms_norm_quant add' (default: all)"
    parser.add_argument("--only", default="", metavar="TEXT", help=text)
    return command


def command(args: argparse.Namespace) -> int:
    """Try the ops, print what was found, and write it to a file; return the exit status."""
    chosen = cases(args.only)
    found = tree_map(lambda value: public(value) if isinstance(value, str) else value, information())
    found["preferences"] = {k: v for k, v in found["preferences"].items() if v["from"].startswith("AITER_FUSION")}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, _progress(len(chosen) + 1) as tell:
        examined = examine(chosen, Path(folder), tell)
    machine = rows_of(found)
    show(report.text(machine, examined), sys.stdout)
    if args.output:
        Path(args.output).write_text(report.FORMS[Path(args.output).suffix](machine, examined))
    return 0 if examined.is_well else 1


def _output(text: str) -> str:
    path = Path(text)
    if path.suffix not in report.FORMS:
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .txt nor in .md")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return text


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on standard error, if that is a terminal, which names what is being tried."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(file=sys.stderr), redirect_stdout=False) as bar:
        task = bar.add_task("", total=total)
        done = -1

        def tell(what: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done, description=what, refresh=True)

        yield tell
        bar.update(task, completed=total, description="")
