"""``bench ops``: every fused op against Inductor's code for the same arithmetic, and against copying the same bytes.

Ours is the op as a compiled graph runs it, Inductor's is ``torch.compile`` of the op's reference. Both are timed in
CUDA graphs of many calls. With few rows all calls take one set of inputs, which stays in the L2 cache, where a model's
previous kernel would have left it; with more rows they rotate over more memory than the cache holds.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import Tensor

from .. import families  # noqa: F401  (importing it registers ops)
from ..formats import FORMATS, FP8, Format, format_of
from ..op import FusedOp
from ..passes.verify import difference
from ..providers import PROVIDERS
from ..providers.triton.jit import native_fp8
from ..registry import REGISTRY
from ..stage import Setting
from ..stages.quantise import Granularity
from ..tables import plain, table
from .timing import Conditions, Refused, alternate, capture, check_folder, conditions, need, need_gpu, progress

# A word that is no feature of the op is the activation.
VARIANTS = (
    ("rms_norm_quant", "add+group128"),
    ("rms_norm_quant", "group128"),
    ("rms_norm_quant", "add+token"),
    ("rms_norm_quant", "token"),
    ("rms_norm_quant", "tensor"),
    ("rms_norm_quant", "static"),
    ("rms_norm_quant", "static3"),
    ("rms_norm_quant", "add+int8+token"),
    ("rms_norm_quant", "int8+token"),
    ("rms_norm_quant", "add+mxfp8+group32"),
    ("rms_norm_quant", "mxfp8+group32"),
    ("act_mul_quant", "group128"),
    ("act_mul_quant", "packed+group128"),
    ("act_mul_quant", "token"),
    ("act_mul_quant", "packed+token"),
    ("act_mul_quant", "tensor"),
    ("act_mul_quant", "int8+token"),
    ("act_mul_quant", "packed+int8+token"),
    ("act_mul_quant", "mxfp8+group32"),
    ("act_mul_quant", "packed+mxfp8+group32"),
    ("act_quant", "gelu_tanh+int8+token"),
    ("act_quant", "gelu_tanh+mxfp8+group32"),
    ("act_mul_quant", "sigmoid+token"),
    ("act_quant", "gelu_tanh+group128"),
    ("act_quant", "gelu_tanh+token"),
    ("act_quant", "gelu+token"),
    ("act_quant", "squared_relu+token"),
    ("layer_norm_quant", "token"),
    ("layer_norm_quant", "add+token"),
    ("layer_norm_quant", "modulate+token"),
    ("layer_norm_quant", "gated_add+modulate+token"),
    ("rms_norm_quant", "modulate+token"),
    ("rms_norm_quant", "gated+token"),
    ("cat_quant", "gelu_tanh+token"),
    ("add_quant", "gated_add+token"),
)
HIDDEN = (2880, 4096, 8192, 14336)
ROWS = (1, 16384)
# Fewer rows than this are timed on one set of inputs.
CACHED_ROWS = 256
# What the sets of inputs must exceed, in sizes of the L2 cache.
CACHES = 3
# A graph has as many calls as take about this long, in seconds, but not more than that; it is replayed this often.
GRAPH_TIME, GRAPH_CALLS, ROUNDS = 1e-3, 200, 15
COPY_ELEMENTS = 1 << 29  # of bfloat16: 1 GiB is read and 1 GiB is written


@dataclass(frozen=True)
class Case:
    """One shape of one variant: the value that is quantised is ``[rows, hidden]``, of bfloat16."""

    family: str
    variant: str
    hidden: int
    rows: int

    def __str__(self) -> str:
        return f"{self.family} {self.variant} hidden {self.hidden} rows {self.rows}"

    @property
    def op(self) -> FusedOp:
        """The overload that computes it."""
        found = REGISTRY.overload(self.family, frozenset(self.variant.split("+")))
        assert found is not None
        return found

    def format(self, fp8: torch.dtype) -> Format:
        """What it quantises to: ``fp8`` where the variant names no other format."""
        words = self.variant.split("+")
        return next((format for format in FORMATS if format.word() in words), format_of(fp8))

    def arguments(self, device: str, fp8: torch.dtype = FP8[0]) -> dict[str, Any]:
        """The op's arguments by name, in order, as models give them."""
        words, typical = self.variant.split("+"), self.op.typical
        assert typical is not None
        return typical(Setting(self.rows, self.hidden, device, words[-1], self.format(fp8), frozenset(words)))

    @property
    def bytes(self) -> int:
        """What one call must move: every input and every output once."""
        arguments = self.arguments("meta")
        inputs = [value for value in arguments.values() if isinstance(value, Tensor)]
        return sum(tensor.nbytes for tensor in [*inputs, *self.op.allocate(**arguments).values()])

    def sets(self, cache: int) -> int:
        """How many sets of inputs the calls rotate over, for an L2 cache of that many bytes."""
        return 1 if self.rows < CACHED_ROWS else math.ceil(CACHES * cache / self.bytes)

    def calls(self, sets: int, rate: float) -> int:
        """How many calls a graph has; each set has its turn equally often. ``rate``: bytes a second of a copy."""
        wanted = min(GRAPH_CALLS, GRAPH_TIME / (2e-6 + self.bytes / rate))
        return max(1, math.ceil(wanted / sets)) * sets


