"""A process for each GPU, which runs one of these functions: for tests/providers/triton/test_multi_gpu.py."""

from __future__ import annotations

import random
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

import aiter_fusion
from aiter_fusion import ops  # noqa: F401  (importing ops registers them)
from aiter_fusion.op import FusedOp
from aiter_fusion.passes.verify import differing_codes
from aiter_fusion.providers.triton.all_reduce import algorithms
from aiter_fusion.registry import REGISTRY
from support import cases

BF16 = torch.bfloat16
WIDTHS = (256, 2880, 4096, 8192)
KINDS = 12  # each is some kernels to compile
ROWS = (1, 2, 3, 7, 32, 80, 81, 200, 515)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = {
    "column_major": False,
    "factor_steps": "div=448.0 float32",
    "scale_steps": "div=448.0 float32",
    "value_steps": "float32 div_scale clamp_min=-448.0 clamp_max=448.0",
    "quant_dtype": torch.float8_e4m3fn,
}


def arguments(op: FusedOp, rows: int, width: int, block: int, seed: int, pair: bool = False) -> dict[str, Any]:
    """This rank's arguments of a call."""
    group = dist.group.WORLD.group_name  # type: ignore[union-attr]
    return arguments_of(dist.get_rank(), group, op, rows, width, block, seed, pair)


def arguments_of(
    rank: int, group: str, op: FusedOp, rows: int, width: int, block: int, seed: int, pair: bool
) -> dict[str, Any]:
    """A rank's arguments of a call; ``x`` and ``other`` of rank r are of seed 16 seed + r."""
    x, other = summands(rows, width, seed, rank)
    generator = torch.Generator(DEVICE).manual_seed(16 * seed + 15)
    residual = torch.randn(rows, width, generator=generator, device=DEVICE).to(BF16)
    weight = torch.randn(width, generator=generator, device=DEVICE).to(BF16)
    known = {"x": x, "other": other if pair else None, "group": group, "weight": weight}
    known |= {"residual": residual, "sum_dtype": BF16, "residual_dtype": BF16}
    known |= {"scale": torch.full((), 0.02, device=DEVICE), "offset": None, "cast_first": True}
    known |= {"eps": 1e-6, "eps_tensor": None}
    known |= {"dtype": BF16, "block": block, **STEPS}
    return {name: known[name] for name in op.arguments}


