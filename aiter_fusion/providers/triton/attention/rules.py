"""How attention of few query rows is launched: tiles, and over how many programs the keys of a head are split.

Reading keys and values bounds it, so the rules are about how many loads are under way on every multiprocessor, and
about how evenly the keys are spread over them.
"""

from __future__ import annotations

from typing import NamedTuple

from ...shapes import power_of_two

# The query rows of a group that a program can have; more go to several programs.
LEAST_ROWS, MOST_ROWS = 16, 64
# What tokens of a call, and elements of a head, the kernels are for.
MOST_TOKENS, LEAST_SIZE, MOST_SIZE, SIZES = 16, 64, 256, 8
# Parts that the keys of a head are split into at most, and the blocks of keys that a part has at least in a full cache.
MOST_SPLITS, LEAST_BLOCKS = 128, 2
# Programs for each multiprocessor that a split aims at.
WAVES = 4
# GPUs that the rules were measured on, by the name that PyTorch gives them.
MEASURED = ("NVIDIA H200",)


class Tile(NamedTuple):
    """The work of one program.

    rows:    of queries; 1: multiply and add in float32, without matrix units.
    block:   keys that it holds at a time.
    stages:  loads of such blocks that are under way at a time, and one that is worked on.
    warps:   on AMD's GPUs as many, of 64 threads: with half, sums of heads of 256 do not fit the registers.
    swapped: whether keys are the rows of the products (of 64 rows at a time on NVIDIA's from compute capability 9.0).
    """

    rows: int
    block: int
    stages: int
    warps: int
    swapped: bool = False

    def stage_bytes(self, size: int, itemsize: int) -> int:
        """Shared memory that the keys and values of a stage take."""
        return 2 * self.block * size * itemsize


class Plan(NamedTuple):
    """A tile, and over how many programs the keys are split."""

    tile: Tile
    splits: int


def plan(heads: int, rows: int, keys: int, size: int, itemsize: int, multiprocessors: int, shared_memory: int) -> Plan:
    """How to launch a call.

    Args:
        heads: of keys, of all batches.
        rows: of queries that share a head of keys.
        keys: that the cache has room for.
        size: elements of a head; itemsize: bytes of an element.
        multiprocessors, shared_memory: of the GPU; bytes that a program can have.
    """
    padded = power_of_two(size)
    tile = Tile(1, 32, 3, 4) if rows == 1 else Tile(min(MOST_ROWS, max(LEAST_ROWS, power_of_two(rows))), 64, 3, 4)
    if padded > 128:
        tile = tile._replace(block=tile.block // 2)
    queries = tile.rows * padded * itemsize + 2048
    stages = max(1, min(tile.stages, (shared_memory - queries) // tile.stage_bytes(padded, itemsize)))
    programs = heads * -(-rows // tile.rows)
    splits = min(WAVES * multiprocessors // programs, keys // (LEAST_BLOCKS * tile.block), MOST_SPLITS)
    return Plan(tile._replace(stages=stages), max(1, splits))
