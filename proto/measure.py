"""Correctness and times of linear_kernels on one GPU. Writes $OUT/linear.json as it goes.

    python proto/measure.py [--deadline 400] [--workers 14] [--dry]

--dry: no GPU; kernels are compiled for sm_90 only, products are PyTorch's, times are made up: checks the script.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, TimeoutError
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from linear_kernels import Config, cdiv, linear, mocked, plan, scale_strides  # noqa: E402

BEGAN = time.monotonic()
SIZES = {  # in order of importance: name -> (K, Ns)
    "qkv 4096": (4096, (4096, 1024, 1024)),
    "o 4096": (4096, (4096,)),
    "down 14336": (14336, (4096,)),
    "gate,up 4096": (4096, (14336, 14336)),
    "qkv 8192": (8192, (8192, 1024, 1024)),
    "gate,up 8192": (8192, (28672, 28672)),
    "down 28672": (28672, (8192,)),
}
GOALS = {  # ours / the separate calls with fast accumulation, at 1, 16, 64 rows
    "qkv 4096": (0.22, 0.22, 0.24), "o 4096": (0.49, 0.50, 0.56), "gate,up 4096": (0.71, 0.75, 0.79),
    "down 14336": (0.46, 0.47, 0.52), "qkv 8192": (0.29, 0.35, 0.38), "gate,up 8192": (0.75, 0.86, 0.95),
    "down 28672": (0.63, 0.81, 0.95),
}  # fmt: skip
BANDWIDTH = 4.26e12
SHARED = 227 * 1024
LLC = 220 << 20  # bytes of weights that a rotation passes through, at least


def left(args: argparse.Namespace) -> float:
    return args.deadline - (time.monotonic() - BEGAN)


# ---- configurations ------------------------------------------------------------------------------------------------


def gemvs(rows: int = 1) -> list[Config]:
    found = []
    for block_n, block_k, warps in product((2, 4, 8, 16), (512, 1024, 2048, 4096), (1, 2, 4, 8)):
        each = block_n * block_k // (32 * warps)  # bytes of a thread
        if 64 <= each <= (256 if rows == 1 else 128) and block_k <= 1024 * warps and block_k >= 256 * warps:
            found.append(Config("gemv", rows, block_n, block_k, 1, warps))
            if each <= 128 and rows == 1 and block_k <= 2048:
                found.append(Config("gemv", rows, block_n, block_k, 1, warps, unroll=2))
            if rows == 1 and each in (64, 128) and warps >= 2:
                found.append(Config("gemv", rows, block_n, block_k, 4, warps))
    found += [replace(c, first=False) for c in found if c.block_n == 8 and c.warps == 4 and c.stages == 1]
    return found


def stage_bytes(c: Config) -> int:
    return (c.block_n + c.rows) * c.block_k


def fits(c: Config) -> bool:
    """In shared memory, with some KB in flight."""
    bytes_in_all = stage_bytes(c) * c.stages
    return bytes_in_all <= SHARED - 2048 and stage_bytes(c) * (c.stages - 1) >= 12 * 1024


def mms(rows: int, forms: tuple[str, ...]) -> list[Config]:
    """wgmma (fp8, promoted: 64 rows of weights a tile, four warps), and mma.sync, which has products of fp16."""
    found = []
    if "fp8" in forms and rows >= 16:
        for block_n, block_k, stages, warps in product((64, 128, 256), (128, 256, 512), (3, 4, 5, 6), (4, 8)):
            wide = warps == 8
            if wide == (block_n >= 128 and (rows >= 64 or block_n == 256)) or (block_n == 128 and rows == 64):
                found.append(Config("fp8", rows, block_n, block_k, stages, warps))
    if "sync" in forms:
        for block_n, block_k, stages, warps in product((16, 32, 64), (128, 256, 512), (3, 4, 6), (1, 2, 4)):
            per_warp = block_n * rows / warps
            if block_n == 64 and warps == 4 and rows >= 16:
                continue  # that is wgmma
            if not (128 if rows <= 16 else 256) <= per_warp <= 1024 or block_n * block_k // warps > 16384:
                continue
            if stages == 6 and block_k == 512 and block_n > 16:
                continue
            found.append(Config("fp8", rows, block_n, block_k, stages, warps))
    if "sliced" in forms:
        for block_n, block_k, stages, warps in product((16, 32, 64), (256, 512, 1024), (3, 4, 6), (2, 4, 8)):
            if (
                block_k // warps in (64, 128, 256)
                and block_n * rows <= 2048
                and 16 * 1024 <= block_n * block_k * stages
            ):
                found.append(Config("sliced", rows, block_n, block_k, stages, warps))
    if "promoted" in forms:
        for block_n, block_k, stages, warps in product((64, 128), (128, 256), (3, 4, 5, 6), (4, 8)):
            if warps == 4 or block_n == 128:
                found.append(Config("promoted", rows, block_n, block_k, stages, warps))
    if "half" in forms:
        for block_n, block_k, stages, warps in product((64, 128), (64, 128), (4, 6), (4, 8)):
            if warps == 4 or block_n == 128:
                found.append(Config("half", rows, block_n, block_k, stages, warps))
    return [c for c in dict.fromkeys(found) if fits(c)]


def group(rows: int, kind: str) -> list[Config]:
    """kind: fast or precise."""
    if rows == 1:
        return gemvs() + (mms(8, ("sliced",))[::2] if kind == "fast" else [])
    padded = max(8 if kind == "precise" else 16, 1 << (rows - 1).bit_length())
    if kind == "fast":
        normal = mms(padded, ("fp8", "sliced"))  # precise forms may be the faster ones
        return normal + [replace(c, first=False) for c in normal if c.stages == 4 and c.block_k == 256]
    return mms(padded, ("sync", "sliced", "promoted", "half") if padded <= 64 else ("promoted", "half"))


def fitted(c: Config, k: int, ns: tuple[int, ...], rows: int) -> list[Config]:
    """The splits of K that are worth a try for a size."""
    tiles = sum(cdiv(n, c.block_n) for n in ns) * cdiv(rows, c.rows)
    if k % c.block_k:
        return []
    if c.form == "gemv":
        return [c] if tiles >= 200 else []
    found = [c] if tiles >= 48 else []
    for split in (2, 4, 8):
        if (
            64 <= tiles * split <= 600
            and tiles <= 140
            and k // split >= 4 * c.block_k
            and (c.block_n >= 64 or c.form == "sliced" and c.block_n == 32)
        ):
            found.append(replace(c, split=split, pdl=True))
    return found


# ---- compiling -----------------------------------------------------------------------------------------------------


def compile_one(config: Config, k: int, m: int, scales: str, bias: bool, dry: bool) -> str:
    """In a worker: fills Triton's cache on disk. Says what failed, or nothing."""
    try:
        for step in mocked(1, m, k, config, scales, bias):
            if dry:
                import triton
                from check_compile import source
                from triton.backends.compiler import GPUTarget

                kernel = triton.compile(source(step), target=GPUTarget("cuda", 90, 32), options=dict(step.options))
                if kernel.metadata.shared > SHARED:
                    return f"shared memory: {kernel.metadata.shared}"
            else:
                values = [step.arguments[name] for name in step.kernel.arg_names]
                step.kernel.warmup(*values, grid=(1,), **step.options)
    except Exception as error:  # a configuration that does not compile is a result
        return f"{type(error).__name__}: {str(error)[:300]}"
    return ""


