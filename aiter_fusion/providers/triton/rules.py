"""Launch rules: threads and tiles from the hidden size and the number of rows, unless ``tuned`` has a measurement.

Rules count threads, not warps, because a warp has 32 threads on NVIDIA's GPUs and 64 on AMD's, where it is a wave.

The rules were found on an NVIDIA H200 (torch 2.11.0, triton 3.6.0, 2026-11-21) by timing 1 to 32 warps and 8 or 16
elements a thread in CUDA graphs, for hidden sizes of 2880, 4096, 8192, 14336 and 16384 and for 1, 32 and 16384 rows.
They are the best that was found, or within 4 % of it. SiLU with a scale for each row is the exception: 10 % for 16384
rows of 16384, 6 % for 32 rows of 8192.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..shapes import power_of_two
from . import tuned
from .tuned import MOST_THREADS

# The most elements that a program holds at a time. It reads wider rows in tiles, more than once.
TILE = 16384
# Programs that look for the maximum of a whole tensor, each of which writes one number. A power of two.
PARTS = 512
# With fewer rows than this, multiprocessors are idle, and only the time of one program counts.
FEW = 256
# Rules of which one program of more than 8192 elements and 256 threads fills the registers of a multiprocessor, whose 8
# warps then wait for memory (compiled for sm_90: 172 a thread for a gated norm of 12,288, 141 for a concatenation of
# 15,360). With 512 threads there are 16 warps, of 100 and 86 registers a thread.
MORE_REGISTERS = frozenset({"gated_norm", "cat_row"})
# Rules by which weights are read when the statistic is known, if there are many rows: before, they would take registers
# (of a LayerNorm of 3,072 64 a thread, not 56), and with few rows their way from memory would be waited for.
LATE = frozenset({"layer_norm", "gated_norm"})
ANY = (0, 1 << 62)


@dataclass(frozen=True)
class InductorFaster:
    """Calls for which Inductor's code was measured to be faster than the kernels. Such sites are left to Inductor.

    why:      the reason in the report.
    scales:   the granularity (``stages/quantise.py``): group, token, tensor or static; None: all of these.
    family:   of the op; None: all.
    features: that the op has, among others.
    widths:   hidden sizes from and to, both included; so are rows and elements.
    rows:     of a call.
    elements: of a call, rows times hidden size.
    since:    the first version of torch whose Inductor is faster; None: unknown.
    until:    the last version of torch whose Inductor is faster; None: the newest still is.
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
        """Whether they include a call of an op, under a version of torch."""
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


# Source: the tables of BENCHMARKS.md. The first row: for 1 row of 2880 to 8192 the kernels take 1.1 to 2.0 times as
# long; from 8 rows of 4096 on they are faster.
INDUCTOR_FASTER = (
    InductorFaster(
        why="one scale for at most 8192 elements is one kernel of Inductor's and two of ours",
        scales="tensor",
        elements=(0, 8192),
    ),
    InductorFaster(  # 1.05 times for 16,384 rows of 14,336; not for 4,096 rows, and not for rows of 8,192
        why="a given scale for many long rows is 5 % faster by the Inductor of torch 2.15",
        scales="static",
        family="rms_norm_quant",
        widths=(8193, 16384),
        rows=(4097, 1 << 62),
        since=(2, 15),
    ),
    # Measured at 3072 and 12,288 with 1, 4,608 and 16,384 rows, before the kernel held LayerNorms in fewer registers.
    InductorFaster(  # 1.01 to 1.29 times; with a residual 0.87 and 1.03, with modulation 1.16 to 1.52
        why="LayerNorm of many rows of over 8192 is up to 1.5 times as fast by Inductor, which reads a row thrice",
        family="layer_norm_quant",
        scales="token",
        widths=(8193, 1 << 62),
        rows=(4096, 1 << 62),
    ),
    InductorFaster(  # 1.06 and 1.15 times at 3072; with 4,608 rows 0.85 and 0.96
        why="LayerNorm with modulation of 16,384 rows is up to 1.15 times as fast by Inductor",
        family="layer_norm_quant",
        features=frozenset({"modulate"}),
        scales="token",
        rows=(8192, 1 << 62),
    ),
    *(
        InductorFaster(  # 1.27 to 1.50 times with modulation, 1.49 to 1.66 with a gate
            why=f"RMSNorm {what} of many rows of over 8192 is up to {times} times as fast by Inductor",
            family="rms_norm_quant",
            features=frozenset({feature}),
            scales="token",
            widths=(8193, 1 << 62),
            rows=(4096, 1 << 62),
        )
        for feature, what, times in (("modulate", "with modulation", "1.5"), ("gated", "with a gate", "1.7"))
    ),
    InductorFaster(  # 1.25 and 1.22 times; with more rows 0.99 to 1.02
        why="groups of one row of an activation are 1.2 times as fast by Inductor",
        family="act_quant",
        scales="group",
        rows=(0, 1),
    ),
)


