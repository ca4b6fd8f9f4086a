"""What the processes of a doctor are asked to do, and mostly do not survive."""

from __future__ import annotations

import os
import sys
import time

import torch.distributed as dist


def answer() -> str:
    return "well"


def number() -> int:
    return dist.get_rank() + 10 * dist.get_world_size()


def abort() -> None:
    """As a ROCm process that reads foreign memory."""
    print("Memory access fault by GPU node-1, in /opt/of/somebody/lib/x.so\n\n", file=sys.stderr, flush=True)
    os.abort()


def wait() -> None:
    time.sleep(3600)


def fail() -> None:
    """As Triton: the reason is in the last line, and what its compiler says is printed."""
    print("/home/somebody/kernels/x.py:3:5: error: failed to legalize operation\nmuch more", file=sys.stderr)
    try:
        raise ValueError("at 3:5:\n    x = tl.load(y)\n        ^\ny is no pointer")
    except ValueError as error:
        raise RuntimeError("compiling failed") from error


def fail_on_the_second() -> None:
    if dist.get_rank() == 1:
        fail()
    dist.barrier()
