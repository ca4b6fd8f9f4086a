"""``aiter-fusion tune``: measure how the Triton kernels are best launched on this GPU."""

from __future__ import annotations

from .parser import Parser, Run, positive


def fill(parser: Parser) -> Run:
    """Add the arguments."""
    from ..bench import tune

    text = f"hidden sizes of norms and activations (default: {' '.join(map(str, tune.HIDDEN))})"
    parser.add_argument("--hidden", type=positive, nargs="+", default=tune.HIDDEN, metavar="N", help=text)
    known = (*tune.NORMS, *tune.ROWS, "flat")
    text = f"measure these rules only, of {', '.join(known)} (default: all)"
    parser.add_argument("--rules", nargs="+", choices=known, metavar="RULE", help=text)
    text = "measure FP8 products of few rows instead: those of bench linear, or K of a value and N of each layer"
    parser.add_argument("--linear", nargs="*", metavar="KxN,N", help=text)
    text = "write the launches to this file instead of the user's cache; kernels do not read it"
    parser.add_argument("--output", metavar="FILE.json", help=text)
    return tune.command
