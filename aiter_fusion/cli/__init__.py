"""The command line: ``aiter-fusion <command>``, or ``python -m aiter_fusion <command>``.

Compiles models with fused FP8 kernels and reports what was fused, what was not, and why. Results go to standard output,
and everything else goes to standard error. The exit status is 0 on success; 1 if a comparison was refused, if --expect
named other counts, if --strict found a skipped site, or if doctor found that a call fails which graphs take; 2 on an
error, which is reported in one line (--debug shows the traceback). The command 'run' leaves standard output to the
script and exits with the script's status. Colours appear on terminals only, unless NO_COLOR is set.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module

from .. import __version__
from .parser import Parser, Run, add_command
from .streams import PROGRAM, complain

# Each command is a module of this folder, which is imported when the command is given.
COMMANDS = {
    "run": "run a Python script; every torch.compile in it that names no other backend uses aiter_fusion",
    "explain": "compile a model, call it once, and show what was fused, what was not, and why",
    "info": "show what this machine can run and what the environment variables prefer",
    "doctor": "compile and run every fused op on this machine, and write a report of what works and what does not",
    "bench": "compare aiter_fusion with plain Inductor on this GPU",
    "tune": "measure how to launch the Triton kernels on this GPU, and keep the fastest launches in the user's cache",
}

EXAMPLES = {
    "run": "aiter-fusion run -O3 --expect rms_norm_quant=9 --report report.html script.py its arguments",
    "explain": "aiter-fusion explain my_models:tiny_llama --report report.html",
    "info": "aiter-fusion info --json",
    "doctor": "aiter-fusion doctor --output report.md",
    "bench": "aiter-fusion bench model --decode 1 32 --json model.json",
    "tune": "aiter-fusion tune --hidden 4096",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        argv: the arguments after the program's name; None takes them from ``sys.argv``.

    Raises:
        SystemExit: the arguments are invalid, or they ask for help or for the version.
    """
    try:
        return _main(sys.argv[1:] if argv is None else list(argv))
    except BrokenPipeError:
        if not _readers_gone():
            raise
        return 128 + signal.SIGPIPE  # the status of a program that this signal ends, which prints nothing either


def _main(argv: list[str]) -> int:
    args = _parser().parse_args(argv)
    args.command_line = shlex.join([PROGRAM, *argv])
    try:
        status = args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except Exception as error:
        if args.debug or isinstance(error, BrokenPipeError):
            raise
        from ..bench.timing import Refused

        cause = getattr(error, "inner_exception", error)  # Dynamo wraps what a backend raises
        said = [line.strip() for line in str(cause).splitlines() if line.strip()][:1]
        if not said or not isinstance(cause, (ValueError, RuntimeError, OSError)):
            said = [type(cause).__name__, *said]
        complain(": ".join(said))
        return 1 if isinstance(cause, Refused) else 2
    return status or 0


def _readers_gone() -> bool:
    """Whether the reader of an output stream has exited, as after ``| head``; the rest of that stream is discarded."""
    gone = False
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            gone = True
    return gone


def _parser() -> Parser:
    parser = Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n\n")[2])
    parser.example = EXAMPLES["run"]
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="<command>")
    for name, summary in COMMANDS.items():
        add_command(commands, name, summary, partial(_fill, name), EXAMPLES[name])
    return parser


def _fill(name: str, parser: Parser) -> Run | None:
    return import_module(f".{name}", __name__).fill(parser)
