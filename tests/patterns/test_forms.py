"""Every form and every fusion: recognised, replaced once, and bit-equal to the interpreted original."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aiter_fusion.report import REPLACED
from support import cases
from support.checked import checked
from support.rows import Row, Rows

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QUANTS = ("Q1r", "Q2", "Q3_tensor", "Q7_64")
RANKS = ((6,), (2, 3), (2, 2, 3))
slow = pytest.mark.slow


def run(
    rows: Sequence[Row],
    sizes: tuple[int, ...] = (2, 3),
    dtype: torch.dtype = torch.bfloat16,
    kinds: Sequence[str] = cases.ROWS,
    **options: bool,
) -> None:
    """Each row is one site, replaced, with the original's bits on every kind of input."""
    model = Rows(rows, **options)
    result = checked(model)
    with torch.no_grad():
        for kind in kinds:
            result.call(*model.inputs(sizes, dtype, kind))
            assert result.oracle.identical, f"{kind} rows differ"
    assert result.report.unaccounted == 0
    assert not result.report.skipped, result.report
    assert len(result.variants) == len(result.report.sites) == len(rows)
    if sizes != (1,):  # the maximum of one row is that of the whole tensor
        assert sorted(result.variants) == model.variants


def quants(*names: str) -> list[cases.QuantForm]:
    return [cases.QUANT[name] for name in names]


def every(always: Sequence[Any], others: Sequence[Any]) -> Any:
    """A parameter whose other values repeat what the first ones show, and are slow."""
    return [*always, *(pytest.param(value, marks=slow) for value in others)]


def test_every_norm() -> None:
    """With a quantiser of each granularity."""
    run([(cases.FUSION["norm"], norm, quant) for norm in cases.NORMS for quant in quants(*QUANTS)])


@pytest.mark.parametrize("norm", every(cases.NORMS[:1], cases.NORMS[1:]), ids=lambda n: n.name)
def test_every_norm_with_every_quantiser(norm: cases.NormForm) -> None:
    run([(cases.FUSION["norm"], norm, quant) for quant in cases.QUANTS])


@pytest.mark.parametrize(
    "quant", every(quants("Q1r", "Q2", "I1"), quants("Q3_tensor", "Q7_128", "X1")), ids=lambda q: q.name
)
def test_every_activation(quant: cases.QuantForm) -> None:
    run([(cases.FUSION["act"], act, quant) for act in cases.ACTS])


@pytest.mark.parametrize("quant", every(quants(*QUANTS[:2]), quants(*QUANTS[2:])), ids=lambda q: q.name)
def test_every_producer(quant: cases.QuantForm) -> None:
    """And half of them with the value read elsewhere too; a sum with the residual stream always is."""
    rows = [(cases.PRODUCED, producer, quant) for producer in cases.PRODUCERS]
    returned = [producer for producer in cases.PRODUCERS if producer.family != "add_quant"][
        QUANTS.index(quant.name) % 2 :: 2
    ]
    run(
        [*rows, *((cases.PRODUCED_VALUE, producer, quant) for producer in returned)],
        kinds=("normal", "tiny", "nonfinite"),
    )


