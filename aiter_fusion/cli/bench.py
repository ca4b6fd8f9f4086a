"""``aiter-fusion bench``: the benchmarks, each of which is imported when it is named."""

from __future__ import annotations

from .parser import Parser, Run, add_command, positive


def fill(parser: Parser) -> None:
    """Add one command for each benchmark."""
    kinds = parser.add_subparsers(required=True, metavar="<what>")
    summary = "time every fused op, by the Triton kernels, against Inductor's code for the same arithmetic"
    add_command(kinds, "ops", summary, _fill_ops, "aiter-fusion bench ops --rows 1 64 --only token --json ops.json")
    summary = "time a Llama quantised by torchao, compiled by both backends (needs the extra 'bench')"
    add_command(kinds, "model", summary, _fill_model, "aiter-fusion bench model --decode 1 32 --context 1024")
    summary = "time FP8 products of few rows, by the Triton kernels, against torch._scaled_mm"
    add_command(kinds, "linear", summary, _fill_linear, "aiter-fusion bench linear --rows 1 16")
    summary = (
        "time attention of one token over a cache, by the Triton kernels, against Inductor's code for transformers"
    )
    add_command(
        kinds, "attention", summary, _fill_attention, "aiter-fusion bench attention --batches 1 32 --contexts 1024"
    )
    summary = "time all-reduce, norm and quantiser on this host's GPUs, against NCCL and symmetric memory"
    add_command(kinds, "allreduce", summary, _fill_allreduce, "aiter-fusion bench allreduce --world 2 --quick")


def _fill_ops(parser: Parser) -> Run:
    from ..bench import ops

    for name, default, what in (
        ("--hidden", ops.HIDDEN, "hidden sizes; sizes that 128 does not divide get no groups of 128"),
        ("--rows", ops.ROWS, "numbers of rows"),
    ):
        text = f"{what} (default: {' '.join(map(str, default))})"
        parser.add_argument(name, type=positive, nargs="+", default=default, metavar="N", help=text)
    variants = ", ".join(f"'{family} {variant}'" for family, variant in ops.VARIANTS)
    text = f"time only variants whose name contains TEXT: {variants} (default: all)"
    parser.add_argument("--only", default="", metavar="TEXT", help=text)
    parser.add_argument("--max-autotune", action="store_true", help="also time max-autotune, which compiles for longer")
    parser.add_argument("--reference", action="store_true", help="also time the reference in eager PyTorch")
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the result (needs the extra 'bench')")
    text = "show a result that --json wrote, and measure nothing"
    parser.add_argument("--from", dest="source", metavar="FILE.json", help=text)
    return ops.command


def _fill_model(parser: Parser) -> Run:
    from ..bench import decode, model

    sizes = model.Sizes()
    for name, default in (("hidden", sizes.hidden), ("intermediate", sizes.intermediate), ("layers", sizes.layers)):
        parser.add_argument(f"--{name}", type=positive, default=default, metavar="N", help=f"default: {default}")
    text = f"decode-<rows> or prefill-<tokens> (default: {' '.join(model.WORKLOADS)})"
    parser.add_argument("--workloads", nargs="+", default=model.WORKLOADS, metavar="NAME", help=text)
    text = f"also measure the time that the host needs to launch {model.HOST_WORKLOAD} without CUDA graphs"
    parser.add_argument("--host", action="store_true", help=text)
    text = f"time one token of N sequences over a static cache instead (default: {' '.join(map(str, decode.BATCHES))})"
    parser.add_argument("--decode", type=positive, nargs="*", metavar="N", help=text)
    text = "with --decode: how many tokens the cache holds, all but the last filled"
    parser.add_argument("--context", type=positive, metavar="N", help=f"{text} (default: {decode.CONTEXT})")
    text = "with --decode: also time max-autotune, which compiles for minutes"
    parser.add_argument("--max-autotune", action="store_true", help=text)
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON")
    return lambda args: model.command(args) if args.decode is None else decode.command(args)


def _fill_linear(parser: Parser) -> Run:
    from ..bench import linear

    text = f"K of a value, and N of each layer that reads it (default: {' '.join(linear.SIZES)})"
    parser.add_argument("--sizes", nargs="+", default=linear.SIZES, metavar="KxN,N", help=text)
    text = f"numbers of rows (default: {' '.join(map(str, linear.ROWS))})"
    parser.add_argument("--rows", type=positive, nargs="+", default=linear.ROWS, metavar="N", help=text)
    parser.add_argument("--precise", action="store_true", help="add up as use_fast_accum=False does, on both sides")
    parser.add_argument("--max-autotune", action="store_true", help="also time max-autotune, which compiles for longer")
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON")
    return linear.command


def _fill_attention(parser: Parser) -> Run:
    from ..bench import attention

    for name, default, what in (
        ("--batches", attention.BATCHES, "numbers of sequences"),
        ("--contexts", attention.CONTEXTS, "keys in the cache of a sequence"),
        ("--groups", attention.GROUPS, f"heads of queries, of {attention.HEADS}, that share one of keys"),
    ):
        text = f"{what} (default: {' '.join(map(str, default))})"
        parser.add_argument(name, type=positive, nargs="+", default=default, metavar="N", help=text)
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON")
    return attention.command


def _fill_allreduce(parser: Parser) -> Run:
    from ..bench import allreduce

    parser.add_argument("--world", type=positive, metavar="N", help="number of GPUs (default: all of this host)")
    for name, default, what in (("--hidden", allreduce.HIDDEN, "hidden sizes"), ("--rows", allreduce.ROWS, "rows")):
        text = f"{what} (default: {' '.join(map(str, default))})"
        parser.add_argument(name, type=positive, nargs="+", default=default, metavar="N", help=text)
    text = "of our algorithms, time only the one that the size selects"
    parser.add_argument("--quick", action="store_true", help=text)
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON")
    return allreduce.command