class Compiler:
    """Each configuration once, by worker processes, in the order asked for. Made before CUDA is touched."""

    def __init__(self, workers: int, dry: bool) -> None:
        self.dry = dry
        self.pool = ProcessPoolExecutor(workers, mp_context=get_context("fork"))
        self.jobs: dict[tuple[object, ...], Future[str]] = {}

    def end(self) -> None:
        """The workers hold the output open, so they end before this process does."""
        workers = list((self.pool._processes or {}).values())
        self.pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()

    @staticmethod
    def key(config: Config, k: int, m: int, scales: str, bias: bool) -> tuple[object, ...]:
        split = min(config.split, 2) if config.form != "gemv" else 1
        return replace(config, split=split), k % config.block_k == 0, scales, bias, config.split

    def ask(self, config: Config, k: int, m: int, scales: str = "row", bias: bool = False) -> None:
        key = self.key(config, k, m, scales, bias)
        if key not in self.jobs:
            self.jobs[key] = self.pool.submit(compile_one, config, k, m, scales, bias, self.dry)

    def ready(self, config: Config, k: int, m: int, timeout: float, scales: str = "row", bias: bool = False) -> str:
        try:
            return self.jobs[self.key(config, k, m, scales, bias)].result(timeout=max(0.1, timeout))
        except TimeoutError:
            return "not compiled in time"


# ---- data and times ------------------------------------------------------------------------------------------------


