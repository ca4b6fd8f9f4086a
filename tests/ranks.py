"""Run a function in several processes of one group."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from queue import Empty
from typing import Any

SECONDS = 120  # far more than any function takes: a process that hangs is a defect


def run(world: int, folder: Path, function: Callable[..., Any], *args: Any, backend: str = "gloo") -> list[Any]:
    """``function(*args)`` in ``world`` processes; what each returned, by rank. With NCCL each has the GPU of its rank.

    The function is looked up by its name in a fresh process, and finds ``torch.distributed`` initialised, and RANK and
    the like in the environment. An exception in one is raised here with its traceback.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_child, args=(rank, world, str(folder), backend, results, function, args))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        for _ in range(world):
            rank, problem, value = results.get(timeout=SECONDS)
            if problem:
                raise AssertionError(f"rank {rank}: {problem}")
            found[rank] = value
    except Empty:
        raise AssertionError(f"only ranks {sorted(found)} have finished in {SECONDS} s") from None
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return [found[rank] for rank in range(world)]


def _child(
    rank: int, world: int, folder: str, backend: str, results: Any, function: Callable[..., Any], args: Any
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "HF_HUB_OFFLINE": "1"}
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor{rank}", "OMP_NUM_THREADS": "1"}
    import torch
    import torch.distributed as dist

    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, rank=rank, world_size=world, init_method=f"file://{folder}/store")
        value = function(*args)
        dist.barrier()
        results.put((rank, "", value))
    except Exception:
        results.put((rank, traceback.format_exc(), None))
        raise
    finally:
        dist.destroy_process_group()
