"""``bench model --decode``: one token a sequence over a filled static cache, as transformers compiles it.

The Llama of ``bench model`` with transformers' own attention over its ``StaticCache``, mask and repeated heads
included. Every backend runs in a CUDA graph; all share the weights and the cache.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..report import merge
from ..tables import plain, table
from .model import HEAD, VOCABULARY, Sizes, build, peak, profiled, wall
from .timing import Conditions, Refused, check_folder, conditions, need, need_gpu, progress

BATCHES = (1, 8, 32)
CONTEXT = 1024
# Transformers moves the place of the next token on at every call. A measurement takes fewer calls than this, and begins
# so far from the cache's end: what reads only the filled part must not gain by an empty one.
CALLS = 96


@dataclass(frozen=True)
class Step:
    """One backend's decode step; medians, times in microseconds.

    gpu_us:     sum of the times of all kernels; kernels: launched.
    wall_us:    of a replay of the step's CUDA graph.
    peak_bytes: of GPU memory, weights and cache included.
    compile_s:  seconds of the first call.
    difference: of the logits to Inductor's: norm of the difference over norm.
    """

    backend: str
    gpu_us: float
    kernels: float
    wall_us: float
    captured: bool
    peak_bytes: int
    compile_s: float
    difference: float


@dataclass(frozen=True)
class Row:
    """All backends at one batch; ``replaced`` and ``skipped`` are of our report."""

    batch: int
    replaced: dict[str, int]
    skipped: int
    steps: tuple[Step, ...]

    def ratio(self, quantity: str, other: str) -> float:
        """Ours over another backend's."""
        found = {step.backend: getattr(step, quantity) for step in self.steps}
        return found["aiter_fusion"] / found[other]


@dataclass(frozen=True)
class Result:
    """What ``bench model --decode`` measured; ``seconds``: that it took, compilation included."""

    conditions: Conditions
    sizes: Sizes
    context: int
    rows: tuple[Row, ...]
    seconds: float

    def __str__(self) -> str:
        headers = [
            "batch",
            "backend",
            "GPU us",
            "ratio",
            "wall us",
            "ratio",
            "kernels",
            "peak GB",
            "compile s",
            "difference",
        ]
        lines = []
        for row in self.rows:
            for step in row.steps:
                alone = step.backend == "aiter_fusion"
                ratios = ["" if alone else f"{row.ratio(name, step.backend):.3f}" for name in ("gpu_us", "wall_us")]
                star = "" if step.captured else "*"
                times = [f"{step.gpu_us:.1f}", ratios[0], f"{step.wall_us:.1f}{star}", ratios[1]]
                rest = [f"{step.kernels:.0f}", f"{step.peak_bytes * 1e-9:.3f}", f"{step.compile_s:.1f}"]
                lines.append([str(row.batch), step.backend, *times, *rest, f"{step.difference:.1e}"])
        replaced = [
            f"batch {row.batch}: replaced {', '.join(f'{n} {family}' for family, n in row.replaced.items())}; "
            f"skipped {row.skipped}"
            for row in self.rows
        ]
        captured = all(step.captured for row in self.rows for step in row.steps)
        star = [] if captured else ["* not captured in a CUDA graph: the host's time too"]
        sizes = self.sizes
        return "\n".join(
            [
                str(self.conditions),
                f"Llama, torchao FP8 per row: hidden {sizes.hidden}, intermediate {sizes.intermediate}, layers "
                f"{sizes.layers}; one token over a static cache of {self.context}; measured in {self.seconds:.0f} s",
                "ratio: ours over that backend's",
                "",
                plain(table(headers, lines, left=("backend",))),
                *star,
                *replaced,
            ]
        )

    def to_json(self) -> str:
        """A JSON object with the fields of this class."""
        return json.dumps(asdict(self), indent=1)


