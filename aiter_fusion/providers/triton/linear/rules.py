"""How a product of few rows is launched, and up to how many rows it pays: measured tiles, looked up by size.

Few rows leave a product bound by reading its weights once, at 4.26 TB/s on an NVIDIA H200. For that, 26 to 32 KB of
loads must be under way on every multiprocessor (Little's law with 0.8 to 1 us of loaded latency), so a tile is chosen
by how often the tiles of all weights go round the multiprocessors, which depends on the sum of all N, not on K:

* less than once: one program a multiprocessor, which alone has enough under way (64 x 256 values, five or six stages);
  where that leaves most multiprocessors idle, k is split over several programs, and a second launch adds up;
* once or twice: the programs share multiprocessors, with fewer stages each;
* more often: small tiles and three stages, so that three or four programs share one, and the last round is short.

Every tile reads x again, so with 64 rows tiles are wider. One row takes no matrix unit: threads multiply and add.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ....scaled_product import BLOCK
from ...shapes import Int, power_of_two
from .. import tuned

# Multiprocessors of the GPU that the tables were measured on.
MULTIPROCESSORS = 132
# The most rows that are measured, and weights of one launch.
MOST_ROWS, MOST_WEIGHTS = 128, 4
# A split leaves every program at least so many steps along k, or filling its pipeline is most of its time.
LEAST_STEPS, MOST_SPLITS = 4, 8
# GPUs that the tables hold for, by the name that PyTorch gives them.
MEASURED = ("NVIDIA H200",)


class Tile(NamedTuple):
    """The work of one program.

    rows:    of x; 1: multiply and add in float32, without matrix units.
    block_n: rows of a weight.
    block_k: columns of a weight that it holds at a time.
    stages:  loads of such blocks that are under way at a time, and one that is worked on.
    warps:   of 32 threads.
    """

    rows: int
    block_n: int
    block_k: int
    stages: int
    warps: int

    @property
    def stage_bytes(self) -> int:
        """Shared memory that a stage takes."""
        return (self.rows + self.block_n) * self.block_k


class Plan(NamedTuple):
    """A tile, and over how many programs k is split."""

    tile: Tile
    split: int


# rows of x, padded -> sum of all N -> the fastest tile. None: separate calls of ``torch._scaled_mm`` are as fast, or
# faster. Source: one NVIDIA H200 (torch 2.11.0, triton 3.6.0, 2026-11-21), CUDA graphs of calls that rotate over more
# weights than the L2 cache holds; N of 4096 with K of 4096 and of 14336, 8192 with K of 28672, the others with 4096 and
# 8192. A tile that is within 1 % of the fastest at several sizes is preferred to several tiles.
_ONE_ROW: Mapping[int, Tile | None] = {
    4096: Tile(1, 4, 2048, 1, 4),
    6144: Tile(1, 2, 1024, 1, 1),
    8192: Tile(1, 4, 1024, 1, 2),
    10240: Tile(1, 8, 1024, 1, 2),
    28672: Tile(1, 2, 1024, 1, 1),
    57344: Tile(1, 2, 1024, 1, 1),
}
_16_ROWS: Mapping[int, Tile | None] = {
    4096: Tile(16, 64, 256, 5, 4),
    6144: Tile(16, 64, 256, 6, 4),
    8192: Tile(16, 64, 256, 6, 4),
    10240: Tile(16, 64, 256, 4, 4),
    28672: Tile(16, 64, 128, 3, 4),
    57344: Tile(16, 64, 128, 3, 4),
}
_32_ROWS: Mapping[int, Tile | None] = {
    4096: Tile(32, 64, 256, 5, 4),
    6144: Tile(32, 64, 256, 5, 4),
    8192: Tile(32, 64, 256, 5, 4),
    10240: Tile(32, 128, 256, 4, 4),
    28672: Tile(32, 64, 128, 3, 4),
    57344: Tile(32, 128, 128, 4, 8),
}
_64_ROWS: Mapping[int, Tile | None] = {
    4096: Tile(64, 64, 256, 5, 4),
    6144: Tile(64, 64, 256, 5, 4),
    8192: Tile(64, 64, 256, 5, 4),
    10240: Tile(64, 128, 256, 4, 8),
    28672: Tile(64, 64, 128, 3, 4),
    57344: Tile(64, 128, 128, 4, 8),
}
FAST: Mapping[int, Mapping[int, Tile | None]] = {
    1: _ONE_ROW,
    16: _16_ROWS,
    32: _32_ROWS,
    64: _64_ROWS,
    128: {
        4096: Tile(64, 64, 256, 6, 4),
        6144: Tile(128, 64, 256, 4, 4),
        8192: Tile(128, 64, 256, 4, 4),
        10240: Tile(128, 128, 128, 6, 4),
        28672: Tile(128, 128, 128, 3, 8),
        57344: None,
    },
}
# Sums are kept in float32 for every 128 columns, whatever the tile's width: tiles of 256 columns gain nothing then.
PRECISE: Mapping[int, Mapping[int, Tile | None]] = {
    1: _ONE_ROW,
    16: {
        **_16_ROWS,
        4096: Tile(16, 64, 128, 8, 4),
        6144: Tile(16, 64, 128, 8, 4),
        8192: Tile(16, 64, 128, 8, 4),
        10240: Tile(16, 64, 128, 6, 4),
    },
    32: {
        **_32_ROWS,
        4096: Tile(32, 64, 128, 8, 4),
        6144: Tile(32, 64, 128, 8, 4),
        8192: Tile(32, 64, 128, 8, 4),
        10240: Tile(32, 128, 128, 6, 4),
    },
    64: {
        **_64_ROWS,
        4096: Tile(64, 64, 128, 8, 4),
        6144: Tile(64, 64, 128, 8, 4),
        8192: Tile(64, 64, 128, 8, 4),
        10240: Tile(64, 128, 128, 6, 4),
    },
    128: {
        4096: Tile(64, 64, 128, 8, 4),
        6144: Tile(64, 64, 128, 6, 4),
        8192: None,
        10240: Tile(128, 128, 128, 5, 8),
        28672: None,
        57344: None,
    },
}


def padded(rows: int) -> int:
    """The rows of the tables that stand for a number of rows."""
    return 1 if rows == 1 else max(16, power_of_two(rows))


def key(k: int, ns: Sequence[int], rows: int, fast: bool) -> str:
    """How the tuned file names a product."""
    return tuned.key("linear", k, sum(ns), padded(rows), fast)


def tile(k: int, ns: Sequence[int], rows: int, fast: bool, multiprocessors: int) -> Tile | None:
    """The measured tile of the nearest size, by how often the tiles go round the multiprocessors; None: no tile was
    as fast as PyTorch's calls, or none was measured for so many rows."""
    if rows > MOST_ROWS:
        return None
    table = (FAST if fast else PRECISE)[padded(rows)]
    total = sum(ns) * MULTIPROCESSORS / multiprocessors
    return table[min(table, key=lambda n: abs(math.log(n / total)))]


