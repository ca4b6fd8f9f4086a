"""On one H200: the package's fp8_linear: correctness, bench linear with its goals, a grid around the winners, host time,
the decode step. Writes $OUT/linear2.json as it goes.

    PYTHONPATH=. python proto/measure2.py [--deadline 290] [--only check,bench,host,grid,decode]
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

BEGAN = time.monotonic()
GOALS = {  # ours / the separate calls with fast accumulation, at 1, 16, 64 rows
    "4096x4096,1024,1024": (0.22, 0.22, 0.24), "4096x4096": (0.49, 0.50, 0.56), "4096x14336,14336": (0.71, 0.75, 0.79),
    "14336x4096": (0.46, 0.47, 0.52), "8192x8192,1024,1024": (0.29, 0.35, 0.38),
    "8192x28672,28672": (0.75, 0.86, 0.95), "28672x8192": (0.63, 0.81, 0.95),
}  # fmt: skip
RESULTS: dict[str, Any] = {}
TARGET = Path(os.environ.get("OUT", ".")) / "linear2.json"


def save() -> None:
    TARGET.write_text(json.dumps(RESULTS, indent=1))


def left(args: Any) -> float:
    return args.deadline - (time.monotonic() - BEGAN)


def warm(job: tuple[Any, ...]) -> str:
    """In a worker process: fill Triton's cache on disk with the kernels of a case (dtypes and shapes alone)."""
    case, tile = job
    from torch._subclasses import FakeTensorMode

    from aiter_fusion.providers.triton import tuned
    from aiter_fusion.providers.triton.jit import kernel
    from aiter_fusion.providers.triton.launches import Ref, flat
    from aiter_fusion.providers.triton.linear import launches, rules

    try:
        with FakeTensorMode():
            arguments = case.arguments("cpu")
        key = rules.key(case.size.k, case.size.ns, case.rows, case.fast)
        with tuned.trying({key: tile} if tile else {}):
            plan = launches.of(arguments, launches.Gpu(True, True, 132, 232448))
        named = {n: v.dtype for n, v in flat(arguments).items() if isinstance(v, torch.Tensor)}
        named |= {f"y{i}": case.dtype for i in range(8)} | {n: torch.float32 for n in plan.scratch}
        for launch in plan.launches:
            function = kernel(launch.kernel)
            values = [
                named[v.name] if isinstance(v, Ref) else v for v in (launch.arguments[n] for n in function.arg_names)
            ]
            options = {"num_warps": launch.warps} | ({"launch_pdl": True} if launch.dependent else {})
            function.warmup(*values, grid=(1,), **options)
    except Exception as error:  # a configuration that does not compile is a result
        return f"{case} {tile}: {type(error).__name__}: {str(error)[:300]}"
    return ""