@pytest.mark.parametrize(("sizes", "dtype"), [((6,), torch.float32), ((2, 2, 3), torch.float16)], ids=str)
def test_every_producer_of_other_ranks(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of float32 some spellings are the same."""
    rows = [(cases.PRODUCED, producer, cases.QUANT["Q1r"]) for producer in cases.PRODUCERS]
    run(rows, sizes, dtype, ("normal", "nonfinite"))


@pytest.mark.parametrize("quant", every(quants("Q1r", "Q1b", "Q2"), quants("Q1t", "Q5")), ids=lambda q: q.name)
def test_every_fusion(quant: cases.QuantForm) -> None:
    norms = [(case, cases.NORM["R1"], quant) for case in cases.NORM_FUSIONS]
    run([*norms, *((case, cases.ACT["S1"], quant) for case in cases.ACT_FUSIONS)])


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [  # each once, with every quantiser; the other combinations are slow
        pytest.param(sizes, dtype, marks=() if RANKS.index(sizes) == DTYPES.index(dtype) else slow)
        for sizes, dtype in itertools.product(RANKS, DTYPES)
    ],
    ids=str,
)
def test_every_dtype_and_rank(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every norm that computes otherwise, with another quantiser in each of three combinations."""
    quant = quants("Q1r", "Q1t", "Q1b")[(DTYPES.index(dtype) + RANKS.index(sizes)) % 3]
    norms = [(cases.FUSION["add_norm"], cases.NORM[name], quant) for name in ("R1", "R2'", "R3", "R4")]
    acts = ("S1", "S2", "S7", "S6", "S6_separate", "S6_rounded_late")
    rows = [*norms, *((cases.FUSION["act"], cases.ACT[name], cases.QUANT["Q1r"]) for name in acts)]
    run(rows, sizes, dtype, ("normal", "nonfinite"))


def test_fp32_weight_with_half_input() -> None:
    norms = [norm for norm in cases.NORMS if norm.fp32_weight]
    run([(cases.FUSION["norm"], norm, cases.QUANT["Q2_product"]) for norm in norms], (6,), w32=True)


def test_one_row() -> None:
    rows = [(cases.FUSION["norm"], cases.NORM["R1"], quant) for quant in cases.QUANTS]
    run(rows, (1,), kinds=("normal", "zero"))


@pytest.mark.parametrize(
    ("quantisers", "sizes"),
    [
        (quants("Q1r", "Q1t", "Q1b", "Q2", "Q7_64"), [(6,), (1,), (9,)]),
        (quants("Q1r", "Q1t", "Q1b", "Q2", "Q7_64"), [(2, 3), (3, 5), (4, 7)]),
        pytest.param(cases.QUANTS, [(2, 3), (3, 5), (4, 7)], marks=slow),
    ],
    ids=["one", "two", "two, all"],
)
def test_dynamic_rows(quantisers: Sequence[cases.QuantForm], sizes: list[tuple[int, ...]]) -> None:
    """One graph serves any number of rows, in one and in two symbolic dimensions."""
    model = Rows([(cases.FUSION["add_norm"], cases.NORM["R1"], quant) for quant in quantisers])
    result = checked(model)
    with torch.no_grad():
        for size in sizes:
            given = model.inputs(size)
            for tensor, name in zip(given, itertools.chain(*model.names), strict=True):
                for dim in range(len(size) if name in ("x", "r") else 0):
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
            result.call(*given)
    assert result.oracle.identical
    for report in result.reports:
        assert report.replaced == {"rms_norm_quant": len(quantisers)}, report
        assert len(report.sites) == len(quantisers)


# How models put a number in the place of a maximum of 0, and the step that it is.
CHOICES = {
    "unless_positive=1.0": lambda m: torch.where(m > 0, m, torch.ones_like(m)),
    "unless_positive=0.5": lambda m: torch.where(m > 0, m, 0.5),
    "if_zero=0.25": lambda m: torch.where(m == 0, torch.tensor(0.25, dtype=m.dtype), m),
    "if_zero=2.0": lambda m: m.masked_fill(m == 0, 2),
    "if_zero=3.0": lambda m: torch.where(m != 0, m, 3),
}
# ... and what is none of them, however near.
NO_CHOICES = (
    lambda m: torch.where(m > 1e-3, m, 1),
    lambda m: torch.where(m > 0, 1, m),
    lambda m: torch.where(m <= 0, 1, m),  # keeps NaN
    lambda m: torch.where(m > 0, m * 2, 1),
    lambda m: torch.where(m + 1 > 0, m, 1),
    lambda m: torch.where(m > 0, m, m[:1]),
    lambda m: torch.where(m > 0, m, torch.ones(4, 6, 1)),
    lambda m: torch.where((m > 0) & (m < 9), m, 1),
    lambda m: torch.where(m.half() > 0, m, 1),
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_number_for_zero(dtype: torch.dtype) -> None:
    """Of the maximum, and of a given scale; rows of zeros and with NaN show the difference."""

    def fn(x: torch.Tensor, w: torch.Tensor, given: torch.Tensor) -> list[torch.Tensor]:
        results = []
        for number, choose in enumerate([*CHOICES.values(), *NO_CHOICES]):
            value = cases.llama(x, w, 1e-6 * (number + 1))
            scale = choose(value.to(dtype).abs().amax(-1, keepdim=True)).float() / 448.0
            results += [(value / scale).to(cases.FN), scale]
        static = cases.llama(x, w, 1.0)
        return [*results, *cases.q2_static(static, torch.where(given == 0, 0.125, given))]

    result = checked(fn)
    with torch.no_grad():
        for rows in ("zero", "nonfinite"):
            inputs = cases.tensors(("x", "w", "scale"), (6,), torch.bfloat16, rows)
            result.call(*inputs[:2], inputs[2] * (rows != "zero"))
            assert result.oracle.identical, rows
    converted = "" if dtype is torch.bfloat16 else "float32 "
    after = " float32" if dtype is torch.bfloat16 else ""
    steps = [f"{converted}{step}{after} div=448.0" for step in CHOICES]
    (graph,) = result.oracle.graphs
    calls = [n for n in graph.after.graph.nodes if getattr(n.target, "namespace", "") == "aiter_fusion"]
    names = [[argument.name for argument in call.target._schema.arguments] for call in calls]
    found = [call.args[of.index("factor_steps")] for call, of in zip(calls, names, strict=True)]
    assert sorted(found) == sorted([*steps, "if_zero=0.125"])


def test_no_rows() -> None:
    """Nothing in, nothing out. (The maximum of no tensor at all does not exist, in eager PyTorch either.)"""
    of_rows = [quant for quant in cases.QUANTS if quant.granularity != "tensor"]
    run([(cases.FUSION["add_norm"], cases.NORM["R1"], quant) for quant in of_rows], (0,), kinds=("normal",))


COMBINATIONS = given(
    norm=st.sampled_from(cases.NORMS),
    act=st.sampled_from(cases.ACTS),
    case=st.sampled_from(cases.NORM_FUSIONS + cases.ACT_FUSIONS),
    quant=st.sampled_from(cases.QUANTS),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    rows=st.sampled_from(cases.ROWS),
)


def one_combination(
    norm: cases.NormForm,
    act: cases.ActForm,
    case: cases.FusionCase,
    quant: cases.QuantForm,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    rows: str,
) -> None:
    run([(case, norm if case in cases.NORM_FUSIONS else act, quant)], sizes, dtype, (rows,))


@pytest.mark.parametrize("examples", every([10], [100]))
def test_any_combination(examples: int) -> None:
    """Every part with every other: a form is always found, and the bits are the same."""
    settings(max_examples=examples, deadline=None, derandomize=True, database=None)(COMBINATIONS(one_combination))()


def test_no_mm_plus_residual_is_lost() -> None:
    """In the pre slot the residual addition after a matrix product is still an addition."""

    def fn(x: torch.Tensor, m: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        summed = r + x @ m
        return (*cases.q1_row(cases.llama(summed, w)), summed)

    result = checked(fn)
    x, r, w = cases.tensors(("x", "r", "w"), (6,), torch.bfloat16, "normal")
    with torch.no_grad():
        result.call(x, torch.eye(cases.H, dtype=torch.bfloat16), r, w)
    assert result.oracle.identical
    assert result.variants == ["rms_norm_quant:add+token"]
    assert not any("addmm" in target for target in result.targets)


@pytest.mark.parametrize("levels", [1, 2])
def test_a_scale_in_fp8_is_no_quantiser(levels: int) -> None:
    """NVFP4's, of 16 values each, with and without one for the whole tensor."""
    nvfp4 = importlib.import_module("torchao.prototype.mx_formats.nvfp4_tensor")

    def quantise(x: Tensor, w: Tensor, outer: Tensor) -> tuple[Tensor, ...]:
        y = cases.llama(x, w)
        return (*nvfp4.nvfp4_quantize(y, per_tensor_scale=outer if levels == 2 else None), *cases.q3(y))

    x, w = cases.tensors(("x", "w"), (4,), torch.bfloat16, "normal")
    result = checked(quantise)
    with torch.no_grad():
        result.call(x, w, torch.tensor(0.01))
    assert result.oracle.identical
    assert [(site.family, site.variant, site.status) for site in result.report.sites] == [
        ("rms_norm_quant", "token+value", REPLACED)
    ]
    assert result.report.unaccounted == 0


@pytest.mark.parametrize(
    ("quant", "granularity"), [(cases.q3, "token"), (cases.q7(64), "group64"), (cases.q7(128), "group128")]
)
def test_a_quantiser_has_one_name(quant: Callable[[Tensor], tuple[Tensor, ...]], granularity: str) -> None:
    """Fused or not, and whether or not its rows are made of heads, as after attention."""

    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        heads = x.sin().view(4, 4, 64).transpose(0, 1).cos().transpose(0, 1)
        return (*quant(cases.llama(x, w)), *quant(x.sin()), *quant(heads.reshape(4, 256)))

    result = checked(fn)
    with torch.no_grad():
        result.call(*cases.tensors(("x", "w"), (4,), torch.bfloat16, "normal"))
    assert result.oracle.identical
    found = [(site.family, site.variant) for site in result.report.sites]
    assert found == [("rms_norm_quant", granularity), ("fp8_quant", granularity), ("fp8_quant", granularity)]
