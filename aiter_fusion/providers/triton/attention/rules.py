"""How attention over a cache is launched: kernels, tiles, and over how many programs the keys of a head are split.

Reading keys and values bounds that of few tokens, so the rules are about how many loads are under way on every
multiprocessor, and about how evenly the keys are spread over them.
"""

from __future__ import annotations

from typing import NamedTuple

from ...shapes import power_of_two
from ..gpu import Gpu

# The query rows that a program of ``decode_attention`` can have; more go to several programs.
LEAST_ROWS, MOST_ROWS = 16, 64
# Tokens of a call that it is for, and elements of a head that all kernels are for.
FEW_TOKENS, LEAST_SIZE, MOST_SIZE, SIZES = 16, 64, 256, 8
# Programs for each multiprocessor that a split aims at, keys that a part of a full cache has at least, parts at most.
WAVES, LEAST_KEYS, MOST_SPLITS = 2, 128, 128
# GPUs that the rules were measured on, by the name that PyTorch gives them.
MEASURED = ("NVIDIA H200",)


class Tile(NamedTuple):
    """The work of one program.

    rows:    of queries.
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
    """A kernel, its tile, and over how many programs the keys are split."""

    kernel: str
    tile: Tile
    splits: int


def plan(heads: int, group: int, tokens: int, keys: int, size: int, itemsize: int, gpu: Gpu) -> Plan:
    """How to launch a call.

    Args:
        heads: of keys, of all batches.
        group: heads of queries that share one of keys.
        tokens: of queries; keys: that the cache has room for.
        size: elements of a head; itemsize: bytes of an element.
    """
    rows = group * tokens
    if tokens > FEW_TOKENS:
        tile = Tile(64, 32, 2, 8 if gpu.nvidia else 4) if size > 128 else Tile(128, 64, 3, 8)
        return Plan("prefill_attention", _fitting(tile, size, itemsize, gpu), 1)
    tile = _few(rows, size)
    programs = heads * -(-rows // tile.rows)
    waves = WAVES if tile.rows == LEAST_ROWS else 1
    splits = max(1, min(waves * gpu.multiprocessors // programs, keys // LEAST_KEYS, MOST_SPLITS))
    if tile.rows == LEAST_ROWS and size <= 128:
        if splits == 1:
            tile = tile._replace(swapped=True)
        elif keys <= splits * LEAST_KEYS:  # all loads of a program are under way at once
            tile = tile._replace(block=LEAST_KEYS, stages=2)
    blocks = -(-keys // tile.block)
    splits = -(-blocks // -(-blocks // splits))  # those that have keys if the cache is full
    return Plan("decode_attention", _fitting(tile, size, itemsize, gpu), splits)


def _fitting(tile: Tile, size: int, itemsize: int, gpu: Gpu) -> Tile:
    """With as many stages as there is shared memory for, besides the queries."""
    padded = power_of_two(size)
    left = gpu.shared_memory - tile.rows * padded * itemsize - 2048
    return tile._replace(stages=max(1, min(tile.stages, left // tile.stage_bytes(padded, itemsize))))


def _few(rows: int, size: int) -> Tile:
    """The tile for few rows, of which few are padding."""
    padded = min(MOST_ROWS, max(LEAST_ROWS, power_of_two(rows)))
    if size > 128:
        return Tile(padded, 32, 4, 4)
    if padded > LEAST_ROWS:
        return Tile(padded, 32, 4, 4)
    return Tile(padded, 128 if size <= 64 else 64, 3, 4)
