"""``bench model``: a Llama quantised by torchao, compiled by this backend and by plain Inductor.

The head is quantised too, and gives the logits of every token. Weights are random, and both compiled models share them.
Attention is causal without a mask tensor, so that PyTorch may choose flash attention: in a compiled graph transformers
makes a mask of tokens x tokens, with which it may not, and which inference engines avoid.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..report import FusionReport, merge
from ..tables import plain, table
from .timing import Conditions, Refused, alternate, capture, check_folder, conditions, in_turn, need, need_gpu, progress

WORKLOADS = ("decode-1", "decode-32", "decode-128", "prefill-2048", "prefill-16384")
HOST_WORKLOAD = "decode-1"
VOCABULARY = 32000
HEAD = 128

WALL_ROUNDS = 21
PROFILES, PROFILED_FORWARDS = 2, 8  # few: starting and stopping a profile takes seconds
# Between two waits for the GPU no more kernels than these are put in its queue, so that the host never waits for room.
HOST_ROUNDS, HOST_QUEUE = 101, 400


@dataclass(frozen=True)
class Sizes:
    """A Llama's sizes; heads of 128, a quarter as many of them for keys and values.

    Raises:
        ValueError: ``hidden`` is no multiple of 512, or ``intermediate`` none of 16.
    """

    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 8

    def __post_init__(self) -> None:
        if self.hidden % (4 * HEAD):
            raise ValueError(
                f"--hidden {self.hidden}: must be a multiple of {4 * HEAD} (heads of {HEAD}, 4 to a group)"
            )
        if self.intermediate % 16:
            raise ValueError(f"--intermediate {self.intermediate}: must be a multiple of 16, as FP8 products demand")


@dataclass(frozen=True)
class Workload:
    """Tokens ``[batch, length]`` of one forward: ``decode-<rows>`` is ``[rows, 1]``, ``prefill-<n>`` is ``[1, n]``."""

    name: str
    batch: int
    length: int

    @staticmethod
    def parse(name: str) -> Workload:
        """The workload of that name; a ValueError says which names there are."""
        kind, _, number = name.partition("-")
        if kind not in ("decode", "prefill") or not number.isdecimal() or int(number) == 0:
            raise ValueError(f"--workloads {name!r}: must be decode-<rows> or prefill-<tokens>")
        return Workload(name, *((int(number), 1) if kind == "decode" else (1, int(number))))


@dataclass(frozen=True)
class Pair:
    """One quantity of both compiled models."""

    ours: float
    inductor: float

    @property
    def ratio(self) -> float:
        """Ours over Inductor's."""
        return self.ours / self.inductor


@dataclass(frozen=True)
class Row:
    """One workload; medians, times in microseconds a forward.

    replaced, skipped: of our report: replaced sites by family, number of skipped sites.
    gpu_us:     sum of the times of all kernels.
    wall_us:    from the first kernel's start to the last one's end, the forward replayed as one CUDA graph.
    captured:   False if it could not be captured: then ``wall_us`` is of plain calls, and has the host's time in it.
    kernels:    launched.
    peak_bytes: of GPU memory, weights included.
    difference: of the results: norm of the difference over norm of Inductor's.
    host_us:    that the host takes to launch all of it, without CUDA graphs; None: not measured.
    """

    workload: str
    replaced: dict[str, int]
    skipped: int
    gpu_us: Pair
    wall_us: Pair
    captured: bool
    kernels: Pair
    peak_bytes: Pair
    difference: float
    host_us: Pair | None = None