def check(args: Any) -> None:
    """Provider triton against float64 and ``_scaled_mm``, bits over runs, over a grid of calls."""
    from aiter_fusion.bench import linear as bench
    from aiter_fusion.providers import PROVIDERS

    op, triton = bench.LINEAR, PROVIDERS["triton"]
    failures, worst, count = [], 0.0, 0
    for case in checked_cases():
        if left(args) < 170:
            failures.append(f"stopped before {case}: no time")
            break
        rows, scales = case.rows, case.scales
        if problem := JOBS[case].result():
            failures.append(problem)
            continue
        for kind in ("normal", "positive", "outliers", "zeros"):
            if kind != "normal" and (rows not in (1, 16, 64) or scales == "tensor"):
                continue
            a = case.arguments("cuda", rows)
            if kind == "positive":
                a["x"], a["weights"] = (
                    a["x"].float().abs().to(a["x"].dtype),
                    [w.t().float().abs().to(w.dtype).t() for w in a["weights"]],
                )
            elif kind == "outliers":
                for t in (a["x"], *(w.t() for w in a["weights"])):
                    t.view(torch.uint8).view(-1)[::509] = torch.tensor([448.0]).to(t.dtype).view(torch.uint8).item()
            elif kind == "zeros":
                a["x"].view(torch.uint8)[0] = 0
                if rows > 1:
                    a["x_scale"][1] = float("inf")
            name = f"{case} {scales} {kind}{' bias' if case.bias else ''}"
            try:
                if why := triton.why_not(op, a):
                    failures.append(f"{name}: refused: {why}")
                    continue
                ys = list(run_kernel(a).values())
                if not all(
                    torch.equal(p.nan_to_num(7), q.nan_to_num(7))
                    for _ in range(3)
                    for p, q in zip(ys, run_kernel(a).values())
                ):
                    failures.append(f"{name}: differs between runs")
                try:
                    want = op.pack(op.reference(**a))
                except RuntimeError as problem:
                    want = None
                    RESULTS.setdefault("reference refuses", {})[f"{scales} {case.dtype} bias {case.bias}"] = str(
                        problem
                    )[:200]
                for i, y in enumerate(ys):
                    count += 1
                    if kind == "zeros":
                        if want is not None and not torch.equal(y.isfinite(), want[i].isfinite()):
                            failures.append(
                                f"{name}: other rows are finite, {y.isfinite().sum()} and {want[i].isfinite().sum()} numbers"
                            )
                        continue
                    mine = bench.error(a, y, i)
                    theirs = bench.error(a, want[i], i) if want is not None else 2e-3
                    worst = max(worst, mine / theirs)
                    if not mine <= 1.02 * theirs:
                        failures.append(f"{name} y{i}: error {mine:.3e}, theirs {theirs:.3e}")
            except Exception as problem:
                failures.append(f"{name}: {type(problem).__name__} {str(problem)[:200]}")
    RESULTS["check"] = {"products": count, "failures": failures, "worst error / theirs": worst}
    print(
        f"check: {count} products, {len(failures)} failures, worst error / theirs {worst:.3f} [{left(args):.0f} s left]",
        flush=True,
    )
    for line in failures[:25]:
        print("  ", line)
    for key, text in RESULTS.get("reference refuses", {}).items():
        print("   reference refuses", key, text.replace("\n", " ")[:160])
    big(args)
    save()


def checked_cases() -> list[Any]:
    from aiter_fusion.bench import linear as bench

    made = []
    sizes = ("4240x1040,528,16", "28672x1024", "14336x4096", "1024x512,512,512,512,512", "4096x4096,1024,1024")
    for size, rows, fast, scales in product(
        sizes, (1, 16, 64, 128, 2, 17, 33, 100), (True, False), ("row", "block", "tensor")
    ):
        dtype = torch.float32 if scales == "tensor" and rows == 16 else torch.bfloat16
        bias = rows in (2, 33) and scales != "block"
        case = bench.Case(bench.Size.parse(size), rows, fast, scales, bias, dtype)
        if scales == "block" and (case.size.k % 128 or fast):
            continue
        made.append(case)
    return made


def run_kernel(a: dict[str, Any]) -> dict[str, torch.Tensor]:
    from aiter_fusion.bench.linear import LINEAR
    from aiter_fusion.providers.triton.linear import calls

    return calls.launcher(LINEAR, a)(calls.pointers(a))


def big(args: Any) -> None:
    """A weight of more than 2**31 elements, many runs, two streams."""
    from aiter_fusion.bench import linear as bench

    op = bench.LINEAR
    w = torch.zeros(135168, 16384, dtype=torch.float8_e4m3fn, device="cuda")
    w[-8:] = (torch.randn(8, 16384, device="cuda")).to(w.dtype)
    for rows in (1, 16):
        small = bench.Case(bench.Size.parse("16384x16"), rows).arguments("cuda")
        a = {**small, "weights": [w.t()], "weight_scales": [torch.ones(1, 135168, device="cuda")]}
        y = next(iter(run_kernel(a).values()))
        last = (a["x"].double() @ w[-8:].double().t()) * a["x_scale"].double()
        print(
            "big",
            rows,
            "error",
            float((y[:, -8:].double() - last).norm() / last.norm()),
            "rest zero",
            bool((y[:, :-8] == 0).all()),
            flush=True,
        )
    del w
    a = bench.Case(bench.Size.parse("14336x4096"), 16).arguments("cuda")
    first = next(iter(run_kernel(a).values()))
    same = sum(torch.equal(first, op.target(*a.values(), "triton")[0]) for _ in range(1000))
    print("equal runs of 1000:", same, flush=True)
    streams = [torch.cuda.Stream() for _ in range(2)]
    others = [bench.Case(bench.Size.parse("14336x4096"), 16).arguments("cuda", seed) for seed in (1, 2)]
    want = [op.target(*o.values(), "triton")[0] for o in others]
    torch.cuda.synchronize()
    wrong = 0
    for _ in range(100):
        found = []
        for stream, other in zip(streams, others):
            with torch.cuda.stream(stream):
                found.append(op.target(*other.values(), "triton")[0])
        torch.cuda.synchronize()
        wrong += sum(not torch.equal(p, q) for p, q in zip(found, want))
    print("two streams: wrong", wrong, flush=True)
    RESULTS["equal"], RESULTS["streams wrong"] = same, wrong


