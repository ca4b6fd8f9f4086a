"""``tune``: measure other launch shapes than the rule's, and keep what is faster on this machine.

For each rule and its arguments (``providers/triton/rules.py``) all candidates run in CUDA graphs in turn, on every op
whose kernels that rule launches; the geometric mean over these ops decides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..providers import PROVIDERS
from ..providers.triton import rules, tuned
from ..providers.triton.jit import native_fp8, nvidia
from ..providers.triton.provider import run
from ..tables import plain, table
from . import tune_linear
from .ops import Case
from .timing import alternate, capture, conditions, need_gpu, progress

HIDDEN = (4096, 8192, 14336)
FEW_ROWS, MANY_ROWS = (1, 32), (16384,)
GROUP = 128
# A choice must be faster than the rule's by this share, or the rule stays: less is within what runs differ by.
WORTH = 0.02
CALLS, FEW_CALLS, ROUNDS = 8, 100, 9
# Inputs rotate over this many sets where there are many rows.
SETS = 3

THREADS = (32, 64, 128, 256, 512, 1024)
RUNS = (8, 16)
FLAT_ELEMENTS = (512, 1024, 2048, 4096)
# The rules for a scale for each row, and what their answers launch: a family and its variants.
NORMS = {
    "norm": ("rms_norm_quant", "add+token", "token"),
    "gated_norm": ("rms_norm_quant", "gated+token"),
    "layer_norm": ("layer_norm_quant", "add+token", "modulate+token"),
    "sum": ("add_quant", "gated_add+token"),
}
ROWS = {
    "row": ("act_mul_quant", "token", "packed+token"),
    "act_row": ("act_quant", "gelu_tanh+token"),
    "cat_row": ("cat_quant", "gelu_tanh+token"),
}


@dataclass(frozen=True)
class Question:
    """One rule with its arguments, the cases that its answer launches, and the answers to try besides the rule's."""

    rule: str
    arguments: tuple[int | bool, ...]
    cases: tuple[Case, ...]
    candidates: tuple[tuned.Choice, ...]

    @property
    def key(self) -> str:
        """How the tuned file names it."""
        return tuned.key(self.rule, *self.arguments)


@dataclass(frozen=True)
class Answer:
    """What was measured for a question: the best choice (empty: the rule's), and its time over the rule's."""

    question: Question
    choice: tuned.Choice
    ratio: float

    def __str__(self) -> str:
        return f"{self.question.key}: {self.ratio:.3f} of the rule's time with {dict(self.choice) or 'the rule itself'}"