@dataclass(frozen=True)
class Result:
    """What ``bench model`` measured; ``seconds``: that it took, compilation included."""

    conditions: Conditions
    sizes: Sizes
    rows: tuple[Row, ...]
    seconds: float

    def __str__(self) -> str:
        """The conditions and a table, ours before Inductor's."""
        sizes = self.sizes
        headers = ["workload", "replaced", "skipped"]
        for name in ("GPU us", "wall us", "kernels", "peak GB", "host us"):
            headers += [f"{name} ours", "Inductor", *(["ratio"] if name.endswith("us") else [])]
        lines = []
        for row in self.rows:
            line = [row.workload, ", ".join(f"{family} {n}" for family, n in row.replaced.items()), str(row.skipped)]
            line += _cells(row.gpu_us, ".1f", ".3f")
            line += _cells(row.wall_us, ".1f" if row.captured else ".1f*", ".3f")
            line += _cells(row.kernels, ".0f")
            line += _cells(Pair(row.peak_bytes.ours * 1e-9, row.peak_bytes.inductor * 1e-9), ".3f")
            line += _cells(row.host_us, ".1f", ".3f") if row.host_us else ["", "", ""]
            lines.append([*line, f"{row.difference:.1e}"])
        headers.append("difference")
        if all(row.host_us is None for row in self.rows):
            keep = [index for index in range(len(headers)) if not len(headers) - 4 <= index < len(headers) - 1]
            headers, *lines = ([line[index] for index in keep] for line in (headers, *lines))
        star = [] if all(row.captured for row in self.rows) else ["* not captured in a CUDA graph: the host's time too"]
        return "\n".join(
            [
                str(self.conditions),
                f"Llama, torchao FP8 per row: hidden {sizes.hidden}, intermediate {sizes.intermediate}, "
                f"layers {sizes.layers}; measured in {self.seconds:.0f} s",
                "",
                plain(table(headers, lines, left=("workload", "replaced"))),
                *star,
            ]
        )

    def to_json(self) -> str:
        """A JSON object with the fields of this class."""
        return json.dumps(asdict(self), indent=1)


def _cells(pair: Pair, style: str, ratio: str = "") -> list[str]:
    star = "*" if style.endswith("*") else ""
    cells = [f"{value:{style.rstrip('*')}}{star}" for value in (pair.ours, pair.inductor)]
    return [*cells, f"{pair.ratio:{ratio}}"] if ratio else cells


def build(sizes: Sizes, device: str, attention: str = "causal") -> nn.Module:
    """A random bf16 Llama, its linear layers quantised by torchao: FP8, one scale a row.

    Args:
        attention: transformers' name of its attention; ``causal`` is this module's.

    Raises:
        RuntimeError: transformers or torchao is missing.
    """
    transformers, quantization = need("transformers"), need("torchao.quantization")
    transformers.AttentionInterface.register("causal", _attention)
    config = transformers.LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // HEAD,
        num_key_value_heads=sizes.hidden // HEAD // 4,
        vocab_size=VOCABULARY,
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        ).eval()
    granularity = quantization.PerRow()
    quantization.quantize_(model, quantization.Float8DynamicActivationFloat8WeightConfig(granularity=granularity))
    return model


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    assert mask is None, "transformers makes no masks for an attention that it does not know"
    causal = query.shape[2] > 1
    result = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=causal, scale=scaling, enable_gqa=True
    )
    return result.transpose(1, 2).contiguous(), None


def compiled(model: nn.Module, chosen: Any) -> Callable[[Tensor], Tensor]:
    """The model, compiled whole by a backend, from tokens to logits."""
    call: Any = torch.compile(model, backend=chosen, dynamic=False, fullgraph=True)
    return lambda tokens: call(tokens, use_cache=False).logits


def bench(sizes: Sizes, workloads: Sequence[Workload], *, host: bool, command: str) -> Result:
    """Measure the workloads on the current GPU; ``host``: also the host's time of ``decode-1``.

    Raises:
        RuntimeError: there is no GPU, or transformers or torchao is missing.
        Refused: nothing was replaced, so that there is nothing to compare.
    """
    need_gpu()
    started = time.perf_counter()
    with torch.no_grad():
        model = build(sizes, "cuda")
        rows = [
            _measure(model, workload, host and workload.name == HOST_WORKLOAD)
            for workload in progress(workloads, "bench model")
        ]
    return Result(conditions(command), sizes, tuple(rows), time.perf_counter() - started)