def summands(rows: int, width: int, seed: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(16 * seed + rank)
    x, other = torch.randn(2, rows, width, generator=generator, device=DEVICE).to(BF16)
    return x, other


def reduced(world: int, rows: int, width: int, seed: int, pair: bool) -> Tensor:
    """The sum that every rank must get: float32, in the order of ranks, rounded once."""
    sums = []
    for which in range(2 if pair else 1):
        total = torch.zeros(rows, width, device=DEVICE)
        for rank in range(world):
            total = total + summands(rows, width, seed, rank)[which].float()
        sums.append(total.to(BF16))
    return sums[0] if not pair else sums[0] + sums[1]


def call(op: FusedOp, given: dict[str, Any], provider: str = "triton") -> dict[str, Tensor]:
    result = op.target(*given.values(), provider)
    return dict(zip(op.outputs, (result,) if isinstance(result, Tensor) else result, strict=True))


def digest(outputs: dict[str, Tensor]) -> Tensor:
    """A number for all bits of all outputs."""
    total = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for tensor in outputs.values():
        codes = tensor.flatten().view(torch.uint8).long()
        total = total * 31 + (codes * (torch.arange(codes.numel(), device=DEVICE) % 65521 + 1)).sum()
    return total


def kind(choice: random.Random) -> tuple[FusedOp, int, int, bool]:
    """An op, the length of rows, that of blocks, and whether two tensors are reduced."""
    every = [
        op
        for family in ("all_reduce_rms_norm", "all_reduce_rms_norm_quant")
        for op in REGISTRY.overloads(family).values()
    ]
    op, width = choice.choice(every), choice.choice(WIDTHS)
    return op, width, choice.choice([width, width, 0] if width % 128 else [width, 128, 128, 0]), choice.random() < 0.2


def random_calls(count: int, seed: int = 0) -> dict[str, Any]:
    """Calls of every op in mixed sizes and ways, one after another: bits on all ranks, sums, and codes."""
    choice = random.Random(seed)
    kinds = [kind(choice) for _ in range(KINDS)]
    digests, ways, wrong_sums, wrong_codes, codes = [], {}, 0, 0, 0
    for number in range(count):
        (op, width, block, pair), rows = choice.choice(kinds), choice.choice(ROWS)
        way = choice.choice([None, None, "one_shot", "two_shot", "fallback"])
        way = way or algorithms.choose(dist.get_world_size(), rows, width, 2)
        given = arguments(op, rows, width, block, number, pair)
        with algorithms.forced(way):
            have = call(op, given)
        ways[way] = ways.get(way, 0) + 1
        if way != "fallback":  # whose order of summation is the library's
            digests.append(digest(have))
        if number % 10 == 0 and way != "fallback":
            sums = reduced(dist.get_world_size(), rows, width, number, pair)
            want = without_reduction(op, given, sums)
            for name in {"reduced", "residual_out"} & have.keys():
                wrong_sums += int(not torch.equal(have[name], want[name]))
            if "q" in have:
                codes += have["q"].numel()
                apart = (have["q"].view(torch.uint8) != want["q"].view(torch.uint8)).sum().item()
                wrong_codes += int(apart)
                wrong_sums += int(differing_codes(have["q"].cpu(), want["q"].cpu()) > 1)
    aiter_fusion.check()
    mine = torch.stack(digests)
    every_rank = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every_rank, mine)
    differing = sum(int((mine != theirs).sum()) for theirs in every_rank)
    return {"ways": ways, "differing": differing, "wrong": wrong_sums, "moved_codes": wrong_codes, "codes": codes}


def hostile(way: str) -> dict[str, Any]:
    """Rows of the bits that stand for what has not come, of NaN and of infinity: on one rank, and on all."""
    rank, world = dist.get_rank(), dist.get_world_size()
    op = REGISTRY.ops["all_reduce_rms_norm_quant", frozenset({"add", "value", "reduced"})]
    given = arguments(op, 6, 4096, 128, 0)
    bits = given["x"].view(torch.int16)
    bits[0] = -1
    if rank == world - 1:
        bits[1], bits[2, 7], bits[3, ::2] = -1, -1, 0x7FFF
        given["x"][4] = float("inf")
    parts = [torch.empty_like(given["x"]) for _ in range(world)]
    dist.all_gather(parts, given["x"])
    with algorithms.forced(way):
        have = [call(op, given) for _ in range(8)]
    aiter_fusion.check()
    total = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        total = total + part.float()
    want = total.to(BF16)
    mine = torch.stack([digest(outputs) for outputs in have])
    every_rank = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(every_rank, mine)
    return {
        "same": all(bool((theirs == mine[0]).all()) for theirs in every_rank),
        "right": bool(torch.all((have[0]["reduced"] == want) | (have[0]["reduced"].isnan() & want.isnan()))),
        "nan": [int(row.isnan().sum()) for row in want],
    }


def without_reduction(op: FusedOp, given: dict[str, Any], sums: Tensor) -> dict[str, Tensor]:
    """The reference's outputs for these sums."""
    features = op.features - {"reduced"}
    plain = {name: value for name, value in given.items() if name not in ("x", "other", "group")}
    if "quant_dtype" in op.arguments:
        return {**REGISTRY.ops["rms_norm_quant", features].reference(x=sums, **plain), "reduced": sums}
    add = plain["residual"] + sums if "residual" in plain else sums
    return {"reduced": sums, "residual_out": add}


def stopped_rank(way: str) -> list[str]:
    """The last rank does not come to the third call: what the others' errors say, which they get while it waits."""
    with algorithms.forced(way):
        return _stopped_rank()