def table(args: Any) -> None:
    from aiter_fusion.bench import linear as bench

    rows_of_table = RESULTS.setdefault("bench", [])
    missed = []
    torch.set_grad_enabled(False)
    rate = bench.copy_rate()
    for precise, rows, size in product((False, True), (1, 16, 64, 4, 32, 128), GOALS):
        if left(args) < 90:
            print("stopped: no time")
            break
        case = bench.Case(bench.Size.parse(size), rows, not precise)
        try:
            if problem := JOBS[case].result():
                print(problem)
                continue
            row = measured(case, rate)
        except RuntimeError as problem:
            print(f"{case}: {type(problem).__name__} {str(problem)[:300]}", flush=True)
            continue
        goal = GOALS[size][(1, 16, 64).index(rows)] if rows in (1, 16, 64) and not precise else None
        mark = "" if goal is None else f"goal {goal} {'met' if row.ratio <= goal else 'MISSED'}"
        missed += [str(case)] if goal and row.ratio > goal else []
        print(
            f"{case}: ours {row.ours_us:.2f} separate {row.separate_us:.2f} ratio {row.ratio:.3f} {mark} "
            f"errors {row.ours_error:.2e} {row.separate_error:.2e} [{left(args):.0f} s]", flush=True,
        )  # fmt: skip
        rows_of_table.append({**row.__dict__, "ratio": row.ratio, "goal": goal})
        save()
    print("goals missed:", missed, flush=True)


