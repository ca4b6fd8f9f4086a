"""Fused all-reduces give every GPU of one host the same right bits, in graphs too, and name a rank that has stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support import gpu_ranks, processes

WORLDS = [
    pytest.param(world, marks=pytest.mark.skipif(torch.cuda.device_count() < world, reason=f"needs {world} GPUs"))
    for world in (2, 4, 8)
]
pytestmark = pytest.mark.multi_gpu
worlds = pytest.mark.parametrize("world", WORLDS)


@worlds
def test_the_same_bits_on_every_rank(world: int, tmp_path: Path) -> None:
    for found in processes.run(world, tmp_path, gpu_ranks.random_calls, 1000, backend="nccl"):
        assert found["differing"] == found["wrong"] == 0
        assert found["moved_codes"] <= 1e-5 * found["codes"]
        assert set(found["ways"]) == {"one_shot", "two_shot", "fallback"}


@worlds
@pytest.mark.parametrize("way", ["one_shot", "two_shot"])
def test_every_number_can_be_sent(world: int, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AITER_FUSION_TIMEOUT", "60")  # what cannot be sent is waited for
    for found in processes.run(world, tmp_path, gpu_ranks.hostile, way, backend="nccl"):
        assert found["nan"] == [4096, 4096, 1, 2048, 0, 0]
        assert found["same"]
        assert found["right"]


@worlds
@pytest.mark.parametrize("way", ["one_shot", "two_shot"])
def test_a_rank_that_stops(world: int, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AITER_FUSION_TIMEOUT", "2")
    *others, _ = processes.run(world, tmp_path, gpu_ranks.stopped_rank, way, backend="nccl")
    for said in others:
        assert len(said) == 2
        assert all(f"rank {world - 1} did not take part" in text for text in said)


@worlds
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled(world: int, mode: str | None, tmp_path: Path) -> None:
    for found in processes.run(world, tmp_path, gpu_ranks.compiled, mode, backend="nccl"):
        assert found["same"]
        # NCCL sums in another order, and may round after every rank: last bits of bfloat16
        assert found["apart"] <= 2.0**-7
        assert found["providers"] == ["reference", "triton"]
        assert {"all_reduce_rms_norm": 2} in found["replaced"]


@worlds
def test_a_graph_replayed(world: int, tmp_path: Path) -> None:
    for found in processes.run(world, tmp_path, gpu_ranks.replays, 10000, backend="nccl"):
        assert found["same"]
