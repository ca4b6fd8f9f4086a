"""``aiter-fusion run``: run a script whose calls of ``torch.compile`` use this backend, and report what was fused."""

from __future__ import annotations

import argparse
import os
import sys

from .options import add_options, backend_options, tell, unexpected
from .parser import Parser, Run
from .streams import PROGRAM, show

NOTHING = (
    "nothing was fused: the script called nothing that torch.compile returned, or names another backend, or compiled "
    'the model by another one before (torch._dynamo.reset() forgets that); TORCH_LOGS="graph_breaks" says more'
)


def fill(parser: Parser) -> Run:
    """Add the arguments."""
    add_options(parser)
    text = "take SCRIPT as the name of a module and run it as python -m does"
    parser.add_argument("-m", dest="as_module", action="store_true", help=text)
    parser.add_argument("script", help="a Python script; all that follows it are the script's own arguments")
    arguments = parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments.required = False  # Python 3.11 requires it, and would name it in the error about a missing script
    return command


def command(args: argparse.Namespace) -> int:
    """Run the script; return its exit status, or that of ``--expect`` if it succeeded."""
    from .. import journal, report
    from ..backend import Backend, reports
    from ..run import default_backend, run_script

    backend = Backend(**backend_options(args))
    # Preferences also hold for the script's child processes, and for calls that name this backend themselves.
    preferred = {"level": args.level, "provider": args.provider, "disable": ",".join(sorted(backend.options.disable))}
    os.environ |= {f"AITER_FUSION_{name.upper()}": str(value) for name, value in preferred.items() if value is not None}
    graphs = bool(args.report) and args.report.endswith(".html")
    with default_backend(backend), journal.recording(graphs):
        status = run_script(args.script, args.arguments, args.debug, as_module=args.as_module)
    compiled = reports()
    made = report.merge(compiled)
    if os.environ.get("RANK", "0") == "0":  # torchrun's: by now the script may have left its process group
        show(f"\n{PROGRAM}: graphs compiled by aiter_fusion: {len(compiled)}", sys.stderr)
        if not compiled:
            show(NOTHING, sys.stderr)
        tell(made, args, sys.stderr)
    return status or unexpected(made, args)
