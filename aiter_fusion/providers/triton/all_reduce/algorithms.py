"""Which algorithm an all-reduce takes, and how much memory: from sizes alone, which are the same on all ranks.

``one_shot``: every rank sends its rows to all others, and each sums all rows itself. ``two_shot``: every row has an
owner, to whom all ranks send it; the owner sums it and sends the sum to all. ``fallback``: PyTorch's all-reduce, then
one kernel for the rest.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

from ...collective import MIB, ONE_STAGE

# The fastest algorithm by the number of ranks: (largest tensor of a rank in bytes, algorithm). It replaces AITER's
# rule, which sends some sizes through two stages that one shot is faster for here, and the reverse. "fallback" never
# was the fastest. Measured by ``bench allreduce`` on NVIDIA H200 (NVLink, no multicast; torch 2.11.0+cu130, triton
# 3.6.0, 2026-11-21) in bfloat16, for 1 to 8192 rows of 8192. With 2 ranks one shot is always the fastest, since both
# send as much (8192 rows: 373 us, two-shot 377 us); with 4 ranks it is for 16 rows (8.1 us, two-shot 8.4 us), two-shot
# for 32 (9.2 us, one-shot 10.4 us).
MEASURED: Mapping[int, tuple[tuple[float, str], ...]] = {
    2: ((math.inf, "one_shot"),),
    4: ((MIB // 4, "one_shot"), (math.inf, "two_shot")),
}
# 8 ranks have not been measured: AITER's rule for one stage, and beyond it what is fastest for most sizes on 4.
UNMEASURED = "two_shot"

# Rows of one launch: blocks are numbered in 16 bits.
ROWS = 32768

_forced: str | None = None


@contextlib.contextmanager
def forced(algorithm: str) -> Iterator[None]:
    """Make all calls take this algorithm, to measure or to test it."""
    global _forced
    before, _forced = _forced, algorithm
    try:
        yield
    finally:
        _forced = before


def choose(world: int, rows: int, width: int, itemsize: int) -> str:
    """``one_shot``, ``two_shot``, or what is ``forced``.

    Args:
        world: number of ranks.
        rows: of a rank's tensor.
        width: elements of a row.
        itemsize: bytes of an element.
    """
    if _forced is not None:
        return _forced
    if world in MEASURED:
        return next(algorithm for most, algorithm in MEASURED[world] if rows * width * itemsize <= most)
    return "one_shot" if ONE_STAGE.has(world, rows, width, itemsize) else UNMEASURED


def needed(algorithm: str, world: int, rows: int, tensors: int) -> int:
    """Rows of memory that a call needs in one half of a channel: one for each row that is sent to a rank, and for
    ``two_shot`` one for each sum.

    Args:
        tensors: summed over the ranks, 1 or 2.
    """
    if algorithm == "one_shot":
        return world * tensors * rows
    return world * tensors * -(-rows // world) + rows


def at_once(algorithm: str, world: int, tensors: int, memory: int) -> int:
    """The most rows that one launch can take with ``memory`` rows in one half of a channel."""
    most = memory // (world * tensors) if algorithm == "one_shot" else memory // (tensors + 1) // world * world
    return min(most, ROWS)
