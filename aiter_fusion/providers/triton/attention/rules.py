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
# Tokens that it is for even where nothing is split, and elements of a head that all kernels are for.
FEW_TOKENS, LEAST_SIZE, MOST_SIZE, SIZES = 16, 64, 256, 8
# Programs for each multiprocessor that a split aims at, and parts at most.
WAVES, MOST_SPLITS = 2, 128
# Keys from which on a cache of whole rows of 128 elements gets ``FEW_LONG``.
LONG = 16384
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


# Of 16 rows, by elements of a head: the tile, and the keys that a part of a full cache has at least.
FEW = {64: (Tile(16, 128, 3, 4), 128), 128: (Tile(16, 64, 3, 4, swapped=True), 256), 256: (Tile(16, 32, 3, 4), 64)}
# Of heads of 65 to 128 elements: where half of the multiprocessors would have nothing to do, so that all loads of a
# program are under way at once; and of long caches, for one program on each multiprocessor.
FEW_SHORT, FEW_LONG = Tile(16, 128, 2, 4), Tile(16, 128, 3, 4)
# Of more rows: where one tile has all rows of a head of keys; of heads of more than 128 elements (not measured: one
# program on each multiprocessor); elsewhere by the number of parts. These have at least so many keys.
SOME, SOME_WIDE, SOME_KEYS = Tile(64, 32, 4, 4), Tile(64, 32, 4, 8), 256
SOME_SPLIT = ((8, Tile(64, 64, 2, 4)), (4, SOME), (2, Tile(64, 64, 3, 4)), (1, SOME))
# Of ``prefill_attention``, by elements of a head; and with a mask that is added.
MANY = {64: Tile(128, 64, 4, 8), 128: Tile(128, 64, 3, 8), 256: Tile(128, 32, 2, 8)}
MANY_ADDED = {**MANY, 128: Tile(64, 64, 3, 4)}
# On AMD's GPUs (not measured), what fits the registers with every mask.
SOME_WIDE_AMD = SOME_WIDE._replace(block=16)
MANY_AMD = {**MANY, 128: Tile(128, 32, 2, 8), 256: Tile(64, 32, 2, 4)}


def plan(
    heads: int, group: int, tokens: int, keys: int, size: int, itemsize: int, gpu: Gpu, added: bool = False
) -> Plan:
    """How to launch a call.

    Args:
        heads: of keys, of all batches.
        group: heads of queries that share one of keys.
        tokens: of queries; keys: that the cache has room for.
        size: elements of a head; itemsize: bytes of an element.
        added: whether it has a mask that is added.
    """
    padded = max(LEAST_SIZE, power_of_two(size))
    rows = min(MOST_ROWS, max(LEAST_ROWS, power_of_two(group * tokens)))
    programs = heads * -(-group * tokens // rows)
    tile, splits = _split(rows, group * tokens <= rows, programs, keys, size, gpu)
    if splits == 1 and tokens > FEW_TOKENS:
        many = MANY_AMD if not gpu.nvidia else MANY_ADDED if added else MANY
        return Plan("prefill_attention", _fitting(many[padded], padded, itemsize, gpu), 1)
    blocks = -(-keys // tile.block)
    splits = -(-blocks // -(-blocks // splits))  # those that have keys if the cache is full
    return Plan("decode_attention", _fitting(tile, padded, itemsize, gpu), splits)


def compared(mask: str, window: int, gpu: Gpu) -> str:
    """Which blocks of keys ``prefill_attention`` compares with the queries' places, as its COMPARED: without a mask and
    a window, a loop for blocks that are not pays; with one a branch does, but not beside the loads of a mask that is
    added, and not on AMD's GPUs, where it takes too many registers."""
    if mask == "none" and not window:
        return "apart"
    return "edges" if mask != "added" and gpu.nvidia else "all"


def _split(rows: int, is_one: bool, programs: int, keys: int, size: int, gpu: Gpu) -> tuple[Tile, int]:
    """The tile of so many rows, and a number of parts for so many programs of a part.

    is_one: whether one tile has all rows of a head of keys.
    """

    multiprocessors = gpu.multiprocessors

    def parts(waves: int, least: int) -> int:
        return max(1, min(waves * multiprocessors // programs, keys // least, MOST_SPLITS))

    if rows > LEAST_ROWS:
        splits = parts(WAVES if size <= 128 else 1, SOME_KEYS)
        by_parts = next(tile for least, tile in SOME_SPLIT if splits >= least)
        wide = SOME_WIDE if gpu.nvidia else SOME_WIDE_AMD
        tile = wide if size > 128 else SOME if is_one else by_parts
        return tile._replace(rows=rows), splits
    if size == 128 and keys >= LONG and parts(1, FEW_LONG.block) > 1:
        return FEW_LONG, parts(1, FEW_LONG.block)
    tile, least = FEW[max(LEAST_SIZE, power_of_two(size))]
    splits = parts(WAVES, least)
    if 64 < size <= 128 and 2 * programs * splits <= multiprocessors:
        return FEW_SHORT, parts(1, FEW_SHORT.block)
    return tile, splits


def _fitting(tile: Tile, padded: int, itemsize: int, gpu: Gpu) -> Tile:
    """With as many stages as there is shared memory for, besides the queries."""
    left = gpu.shared_memory - tile.rows * padded * itemsize - 2048
    return tile._replace(stages=max(1, min(tile.stages, left // tile.stage_bytes(padded, itemsize))))