def is_tuned(k: int, ns: Sequence[int], rows: Int, fast: bool) -> bool:
    """Whether ``tune --linear`` measured a product, with so many rows or, where their number is symbolic, with any."""
    classes = [padded(rows)] if isinstance(rows, int) else list(FAST)
    return any("percent" in tuned.choice("linear", k, sum(ns), each, fast) for each in classes)


def pays(k: int, ns: Sequence[int], rows: int, fast: bool, multiprocessors: int) -> bool:
    """Whether a launch is faster than separate calls of ``torch._scaled_mm``. What ``tune --linear`` measured for a
    product takes precedence over the tables, which stand for all other sizes."""
    measured = tuned.choice("linear", k, sum(ns), padded(rows), fast).get("percent")
    if measured is not None and rows <= MOST_ROWS:
        return measured < 100
    return tile(k, ns, rows, fast, multiprocessors) is not None


def plan(
    k: int, ns: Sequence[int], rows: int, fast: bool, blocked: bool, multiprocessors: int, shared_memory: int
) -> Plan:
    """How to launch a product, whether or not it pays.

    Args:
        k, ns: of the weights.
        rows: of x.
        fast: whether sums may be those of the matrix units.
        blocked: whether scales are by block of 128 x 128.
        multiprocessors, shared_memory: of the GPU; bytes that a program can have.
    """
    chosen = tile(k, ns, min(rows, MOST_ROWS), fast, multiprocessors)
    chosen = chosen or Tile(64, 128, 128, 4, 8)  # what is fastest for the largest products that were measured
    tried = tuned.choice("linear", k, sum(ns), padded(rows), fast)
    chosen = chosen._replace(**{name: value for name, value in tried.items() if name in Tile._fields})
    if chosen.rows == 1:
        return Plan(chosen, 1)
    if blocked and chosen.block_k > BLOCK:  # steps of one block, and as many bytes under way
        chosen = chosen._replace(block_k=BLOCK, stages=chosen.stages * (chosen.block_k // BLOCK))
    stages = max(1, min(chosen.stages, (shared_memory - 2048) // chosen.stage_bytes))
    chosen = chosen._replace(stages=stages)
    tiles = sum(-(-n // chosen.block_n) for n in ns) * -(-rows // chosen.rows)
    split = 1
    while (
        split < MOST_SPLITS and 2 * split * tiles <= multiprocessors and k >= 2 * split * LEAST_STEPS * chosen.block_k
    ):
        split *= 2
    return Plan(chosen, tried.get("split", split))
