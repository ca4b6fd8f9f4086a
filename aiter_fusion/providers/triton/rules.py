"""How kernels are launched: a small rule of the row's width and the number of rows, unless ``tuned`` knows better.

Rules count threads, not warps: a warp has 32 on NVIDIA's GPUs and 64 on AMD's, where it is called a wave.

Found on an NVIDIA H200 (torch 2.11.0, triton 3.6.0, 2026-11-21) by timing, in CUDA graphs, 1 to 32 warps and 8 or 16
elements a thread, for widths of 2880, 4096, 8192, 14336 and 16384 and for 1, 32 and 16384 rows. The rule
takes the best that was found, or one within 4 % of it, but for SiLU with a scale for each row: 10 % for 16384 rows of
16384, 6 % for 32 rows of 8192.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..shapes import power_of_two
from . import tuned
from .tuned import MOST_THREADS

# The most elements that one program holds at a time; wider rows are read in tiles, more than once.
TILE = 16384
# Programs that look for the maximum of a whole tensor, each leaving one number. A power of two.
PARTS = 512
# Fewer rows than this leave processors idle: then only the time of one program counts.
FEW = 256
ANY = (0, 1 << 62)


@dataclass(frozen=True)
class InductorFaster:
    """Calls for which Inductor's code was measured to be faster than the kernels, which therefore leave them to it.

    why:             the reason that a report gives.
    scales:          the granularity (``stages/quantise.py``): group, token, tensor or static; None: all of these.
    family:          of the op; None: all. features: which the op has, with others or without.
    widths, rows, elements: from and to, both included.
    since, until:    the first and the last version of torch with an Inductor for which that is so; None: unknown, or
                     still so.
    """

    why: str
    scales: str | None = None
    family: str | None = None
    features: frozenset[str] = frozenset()
    widths: tuple[int, int] = ANY
    rows: tuple[int, int] = ANY
    elements: tuple[int, int] = ANY
    since: tuple[int, int] | None = None
    until: tuple[int, int] | None = None

    def covers(
        self, family: str, features: frozenset[str], scales: str, width: int, rows: int, torch: tuple[int, int]
    ) -> bool:
        """Whether a call of an op, under a version of torch, is one of them."""
        return (
            self.scales in (None, scales)
            and self.family in (None, family)
            and self.features <= features
            and self.widths[0] <= width <= self.widths[1]
            and self.rows[0] <= rows <= self.rows[1]
            and self.elements[0] <= rows * width <= self.elements[1]
            and (self.since is None or self.since <= torch)
            and (self.until is None or torch <= self.until)
        )


# What BENCHMARKS.md's tables say. 1.1 to 2.0 times for 1 row of 2880 to 8192; from 8 rows of 4096 on ours are faster.
INDUCTOR_FASTER = (
    InductorFaster(
        why="one scale for at most 8192 elements is one kernel of Inductor's and two of ours",
        scales="tensor",
        elements=(0, 8192),
    ),
    InductorFaster(  # 1.05 times for 16,384 rows of 14,336; for 4,096 rows it is not, nor are rows of 8,192
        why="a given scale for many long rows is 5 % faster by the Inductor of torch 2.15",
        scales="static",
        family="rms_norm_quant",
        widths=(8193, 16384),
        rows=(4097, 1 << 62),
        since=(2, 15),
    ),
)


def lanes(nvidia: bool) -> int:
    """Threads of a warp of the GPUs that the kernels are for: of NVIDIA's, or of AMD's gfx942 and gfx950."""
    return 32 if nvidia else 64


@dataclass(frozen=True)
class Shape:
    """What a program takes.

    rows, segments: at a time; segment: a segment's length, padded to a power of two; tiles: of a row; threads: that
    work on it; run: consecutive elements of a thread.
    """

    rows: int
    segments: int
    segment: int
    tiles: int
    threads: int
    run: int

    def warps(self, nvidia: bool) -> int:
        """The warps that have so many threads: at least one, though it has more."""
        return max(1, self.threads // lanes(nvidia))


def _tile(width: int, block: int) -> tuple[int, int, int, int]:
    """(rows, segments, segment, tiles) for whole rows; narrow ones are taken together."""
    segment = power_of_two(block)
    segments = min(power_of_two(width // block), max(1, TILE // segment))
    tiles = -(-width // (segments * block))
    return max(1, 1024 // (segments * segment)), segments, segment, tiles


def threads(wanted: int, elements: int, each: int = 4) -> int:
    """As many as are ``wanted``, but no more than can take ``each`` of the elements, nor than a GPU can launch."""
    return max(1, min(wanted, MOST_THREADS, elements // each))


def norm(width: int, block: int, rows: int) -> Shape:
    """For norms; ``block`` is the length of a segment, ``rows`` a hint."""
    together, segments, segment, tiles = _tile(width, block)
    elements = together * segments * segment
    grouped = block < width
    if rows < FEW:
        wanted, run = 256, 8
    else:
        wanted, run = (256 if elements > 8192 else 128), (16 if grouped and elements <= 8192 else 8)
    shape = Shape(together, segments, segment, tiles, threads(wanted, elements), run)
    return replace(shape, **tuned.choice("norm", width, block, rows < FEW))


def row(width: int, rows: int) -> Shape:
    """For activations with a scale for each row."""
    _, segments, segment, tiles = _tile(width, width)
    wanted = (512 if segment <= 4096 else 1024) if rows < FEW else (128 if segment <= 4096 else 256)
    shape = Shape(1, segments, segment, tiles, threads(wanted, segment), 8)
    return replace(shape, **tuned.choice("row", width, rows < FEW))


def flat(block: int, segments_in_all: int, grouped: bool, packed: bool) -> Shape:
    """For activations whose rows do not matter."""
    segment = power_of_two(block)
    few = segments_in_all * segment < FEW * 2048
    if few or (grouped and not packed):
        elements, wanted, run = 1024, 128, 8
    elif packed:
        elements, wanted, run = 1024, 32, 16
    else:
        elements, wanted, run = 2048, 256, 8
    segments = max(1, elements // segment)
    shape = Shape(1, segments, segment, 1, threads(wanted, segments * segment), run)
    return replace(shape, **tuned.choice("flat", block, few, grouped, packed))