def filled_cache(model: nn.Module, sizes: Sizes, batch: int, context: int, device: str) -> Any:
    """A static cache whose keys and values are random.

    Raises:
        RuntimeError: transformers is missing.
    """
    config: Any = model.config
    cache = need("transformers").StaticCache(config=config, max_cache_len=context)
    heads = sizes.hidden // HEAD // 4
    cache.early_initialization(batch, heads, HEAD, torch.bfloat16, torch.device(device))
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def rewind(cache: Any, begin: int) -> None:
    """Let the next token be the one at ``begin``."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(begin)


def decoder(model: nn.Module, cache: Any, **compiling: Any) -> Callable[[Tensor], Tensor]:
    """A compiled step, from tokens ``[batch, 1]`` to logits."""
    call: Any = torch.compile(model, dynamic=False, fullgraph=True, **compiling)
    return lambda tokens: call(tokens, past_key_values=cache, use_cache=True).logits


def bench(sizes: Sizes, batches: Sequence[int], *, max_autotune: bool, command: str, context: int = CONTEXT) -> Result:
    """Measure a decode step of every batch on the current GPU.

    Args:
        context: tokens that the static cache holds.
        max_autotune: compare with Inductor's ``max-autotune-no-cudagraphs`` too, which compiles for minutes.
        command: what to note as the source of the result.

    Raises:
        RuntimeError: there is no GPU, or transformers or torchao is missing.
        Refused: nothing was replaced, so that there is nothing to compare.
        ValueError: the cache is too small to measure.
    """
    if context <= CALLS:
        raise ValueError(f"--context {context}: must be more than {CALLS}, which is how many tokens are measured")
    need_gpu()
    started = time.perf_counter()
    with torch.no_grad():
        model = build(sizes, "cuda", "sdpa")
        rows = [_measure(model, sizes, n, context, max_autotune) for n in progress(batches, "bench model --decode")]
    return Result(conditions(command), sizes, context, tuple(rows), time.perf_counter() - started)


def _measure(model: nn.Module, sizes: Sizes, batch: int, context: int, max_autotune: bool) -> Row:
    from ..backend import Backend, reports  # imports the whole of Inductor

    torch._dynamo.reset()
    known = len(reports())
    cache = filled_cache(model, sizes, batch, context, "cuda")
    tokens = torch.randint(0, VOCABULARY, (batch, 1), device="cuda")
    compiling: dict[str, dict[str, Any]] = {"aiter_fusion": {"backend": Backend()}, "inductor": {"backend": "inductor"}}
    if max_autotune:
        compiling["max-autotune"] = {"mode": "max-autotune-no-cudagraphs"}
    steps = {name: decoder(model, cache, **given) for name, given in compiling.items()}
    seconds, logits = {}, {}
    for name, step in steps.items():
        rewind(cache, context - CALLS)
        begin = time.perf_counter()
        logits[name] = step(tokens).float()
        torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - begin
    report = merge(reports()[known:])
    if not report.replaced:
        raise Refused(f"batch {batch}: nothing was replaced, so there is nothing to compare")
    calls = [lambda step=step: step(tokens) for step in steps.values()]
    rewind(cache, context - CALLS)
    peaks = [peak(call) for call in calls]
    rewind(cache, context - CALLS)
    times, kernels = profiled(calls)
    rewind(cache, context - CALLS)
    walls, captured = wall(calls)
    want = logits["inductor"]
    measured = tuple(
        Step(
            backend=name,
            gpu_us=times[index],
            kernels=kernels[index],
            wall_us=walls[index],
            captured=captured,
            peak_bytes=peaks[index],
            compile_s=seconds[name],
            difference=float((logits[name] - want).norm() / want.norm()),
        )
        for index, name in enumerate(steps)
    )
    return Row(batch, report.replaced, len(report.skipped), measured)


def command(args: Any) -> None:
    """``bench model --decode``: measure, print, write what was asked for."""
    sizes = Sizes(args.hidden, args.intermediate, args.layers)
    check_folder(args.json)
    batches, context = args.decode or BATCHES, args.context or CONTEXT
    result = bench(sizes, batches, max_autotune=args.max_autotune, command=args.command_line, context=context)
    print(result)
    if args.json:
        Path(args.json).write_text(result.to_json() + "\n")
