"""The command line: ``aiter-fusion <command>``, or ``python -m aiter_fusion <command>``.

Results go to standard output, all else to standard error. Exit status: 0; 1 if a comparison was refused because it
would say nothing true, if other counts were expected, or if ``--strict`` found a skipped site; 2 for an error, which is
one line (``--debug``: the traceback). ``run`` leaves standard output to the script, and ends as the script does.
Colours are for terminals, unless ``NO_COLOR`` is set.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as python_platform
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import torch

from . import __version__, config, machine
from .registry import REGISTRY

if TYPE_CHECKING:
    from .report import FusionReport

PROGRAM = "aiter-fusion"


class _Parser(argparse.ArgumentParser):
    """Errors are one line, as all others are, and no option may be abbreviated.

    A command's arguments are added by ``fill`` when that command is given, so that only what it needs is imported:
    the compiler takes longer to import than PyTorch.
    """

    fill: Callable[[Any], None] | None = None

    def __init__(self, **given: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **given})

    def parse_known_args(self, *args: Any, **given: Any) -> Any:
        if self.fill is not None:
            self.fill(self)
            self.fill = None
        return super().parse_known_args(*args, **given)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status; a bad option raises SystemExit with it."""
    try:
        return _main(sys.argv[1:] if argv is None else list(argv))
    except BrokenPipeError:
        if not _readers_gone():
            raise
        return 128 + signal.SIGPIPE  # as of a program that this signal ends, without a word


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
        from .bench.timing import Refused

        cause = getattr(error, "inner_exception", error)  # what a backend raises comes wrapped
        said = [line.strip() for line in str(cause).splitlines() if line.strip()][:1]
        if not said or not isinstance(cause, (ValueError, RuntimeError, OSError)):
            said = [type(cause).__name__, *said]
        _complain(": ".join(said))
        return 1 if isinstance(cause, Refused) else 2
    return status or 0


def _readers_gone() -> bool:
    """Whether nobody reads our output any more, as after ``| head``; then the rest of it goes nowhere."""
    gone = False
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            gone = True
    return gone


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="<command>")
    summary = "run a Python script with every torch.compile that names no other backend going through aiter_fusion"
    _command(commands, "run", summary, _fill_run)
    summary = "compile a model, run it once, and show what was fused, what was not, and why"
    _command(commands, "explain", summary, _fill_explain)
    _command(commands, "info", "what this machine can run, and what the environment prefers", _fill_info)
    summary = "measure against plain Inductor on this GPU"
    bench = commands.add_parser("bench", help=summary, description=summary)
    kinds = bench.add_subparsers(required=True, metavar="<what>")
    summary = "every fused op, by the Triton kernels, against Inductor's code"
    _command(kinds, "ops", summary, _fill_bench_ops)
    summary = "a Llama quantised by torchao, compiled by aiter_fusion and by Inductor (needs the extra 'bench')"
    _command(kinds, "model", summary, _fill_bench_model)
    summary = "FP8 products of few rows, by the Triton kernels, against torch._scaled_mm"
    _command(kinds, "linear", summary, _fill_bench_linear)
    summary = "all-reduce, norm and quantisation on the GPUs of this host, against NCCL and symmetric memory"
    _command(kinds, "allreduce", summary, _fill_bench_allreduce)
    summary = "measure how our kernels are launched best on this GPU, and keep that in the user's cache"
    _command(commands, "tune", summary, _fill_tune)
    return parser


def _command(commands: Any, name: str, summary: str, fill: Callable[[_Parser], None]) -> None:
    """A command, whose ``fill`` adds its arguments and sets the function that runs it."""
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.fill = fill


# Words of reports and errors, and their colours.
COLOURS = {"replaced": 32, "skipped": 33, "bare": 2, "error:": 31, "cannot run": 33, "can run": 32}