def measured(case: Any, rate: float) -> Any:
    """As ``bench linear``, with the launches themselves: Inductor would need seconds a case to compile them anew."""
    from aiter_fusion.bench import linear as bench
    from aiter_fusion.bench.timing import alternate, capture
    from aiter_fusion.providers.triton.linear import calls

    sets = bench.rotating(case)
    launch = calls.launcher(bench.LINEAR, sets[0])
    pointers = [calls.pointers(a) for a in sets]
    _, separate = bench.functions(sets[0])
    tensors = [bench.tensors_of(a) for a in sets]
    have, want = (
        bench.error(sets[0], next(iter(launch(pointers[0]).values()))),
        bench.error(sets[0], separate(*tensors[0])[0]),
    )
    count = len(sets) * -(-bench.GRAPH_CALLS // len(sets))
    graphs = [
        capture(lambda i: launch(pointers[i]), [(i,) for i in range(len(sets))], count),
        capture(separate, tensors, count),
    ]
    ours, theirs = (t / count for t in alternate([g.replay for g in graphs], 11))
    return bench.Row(str(case.size), case.rows, case.fast, ours, theirs, case.size.bytes / rate * 1e6, have, want)


def compiled(args: Any) -> None:
    """The op as Inductor launches it: the same bits as the launches themselves, and the same time."""
    from aiter_fusion.bench import linear as bench
    from aiter_fusion.bench.timing import alternate, capture
    from aiter_fusion.providers import PROVIDERS
    from aiter_fusion.providers.triton.linear import calls

    PROVIDERS["triton"].prepare()
    torch.set_grad_enabled(False)
    for size, rows in (("4096x4096,1024,1024", 1), ("4096x4096", 16), ("14336x4096", 64)):
        case = bench.Case(bench.Size.parse(size), rows)
        sets = bench.rotating(case)
        ours, separate = bench.functions(sets[0])
        run = torch.compile(ours, dynamic=False, fullgraph=True)
        tensors, pointers = [bench.tensors_of(a) for a in sets], [calls.pointers(a) for a in sets]
        launch = calls.launcher(bench.LINEAR, sets[0])
        same = all(map(torch.equal, run(*tensors[0]), launch(pointers[0]).values()))
        count = len(sets) * -(-bench.GRAPH_CALLS // len(sets))
        own = capture(lambda i: launch(pointers[i]), [(i,) for i in range(len(sets))], count)
        graphs = [capture(run, tensors, count), own, capture(separate, tensors, count)]
        times = [t / count for t in alternate([g.replay for g in graphs], 11)]
        RESULTS.setdefault("compiled", {})[str(case)] = (same, *times)
        print(
            f"compiled {case}: same bits {same}; Inductor's launch {times[0]:.2f}, own {times[1]:.2f}, "
            f"separate {times[2]:.2f} us [{left(args):.0f} s]", flush=True,
        )  # fmt: skip
    # symbolic rows: one graph for all
    torch._dynamo.reset()
    a = bench.Case(bench.Size.parse("4096x4096,1024,1024"), 64).arguments("cuda")
    ours, separate = bench.functions(a)
    run = torch.compile(ours, fullgraph=True)
    _, _, *rest = bench.tensors_of(a)
    for rows in (64, 7, 33, 600, 128):
        b = bench.Case(bench.Size.parse("4096x4096,1024,1024"), rows).arguments("cuda")
        x, xs = b["x"], b["x_scale"]
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(xs, 0)
        ys = run(x, xs, *rest)
        pairs = zip(ys, separate(x, xs, *rest))
        print(
            f"symbolic {rows} rows: difference {max(float((y.float() - w.float()).norm() / w.float().norm()) for y, w in pairs):.1e}",
            flush=True,
        )
    save()


def host(args: Any) -> None:
    """Host time of a call with symbolic rows: the op by the dispatcher, and the calls that it replaces."""
    from aiter_fusion.bench import linear as bench

    for size, rows in product(("4096x4096,1024,1024", "4096x4096", "4096x14336,14336"), (1, 16, 64, 512)):
        a = bench.Case(bench.Size.parse(size), rows).arguments("cuda")
        values = [*a.values(), "triton"]
        x, ws, xs, ss = a["x"], a["weights"], a["x_scale"], a["weight_scales"]

        def replaced() -> None:  # as Inductor writes it
            for w, s in zip(ws, ss):
                y = torch._C._dynamo.guards._empty_strided_cuda((rows, w.shape[1]), (w.shape[1], 1), torch.bfloat16)
                torch.ops.aten._scaled_mm.out(x, w, xs, s, None, None, torch.bfloat16, True, out=y)

        def ours() -> None:
            torch.ops.aiter_fusion.fp8_linear.default(*values)

        def clock(call: Any) -> float:
            best = 1e9
            for _ in range(20):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(50):
                    call()
                best = min(best, (time.perf_counter() - begin) / 50 * 1e6)
            torch.cuda.synchronize()
            return best

        call, base = clock(ours), clock(replaced)
        RESULTS.setdefault("host", {})[f"{size} {rows}"] = (call, base)
        print(
            f"host {size} {rows} rows: ours {call:.1f} us, the calls {base:.1f} us, difference {call - base:+.1f}",
            flush=True,
        )
    save()


def grid(args: Any) -> None:
    """Tiles around the winners, for the goals that were missed and for precise sums of 256 columns."""
    from aiter_fusion.bench import linear as bench
    from aiter_fusion.bench.timing import alternate, capture
    from aiter_fusion.providers.triton import tuned
    from aiter_fusion.providers.triton.linear import calls, rules

    found = RESULTS.setdefault("grid", {})
    for (case, tiles), jobs in GRID_JOBS.items():
        if left(args) < 60:
            print("grid stopped: no time")
            break
        key = rules.key(case.size.k, case.size.ns, case.rows, case.fast)
        sets = bench.rotating(case)
        names, runs = [], []
        calls_of = len(sets) * -(-bench.GRAPH_CALLS // len(sets))
        pointers = [calls.pointers(a) for a in sets]
        for tile, problem in [({}, None), *((dict(t), j) for t, j in zip(tiles, jobs))]:
            if problem is not None and problem.result():
                continue
            try:
                with tuned.trying({key: tile} if tile else {}):
                    launch = calls.launcher(bench.LINEAR, sets[0])
                graph = capture(
                    lambda index, launch=launch: launch(pointers[index]), [(i,) for i in range(len(sets))], calls_of
                )
                runs.append(graph.replay)
                names.append(" ".join(f"{n}{v}" for n, v in tile.items()) or "rule")
            except Exception as error:
                print("  ", case, tile, type(error).__name__, str(error)[:120])
        times = [t / calls_of for t in alternate(runs, 9)]
        ranked = sorted(zip(times, names))
        found[str(case)] = ranked
        print(
            f"grid {case}: rule {times[0]:.2f}; "
            + "; ".join(f"{n} {t:.2f}" for t, n in ranked[:5])
            + f" [{left(args):.0f} s]",
            flush=True,
        )
        save()


def tiles_of(rows: int, fast: bool) -> list[tuple[tuple[str, int], ...]]:
    """Candidates as ``tuned`` has them."""
    made = []
    if rows == 1:
        for n, k, w in product((1, 2, 4, 8), (512, 1024, 2048, 4096), (1, 2, 4)):
            if 64 <= n * k // (32 * w) <= 256 and 256 * w <= k <= 1024 * w:
                made.append((("rows", 1), ("block_n", n), ("block_k", k), ("stages", 1), ("warps", w), ("split", 1)))
        return made
    for n, k, s, w, split in product((64, 128), (128, 256), (3, 4, 5, 6, 7, 8), (4, 8), (1, 2, 4)):
        size = (n + rows) * k * s
        if not 60_000 <= size <= 228_000 or (n == 64 and w == 8) or (n == 128 and split == 1 and w == 4):
            continue
        made.append((("rows", rows), ("block_n", n), ("block_k", k), ("stages", s), ("warps", w), ("split", split)))
    return made


JOBS: dict[Any, Any] = {}
GRID_JOBS: dict[Any, list[Any]] = {}


def ask(pool: Any, only: list[str]) -> None:
    """Compile in worker processes what will be wanted, before CUDA is touched."""
    from aiter_fusion.bench import linear as bench

    if "check" in only:
        for case in checked_cases():
            JOBS[case] = pool.submit(warm, (case, {}))
    if "bench" in only:
        for precise, rows, size in product((False, True), (1, 16, 64, 4, 32, 128), GOALS):
            case = bench.Case(bench.Size.parse(size), rows, not precise)
            if case not in JOBS:
                JOBS[case] = pool.submit(warm, (case, {}))
    if "grid" in only:
        wanted = [("4096x4096", 16, True), ("4096x4096", 64, True), ("14336x4096", 64, True), ("14336x4096", 16, True),
                  ("4096x4096,1024,1024", 64, True), ("8192x28672,28672", 1, True), ("4096x14336,14336", 16, True),
                  ("4096x4096", 16, False), ("14336x4096", 64, False), ("4096x4096,1024,1024", 64, False)]  # fmt: skip
        for size, rows, fast in wanted:
            case = bench.Case(bench.Size.parse(size), rows, fast)
            tiles = tiles_of(rows, fast)
            if size.startswith("4096x14336"):
                tiles = [
                    tuple({**dict(t), "split": 1, "stages": s}.items())
                    for t in tiles
                    if dict(t)["split"] == 1
                    for s in (3, 4)
                ]
            tiles = list(dict.fromkeys(tiles))
            GRID_JOBS[case, tuple(tiles)] = [pool.submit(warm, (case, dict(tile))) for tile in tiles]


def decode(args: Any) -> None:
    from aiter_fusion.bench import decode as bench
    from aiter_fusion.bench.model import Sizes

    for batch in (1, 32):
        if left(args) < 40:
            print("decode stopped: no time")
            break
        try:
            result = bench.bench(Sizes(layers=4), (batch,), max_autotune=False, command="measure2")
            print(result, flush=True)
            RESULTS.setdefault("decode", []).append(json.loads(result.to_json()))
            save()
        except Exception:
            traceback.print_exc()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--deadline", type=float, default=290.0)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--only", default="check,compiled,bench,host,grid,decode")
    args = parser.parse_args()
    only = args.only.split(",")
    pool = ProcessPoolExecutor(args.workers, mp_context=get_context("fork"))
    ask(pool, only)
    print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU", flush=True)
    for name, part in (
        ("check", check),
        ("compiled", compiled),
        ("bench", table),
        ("host", host),
        ("grid", grid),
        ("decode", decode),
    ):
        if name in only:
            try:
                part(args)
            except Exception:
                traceback.print_exc()
            print(f"-- {name} done [{left(args):.0f} s left]", flush=True)
    save()
    for worker in list((pool._processes or {}).values()):
        worker.kill()
    os._exit(0)


if __name__ == "__main__":
    main()