def _measure(model: nn.Module, workload: Workload, host: bool) -> Row:
    from ..backend import Backend, reports  # imports the whole of Inductor

    torch._dynamo.reset()
    known = len(reports())
    tokens = torch.randint(0, VOCABULARY, (workload.batch, workload.length), device="cuda")
    ours, inductor = compiled(model, Backend()), compiled(model, "inductor")
    result = ours(tokens).float()
    report = merge(reports()[known:])
    check(workload, report)
    want = inductor(tokens).float()
    difference = float((result - want).norm() / want.norm())
    del result, want
    both = (lambda: ours(tokens), lambda: inductor(tokens))
    peaks = [peak(call) for call in both]
    gpu_us, kernels = (Pair(*found) for found in profiled(both))
    host_us = _host(both, max(kernels.ours, kernels.inductor)) if host else None
    walls, captured = wall(both)
    return Row(
        workload=workload.name,
        replaced=report.replaced,
        skipped=len(report.skipped),
        gpu_us=gpu_us,
        wall_us=Pair(*walls),
        captured=captured,
        kernels=kernels,
        peak_bytes=Pair(*peaks),
        difference=difference,
        host_us=host_us,
    )


def check(workload: Workload, report: FusionReport) -> None:
    """Raise Refused if nothing was replaced: then both models are Inductor's."""
    if not report.replaced:
        reasons = Counter(site.reason for site in report.skipped).most_common(1)
        why = reasons[0][0] if reasons else report.note or "no site was found"
        raise Refused(f"{workload.name}: nothing was replaced, so there is nothing to compare: {why}")


def peak(call: Callable[[], Any]) -> int:
    """The most bytes of GPU memory during a forward."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def profiled(calls: Sequence[Callable[[], Any]]) -> tuple[list[float], list[float]]:
    """GPU time in microseconds and number of kernels of each forward."""
    _profile(calls[0])  # the first profile of a process starts CUPTI
    found: list[list[tuple[float, float]]] = [[] for _ in calls]
    for index in in_turn(len(calls), PROFILES):
        found[index].append(_profile(calls[index]))
    times = [statistics.median(time for time, _ in profiles) for profiles in found]
    counts = [statistics.median(count for _, count in profiles) for profiles in found]
    if not all(counts):
        raise RuntimeError("PyTorch's profiler saw no kernel: it needs access to the GPU's counters (CUPTI, roctracer)")
    return times, counts


def _profile(call: Callable[[], Any]) -> tuple[float, float]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED_FORWARDS):
            call()
        torch.cuda.synchronize()
    events: Any = profiler.events()
    # annotations span kernels, which would count twice
    kernels = [event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]
    microseconds = sum(event.time_range.elapsed_us() for event in kernels)
    return microseconds / PROFILED_FORWARDS, len(kernels) / PROFILED_FORWARDS


def _host(calls: Sequence[Callable[[], Any]], kernels: float) -> Pair:
    forwards = max(1, int(HOST_QUEUE / kernels))
    times: list[list[float]] = [[] for _ in calls]
    for index in in_turn(len(calls), HOST_ROUNDS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(forwards):
            calls[index]()
        times[index].append((time.perf_counter() - begin) / forwards * 1e6)
    torch.cuda.synchronize()
    return Pair(*map(statistics.median, times))


def wall(calls: Sequence[Callable[[], Any]]) -> tuple[list[float], bool]:
    """Microseconds from the first kernel's start to the last one's end of each forward, and whether it was replayed as
    a CUDA graph."""
    try:
        graphs = [capture(call, [()], 1) for call in calls]
    except RuntimeError as error:
        print(f"not captured in a CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr)
        torch.cuda.synchronize()
        return alternate(calls, WALL_ROUNDS), False
    return alternate([graph.replay for graph in graphs], WALL_ROUNDS), True


def command(args: Any) -> None:
    """``bench model``: measure, print, write what was asked for."""
    sizes = Sizes(args.hidden, args.intermediate, args.layers)
    if args.max_autotune or args.context:
        raise ValueError("--max-autotune and --context are for --decode: add that, or leave them out")
    workloads = [Workload.parse(name) for name in args.workloads]
    if args.host and HOST_WORKLOAD not in args.workloads:
        raise ValueError(f"--host measures {HOST_WORKLOAD}: add it to --workloads")
    check_folder(args.json)
    result = bench(sizes, workloads, host=args.host, command=args.command_line)
    print(result)
    if args.json:
        Path(args.json).write_text(result.to_json() + "\n")