def lanes(nvidia: bool) -> int:
    """Threads of a warp: 32 on NVIDIA's GPUs, 64 on AMD's gfx942 and gfx950."""
    return 32 if nvidia else 64


@dataclass(frozen=True)
class Shape:
    """The work of one program.

    rows:     that it computes at a time.
    segments: of a row that it holds at a time.
    segment:  elements of a segment, padded to a power of two.
    tiles:    of a row, each of ``segments`` segments.
    threads:  of the program.
    run:      consecutive elements that a thread writes.
    block:    elements of a segment that exist; 0: the caller's.
    late:     whether a norm's weights are read when its statistic is known.
    """

    rows: int
    segments: int
    segment: int
    tiles: int
    threads: int
    run: int
    block: int = 0
    late: bool = False

    def warps(self, nvidia: bool) -> int:
        """The warps with so many threads, at least one."""
        return max(1, self.threads // lanes(nvidia))


def _tile(width: int, block: int) -> tuple[int, int, int, int]:
    """(rows, segments, segment, tiles) for programs of whole rows; several narrow rows go together."""
    segment = power_of_two(block)
    segments = min(power_of_two(width // block), max(1, TILE // segment))
    tiles = -(-width // (segments * block))
    return max(1, 1024 // (segments * segment)), segments, segment, tiles


def threads(wanted: int, elements: int, each: int = 4) -> int:
    """``wanted`` threads, or fewer: each must have at least ``each`` elements, and a GPU must be able to launch
    them."""
    return max(1, min(wanted, MOST_THREADS, elements // each))


def norm(width: int, block: int, rows: int, rule: str = "norm") -> Shape:
    """The shape for norms.

    Args:
        width: hidden size.
        block: elements of a segment, which share a scale.
        rows: of the call, or of the call that was captured.
        rule: how ``tuned`` names it: norm, layer_norm, gated_norm, or sum where only that is quantised.
    """
    together, segments, segment, tiles = _tile(width, block)
    elements = together * segments * segment
    grouped = block < width
    if rows < FEW:
        wanted, run = 256, 8
    else:
        wanted, run = (256 if elements > 8192 else 128), (16 if grouped and elements <= 8192 else 8)
        if rule in MORE_REGISTERS and elements > 8192:
            wanted = 512
    late = rule in LATE and rows >= FEW
    shape = Shape(together, segments, segment, tiles, threads(wanted, elements), run, late=late)
    return replace(shape, **tuned.choice(rule, width, block, rows < FEW))


def row(width: int, rows: int, rule: str = "row") -> Shape:
    """The shape for activations with a scale for each row; arguments as in ``norm``.

    rule: how ``tuned`` names it: row where there is a product, act_row where there is none, cat_row.
    """
    _, segments, segment, tiles = _tile(width, width)
    wanted = (512 if segment <= 4096 else 1024) if rows < FEW else (128 if segment <= 4096 else 256)
    if rule in MORE_REGISTERS and rows >= FEW and segment > 8192:
        wanted = 512
    shape = Shape(1, segments, segment, tiles, threads(wanted, segment), 8)
    return replace(shape, **tuned.choice(rule, width, rows < FEW))


def flat(block: int, segments_in_all: int, grouped: bool, packed: bool) -> Shape:
    """The shape for other activations, whose rows do not matter: the tensor is one sequence of segments.

    Args:
        block: elements of a segment.
        segments_in_all: of the tensor.
        grouped: whether each segment has a scale of its own.
        packed: whether gate and up are halves of one tensor.
    """
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
