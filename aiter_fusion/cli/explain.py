"""``aiter-fusion explain``: compile the model that a function returns, and report what was fused."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from operator import attrgetter
from typing import Any

from .options import add_options, backend_options, tell, unexpected
from .parser import Parser, Run
from .streams import complain


def fill(parser: Parser) -> Run:
    """Add the arguments."""
    add_options(parser)
    text = "a function that takes no arguments and returns (model, args) or (model, args, kwargs)"
    parser.add_argument("factory", metavar="MODULE:CALLABLE", help=text)
    return command


def command(args: argparse.Namespace) -> int:
    """Compile the model and call it once; return the exit status."""
    from torch._dynamo.exc import BackendCompilerFailed

    from ..backend import FusionError, explain, reports
    from ..report import merge

    model, inputs, keywords = _example(args.factory)
    known = len(reports())
    try:
        made = explain(model, inputs, keywords, **backend_options(args))
    except BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, FusionError):
            raise
        tell(merge(reports()[known:]), args, sys.stdout)
        complain(str(error.inner_exception).partition("\n")[0])
        return 1
    tell(made, args, sys.stdout)
    return unexpected(made, args)


def _example(factory: str) -> tuple[Callable[..., Any], Sequence[Any], dict[str, Any]]:
    """The model that ``MODULE:CALLABLE`` returns, and the arguments to call it with."""
    module_name, colon, name = factory.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"{factory!r} is not MODULE:CALLABLE, e.g. my_models:tiny_llama")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    made = attrgetter(name)(import_module(module_name))()
    if isinstance(made, tuple) and len(made) in (2, 3) and callable(made[0]) and isinstance(made[1], (tuple, list)):
        return made[0], made[1], (made[2] if len(made) == 3 else {})
    raise ValueError(f"{factory} returned {type(made).__name__}; it must return (model, args) or (model, args, kwargs)")
