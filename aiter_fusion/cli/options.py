"""The options that ``run`` and ``explain`` share: the backend's, and those about the report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .. import config
from ..patterns import fusions  # noqa: F401  (importing it registers the families, which are choices below)
from ..registry import REGISTRY
from .parser import Parser
from .streams import complain, show

if TYPE_CHECKING:
    from ..report import FusionReport


def add_options(parser: Parser) -> None:
    """Add the options of ``aiter_fusion.Backend``, ``--expect``, ``--report`` and ``--json``."""
    levels = "; ".join(f"{level}: {what}" for level, what in config.LEVELS.items())
    text = f"what may be fused. {levels} (default: AITER_FUSION_LEVEL, or {config.DEFAULT_LEVEL} if that is unset)"
    parser.add_argument("-O", dest="level", type=int, choices=config.LEVELS, metavar="LEVEL", help=text)
    text = "the provider that computes the fused ops (default: AITER_FUSION_PROVIDER, or auto if that is unset)"
    parser.add_argument("--provider", choices=("auto", *REGISTRY.providers), help=text)
    text = (
        "exact: a fused op must round where the graph rounds; kernel: it may round as its kernel does "
        "(default: the level decides)"
    )
    parser.add_argument("--numerics", choices=config.NUMERICS, help=text)
    parser.add_argument(
        "--strict",
        action="store_true",
        help="fail if a site is skipped for another reason than speed, or if matching raises an error",
    )
    text = "while compiling, compare every fused op with the nodes that it replaces, on random data"
    parser.add_argument("--verify", action="store_true", help=text)
    for name in ("disable", "enable"):
        text = f"{name} this fusion at every level (repeatable): {', '.join(REGISTRY.family_names)}"
        choices = REGISTRY.family_names
        parser.add_argument(f"--{name}", action="append", default=[], choices=choices, metavar="FAMILY", help=text)
    text = "exit with status 1 unless N sites of this family are replaced in all graphs together (repeatable)"
    parser.add_argument("--expect", type=_expected, action="append", default=[], metavar="FAMILY=N", help=text)
    text = "write the report to a file; an .html file also shows the graphs, which are then compiled anew"
    parser.add_argument("--report", type=_report_path, metavar="FILE.{json,html}", help=text)
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON instead of a table")


def backend_options(args: argparse.Namespace) -> dict[str, Any]:
    """The given options of ``aiter_fusion.Backend``, but for ``expect``: that one counts over all graphs here."""
    return {name: getattr(args, name) for name in config.NAMES if name != "expect"}


def _report_path(text: str) -> str:
    path = Path(text)
    if path.suffix not in (".json", ".html"):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .json nor in .html")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return text


def _expected(text: str) -> tuple[str, int]:
    family, _, count = text.partition("=")
    if family not in REGISTRY.family_names or not count.isdecimal():
        families = ", ".join(REGISTRY.family_names)
        raise argparse.ArgumentTypeError(f"{text!r} is not FAMILY=N, where families are {families}")
    return family, int(count)


def tell(made: FusionReport, args: argparse.Namespace, stream: TextIO | None) -> None:
    """Print a report, and write it to a file, as the options ask."""
    from .. import report

    if args.report:
        if args.report.endswith(".html"):
            made.to_html(args.report)
        else:
            report.write(args.report, made.to_json() + "\n")
    show(made.to_json() if args.json else made, stream)


def unexpected(made: FusionReport, args: argparse.Namespace) -> int:
    """The exit status: 1, with an error on standard error, if a count differs from what ``--expect`` names."""
    wrong = [f"{family}={count}" for family, count in args.expect if made.replaced.get(family, 0) != count]
    if wrong:
        found = ", ".join(f"{family}={made.replaced.get(family, 0)}" for family, _ in args.expect)
        complain(f"expected {', '.join(wrong)}, found {found}")
    return 1 if wrong else 0