@dataclass(frozen=True)
class Row:
    """Times of one case in microseconds a call; ``bytes`` moved once. None: not measured."""

    family: str
    variant: str
    hidden: int
    rows: int
    bytes: int
    ours_us: float
    inductor_us: float
    max_autotune_us: float | None = None
    reference_us: float | None = None

    @property
    def ratio(self) -> float:
        """Our time over Inductor's."""
        return self.ours_us / self.inductor_us


@dataclass(frozen=True)
class Result:
    """What ``bench ops`` measured.

    copy_rate: bytes a second, read and written, of negating 1 GiB of bfloat16.
    refused:   the cases that are not in ``rows``, and why.
    seconds:   that measuring took, compilation included.
    """

    conditions: Conditions
    copy_rate: float
    rows: tuple[Row, ...]
    refused: tuple[str, ...]
    seconds: float

    def copies(self, row: Row, microseconds: float) -> float:
        """A time as a multiple of what copying takes for the row's bytes."""
        return microseconds * 1e-6 * self.copy_rate / row.bytes

    def __str__(self) -> str:
        """The conditions, a table, and the geometric mean of ours / Inductor for each number of rows."""
        columns: dict[str, tuple[str, list[Any]]] = {
            "op": ("", [row.family for row in self.rows]),
            "variant": ("", [row.variant for row in self.rows]),
            "hidden": ("d", [row.hidden for row in self.rows]),
            "rows": ("d", [row.rows for row in self.rows]),
            "MB": (".3f", [row.bytes * 1e-6 for row in self.rows]),
            "ours us": (".2f", [row.ours_us for row in self.rows]),
            "Inductor us": (".2f", [row.inductor_us for row in self.rows]),
            "max-autotune us": (".2f", [row.max_autotune_us for row in self.rows]),
            "reference us": (".2f", [row.reference_us for row in self.rows]),
            "ours / copy": (".2f", [self.copies(row, row.ours_us) for row in self.rows]),
            "ours / Inductor": (".3f", [row.ratio for row in self.rows]),
        }
        shown = {name: column for name, column in columns.items() if any(value is not None for value in column[1])}
        cells = [["" if value is None else f"{value:{style}}" for value in values] for style, values in shown.values()]
        rows = list(zip(*cells, strict=True))
        drawn = plain(table(list(shown), rows, left=("op", "variant")))
        by_rows = {rows: [row.ratio for row in self.rows if row.rows == rows] for rows in {r.rows for r in self.rows}}
        means = [f"{rows} rows {statistics.geometric_mean(by_rows[rows]):.3f}" for rows in sorted(by_rows)]
        return "\n".join(
            [
                str(self.conditions),
                f"copy rate {self.copy_rate * 1e-12:.2f} TB/s (read and written); measured in {self.seconds:.0f} s",
                "",
                drawn,
                "",
                f"ours / Inductor, geometric mean: {', '.join(means)}",
            ]
        )

    def to_json(self) -> str:
        """A JSON object with the fields of this class."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Result:
        """The inverse of ``to_json``; a ValueError if the text is something else."""
        try:
            content = json.loads(text)
            return Result(
                conditions=Conditions(**content["conditions"]),
                copy_rate=content["copy_rate"],
                rows=tuple(Row(**row) for row in content["rows"]),
                refused=tuple(content["refused"]),
                seconds=content["seconds"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"not a result that 'bench ops --json' wrote: {error!r}") from error

    def plot(self, path: str) -> None:
        """Bars of multiples of the time of a copy, ours and Inductor's, one panel for each number of rows."""
        figure_class = need("matplotlib.figure").Figure
        panels = sorted({row.rows for row in self.rows})
        widest = max((sum(row.rows == rows for row in self.rows) for rows in panels), default=1)
        figure = figure_class(figsize=(max(8.0, 0.32 * widest + 2), 3.2 * len(panels) + 0.8), layout="constrained")
        for axes, rows in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
            shown = [row for row in self.rows if row.rows == rows]
            places = range(len(shown))
            for shift, name, colour in ((-0.2, "ours", "#0072B2"), (0.2, "Inductor", "#E69F00")):
                times = [row.ours_us if name == "ours" else row.inductor_us for row in shown]
                heights = list(map(self.copies, shown, times))
                axes.bar([place + shift for place in places], heights, 0.4, label=name, color=colour)
            axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
            axes.set_xticks(places, [f"{row.family.split('_')[0]} {row.variant} {row.hidden}" for row in shown])
            axes.tick_params(axis="x", rotation=90, labelsize=7)
            axes.set_ylabel("times a copy")
            axes.set_title(f"{rows} row{'s' * (rows != 1)}", fontsize=9)
            axes.margins(x=0.01)
        figure.axes[0].legend(fontsize=8)
        about = self.conditions
        figure.suptitle(
            f"{about.device}, torch {about.torch}, triton {about.triton}, {about.date[:10]}; dashed: copying the same "
            f"bytes at {self.copy_rate * 1e-12:.2f} TB/s",
            fontsize=9,
        )
        figure.savefig(path, dpi=120)