def _painted(text: str, stream: TextIO) -> str:
    """The text with colours, if the stream is a terminal and https://no-color.org does not forbid it."""
    if os.environ.get("NO_COLOR") or not stream.isatty():
        return text
    words = "|".join(map(re.escape, COLOURS))
    coloured = rf"^({words})(?=  )|(?<=: )(error:)|(?<=  )(cannot run|can run)"
    return re.sub(coloured, lambda m: f"\x1b[{COLOURS[m[0]]}m{m[0]}\x1b[0m", text, flags=re.MULTILINE)


def _show(text: str, stream: TextIO | None) -> None:
    """Print, also what the stream's encoding lacks; a stream that is closed takes nothing."""
    if stream is not None:
        encoding = stream.encoding or "utf-8"
        said = _painted(text, stream).encode(encoding, "backslashreplace").decode(encoding)
        print(said, file=stream, flush=True)


def _complain(problem: str) -> None:
    _show(f"{PROGRAM}: error: {problem}", sys.stderr)


# ---- run and explain ---------------------------------------------------------------------------------------------


def _add_options(parser: Any) -> None:
    """The backend's options, and what to do with the report."""
    from .patterns import fusions  # noqa: F401  (importing it registers them)

    levels = "; ".join(f"{level}: {what}" for level, what in config.LEVELS.items())
    text = f"{levels} (default: AITER_FUSION_LEVEL, else {config.DEFAULT_LEVEL})"
    parser.add_argument("-O", dest="level", type=int, choices=config.LEVELS, metavar="LEVEL", help=text)
    text = "what computes the fused ops (default: AITER_FUSION_PROVIDER, else auto)"
    parser.add_argument("--provider", choices=("auto", *REGISTRY.providers), help=text)
    text = "exact: only what keeps the graph's sequence of roundings; kernel: a kernel's own (default: by the level)"
    parser.add_argument("--numerics", choices=config.NUMERICS, help=text)
    parser.add_argument("--strict", action="store_true", help="fail if a site is skipped, or if matching raises")
    text = "while compiling, compare every fused op with the nodes it replaces, on random data"
    parser.add_argument("--verify", action="store_true", help=text)
    for name, what in (("disable", "without"), ("enable", "with")):
        text = f"{what} this fusion, whatever the level (repeatable): {', '.join(REGISTRY.family_names)}"
        choices = REGISTRY.family_names
        parser.add_argument(f"--{name}", action="append", default=[], choices=choices, metavar="FAMILY", help=text)
    text = "how many sites must be replaced, in all graphs together; else the status is 1 (repeatable)"
    parser.add_argument("--expect", type=_expected, action="append", default=[], metavar="FAMILY=N", help=text)
    text = "write the report; an HTML report shows the graphs, which are compiled anew for it"
    parser.add_argument("--report", type=_report_path, metavar="FILE.{json,html}", help=text)
    parser.add_argument("--json", action="store_true", help="show the report as a line of JSON, not as a table")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of the options of ``aiter_fusion.Backend``; ``expect`` is not: it is of all graphs together."""
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


def _tell(made: FusionReport, args: argparse.Namespace, stream: TextIO | None) -> None:
    """Show and save a report as the options say."""
    from . import report

    if args.report:
        if args.report.endswith(".html"):
            made.to_html(args.report)
        else:
            report.write(args.report, made.to_json() + "\n")
    _show(made.to_json() if args.json else str(made), stream)


def _unexpected(made: FusionReport, args: argparse.Namespace) -> int:
    """1, and a line that says so, if other counts were expected."""
    wrong = [f"{family}={count}" for family, count in args.expect if made.replaced.get(family, 0) != count]
    if wrong:
        found = ", ".join(f"{family}={made.replaced.get(family, 0)}" for family, _ in args.expect)
        _complain(f"expected {', '.join(wrong)}, found {found}")
    return 1 if wrong else 0


def _fill_run(run: _Parser) -> None:
    _add_options(run)
    run.add_argument("-m", dest="as_module", action="store_true", help="SCRIPT is a module, run as python -m does")
    run.add_argument("script", help="a Python script; what follows are its own arguments")
    arguments = run.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments.required = False  # which Python 3.11 says of it, so that an error would ask for them
    run.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from . import journal, report
    from .backend import Backend, reports
    from .run import default_backend, run_script

    chosen = _options(args)
    backend = Backend(**chosen)
    # Preferences also hold for processes of the script's, and for compilers that name this backend.
    preferred = {"level": args.level, "provider": args.provider, "disable": ",".join(sorted(backend.options.disable))}
    os.environ |= {f"AITER_FUSION_{name.upper()}": str(value) for name, value in preferred.items() if value is not None}
    graphs = bool(args.report) and args.report.endswith(".html")
    with default_backend(backend), journal.recording(graphs):
        status = run_script(args.script, args.arguments, args.debug, as_module=args.as_module)
    compiled = reports()
    made = report.merge(compiled)
    if os.environ.get("RANK", "0") == "0":  # torchrun's: by now the script may have left its process group
        _show(f"\n{PROGRAM}: graphs compiled by aiter_fusion: {len(compiled)}", sys.stderr)
        if not compiled:
            _show("(nothing that torch.compile returned was called, or another backend was named)", sys.stderr)
        _tell(made, args, sys.stderr)
    return status or _unexpected(made, args)


def _fill_explain(command: _Parser) -> None:
    _add_options(command)
    text = "a function without arguments that returns (model, args) or (model, args, kwargs)"
    command.add_argument("factory", metavar="MODULE:CALLABLE", help=text)
    command.set_defaults(run=_explain)


def _explain(args: argparse.Namespace) -> int:
    from torch._dynamo.exc import BackendCompilerFailed

    from .backend import FusionError, explain, reports
    from .report import merge

    model, inputs, keywords = _example(args.factory)
    known = len(reports())
    try:
        made = explain(model, inputs, keywords, **_options(args))
    except BackendCompilerFailed as error:
        if not isinstance(error.inner_exception, FusionError):
            raise
        _tell(merge(reports()[known:]), args, sys.stdout)
        _complain(str(error.inner_exception).partition("\n")[0])
        return 1
    _tell(made, args, sys.stdout)
    return _unexpected(made, args)


def _example(factory: str) -> tuple[Callable[..., Any], Sequence[Any], dict[str, Any]]:
    """The model that a factory makes, and what to call it with."""
    module_name, colon, name = factory.partition(":")
    if not (module_name and colon and name):
        raise ValueError(f"{factory!r} is not MODULE:CALLABLE, e.g. my_models:tiny_llama")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    made = attrgetter(name)(import_module(module_name))()
    if isinstance(made, tuple) and len(made) in (2, 3) and callable(made[0]) and isinstance(made[1], (tuple, list)):
        return made[0], made[1], (made[2] if len(made) == 3 else {})
    raise ValueError(f"{factory} returned {type(made).__name__}; it must return (model, args) or (model, args, kwargs)")


# ---- info --------------------------------------------------------------------------------------------------------


def _fill_info(info: _Parser) -> None:
    info.add_argument("--json", action="store_true", help="print a JSON object")
    info.set_defaults(run=_print_info)


def information() -> dict[str, Any]:
    """What ``info`` prints.

    ``providers``: name -> why it cannot run here, or None. ``preferences``: name -> its value, and the environment
    variable that it comes from or ``default``. ``fusions``: family -> why it is off by these preferences, or None.
    ``backend_by_name``: whether ``backend="aiter_fusion"`` works, which needs an installation.

    Raises:
        ValueError: the environment prefers something that does not exist.
    """
    from .patterns import fusions  # noqa: F401  (importing it registers them)
    from .providers import PROVIDERS
    from .providers.aiter import installation
    from .providers.triton import tuned
    from .providers.triton.jit import native_fp8

    gpu = torch.cuda.is_available()
    device = torch.cuda.current_device() if gpu else 0
    capability = "".join(map(str, torch.cuda.get_device_capability(device))) if gpu else ""
    native = native_fp8(device) if gpu else None
    chosen = config.options()
    return {
        "aiter_fusion": __version__,
        "backend_by_name": bool(entry_points(group="torch_dynamo_backends", name="aiter_fusion")),
        "python": python_platform.python_version(),
        "torch": torch.__version__,
        "triton": machine.triton_version(),
        "device": torch.cuda.get_device_name(device) if gpu else None,
        "architecture": machine.architecture(device) or (f"sm_{capability}" if gpu else None),
        "native_fp8": str(native).removeprefix("torch.") if native else None,
        "aiter": installation.aiter_version() if installation.is_aiter_found() else None,
        "aiter_supported": installation.is_aiter_found_and_supported(),
        "aiter_reason": installation.why_no_aiter(),
        "providers": {name: provider.missing() for name, provider in PROVIDERS.items()},
        "tuned": {"file": str(tuned.path()), "launches": len(tuned.choices())} if tuned.path() else None,
        "preferences": _preferences(chosen),
        "fusions": {fusion.family: chosen.why_not(fusion.family, 1) for fusion in REGISTRY.fusions.values()},
    }


def _preferences(chosen: config.Options) -> dict[str, dict[str, Any]]:
    effective = {
        "level": chosen.level,
        "provider": chosen.provider,
        "disable": sorted(chosen.disable),
        "log": os.environ.get("AITER_FUSION_LOG", "").upper() or "INFO",
        **{name.lower(): config.preference(name) for name in config.PREFERENCES},
    }
    found = {
        name: {"value": value, "from": variable if os.environ.get(variable) else "default"}
        for name, value in effective.items()
        for variable in [f"AITER_FUSION_{name.upper()}"]
    }
    numerics = "kernel" if chosen.allows_kernel_numerics else "exact"
    return found | {"numerics": {"value": numerics, "from": f"level {chosen.level}"}}


def _print_info(args: argparse.Namespace) -> None:
    from tabulate import tabulate

    found = information()
    if args.json:
        _show(json.dumps(found, indent=1), sys.stdout)
        return
    nothing = "none: PyTorch sees no GPU"
    rows = [
        ["aiter_fusion", found["aiter_fusion"]],
        ["python", found["python"]],
        ["torch", found["torch"]],
        ["backend='aiter_fusion'", "works" if found["backend_by_name"] else "needs pip install; Backend() works"],
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
        if isinstance(value, bool):
            text = "on" if value else "off"
        else:
            text = (", ".join(value) or "nothing") if isinstance(value, list) else value
        rows.append([f"preferred {name}", f"{text} ({preference['from']})"])
    rows += [[f"fusion {family}", f"off: {why}" if why else "on"] for family, why in found["fusions"].items()]
    _show(tabulate(rows, tablefmt="plain", disable_numparse=True), sys.stdout)


# ---- bench -------------------------------------------------------------------------------------------------------


def _fill_bench_ops(ops: _Parser) -> None:
    from .bench import ops as bench

    for name, default, what in (
        ("--hidden", bench.HIDDEN, "sizes of rows; groups of 128 only where 128 divides them"),
        ("--rows", bench.ROWS, "numbers of rows"),
    ):
        text = f"{what} (default: {' '.join(map(str, default))})"
        ops.add_argument(name, type=_positive, nargs="+", default=default, metavar="N", help=text)
    variants = ", ".join(f"'{family} {variant}'" for family, variant in bench.VARIANTS)
    ops.add_argument("--only", default="", metavar="TEXT", help=f"those of {variants} that contain this (default: all)")
    ops.add_argument("--max-autotune", action="store_true", help="time max-autotune too: compiles for much longer")
    ops.add_argument("--reference", action="store_true", help="time the reference in eager PyTorch too")
    ops.add_argument("--json", metavar="FILE", help="write the result")
    ops.add_argument("--plot", metavar="FILE.png", help="draw the result (needs the extra 'bench')")
    text = "show a result that --json wrote; measures nothing"
    ops.add_argument("--from", dest="source", metavar="FILE.json", help=text)
    ops.set_defaults(run=bench.command)


def _fill_bench_model(model: _Parser) -> None:
    from .bench import model as bench

    sizes = bench.Sizes()
    for name, default in (("hidden", sizes.hidden), ("intermediate", sizes.intermediate), ("layers", sizes.layers)):
        model.add_argument(f"--{name}", type=_positive, default=default, metavar="N", help=f"default: {default}")
    text = f"decode-<rows> or prefill-<tokens> (default: {' '.join(bench.WORKLOADS)})"
    model.add_argument("--workloads", nargs="+", default=bench.WORKLOADS, metavar="NAME", help=text)
    text = f"also the host's time to launch {bench.HOST_WORKLOAD}, without CUDA graphs"
    model.add_argument("--host", action="store_true", help=text)
    text = f"one token over a static cache instead of the workloads, for so many sequences (default: {bench.BATCHES})"
    model.add_argument("--decode", type=_positive, nargs="*", metavar="N", help=text)
    text = "with --decode: compare with max-autotune too, which compiles for minutes"
    model.add_argument("--max-autotune", action="store_true", help=text)
    model.add_argument("--json", metavar="FILE", help="write the result")
    model.set_defaults(run=bench.command)


def _fill_bench_linear(linear: _Parser) -> None:
    from .bench import linear as bench

    text = f"K of the value, and the N of all layers that read it (default: {' '.join(bench.SIZES)})"
    linear.add_argument("--sizes", nargs="+", default=bench.SIZES, metavar="KxN,N", help=text)
    text = f"numbers of rows (default: {' '.join(map(str, bench.ROWS))})"
    linear.add_argument("--rows", type=_positive, nargs="+", default=bench.ROWS, metavar="N", help=text)
    linear.add_argument("--precise", action="store_true", help="sums as of use_fast_accum=False, on both sides")
    linear.add_argument("--max-autotune", action="store_true", help="time max-autotune too: compiles for much longer")
    linear.add_argument("--json", metavar="FILE", help="write the result")
    linear.set_defaults(run=bench.command)


def _fill_bench_allreduce(reduce: _Parser) -> None:
    from .bench import allreduce as bench

    reduce.add_argument("--world", type=_positive, metavar="N", help="GPUs (default: all of this host)")
    for name, default in (("--hidden", bench.HIDDEN), ("--rows", bench.ROWS)):
        text = f"default: {' '.join(map(str, default))}"
        reduce.add_argument(name, type=_positive, nargs="+", default=default, metavar="N", help=text)
    reduce.add_argument("--quick", action="store_true", help="of our ways only the one that is chosen")
    reduce.add_argument("--json", metavar="FILE", help="write the result")
    reduce.set_defaults(run=bench.command)


# ---- tune --------------------------------------------------------------------------------------------------------


def _fill_tune(tune: _Parser) -> None:
    from .bench import tune as bench

    text = f"sizes of rows: of norms and of activations (default: {' '.join(map(str, bench.HIDDEN))})"
    tune.add_argument("--hidden", type=_positive, nargs="+", default=bench.HIDDEN, metavar="N", help=text)
    text = "measure FP8 products of few rows instead: all their sizes, or K of a value and the N of layers that read it"
    tune.add_argument("--linear", nargs="*", metavar="KxN,N", help=text)
    text = "write to this file, which is not used, instead of the user's cache"
    tune.add_argument("--output", metavar="FILE.json", help=text)
    tune.set_defaults(run=bench.command)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
