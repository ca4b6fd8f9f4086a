"""``bench allreduce``: all-reduce, residual addition, RMSNorm and FP8 groups of 128, on the GPUs of one host.

Ours is ``aiter_fusion::all_reduce_rms_norm_quant.add``, by each way and by the one that it chooses. Beside it stand
PyTorch's all-reduce (NCCL), and its all-reduce over symmetric memory (one-shot for up to 512 KiB, two-shot above; in
place, as if the matrix product had written there), each followed by Inductor's code for the rest. All are timed in CUDA
graphs that all ranks replay together, in turn; the time is the slowest rank's median.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from .. import ops  # noqa: F401  (importing ops registers them)
from ..op import FusedOp
from ..providers.triton.all_reduce import algorithms
from ..providers.triton.all_reduce.symmetric import check
from ..registry import REGISTRY
from ..stages.norm import rms_norm
from ..stages.quantise import DYNAMIC
from ..tables import plain, table
from .timing import Conditions, Refused, alternate, check_folder, conditions, need_gpu

HIDDEN = (8192,)
ROWS = (1, 32, 128, 512, 2048, 8192)
ONE_SHOT_BYTES = 512 * 1024
# A graph has as many calls as take about this long, in seconds, and at most this many; it is replayed this often.
GRAPH_TIME, GRAPH_CALLS, ROUNDS = 2e-3, 40, 15
NAMES = ("ours", "one_shot", "two_shot", "fallback", "nccl", "symmetric")
STEPS = {
    "block": 128,
    "column_major": False,
    "scale_steps": "div=448.0 float32",
    "factor_steps": "div=448.0 float32",
    "value_steps": "float32 div_scale clamp_min=-448.0 clamp_max=448.0",
    "quant_dtype": torch.float8_e4m3fn,
}
NORM = {"eps": 1e-6, "eps_tensor": None, "offset": None, "cast_first": True, "dtype": torch.bfloat16}


@dataclass(frozen=True)
class Row:
    """Microseconds a call by what was timed (None: not possible), for ``rows`` rows of ``hidden``; ``chosen`` is the
    way that ours takes."""

    world: int
    hidden: int
    rows: int
    chosen: str
    us: dict[str, float | None]

    @property
    def floor_bytes(self) -> float:
        """What each GPU must send: the sum of every row must reach every rank, in bfloat16."""
        return 2 * (self.world - 1) / self.world * self.rows * self.hidden * 2


@dataclass(frozen=True)
class Result:
    """All rows, the bytes a second that a GPU sent in one direction when it copied to another, and the conditions."""

    conditions: Conditions
    link_rate: float
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        def ratio(row: Row, name: str) -> str:
            ours, theirs = row.us["ours"], row.us[name]
            return f"{ours / theirs:.2f}" if ours and theirs else "-"

        cells = [
            [str(row.world), str(row.hidden), str(row.rows), row.chosen]
            + [f"{row.us[name]:.1f}" if row.us.get(name) else "-" for name in NAMES]
            + [ratio(row, "nccl"), ratio(row, "symmetric")]
            + [f"{(row.us['ours'] or math.nan) * 1e-6 * self.link_rate / row.floor_bytes:.2f}"]
            for row in self.rows
        ]
        headers = ["GPUs", "hidden", "rows", "way", *(f"{name} us" for name in NAMES)]
        headers += ["ours / NCCL", "ours / symmetric", "ours / link"]
        drawn = plain(table(headers, cells, left=("way",)))
        return f"{self.conditions}\nlink {self.link_rate / 1e9:.0f} GB/s one way\n\n{drawn}"


def rest(reduced: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """What follows the all-reduce, as the graph has it."""
    summed = residual + reduced
    _, quantised = DYNAMIC.compute(rms_norm(summed, weight, **NORM), **STEPS)  # type: ignore[arg-type]
    return quantised["q"], quantised["scale"], summed


def fused_call(x: Tensor, residual: Tensor, weight: Tensor, group: str) -> tuple[FusedOp, list[Any]]:
    """Our op, and its arguments in order but for the provider."""
    op = REGISTRY.overload("all_reduce_rms_norm_quant", frozenset({"add"}))
    assert op is not None
    known = {"x": x, "other": None, "group": group, "residual": residual, "weight": weight, **NORM, **STEPS}
    known |= {"sum_dtype": torch.bfloat16, "residual_dtype": torch.bfloat16}
    return op, [known[name] for name in op.arguments]


def _capture(call: Callable[[], Any], calls: int) -> Callable[[], None]:
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's own threads may call CUDA meanwhile
        for _ in range(calls):
            call()
    return graph.replay


def _measure(rows: int, hidden: int, quick: bool) -> Row:
    world, rank, device = dist.get_world_size(), dist.get_rank(), torch.device("cuda", torch.cuda.current_device())
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    generator = torch.Generator(device).manual_seed(rank)
    x = torch.randn(rows, hidden, generator=generator, device=device).to(torch.bfloat16)
    generator.manual_seed(100)
    residual = torch.randn(rows, hidden, generator=generator, device=device).to(torch.bfloat16)
    weight = torch.randn(hidden, generator=generator, device=device).to(torch.bfloat16)
    op, given = fused_call(x, residual, weight, group)
    torch._dynamo.reset()
    compiled = torch.compile(rest, dynamic=False, fullgraph=True)
    chosen = algorithms.choose(world, rows, hidden, 2)

    def ours(way: str) -> Callable[[], Any]:
        def call() -> Any:
            with algorithms.forced(way):
                return op.target(*given, "triton")

        return call

    scratch = torch.zeros_like(x)

    def nccl() -> Any:
        dist.all_reduce(scratch)
        return compiled(scratch, residual, weight)

    import torch.distributed._symmetric_memory as symmetric

    buffer = symmetric.empty(rows, hidden, dtype=torch.bfloat16, device=device).zero_()
    symmetric.rendezvous(buffer, group)
    symm = torch.ops.symm_mem

    def over_symmetric() -> Any:
        if buffer.nbytes <= ONE_SHOT_BYTES:
            return compiled(symm.one_shot_all_reduce(buffer, "sum", group), residual, weight)
        return compiled(symm.two_shot_all_reduce_(buffer, "sum", group), residual, weight)

    _compare(ours, chosen, x, residual, weight, compiled)
    calls = {name: ours(name) for name in ("one_shot", "two_shot", "fallback") if not quick or name == chosen}
    calls |= {"nccl": nccl, "symmetric": over_symmetric}
    count = max(2, min(GRAPH_CALLS, int(GRAPH_TIME / (5e-6 + 6 * x.nbytes / 3e11))))
    replayed = {name: _capture(call, count) for name, call in calls.items()}
    dist.barrier()
    torch.cuda.synchronize()
    times = torch.tensor(alternate(list(replayed.values()), ROUNDS), device=device) / count
    dist.all_reduce(times, dist.ReduceOp.MAX)
    us: dict[str, float | None] = dict.fromkeys(NAMES) | dict(zip(replayed, times.tolist(), strict=True))
    check()
    return Row(world, hidden, rows, chosen, us | {"ours": us[chosen]})


def _compare(
    ours: Callable[[str], Callable[[], Any]], chosen: str, x: Tensor, residual: Tensor, weight: Tensor, compiled: Any
) -> None:
    """Refuse to compare what computes another thing: NCCL may round after every rank that it adds, and codes follow."""
    have = ours(chosen)()
    reduced = x.clone()
    dist.all_reduce(reduced)
    want = compiled(reduced, residual, weight)
    limit = dist.get_world_size() * 2.0**-8 * want[2].float().abs().max()
    apart = (have[2].float() - want[2].float()).abs().max()
    q = have[0].float() * have[1].repeat_interleave(128, -1)
    other = want[0].float() * want[1].repeat_interleave(128, -1)
    error = ((q - other).abs().max() / other.abs().max()).item()
    if not (apart <= limit and error < 0.1):
        raise Refused(
            f"{tuple(x.shape)}: sums differ by {apart.item()}, quantised values by {error:.3f} of the largest"
        )


def _link_rate() -> float:
    """Bytes a second of a large copy to the next GPU, all GPUs copying."""
    import torch.distributed._symmetric_memory as symmetric

    size = 256 << 20
    buffer = symmetric.empty(size, dtype=torch.uint8, device=torch.device("cuda", torch.cuda.current_device()))
    handle = symmetric.rendezvous(buffer, dist.group.WORLD.group_name)  # type: ignore[union-attr]
    peer = handle.get_buffer((dist.get_rank() + 1) % dist.get_world_size(), (size,), torch.uint8)
    source = torch.zeros_like(buffer)
    dist.barrier()
    torch.cuda.synchronize()
    (us,) = alternate([lambda: peer.copy_(source)], 10)
    slowest = torch.tensor(us, device=buffer.device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return size / slowest.item() * 1e6


def _process(rank: int, world: int, folder: str, hidden: Sequence[int], rows: Sequence[int], quick: bool) -> None:
    """One rank: measures, and rank 0 writes the rows to a file."""
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", rank=rank, world_size=world, init_method=f"file://{folder}/store")
    try:
        made = {"link_rate": _link_rate(), "rows": []}
        for width in hidden:
            for count in rows:
                row = _measure(count, width, quick)
                made["rows"].append(asdict(row))
                if rank == 0:
                    print(f"{world} GPUs, {count} x {width}: {row.us}", file=sys.stderr, flush=True)
        if rank == 0:
            (Path(folder) / "rows.json").write_text(json.dumps(made))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def measure(world: int, hidden: Sequence[int], rows: Sequence[int], command: str, quick: bool = False) -> Result:
    """Times on ``world`` GPUs of this host, each by a process of its own.

    Raises:
        RuntimeError: there are fewer GPUs.
        Refused: the results differ from PyTorch's.
    """
    need_gpu()
    if not 2 <= world <= torch.cuda.device_count():
        raise RuntimeError(f"{world} GPUs asked for; this machine has {torch.cuda.device_count()}, and 2 are the least")
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    with tempfile.TemporaryDirectory(prefix="aiter_fusion_") as folder:
        spawn(_process, (world, folder, tuple(hidden), tuple(rows), quick), nprocs=world)
        made = json.loads((Path(folder) / "rows.json").read_text())
    return Result(conditions(command), made["link_rate"], tuple(Row(**row) for row in made["rows"]))


def command(args: Namespace) -> None:
    """``aiter-fusion bench allreduce``."""
    check_folder(args.json)
    made = measure(args.world or torch.cuda.device_count(), args.hidden, args.rows, args.command_line, args.quick)
    print(made)
    if args.json:
        Path(args.json).write_text(json.dumps(asdict(made), indent=1))
