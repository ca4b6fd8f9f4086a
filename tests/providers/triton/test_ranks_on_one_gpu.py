"""The all-reduce kernel is right for every number of ranks, which here share one GPU: each has a stream and memory.

What it computes, and how it waits, is the same as between GPUs; only the link is missing. A rank's blocks must all run
beside those of the others, so rows are few.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aiter_fusion.op import FusedOp
from aiter_fusion.passes.verify import differing_codes, same_bits
from aiter_fusion.providers import collective
from aiter_fusion.providers.triton.all_reduce import algorithms, calls, symmetric
from aiter_fusion.registry import REGISTRY
from support import gpu_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.version.hip is not None, reason="needs a CUDA device: a GPU of NVIDIA's"
    ),
]
Outputs = dict[str, Tensor]
worlds = pytest.mark.parametrize("world", collective.WORLDS)


class Ranks:
    """``cores``: as many blocks of a rank as run at once for certain; more are numbered as they start."""

    def __init__(self, world: int, cores: int) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        memories = {half: [self._memory(half) for _ in range(world)] for half in symmetric.CLASSES[:2]}
        self.ranks = [
            symmetric.Communicator(
                group=str(rank),
                process_group=None,
                device=self.device,
                rank=rank,
                ranks=list(range(world)),
                late=torch.zeros(1, dtype=torch.int32, pin_memory=True),
                failed=self._word(),
                cores=cores,
                channels={half: self._channel(half, memory) for half, memory in memories.items()},
            )
            for rank in range(world)
        ]
        self.streams = [torch.cuda.Stream() for _ in range(world)]
        for stream in self.streams:  # what is asked for while kernels wait for each other is there
            with torch.cuda.stream(stream):
                torch.empty(16 << 20, dtype=torch.uint8, device=self.device)

    def _word(self) -> Tensor:
        return torch.zeros(1, dtype=torch.int32, device=self.device)

    def _memory(self, half: int) -> Tensor:
        memory = torch.full((symmetric.HEADER + 2 * half,), 0xFF, dtype=torch.uint8, device=self.device)
        memory[: symmetric.HEADER] = 0
        return memory

    def _channel(self, half: int, memories: list[Tensor]) -> symmetric.Channel:
        peers = torch.tensor([memory.data_ptr() for memory in memories], device=self.device)
        return symmetric.Channel(half, peers, self._word(), memories)

    def call(self, way: str, op: Any, of_rank: Callable[[int], dict[str, Any]], absent: int = -1) -> list[Outputs]:
        """What each rank gets."""
        given = [of_rank(rank) for rank in range(len(self.ranks))]
        found: list[Outputs] = [{} for _ in given]
        torch.cuda.synchronize()
        with algorithms.forced(way):
            for rank, stream in enumerate(self.streams):
                if rank != absent:
                    with torch.cuda.stream(stream):
                        found[rank] = calls.run(op, True, **given[rank])
        torch.cuda.synchronize()
        return found


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Ranks]:
    def make(world: int, cores: int) -> Ranks:
        made = Ranks(world, cores)
        monkeypatch.setattr(calls, "communicator", lambda group, device: made.ranks[int(group)])
        return made

    monkeypatch.setenv("AITER_FUSION_TIMEOUT", "60")  # longer than this host may take between two ranks
    return make


@worlds
@pytest.mark.parametrize("cores", [1, 16])
@pytest.mark.parametrize("way", ["one_shot", "two_shot"])
def test_random_calls(world: int, cores: int, way: str, together: Callable[[int, int], Ranks]) -> None:
    choice = random.Random(world)
    group = together(world, cores)
    # one scale for a tensor takes a second kernel, which would be loaded while the first waits
    kinds = [kind for kind in (gpu_ranks.kind(choice) for _ in range(12)) if kind[2] != 0][:6]
    codes = moved = 0
    for number in range(60):
        (op, width, block, pair), rows = choice.choice(kinds), choice.choice((1, 2, 3, 5, 8, 13, 16))
        shape = (op, rows, width, block, number, pair)
        found = group.call(way, op, lambda rank, shape=shape: gpu_ranks.arguments_of(rank, str(rank), *shape))
        for rank in group.ranks:
            rank.check()
        for other in found[1:]:
            assert all(same_bits(found[0][name], other[name]) for name in op.outputs)
        sums = gpu_ranks.reduced(world, rows, width, number, pair)
        want = gpu_ranks.without_reduction(op, gpu_ranks.arguments_of(0, "0", *shape), sums)
        for name in {"reduced", "residual_out"} & found[0].keys():
            assert same_bits(want[name], found[0][name])
        if "q" in want:
            q = found[0]["q"]
            assert differing_codes(q.cpu(), want["q"].cpu()) <= 1
            codes += q.numel()
            moved += int((q.view(torch.uint8) != want["q"].view(torch.uint8)).sum())
    assert moved <= 1e-5 * codes


@worlds
@pytest.mark.parametrize("way", ["one_shot", "two_shot"])
def test_a_rank_that_does_not_come(
    world: int, way: str, together: Callable[[int, int], Ranks], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = together(world, 16)
    op = REGISTRY.ops["all_reduce_rms_norm", frozenset({"add"})]
    absent = world - 1

    def given(rank: int) -> dict[str, Any]:
        return gpu_ranks.arguments_of(rank, str(rank), op, 3, 512, 0, 0, False)

    group.call(way, op, given)  # compiles, so that the others of the next call start at once
    monkeypatch.setenv("AITER_FUSION_TIMEOUT", "2")
    group.call(way, op, given, absent)
    for rank in group.ranks[:absent]:
        with pytest.raises(symmetric.LateRankError, match=f"rank {absent} did not take part"):
            rank.check()


@pytest.mark.parametrize("way", ["one_shot", "two_shot"])
def test_eps_in_a_tensor_is_the_number(way: str, together: Callable[[int, int], Ranks]) -> None:
    """The bits of the kernel that has the number built in, for a tensor on the CPU and one on the GPU."""
    group = together(2, 16)

    def call(op: FusedOp, **eps: object) -> list[Outputs]:
        return group.call(
            way, op, lambda rank: gpu_ranks.arguments_of(rank, str(rank), op, 5, 512, 128, 0, False) | eps
        )

    for family, features in (("all_reduce_rms_norm", {"add"}), ("all_reduce_rms_norm_quant", {"add", "value"})):
        op = REGISTRY.ops[family, frozenset(features)]
        want = call(op, eps=0.3)
        for device in ("cpu", "cuda"):
            have = call(op, eps=None, eps_tensor=torch.tensor(0.3, dtype=torch.float64, device=device))
            for rank in (0, 1):
                assert all(same_bits(want[rank][name], have[rank][name]) for name in op.outputs)
        assert not same_bits(want[0]["value"], call(op)[0]["value"])
