"""``tune --linear``: measure FP8 products of few rows with all tiles, against separate calls of ``torch._scaled_mm``.

What is faster is kept with its tile, and what is not as well, because provider ``auto`` leaves that to PyTorch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..ops.linear import LINEAR
from ..providers.triton import tuned
from ..providers.triton.gpu import gpu_of
from ..providers.triton.linear import calls, rules
from .linear import GRAPH_CALLS, SIZES, WORSE, Case, Size, error, functions, rotating, tensors_of
from .timing import alternate, capture

ROWS = (1, 16, 32, 64, 128)
ROUNDS = 7
# A larger share of PyTorch's time counts as all of it: the difference is within what runs differ by.
WORTH = 0.98


@dataclass(frozen=True)
class Question:
    """A product of so many rows, and the tiles to try besides the rule's, as ``tuned`` has them."""

    case: Case
    candidates: tuple[tuned.Choice, ...]

    @property
    def key(self) -> str:
        """How the tuned file names it."""
        return rules.key(self.case.size.k, self.case.size.ns, self.case.rows, self.case.fast)


@dataclass(frozen=True)
class Answer:
    """The best tile, and its time over that of the separate calls."""

    question: Question
    choice: tuned.Choice
    ratio: float


def questions(sizes: Sequence[str], nvidia: bool) -> Iterator[Question]:
    """Those about products of these sizes, with fast sums and with precise ones."""
    for size, rows, fast in itertools.product(sizes, ROWS, (True, False)):
        case = Case(Size.parse(size), rows, fast)
        yield Question(case, tuple(candidates(case, nvidia)))


def candidates(case: Case, nvidia: bool) -> Iterator[tuned.Choice]:
    """Tiles of few rows, or of one, with at least four steps along k."""
    k = case.size.k
    if case.rows == 1:
        for block_n, block_k, warps in itertools.product((2, 4, 8), (512, 1024, 2048), (1, 2, 4)):
            if 256 * warps <= block_k <= 1024 * warps and block_k <= rules.power_of_two(k):
                yield {"rows": 1, "block_n": block_n, "block_k": block_k, "stages": 1, "warps": warps, "split": 1}
        return
    rows = rules.padded(case.rows)
    for padded, block_n, block_k, warps, split in itertools.product(
        sorted({rows, min(rows, 64)}), (64, 128), (128, 256), (4, 8), (1, 2, 4)
    ):
        if k < split * rules.LEAST_STEPS * block_k or (warps == 8 and block_n * padded < 8192):
            continue
        for stages in (3, 5) if nvidia else (2,):
            yield {
                "rows": padded,
                "block_n": block_n,
                "block_k": block_k,
                "stages": stages,
                "warps": warps,
                "split": split,
            }


def measure(question: Question) -> Answer:
    """Time all tiles on the current GPU. A tile that the GPU cannot launch is none.

    Raises:
        RuntimeError: the tensors do not fit into memory, or the GPU multiplies no such values.
    """
    case = question.case
    sets = rotating(case)
    if why := calls.refuse(sets[0]):
        raise RuntimeError(f"{case}: {why}")
    _, separate = functions(sets[0])
    tensors, pointers = [tensors_of(given) for given in sets], [calls.pointers(given) for given in sets]
    count = len(sets) * math.ceil(GRAPH_CALLS / len(sets))
    most = WORSE * error(sets[0], separate(*tensors[0])[0])
    graphs, tried = [capture(separate, tensors, count)], []
    gpu = gpu_of(torch.cuda.current_device())
    for choice in ({}, *question.candidates):
        with tuned.trying({question.key: choice}):
            tile = rules.plan(case.size.k, case.size.ns, case.rows, case.fast, False, *gpu[2:])
            if choice and tile.tile.stages != choice["stages"]:
                continue  # so many do not fit, and the tile with fewer is tried too
            launch = calls.launcher(LINEAR, sets[0])
        if not error(sets[0], next(iter(launch(pointers[0]).values()))) <= most:
            continue
        graphs.append(capture(lambda i, launch=launch: launch(pointers[i]), [(i,) for i in range(len(sets))], count))
        tried.append({**tile.tile._asdict(), "split": tile.split})
    theirs, *ours = alternate([graph.replay for graph in graphs], ROUNDS)
    if not ours:
        return Answer(question, {"percent": 100}, 1.0)
    best = min(range(len(ours)), key=ours.__getitem__)
    ratio = ours[best] / theirs
    return Answer(question, {**tried[best], "percent": max(1 if ratio < WORTH else 100, round(100 * ratio))}, ratio)


__all__ = ["SIZES", "Answer", "Question", "measure", "questions"]