def questions(hidden: Sequence[int], nvidia: bool) -> Iterator[Question]:
    """Those about rows of these lengths, per token and in groups of 128, for few rows and for many."""
    threads = [count for count in THREADS if count >= rules.lanes(nvidia)]
    in_groups = [width for width in hidden if width % GROUP == 0]
    for width, few in itertools.product(hidden, (True, False)):
        rows = FEW_ROWS if few else MANY_ROWS

        def cases(family: str, *variants: str, width: int = width, rows: tuple[int, ...] = rows) -> tuple[Case, ...]:
            return tuple(Case(family, variant, width, n) for variant in variants for n in rows)

        whole = _choices(threads, RUNS if not few else (8,), rules.power_of_two(width))
        for rule, (family, *variants) in NORMS.items():
            yield Question(rule, (width, width, few), cases(family, *variants), whole)
        for rule, (family, *variants) in ROWS.items():
            yield Question(rule, (width, few), cases(family, *variants), whole)
        if width % GROUP == 0:
            grouped = cases("rms_norm_quant", f"add+group{GROUP}", f"group{GROUP}")
            yield Question("norm", (width, GROUP, few), grouped, whole)
    for few, packed in itertools.product((True, False), (False, True)) if in_groups else ():
        # rows do not matter to this rule: one width stands for all
        variant = f"packed+group{GROUP}" if packed else f"group{GROUP}"
        made = tuple(Case("act_mul_quant", variant, max(in_groups), n) for n in (FEW_ROWS if few else MANY_ROWS))
        choices = tuple(
            {"threads": count, "run": run, "segments": elements // GROUP}
            for elements in FLAT_ELEMENTS
            for count in threads
            for run in RUNS
            if count <= 256 and run * count <= elements
        )
        yield Question("flat", (GROUP, few, True, packed), made, choices)


def _choices(threads: Sequence[int], runs: Sequence[int], elements: int) -> tuple[tuned.Choice, ...]:
    """Those that give every thread at least four elements and at most 128, and those of one warp."""
    return tuple(
        {"threads": count, "run": run}
        for count in threads
        for run in runs
        if 4 * count <= elements <= 128 * count or count == threads[0]
    )


def measure(question: Question) -> Answer:
    """Time all candidates on the current GPU.

    Raises:
        RuntimeError: the tensors do not fit into memory.
    """
    ratios: list[list[float]] = []
    tried: tuple[tuned.Choice, ...] = ({}, *question.candidates)
    for case in question.cases:
        few = case.rows in FEW_ROWS
        fp8 = native_fp8(torch.cuda.current_device()) or torch.float8_e4m3fn
        sets = [case.arguments("cuda", fp8) for _ in range(1 if few else SETS)]
        graphs, kept = [], []
        for candidate in tried:
            with tuned.trying({question.key: candidate}):
                graphs.append(_captured(case, sets, FEW_CALLS if few else CALLS))
                kept.append(run(case.op)(**sets[0]))
        times = alternate([graph.replay for graph in graphs], ROUNDS)
        assert all(_close(kept[0], other) for other in kept)
        ratios.append([time / times[0] for time in times])
    means = [math.exp(sum(map(math.log, column)) / len(column)) for column in zip(*ratios, strict=True)]
    best = min(range(len(tried)), key=means.__getitem__)
    worth = means[best] <= 1.0 - WORTH
    return Answer(question, tried[best] if worth else {}, means[best] if worth else 1.0)


def _captured(case: Case, sets: Sequence[Mapping[str, Any]], calls: int) -> torch.cuda.CUDAGraph:
    compute = run(case.op)
    return capture(lambda index: tuple(compute(**sets[index]).values()), [(i,) for i in range(len(sets))], calls)


def _close(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Another order of a sum moves its last bit, so a value by one place of bfloat16, or of FP8: an eighth."""
    return all(torch.allclose(a[n].float(), b[n].float(), rtol=0.13, atol=0.0) for n in a)


def command(args: Any) -> None:
    """``tune``: measure, print what was found, write it to the user's cache."""
    need_gpu()
    if missing := PROVIDERS["triton"].missing():
        raise RuntimeError(f"our kernels cannot run here: {missing}")
    file = Path(args.output) if args.output else tuned.path()
    assert file is not None
    answers: list[Any]
    with torch.no_grad():
        if args.linear is not None:
            asked = tune_linear.questions(args.linear or tune_linear.SIZES, nvidia())
            answers = [tune_linear.measure(question) for question in progress(list(asked), "tune --linear")]
        else:
            asked = [q for q in questions(args.hidden, nvidia()) if not args.rules or q.rule in args.rules]
            answers = [measure(question) for question in progress(asked, "tune")]
    rows = [[a.question.key, str(dict(a.choice) or "the rule's"), f"{a.ratio:.3f}"] for a in answers]
    headers = ("rule and arguments", "best", "time / rule's" if args.linear is None else "time / _scaled_mm's")
    print(plain(table(headers, rows, left=headers[:2])))
    chosen = {answer.question.key: answer.choice for answer in answers if answer.choice}
    tuned.write(file, chosen, {k: str(v) for k, v in asdict(conditions(args.command_line)).items()})
    print(f"{sum(a.ratio < 1 for a in answers)} of {len(answers)} are faster: written to {file}")