def cases(hidden: Iterable[int] = HIDDEN, rows: Iterable[int] = ROWS, only: str = "") -> list[Case]:
    """All cases of these sizes whose ``<op> <variant>`` contains ``only``; groups only where they divide rows.

    Raises:
        ValueError: there is none.
    """
    hidden, rows = tuple(hidden), tuple(rows)
    chosen = [(family, variant) for family, variant in VARIANTS if only in f"{family} {variant}"]
    if not chosen:
        known = ", ".join(f"{family} {variant}" for family, variant in VARIANTS)
        raise ValueError(f"--only {only!r}: no variant's name contains that; there are {known}")
    made = [
        Case(family, variant, width, count)
        for family, variant in chosen
        for width in hidden
        if width % (Granularity.parse(variant.split("+")[-1], width).block or 1) == 0
        for count in rows
    ]
    if not made:
        raise ValueError(f"--hidden {' '.join(map(str, hidden))}: groups need a hidden size that they divide")
    return made


def functions(op: FusedOp, arguments: dict[str, Any], provider: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The op by a provider, and its reference, as functions of the tensors alone that return the outputs in order."""
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    constants = {name: value for name, value in arguments.items() if name not in tensors}

    def fused(*given: Tensor) -> Any:
        named = constants | dict(zip(tensors, given, strict=True))
        return op.target(*[named[name] for name in op.arguments], provider)

    def reference(*given: Tensor) -> Any:
        return op.pack(op.reference(**constants, **dict(zip(tensors, given, strict=True))))

    return fused, reference


def bench(chosen: Sequence[Case], *, max_autotune: bool, reference: bool, command: str) -> Result:
    """Measure the cases on the current GPU.

    Args:
        max_autotune: time Inductor's ``max-autotune-no-cudagraphs`` too; reference: the reference run eagerly too.
        command: what to note as the source of the result.

    Raises:
        RuntimeError: there is no GPU, or our kernels cannot run on it.
    """
    need_gpu("; --from FILE shows a saved result")
    if missing := PROVIDERS["triton"].missing():
        raise RuntimeError(f"our kernels cannot run here: {missing}")
    PROVIDERS["triton"].prepare()
    started, rows, refused = time.perf_counter(), [], []
    # Inductor's caches know the graph, which has the op's name, but not the kernels that stand for it
    with torch.no_grad(), inductor_config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lru_cache")  # the references parse their programs
        rate = copy_rate()
        for case in progress(chosen, "bench ops"):
            try:
                rows.append(_measure(case, rate, max_autotune, reference))
            except Refused as problem:
                refused.append(f"{case}: {problem}")
    return Result(conditions(command), rate, tuple(rows), tuple(refused), time.perf_counter() - started)


def copy_rate() -> float:
    """Bytes a second, read and written, of negating 1 GiB of bfloat16 on the current GPU."""
    source = torch.randn(COPY_ELEMENTS, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    calls = 4
    graph = capture(lambda: torch.neg(source, out=target), [()], calls)
    (microseconds,) = alternate([graph.replay], ROUNDS)
    return calls * 2 * source.nbytes / (microseconds * 1e-6)


def _measure(case: Case, rate: float, max_autotune: bool, eager: bool) -> Row:
    torch._dynamo.reset()
    fp8 = native_fp8(torch.cuda.current_device()) or torch.float8_e4m3fn
    count = case.sets(torch.cuda.get_device_properties().L2_cache_size)
    sets = [case.arguments("cuda", fp8) for _ in range(count)]
    if reason := PROVIDERS["triton"].why_not(case.op, sets[0]):
        raise Refused(reason)
    fused, reference = functions(case.op, sets[0], "triton")
    options: dict[str, Any] = {"dynamic": False, "fullgraph": True}
    runs = {"ours_us": torch.compile(fused, **options), "inductor_us": torch.compile(reference, **options)}
    if max_autotune:
        runs["max_autotune_us"] = torch.compile(reference, mode="max-autotune-no-cudagraphs", **options)
    if eager:
        runs["reference_us"] = reference
    tensors = [tuple(value for value in given.values() if isinstance(value, Tensor)) for given in sets]
    verify(case.op, outputs(runs["ours_us"](*tensors[0])), outputs(reference(*tensors[0])))
    calls = case.calls(count, rate)
    graphs = [capture(run, tensors, calls) for run in runs.values()]
    times = alternate([graph.replay for graph in graphs], ROUNDS)
    measured = {name: microseconds / calls for name, microseconds in zip(runs, times, strict=True)}
    return Row(case.family, case.variant, case.hidden, case.rows, case.bytes, **measured)


def outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def verify(op: FusedOp, ours: Sequence[Tensor], reference: Sequence[Tensor]) -> None:
    """Refuse to time results that differ from the reference's by more than the op's tolerance allows.

    Inductor's results are no measure: it drops roundings, and where a sum cancels, that is any number of codes.
    """
    for name, have, want in zip(op.outputs, ours, reference, strict=True):
        if have.dtype != want.dtype or have.shape != want.shape:
            raise Refused(
                f"{name} is {have.dtype} {tuple(have.shape)}, the reference's {want.dtype} {tuple(want.shape)}"
            )
        if problem := difference(op, PROVIDERS["triton"], name, want, have):
            raise Refused(f"ours differs from the reference: {name}: {problem}")


def command(args: Any) -> None:
    """``bench ops``: measure or read a result, print it, write what was asked for."""
    if args.plot:
        need("matplotlib")
    for path in (args.json, args.plot):
        check_folder(path)
    if args.source:
        result = Result.from_json(Path(args.source).read_text())
    else:
        chosen = cases(args.hidden, args.rows, args.only)
        result = bench(chosen, max_autotune=args.max_autotune, reference=args.reference, command=args.command_line)
    print(result)
    if args.json:
        Path(args.json).write_text(result.to_json() + "\n")
    if args.plot and result.rows:
        result.plot(args.plot)
    for line in result.refused:
        print(f"not compared: {line}", file=sys.stderr)
    if result.refused and not args.source:
        raise Refused(f"{len(result.refused)} of {len(result.refused) + len(result.rows)} cases were not compared")
