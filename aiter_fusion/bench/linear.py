"""``bench linear``: FP8 products of few rows, all layers that read one value in one launch, against separate calls.

Ours is the op as a compiled graph runs it, theirs are the calls of ``torch._scaled_mm`` that the graph had. Both are
timed in CUDA graphs of many calls, in turn, with weights that rotate over more memory than the L2 cache holds.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import Tensor

from ..ops.linear import LINEAR
from ..providers import PROVIDERS
from ..providers.triton.jit import native_fp8
from ..scaled_product import BLOCK
from ..tables import plain, table
from .ops import copy_rate
from .timing import Conditions, Refused, alternate, capture, check_folder, conditions, need_gpu, progress

# The layers of a Llama of 8 and of 70 billion parameters: K x N of the layers that read one value.
SIZES = (
    "4096x4096,1024,1024",
    "4096x4096",
    "4096x14336,14336",
    "14336x4096",
    "8192x8192,1024,1024",
    "8192x28672,28672",
    "28672x8192",
)
ROWS = (1, 16, 64)

# What the weights must exceed, in sizes of the L2 cache.
CACHES = 4
# A graph has at least so many calls; it is replayed this often.
GRAPH_CALLS, ROUNDS = 8, 15
# Columns of the first weight that errors are computed for.
CHECKED = 1024
# Our error to float64 over PyTorch's, at most: sums in another order differ by so much.
WORSE = 1.02


@dataclass(frozen=True)
class Size:
    """Products of one value of K columns with weights of so many rows each."""

    k: int
    ns: tuple[int, ...]

    @staticmethod
    def parse(text: str) -> Size:
        """``<K>x<N>,<N>``; a ValueError says what is wrong."""
        k, cross, ns = text.partition("x")
        numbers = [k, *ns.split(",")]
        if not cross or not all(number.isdecimal() and int(number) > 0 for number in numbers):
            raise ValueError(f"--sizes {text!r}: must be <K>x<N>, or <K>x<N>,<N> for layers that read one value")
        if any(int(number) % 16 for number in numbers) or len(numbers) > 9:
            raise ValueError(f"--sizes {text!r}: FP8 products need multiples of 16, and at most 8 weights")
        return Size(int(k), tuple(map(int, numbers[1:])))

    def __str__(self) -> str:
        return f"{self.k}x{','.join(map(str, self.ns))}"

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return self.k * sum(self.ns)


@dataclass(frozen=True)
class Case:
    """A product, of so many rows; ``fast``: ``use_fast_accum``; ``scales``: row, tensor or block."""

    size: Size
    rows: int
    fast: bool = True
    scales: str = "row"
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.size} rows {self.rows} {'fast' if self.fast else 'precise'}"

    def sets(self, cache: int) -> int:
        """How many sets of weights the calls rotate over, for an L2 cache of that many bytes."""
        return max(2, math.ceil(CACHES * cache / self.size.bytes))

    def arguments(self, device: str, seed: int = 0, fp8: torch.dtype = torch.float8_e4m3fn) -> dict[str, Any]:
        """The op's arguments by name, in order, of random values."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, device=device, generator=generator)

        k, ns = self.size.k, self.size.ns
        blocks = -(-k // BLOCK)
        of_x = {"row": (self.rows, 1), "tensor": (), "block": (self.rows, blocks)}[self.scales]
        of_w = {"row": lambda n: (n, 1), "tensor": lambda n: (), "block": lambda n: (-(-n // BLOCK), blocks)}[
            self.scales
        ]

        def scale(sizes: tuple[int, ...]) -> Tensor:
            return draw(*sizes).abs() + 0.5 if sizes else draw(1).abs().reshape(()) + 0.5

        def of_weight(n: int) -> Tensor:
            found = scale(of_w(n))
            if self.scales != "block":
                return found.t() if found.dim() else found
            # PyTorch's product wants the scales of four blocks of columns together
            padded = torch.zeros(found.shape[0], -(-blocks // 4) * 4, device=device)
            padded[:, :blocks] = found
            return padded[:, :blocks].t()

        x_scale = scale(of_x)
        return {
            "x": (draw(self.rows, k) * 2).to(fp8),
            "weights": [(draw(n, k) * 2).to(fp8).t() for n in ns],
            # by block, the rows' scales of one block of columns lie next to each other, as PyTorch's product wants them
            "x_scale": x_scale.t().contiguous().t() if self.scales == "block" else x_scale,
            "weight_scales": [of_weight(n) for n in ns],
            "biases": [draw(n).to(self.dtype) if self.bias else None for n in ns],
            "dtype": self.dtype,
            "fast_accum": self.fast,
        }


@dataclass(frozen=True)
class Row:
    """Times of one case in microseconds; errors to float64, relative, in the 2-norm. None: not measured.

    floor_us:  of reading the weights once, at the rate of a copy.
    """

    size: str
    rows: int
    fast: bool
    ours_us: float
    separate_us: float
    floor_us: float
    ours_error: float
    separate_error: float
    max_autotune_us: float | None = None

    @property
    def ratio(self) -> float:
        """Our time over that of the separate calls."""
        return self.ours_us / self.separate_us


@dataclass(frozen=True)
class Result:
    """What ``bench linear`` measured; ``copy_rate`` in bytes a second; ``seconds``: that it took."""

    conditions: Conditions
    copy_rate: float
    rows: tuple[Row, ...]
    refused: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        headers = [
            "K x N",
            "rows",
            "sums",
            "ours us",
            "_scaled_mm us",
            "max-autotune us",
            "floor us",
            "ours / _scaled_mm",
        ]
        headers += ["error ours", "error _scaled_mm"]
        lines = [
            [
                row.size,
                str(row.rows),
                "fast" if row.fast else "precise",
                f"{row.ours_us:.2f}",
                f"{row.separate_us:.2f}",
                "" if row.max_autotune_us is None else f"{row.max_autotune_us:.2f}",
                f"{row.floor_us:.2f}",
                f"{row.ratio:.3f}",
                f"{row.ours_error:.2e}",
                f"{row.separate_error:.2e}",
            ]
            for row in self.rows
        ]
        mean = statistics.geometric_mean(row.ratio for row in self.rows) if self.rows else math.nan
        return "\n".join(
            [
                str(self.conditions),
                f"copy rate {self.copy_rate * 1e-12:.2f} TB/s (read and written); measured in {self.seconds:.0f} s",
                "",
                plain(table(headers, lines, left=("K x N", "sums"))),
                "",
                f"ours / _scaled_mm, geometric mean: {mean:.3f}",
            ]
        )

    def to_json(self) -> str:
        """A JSON object with the fields of this class."""
        return json.dumps(asdict(self), indent=1)


def cases(sizes: Iterable[str], rows: Iterable[int], precise: bool) -> list[Case]:
    """All cases of these sizes; a ValueError names a size that is none."""
    return [Case(Size.parse(size), count, not precise) for size in sizes for count in rows]


def bench(chosen: Sequence[Case], *, max_autotune: bool, command: str) -> Result:
    """Measure the cases on the current GPU.

    Args:
        max_autotune: time Inductor's ``max-autotune-no-cudagraphs`` of the separate calls too.
        command: what to note as the source of the result.

    Raises:
        RuntimeError: there is no GPU, or our kernels cannot run on it.
    """
    need_gpu()
    if missing := PROVIDERS["triton"].missing():
        raise RuntimeError(f"our kernels cannot run here: {missing}")
    PROVIDERS["triton"].prepare()
    started, rows, refused = time.perf_counter(), [], []
    with torch.no_grad(), inductor_config.patch(force_disable_caches=True):
        rate = copy_rate()
        for case in progress(chosen, "bench linear"):
            try:
                rows.append(_measure(case, rate, max_autotune))
            except Refused as problem:
                refused.append(f"{case}: {problem}")
    return Result(conditions(command), rate, tuple(rows), tuple(refused), time.perf_counter() - started)


def functions(arguments: dict[str, Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(our op, the separate calls) of the tensors of such arguments, in the order of ``tensors``."""
    dtype, fast, count = arguments["dtype"], arguments["fast_accum"], len(arguments["weights"])

    def given(*tensors: Tensor) -> dict[str, Any]:
        x, x_scale, *others = tensors
        biases = others[2 * count :] or [None] * count
        lists = {"weights": others[:count], "x_scale": x_scale, "weight_scales": others[count : 2 * count]}
        return {"x": x, **lists, "biases": biases, "dtype": dtype, "fast_accum": fast}

    def ours(*tensors: Tensor) -> Any:
        return LINEAR.target(*given(*tensors).values(), "triton")

    def separate(*tensors: Tensor) -> Any:
        return LINEAR.pack(LINEAR.reference(**given(*tensors)))

    return ours, separate


def tensors_of(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """What the functions take."""
    biases = [bias for bias in arguments["biases"] if bias is not None]
    return arguments["x"], arguments["x_scale"], *arguments["weights"], *arguments["weight_scales"], *biases


def rotating(case: Case) -> list[dict[str, Any]]:
    """Arguments whose weights pass through more than the L2 cache."""
    count = case.sets(torch.cuda.get_device_properties().L2_cache_size)
    fp8 = native_fp8(torch.cuda.current_device()) or torch.float8_e4m3fn
    first = case.arguments("cuda", 0, fp8)
    copies = [{**first, "weights": [w.t().clone().t() for w in first["weights"]]} for _ in range(count - 1)]
    return [first, *copies]


def _measure(case: Case, rate: float, max_autotune: bool) -> Row:
    torch._dynamo.reset()
    sets = rotating(case)
    if reason := PROVIDERS["triton"].why_not(LINEAR, sets[0]):
        raise Refused(reason)
    ours, separate = functions(sets[0])
    options: dict[str, Any] = {"dynamic": False, "fullgraph": True}
    runs: dict[str, Callable[..., Any]] = {"ours_us": torch.compile(ours, **options), "separate_us": separate}
    if max_autotune:
        runs["max_autotune_us"] = torch.compile(separate, mode="max-autotune-no-cudagraphs", **options)
    given = [tensors_of(arguments) for arguments in sets]
    have, want = (error(sets[0], runs[name](*given[0])[0]) for name in ("ours_us", "separate_us"))
    if not have <= WORSE * want:
        raise Refused(f"our error to float64 is {have:.2e}, that of torch._scaled_mm {want:.2e}")
    calls = len(sets) * math.ceil(GRAPH_CALLS / len(sets))
    graphs = [capture(run, given, calls) for run in runs.values()]
    times = alternate([graph.replay for graph in graphs], ROUNDS)
    measured = {name: microseconds / calls for name, microseconds in zip(runs, times, strict=True)}
    return Row(
        size=str(case.size),
        rows=case.rows,
        fast=case.fast,
        floor_us=case.size.bytes / rate * 1e6,
        ours_error=have,
        separate_error=want,
        **measured,
    )


def exact(arguments: dict[str, Any], columns: int = CHECKED, index: int = 0) -> Tensor:
    """The first columns of the product with a weight, in float64."""
    x, weight = arguments["x"].double(), arguments["weights"][index][:, :columns].double()
    x_scale, w_scale = arguments["x_scale"].double(), arguments["weight_scales"][index].double()
    if w_scale.numel() != 1 and w_scale.shape[-1] != arguments["weights"][index].shape[1]:
        x = x * x_scale.repeat_interleave(BLOCK, 1)
        wide = w_scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        product = x @ (weight * wide[:, : weight.shape[1]])
    else:
        product = x @ weight * x_scale * (w_scale if w_scale.numel() == 1 else w_scale[:, :columns])
    bias = arguments["biases"][index]
    return product if bias is None else product + bias[:columns].double()


def error(arguments: dict[str, Any], y: Tensor, index: int = 0) -> float:
    """The relative error of the first columns of a result, in the 2-norm."""
    want = exact(arguments, index=index)
    return float((y[:, : want.shape[1]].double() - want).norm() / want.norm())


def command(args: Any) -> None:
    """``bench linear``: measure, print, write what was asked for."""
    check_folder(args.json)
    chosen = cases(args.sizes, args.rows, args.precise)
    result = bench(chosen, max_autotune=args.max_autotune, command=args.command_line)
    print(result)
    if args.json:
        Path(args.json).write_text(result.to_json() + "\n")
    if result.refused:
        raise Refused(f"{len(result.refused)} cases were not compared: {result.refused[0]}")