def _stopped_rank() -> list[str]:
    op = REGISTRY.ops["all_reduce_rms_norm_quant", frozenset({"add"})]
    world, rank = dist.get_world_size(), dist.get_rank()
    for number in range(2):
        call(op, arguments(op, 4, 4096, 128, number))
    aiter_fusion.check()
    dist.barrier()
    torch.cuda.synchronize()
    store = dist.distributed_c10d._get_default_store()
    said = []
    if rank != world - 1:
        given = arguments(op, 4, 4096, 128, 3)
        call(op, given)
        for attempt in (aiter_fusion.check, lambda: call(op, given)):
            try:
                attempt()
            except aiter_fusion.LateRankError as error:
                said.append(str(error))
        store.set(f"rank {rank} has ended", "")
    else:
        store.wait([f"rank {other} has ended" for other in range(rank)])
    return said


def after_a_layer(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Two all-reduces before norms, as in a layer that is split over ranks."""
    summed = residual + funcol.all_reduce(x, "sum", dist.group.WORLD)  # type: ignore[arg-type]
    q, scale = cases.q3(cases.llama(summed, weight))
    again = summed + funcol.all_reduce(summed * 0.5, "sum", dist.group.WORLD)  # type: ignore[arg-type]
    return again, q, scale, *cases.q3(cases.llama(again, weight))


def compiled(mode: str | None) -> dict[str, Any]:
    """By Inductor, whose CUDA graphs warm up, capture and replay in mode reduce-overhead; against the reference."""
    given = []
    for rows in (3, 64, 200):
        residual, other = summands(rows, 1024, rows, 15)
        given.append((summands(rows, 1024, rows, dist.get_rank())[0], residual, 1 + 0.1 * other[0]))
    found = {}
    for provider in ("reference", "triton"):
        torch._dynamo.reset()
        options: Any = {"mode": mode} if mode else {}
        function = torch.compile(after_a_layer, backend=aiter_fusion.Backend(provider=provider), options=options)
        with torch.no_grad():
            found[provider] = [[t.clone() for t in function(*each)] for each in given for _ in range(4)]
    aiter_fusion.check()
    sums = [abs(a[0].float() - b[0].float()).max().item() for a, b in zip(*found.values(), strict=True)]
    largest = max(a[0].float().abs().max().item() for a in found["reference"])
    return {
        "replaced": [report.replaced for report in aiter_fusion.reports()],
        "providers": sorted({site.provider for report in aiter_fusion.reports() for site in report.sites}),
        "apart": max(sums) / largest,
        "same": all(
            torch.equal(first, again)
            for n in range(0, len(found["triton"]), 4)
            for other in found["triton"][n + 1 : n + 4]
            for first, again in zip(found["triton"][n], other, strict=True)
        ),
    }


def replays(count: int) -> dict[str, Any]:
    """A CUDA graph of calls of several sizes and ways, replayed; then the same calls without it, on another stream."""
    op = REGISTRY.ops["all_reduce_rms_norm_quant", frozenset({"add"})]
    shapes = [(1, 4096), (32, 8192), (512, 4096), (128, 8192), (1, 8192)]
    given = [arguments(op, rows, width, 128, number) for number, (rows, width) in enumerate(shapes)]
    want = [call(op, each) for each in given]
    with torch.cuda.stream(torch.cuda.Stream()):
        again = [call(op, each) for each in given]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        have = [call(op, each) for each in given]
    begin = time.monotonic()
    for _ in range(count):
        graph.replay()
    aiter_fusion.check()
    took = time.monotonic() - begin
    after = [call(op, each) for each in given]
    aiter_fusion.check()
    first = torch.stack([digest(outputs) for outputs in want])
    same = all(torch.equal(first, torch.stack([digest(o) for o in other])) for other in (again, have, after))
    return {"same": same, "microseconds": 1e6 * took / count / len(shapes)}
