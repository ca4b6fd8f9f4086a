"""Run a function in several processes of one group."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# A hang is a defect that only a clock can tell. No result depends on it: it is longer than processes that compile wait
# for each other (aiter_fusion.agreement.PATIENCE), whose own error says more, and far longer than any function takes.
SECONDS = 1800


def run(world: int, folder: Path, function: Callable[..., Any], *args: Any, backend: str = "gloo") -> list[Any]:
    """``function(*args)`` in ``world`` processes; what each returned, by rank. With NCCL each has the GPU of its rank.

    The function is looked up by its name in a fresh process, and finds ``torch.distributed`` initialised, and RANK and
    the like in the environment. An exception in one is raised here with its traceback, and so is its death.
    """
    context = multiprocessing.get_context("spawn")
    processes: list[Any] = []
    ends: dict[int, Connection] = {}
    for rank in range(world):
        end, theirs = context.Pipe(duplex=False)
        given = (rank, world, str(folder), backend, theirs, function, args)
        processes.append(context.Process(target=_child, args=given))
        processes[-1].start()
        theirs.close()
        ends[rank] = end
    found: dict[int, Any] = {}
    try:
        while ends:
            ready = wait(ends.values(), SECONDS)
            if not ready:
                raise AssertionError(f"only ranks {sorted(found)} have finished in {SECONDS} s")
            for rank in [rank for rank, end in ends.items() if end in ready]:
                end = ends.pop(rank)
                try:
                    problem, found[rank] = end.recv()
                except EOFError:
                    processes[rank].join()
                    problem = f"has died with status {processes[rank].exitcode}"
                if problem:
                    raise AssertionError(f"rank {rank}: {problem}")
    finally:
        for process in processes:
            process.join(5)  # it has nothing more to say, and may leave its group in peace
            process.kill()
    return [found[rank] for rank in range(world)]


def _child(
    rank: int, world: int, folder: str, backend: str, result: Connection, function: Callable[..., Any], args: Any
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
        result.send(("", value))
    except Exception:
        result.send((traceback.format_exc(), None))
        raise
    finally:
        dist.destroy_process_group()