class Device:
    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.name = "cpu" if dry else "cuda"
        self.fake = 0.0

    def random(self, *sizes: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator(self.name).manual_seed(seed)
        return torch.randn(*sizes, device=self.name, generator=generator)

    def graph_time(self, calls: list[Callable[[], object]], budget_ms: float = 12.0) -> float:
        """Microseconds of a call: median over samples of replays of one graph of all calls."""
        if self.dry:
            calls[0]()
            self.fake = (self.fake * 1.3 + 7.7) % 40 + 5
            return self.fake
        calls[0]()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            calls[-1]()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()

        def replays(count: int) -> float:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            for _ in range(count):
                graph.replay()
            last.record()
            last.synchronize()
            return first.elapsed_time(last) * 1000 / (count * len(calls))

        replays(1)
        estimate = replays(1)
        count = max(1, round(budget_ms * 1000 / 5 / (estimate * len(calls))))
        return statistics.median(replays(count) for _ in range(5))


class Data:
    """The operands of a size, with as many copies of the weights as pass through more than L2."""

    def __init__(self, device: Device, k: int, ns: tuple[int, ...], most_rows: int = 128) -> None:
        self.k, self.ns = k, ns
        copies = 1 if device.dry else max(2, cdiv(LLC, k * sum(ns)))
        self.calls = copies * cdiv(8, copies)
        first = [(device.random(n, k, seed=i) * 2).to(torch.float8_e4m3fn) for i, n in enumerate(ns)]
        whole = torch.cat(first)
        self.merged = [whole] + [whole.clone() for _ in range(copies - 1)]
        self.weights = [
            list(w.split(list(ns))) for w in self.merged
        ]  # rows as stored; each has its own storage's start
        self.x = (device.random(most_rows, k, seed=99) * 2).to(torch.float8_e4m3fn)
        self.x_scale = device.random(most_rows, 1, seed=98).abs() + 0.5
        self.w_scale = device.random(sum(ns), 1, seed=97).abs() + 0.5
        self.w_scales = list(self.w_scale.split(list(ns)))
        self.device = device

    def ours(self, rows: int, config: Config) -> list[Callable[[], object]]:
        x, x_scale = self.x[:rows], self.x_scale[:rows]
        outs = [torch.empty(rows, n, dtype=torch.bfloat16, device=x.device) for n in self.ns]
        columns = sum(cdiv(n, config.block_n) for n in self.ns) * config.block_n
        partial = torch.empty(config.split * rows * columns if config.split > 1 else 4, device=x.device)

        def bound(weights: list[torch.Tensor]) -> Callable[[], object]:
            steps = plan(
                x, weights, x_scale, self.w_scales, [None] * len(weights), outs, partial, rows, self.k,
                list(self.ns), [self.k] * len(weights), self.k, scale_strides(x_scale, rows),
                scale_strides(self.w_scales[0], self.ns[0]), False, config,
            )  # fmt: skip

            def call() -> None:
                for step in steps:
                    step.kernel[(step.grid,)](**step.arguments, **step.options)

            return (lambda: None) if self.device.dry else call

        bounds = [bound(w) for w in self.weights]
        return [bounds[i % len(bounds)] for i in range(self.calls)]

    def theirs(self, rows: int, fast: bool, merged: bool) -> list[Callable[[], object]]:
        x, x_scale = self.x[:rows], self.x_scale[:rows]

        def bound(weights: list[torch.Tensor], scales: list[torch.Tensor]) -> Callable[[], object]:
            pairs = [(w.t(), s.view(1, -1)) for w, s in zip(weights, scales, strict=True)]

            def call() -> None:
                for w, s in pairs:
                    torch._scaled_mm(x, w, x_scale, s, out_dtype=torch.bfloat16, use_fast_accum=fast)

            return (lambda: None) if self.device.dry else call

        if merged:
            bounds = [bound([w], [self.w_scale]) for w in self.merged]
        else:
            bounds = [bound(w, self.w_scales) for w in self.weights]
        return [bounds[i % len(bounds)] for i in range(self.calls)]


# ---- correctness ---------------------------------------------------------------------------------------------------

CHECKED = [
    Config("gemv", 1, 8, 2048, 1, 4), Config("gemv", 1, 4, 1024, 4, 2), Config("gemv", 1, 8, 2048, 1, 4, unroll=2),
    Config("gemv", 2, 8, 1024, 1, 4),
    Config("fp8", 8, 32, 256, 4, 2), Config("fp8", 16, 16, 512, 4, 1), Config("fp8", 16, 64, 256, 5, 4),
    Config("fp8", 16, 64, 256, 5, 4, split=4, pdl=True), Config("fp8", 64, 128, 128, 5, 8),
    Config("fp8", 64, 64, 256, 4, 4, split=2), Config("fp8", 64, 256, 128, 4, 8), Config("promoted", 16, 64, 128, 4, 4),
    Config("promoted", 64, 64, 128, 4, 4), Config("promoted", 64, 64, 256, 3, 4), Config("half", 16, 64, 128, 4, 4),
    Config("sliced", 8, 32, 512, 4, 4), Config("sliced", 16, 32, 512, 4, 4), Config("sliced", 16, 16, 1024, 4, 8),
    Config("sliced", 64, 32, 512, 3, 4), Config("sliced", 64, 32, 256, 3, 2, split=2, pdl=True), Config("half", 64, 64, 128, 4, 4),
]  # fmt: skip


def checked_scales(config: Config) -> list[tuple[str, bool]]:
    """(kind of scale, bias)"""
    block = config.form == "gemv" or (config.block_k == 128 and config.form != "sliced")
    return [("row", True), ("tensor", False), *([("block", True)] if block else [])]


def rows_checked(config: Config) -> tuple[int, ...]:
    if config.form == "gemv":
        return (config.rows,)
    return tuple(
        r for r in (1, 2, 5, 16, 17, 33, 64, 128) if r <= config.rows or (config.rows, r) in ((16, 17), (64, 128))
    )


def spread(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "positive":
        return x.abs()
    if kind == "outliers":  # one value in 509 is 448
        return torch.where(torch.arange(x.numel(), device=x.device).view_as(x) % 509 == 0, 448.0 * x.sign(), x)
    return x


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


def check(device: Device, compiler: Compiler, args: argparse.Namespace, results: dict[str, object]) -> None:
    """Every form over odd sizes; then errors over long K beside _scaled_mm's."""
    failures: list[str] = []
    worst: dict[str, float] = {}
    k, ns = 4240, (1040, 528, 16)  # multiples of 16, of no tile
    k_block, f8 = 4224, torch.float8_e4m3fn
    count = 0
    for config in CHECKED:
        for scales, bias in checked_scales(config):
            width = k_block if scales == "block" else k
            state = compiler.ready(config, width, 16, left(args) - 60, scales, bias)
            if state:
                failures.append(f"{config} {scales}: {state}")
                continue
            weights = [device.random(n, width, seed=n).to(f8) for n in ns]
            for rows in rows_checked(config):
                x = device.random(rows, width, seed=rows).to(f8)
                if scales == "row":
                    xs, ws = device.random(rows, 1, seed=5).abs() + 0.1, [device.random(n, 1, seed=6).abs() for n in ns]
                elif scales == "tensor":
                    xs, ws = (
                        torch.full((1, 1), 0.3, device=device.name),
                        [torch.full((1, 1), 0.1 + n, device=device.name) for n in ns],
                    )
                else:
                    xs = device.random(rows, width // 128, seed=5).abs() + 0.1
                    ws = [device.random(cdiv(n, 128), width // 128, seed=6).abs() + 0.1 for n in ns]
                biases = [
                    device.random(n, seed=8).bfloat16() * 50 if bias and i != 1 else None for i, n in enumerate(ns)
                ]
                try:
                    if device.dry:
                        ys = [torch.zeros(rows, n) for n in ns]
                    else:
                        ys = linear(x, weights, xs, ws, biases, torch.bfloat16, True, config)
                        for _ in range(3):
                            again = linear(x, weights, xs, ws, biases, torch.bfloat16, True, config)
                            if not all(torch.equal(a, b) for a, b in zip(ys, again, strict=True)):
                                failures.append(f"{config} {scales} {rows} rows: differs between runs")
                except Exception as error:
                    failures.append(f"{config} {scales} {rows} rows: {type(error).__name__} {str(error)[:300]}")
                    continue
                for y, w, s, b in zip(ys, weights, ws, biases, strict=True):
                    if scales == "block":
                        wide_x = x.double() * xs.double().repeat_interleave(128, 1)
                        wide_w = w.double() * s.double().repeat_interleave(128, 0)[: w.shape[0]].repeat_interleave(
                            128, 1
                        )
                        exact = wide_x @ wide_w.T
                    else:
                        exact = (x.double() @ w.double().T) * xs.double() * s.double().T
                    exact = exact if b is None else exact + b.double()
                    error = relative(y, exact)
                    count += 1
                    worst[str(config)] = max(worst.get(str(config), 0.0), error)
                    if not error < 4e-3:
                        failures.append(f"{config} {scales} {rows} rows x {w.shape[0]}: error {error:.2e}")
    print(f"correctness: {count} products, {len(failures)} failures", flush=True)
    for line in failures[:12]:
        print("  ", line)
    results["correctness"] = {"products": count, "failures": failures, "worst": worst}
    errors: list[dict[str, object]] = []
    for (width, kind), rows in product(product((4096, 14336, 28672), ("normal", "positive", "outliers")), (1, 16, 64)):
        if left(args) < 120:
            break
        n = 1024
        w = spread(device.random(n, width, seed=3), kind).to(f8)
        x = spread(device.random(rows, width, seed=4), kind).to(f8)
        xs, ws = device.random(rows, 1, seed=5).abs() + 0.5, device.random(n, 1, seed=6).abs() + 0.5
        exact = (x.double() @ w.double().T) * xs.double() * ws.double().T
        row: dict[str, object] = {"k": width, "data": kind, "rows": rows}
        if not device.dry:
            for fast in (True, False):
                row["scaled_mm fast" if fast else "scaled_mm precise"] = relative(
                    torch._scaled_mm(x, w.t(), xs, ws.t(), out_dtype=torch.bfloat16, use_fast_accum=fast), exact
                )
            for config in CHECKED:
                fit = config.rows == rows or (config.form != "gemv" and rows < config.rows <= 16)
                if fit and compiler.ready(config, width, 16, 5) == "":
                    row[str(config)] = relative(linear(x, [w], xs, [ws], None, torch.bfloat16, True, config)[0], exact)
        errors.append(row)
        values = " ".join(f"{name}={v:.2e}" for name, v in row.items() if isinstance(v, float))
        if width != 14336:
            print(f"  error K {width} {kind} {rows} rows: {values}", flush=True)
    results["errors"] = errors


# ---- the grid ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--deadline", type=float, default=400.0, help="seconds of wall time")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--only-check", action="store_true")
    parser.add_argument("--thin", type=int, default=1, help="take one configuration in so many")
    args = parser.parse_args()
    target = Path(os.environ.get("OUT", ".")) / "linear.json"
    results: dict[str, object] = {"times": []}
    times: list[dict[str, object]] = results["times"]  # type: ignore[assignment]

    def save() -> None:
        target.write_text(json.dumps(results, indent=1))

    compiler = Compiler(args.workers, args.dry)
    groups = [(1, "fast"), (16, "fast"), (64, "fast"), (16, "precise"), (64, "precise")]
    after = [(4, "fast"), (32, "fast"), (128, "fast"), (4, "precise"), (32, "precise"), (128, "precise")]
    grids = {g: group(*g)[:: args.thin] for g in groups}

    def ask(rows: int, configs: list[Config], sizes: list[str]) -> None:
        for config in configs:
            for name in sizes:
                for each in fitted(config, *SIZES[name], rows):
                    compiler.ask(each, SIZES[name][0], rows)

    for config in CHECKED[:: args.thin]:
        for scales, bias in checked_scales(config):
            compiler.ask(config, 4224 if scales == "block" else 4240, 16, scales, bias)
        compiler.ask(config, 4096, 16)
    for rows, kind in groups:
        if not args.only_check:
            ask(rows, grids[rows, kind], list(SIZES))
    print(
        f"{len(compiler.jobs)} kernels to compile; grids { ({f'{r} {k}': len(c) for (r, k), c in grids.items()}) }",
        flush=True,
    )

    device = Device(args.dry)
    if not args.dry:
        print(torch.__version__, torch.cuda.get_device_name(), flush=True)
    check(device, compiler, args, results) if args.thin == 1 else None
    save()
    if args.only_check:
        compiler.end()
        os._exit(0)
    data: dict[str, Data] = {}

    def of(name: str) -> Data:
        if args.dry:
            return Data(device, 512 if name else 0, tuple(16 for _ in SIZES[name][1]), 128)
        if name not in data:
            data[name] = Data(device, *SIZES[name])
        return data[name]

    def row(name: str, rows: int, kind: str, configs: list[Config], finals: int) -> list[Config]:
        """Times all configurations, then the best ones again beside _scaled_mm. Gives the best."""
        k, ns = SIZES[name]
        d = of(name)
        found: list[tuple[float, Config]] = []
        problems: list[str] = []
        for config in configs:
            for each in fitted(config, k, ns, rows):
                if left(args) < 8:
                    break
                state = compiler.ready(each, k, rows, left(args) - 8)
                try:
                    if not state:
                        found.append((device.graph_time(d.ours(rows, each), 4.0), each))
                except Exception as error:
                    state = f"{type(error).__name__}: {str(error)[:200]}"
                if state:
                    problems.append(f"{each}: {state}")
        found.sort(key=lambda pair: pair[0])
        best = [c for _, c in found[:finals]]
        if not best or left(args) < 5:
            print(f"{name} {rows} {kind}: nothing; {problems[:3]}", flush=True)
            return []
        tried = [*best, *(replace(c, pdl=False) for c in best[:1] if c.split > 1)]
        # without pdl only the short second kernel is another one, which is compiled at once
        again = sorted(
            ((min(device.graph_time(d.ours(rows, c)) for _ in range(2)), c) for c in tried), key=lambda pair: pair[0]
        )
        theirs = {
            f"{'fast' if fast else 'precise'} {'merged' if merged else 'separate'}": device.graph_time(d.theirs(rows, fast, merged))
            for fast, merged in product((True, False), (False, True))
        }  # fmt: skip
        ours, base = again[0][0], theirs["fast separate"]
        floor = k * sum(ns) / BANDWIDTH * 1e6
        goal = GOALS[name][(1, 16, 64).index(rows)] if rows in (1, 16, 64) else None
        times.append(
            {
                "size": name,
                "k": k,
                "ns": ns,
                "rows": rows,
                "kind": kind,
                "ours": ours,
                "config": str(again[0][1]),
                "floor": floor,
                "ratio": ours / base,
                "goal": goal,
                "scaled_mm": theirs,
                "finals": [(t, str(c)) for t, c in again],
                "screened": [(round(t, 2), str(c)) for t, c in found],
                "problems": problems,
            }  # fmt: skip
        )
        save()
        runners = "; ".join(f"{c} {t:.1f}" for t, c in again[1:4])
        mark = "" if goal is None or kind == "precise" else f" goal {goal} {'met' if ours / base <= goal else 'MISSED'}"
        print(
            f"{name} {rows}r {kind}: {ours:.1f} us ({again[0][1]}) floor {floor:.1f} mm {' '.join(f'{v:.1f}' for v in theirs.values())}"
            f" ratio {ours / base:.3f}{mark} | {runners} [{len(found)} timed, {len(problems)} problems, {left(args):.0f} s left]",
            flush=True,
        )
        return [c for _, c in again]

    best: dict[tuple[str, str, int], list[Config]] = {}
    for rows, kind in groups:
        for name in SIZES:
            if left(args) > 15:
                best[name, kind, rows] = row(name, rows, kind, grids[rows, kind], 5)
    # neighbours of the winners, for other row counts
    plans: list[tuple[str, int, str, list[Config]]] = []
    for (rows, kind), name in product(after, SIZES):
        near = 64 if rows >= 64 or (rows == 32 and kind == "precise") else 16
        padded = max(16, rows)
        source = [c for c in best.get((name, kind, near), []) if c.form != "gemv"][:4]
        configs = [replace(c, rows=padded if c.form != "gemv" else c.rows, split=1, pdl=False) for c in source]
        if rows == 128:
            configs += [replace(c, split=1, pdl=False) for c in source]  # two row blocks
            configs += [replace(c, rows=128, stages=max(2, c.stages - 1), split=1, pdl=False) for c in source]
        if rows == 4:
            configs += [replace(c, rows=8) for c in configs if c.block_n < 64 or c.warps < 4 or kind == "fast"]
            configs += [
                Config("gemv", 4, 4, 1024, 1, 4),
                Config("gemv", 4, 8, 1024, 1, 4),
                Config("gemv", 4, 4, 512, 1, 2),
            ]
        configs = [c for c in dict.fromkeys(configs) if c.form == "gemv" or stage_bytes(c) * c.stages <= SHARED - 2048]
        ask(rows, configs, [name])
        plans.append((name, rows, kind, configs))
    for name, rows, kind, configs in plans:
        if configs and left(args) > 15:
            row(name, rows, kind, configs, 2)
    print(
        "goals missed:",
        [
            (t["size"], t["rows"], round(t["ratio"], 3), t["goal"])
            for t in times
            if t["goal"] and t["kind"] == "fast" and t["ratio"] > t["goal"]
        ],
    )  # type: ignore[operator]
    save()
    sys.stdout.flush()
    compiler.end()
    os._exit(0)


if __name__ == "__main__":
    main()
