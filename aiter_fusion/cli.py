"""The command line: ``aiter-fusion <command>``, or ``python -m aiter_fusion <command>``.

Results go to standard output, all else to standard error. Exit status: 0; 1 if a comparison was refused because it
would say nothing true; 2 for an error, which is one line (``--debug``: the traceback).
"""

from __future__ import annotations

import argparse
import json
import os
import platform as python_platform
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from tabulate import tabulate

from . import __version__, config, platform
from .bench import allreduce as bench_allreduce
from .bench import model as bench_model
from .bench import ops as bench_ops
from .bench import tune as bench_tune
from .bench.timing import Refused
from .providers import PROVIDERS
from .providers.triton import native_fp8, tuned

PROGRAM = "aiter-fusion"


class _Parser(argparse.ArgumentParser):
    """Errors are one line, as all others are, and no option may be abbreviated."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **given})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status; a bad option raises SystemExit with it."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser().parse_args(argv)
    args.command_line = shlex.join([PROGRAM, *argv])
    try:
        args.run(args)
    except Exception as error:
        if args.debug:
            raise
        said = [line.strip() for line in str(error).splitlines() if line.strip()][:1]
        if not said or not isinstance(error, (ValueError, RuntimeError, OSError)):
            said = [type(error).__name__, *said]
        print(f"{PROGRAM}: error: {': '.join(said)}", file=sys.stderr)
        return 1 if isinstance(error, Refused) else 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="<command>")
    for add in (_add_info, _add_bench, _add_tune):
        add(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], summary: str) -> Any:
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


# ---- info --------------------------------------------------------------------------------------------------------


def _add_info(commands: Any) -> None:
    info = _command(commands, "info", _print_info, "what this machine can run, and what the environment prefers")
    info.add_argument("--json", action="store_true", help="print a JSON object")


def information() -> dict[str, Any]:
    """What ``info`` prints.

    ``providers``: name -> why it cannot run here, or None. ``preferences``: name -> its value, and the environment
    variable that it comes from or ``default``.

    Raises:
        ValueError: the environment prefers something that does not exist.
    """
    gpu = torch.cuda.is_available()
    device = torch.cuda.current_device() if gpu else 0
    capability = "".join(map(str, torch.cuda.get_device_capability(device))) if gpu else ""
    native = native_fp8(device) if gpu else None
    return {
        "aiter_fusion": __version__,
        "python": python_platform.python_version(),
        "torch": torch.__version__,
        "triton": platform.triton_version(),
        "device": torch.cuda.get_device_name(device) if gpu else None,
        "architecture": platform.architecture(device) or (f"sm_{capability}" if gpu else None),
        "native_fp8": str(native).removeprefix("torch.") if native else None,
        "aiter": platform.aiter_version() if platform.is_aiter_found() else None,
        "aiter_supported": platform.is_aiter_found_and_supported(),
        "aiter_reason": platform.why_no_aiter(),
        "providers": {name: provider.missing() for name, provider in PROVIDERS.items()},
        "tuned": {"file": str(tuned.path()), "launches": len(tuned.choices())} if tuned.path() else None,
        "preferences": _preferences(),
    }


def _preferences() -> dict[str, dict[str, Any]]:
    chosen = config.options()
    effective = {
        "level": chosen.level,
        "provider": chosen.provider,
        "disable": sorted(chosen.disable),
        "log": os.environ.get("AITER_FUSION_LOG", "").upper() or "INFO",
    }
    return {
        name: {"value": value, "from": variable if os.environ.get(variable) else "default"}
        for name, value in effective.items()
        for variable in [f"AITER_FUSION_{name.upper()}"]
    }


def _print_info(args: argparse.Namespace) -> None:
    found = information()
    if args.json:
        print(json.dumps(found, indent=1))
        return
    nothing = "none: PyTorch sees no GPU"
    rows = [
        ["aiter_fusion", found["aiter_fusion"]],
        ["python", found["python"]],
        ["torch", found["torch"]],
        ["triton", found["triton"] or "not installed"],
        ["device", found["device"] or nothing],
        ["architecture", found["architecture"] or nothing],
        ["native FP8", found["native_fp8"] or ("none" if found["device"] else nothing)],
        ["AITER", found["aiter_reason"] or f"can run: version {found['aiter'] or 'unknown'}"],
        *([f"provider {name}", f"cannot run: {why}" if why else "can run"] for name, why in found["providers"].items()),
    ]
    if found["tuned"]:
        rows.append(["tuned launches", f"{found['tuned']['launches']} in {found['tuned']['file']}"])
    for name, preference in found["preferences"].items():
        value = preference["value"]
        text = (", ".join(value) or "nothing") if isinstance(value, list) else value
        rows.append([f"preferred {name}", f"{text} ({preference['from']})"])
    print(tabulate(rows, tablefmt="plain", disable_numparse=True))


# ---- bench -------------------------------------------------------------------------------------------------------


def _add_bench(commands: Any) -> None:
    summary = "measure against plain Inductor on this GPU"
    kinds = commands.add_parser("bench", help=summary, description=summary).add_subparsers(
        required=True, metavar="<what>"
    )
    ops = _command(kinds, "ops", bench_ops.command, "every fused op, by the Triton kernels, against Inductor's code")
    for name, default, what in (
        ("--hidden", bench_ops.HIDDEN, "sizes of rows; groups of 128 only where 128 divides them"),
        ("--rows", bench_ops.ROWS, "numbers of rows"),
    ):
        text = f"{what} (default: {' '.join(map(str, default))})"
        ops.add_argument(name, type=_positive, nargs="+", default=default, metavar="N", help=text)
    variants = ", ".join(f"'{family} {variant}'" for family, variant in bench_ops.VARIANTS)
    ops.add_argument("--only", default="", metavar="TEXT", help=f"those of {variants} that contain this (default: all)")
    ops.add_argument("--max-autotune", action="store_true", help="time max-autotune too: compiles for much longer")
    ops.add_argument("--reference", action="store_true", help="time the reference in eager PyTorch too")
    ops.add_argument("--json", metavar="FILE", help="write the result")
    ops.add_argument("--plot", metavar="FILE.png", help="draw the result (needs the extra 'bench')")
    ops.add_argument(
        "--from", dest="source", metavar="FILE.json", help="show a result that --json wrote; measures nothing"
    )
    sizes = bench_model.Sizes()
    summary = "a Llama quantised by torchao, compiled by aiter_fusion and by Inductor (needs the extra 'bench')"
    model = _command(kinds, "model", bench_model.command, summary)
    for name, default in (("hidden", sizes.hidden), ("intermediate", sizes.intermediate), ("layers", sizes.layers)):
        model.add_argument(f"--{name}", type=_positive, default=default, metavar="N", help=f"default: {default}")
    text = f"decode-<rows> or prefill-<tokens> (default: {' '.join(bench_model.WORKLOADS)})"
    model.add_argument("--workloads", nargs="+", default=bench_model.WORKLOADS, metavar="NAME", help=text)
    text = f"also the host's time to launch {bench_model.HOST_WORKLOAD}, without CUDA graphs"
    model.add_argument("--host", action="store_true", help=text)
    model.add_argument("--json", metavar="FILE", help="write the result")
    summary = "all-reduce, norm and quantisation on the GPUs of this host, against NCCL and symmetric memory"
    reduce = _command(kinds, "allreduce", bench_allreduce.command, summary)
    reduce.add_argument("--world", type=_positive, metavar="N", help="GPUs (default: all of this host)")
    for name, default in (("--hidden", bench_allreduce.HIDDEN), ("--rows", bench_allreduce.ROWS)):
        text = f"default: {' '.join(map(str, default))}"
        reduce.add_argument(name, type=_positive, nargs="+", default=default, metavar="N", help=text)
    reduce.add_argument("--quick", action="store_true", help="of our ways only the one that is chosen")
    reduce.add_argument("--json", metavar="FILE", help="write the result")


# ---- tune --------------------------------------------------------------------------------------------------------


def _add_tune(commands: Any) -> None:
    summary = "measure how our kernels are launched best on this GPU, and keep that in the user's cache"
    tune = _command(commands, "tune", bench_tune.command, summary)
    text = f"sizes of rows: of norms and of activations (default: {' '.join(map(str, bench_tune.HIDDEN))})"
    tune.add_argument("--hidden", type=_positive, nargs="+", default=bench_tune.HIDDEN, metavar="N", help=text)
    text = "write to this file, which is not used, instead of the user's cache"
    tune.add_argument("--output", metavar="FILE.json", help=text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
