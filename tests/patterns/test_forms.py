"""Every form and every fusion: recognised, replaced once, and bit-equal to the interpreted original."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aiter_fusion.report import REPLACED
from support import cases
from support.checked import Checked, checked

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RANKS = ((6,), (2, 3), (2, 2, 3))


def run(
    case: cases.FusionCase,
    producer: cases.NormForm | cases.ActForm,
    quant: cases.QuantForm,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    rows: tuple[str, ...] = cases.ROWS,
    weight: str = "w",
) -> Checked:
    names = tuple(weight if name == "w" else name for name in case.inputs) + (("scale",) if quant.static else ())
    result = checked(case.call(producer.call, quant.call))
    with torch.no_grad():
        for kind in rows:
            result.call(*cases.tensors(names, sizes, dtype, kind))
            assert result.oracle.identical, f"{kind} rows differ"
    assert result.report.unaccounted == 0
    assert not result.report.skipped, result.report
    return result


@pytest.mark.parametrize("quant", cases.QUANTS, ids=lambda q: q.name)
@pytest.mark.parametrize("norm", cases.NORMS, ids=lambda n: n.name)
def test_every_norm_with_every_quantiser(norm: cases.NormForm, quant: cases.QuantForm) -> None:
    case = cases.NORM_FUSIONS[0]
    result = run(case, norm, quant, (2, 3), torch.bfloat16)
    assert result.variants == [cases.variant(case, norm, quant)]


@pytest.mark.parametrize(
    "quant", [q for q in cases.QUANTS if q.name in ("Q1r", "Q2", "Q3_tensor", "Q7_128")], ids=lambda q: q.name
)
@pytest.mark.parametrize("act", cases.ACTS, ids=lambda a: a.name)
def test_every_activation(act: cases.ActForm, quant: cases.QuantForm) -> None:
    case = cases.ACT_FUSIONS[0]
    result = run(case, act, quant, (2, 3), torch.bfloat16)
    assert result.variants == [cases.variant(case, act, quant)]


@pytest.mark.parametrize(
    "quant", [q for q in cases.QUANTS if q.name in ("Q1r", "Q1t", "Q1b", "Q2", "Q5")], ids=lambda q: q.name
)
@pytest.mark.parametrize("case", cases.NORM_FUSIONS, ids=lambda c: c.name)
def test_every_norm_fusion(case: cases.FusionCase, quant: cases.QuantForm) -> None:
    result = run(case, cases.NORMS[0], quant, (2, 3), torch.bfloat16)
    assert result.variants == [cases.variant(case, cases.NORMS[0], quant)]


@pytest.mark.parametrize(
    "quant", [q for q in cases.QUANTS if q.name in ("Q1t", "Q1b", "Q2", "Q5")], ids=lambda q: q.name
)
@pytest.mark.parametrize("case", cases.ACT_FUSIONS, ids=lambda c: c.name)
def test_every_activation_fusion(case: cases.FusionCase, quant: cases.QuantForm) -> None:
    result = run(case, cases.ACTS[0], quant, (2, 3), torch.bfloat16)
    assert result.variants == [cases.variant(case, cases.ACTS[0], quant)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", RANKS, ids=str)
@pytest.mark.parametrize("norm", [n for n in cases.NORMS if n.name in ("R1", "R2'", "R3", "R4")], ids=lambda n: n.name)
def test_every_dtype_and_rank(norm: cases.NormForm, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    case = cases.NORM_FUSIONS[1]
    for quant in cases.QUANTS[:3]:
        result = run(case, norm, quant, sizes, dtype, rows=("normal", "nonfinite"))
        assert len(result.variants) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", RANKS, ids=str)
def test_activations_of_every_dtype_and_rank(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    for act in (act for act in cases.ACTS if act.name in ("S1", "S2", "S7", "S6", "S6_separate", "S6_rounded_late")):
        result = run(cases.ACT_FUSIONS[0], act, cases.QUANTS[0], sizes, dtype, rows=("normal", "nonfinite"))
        assert len(result.variants) == 1


@pytest.mark.parametrize("norm", [n for n in cases.NORMS if n.fp32_weight], ids=lambda n: n.name)
def test_fp32_weight_with_half_input(norm: cases.NormForm) -> None:
    result = run(cases.NORM_FUSIONS[0], norm, cases.QUANTS[6], (6,), torch.bfloat16, weight="w32")
    assert len(result.variants) == 1


@pytest.mark.parametrize("quant", cases.QUANTS, ids=lambda q: q.name)
def test_one_row(quant: cases.QuantForm) -> None:
    result = run(cases.NORM_FUSIONS[0], cases.NORMS[0], quant, (1,), torch.bfloat16, rows=("normal", "zero"))
    assert len(result.variants) == 1


@pytest.mark.parametrize("quant", cases.QUANTS, ids=lambda q: q.name)
def test_dynamic_rows(quant: cases.QuantForm) -> None:
    """One graph serves any number of rows, in one and in two symbolic dimensions."""
    names = ("x", "r", "w", *(("scale",) if quant.static else ()))
    for sizes in ([(6,), (1,), (9,)], [(2, 3), (3, 5), (4, 7)]):
        result = checked(cases.NORM_FUSIONS[1].call(cases.llama, quant.call))
        with torch.no_grad():
            for size in sizes:
                inputs = cases.tensors(names, size, torch.bfloat16, "normal")
                for tensor in inputs[:2]:
                    for dim in range(len(size)):
                        torch._dynamo.maybe_mark_dynamic(tensor, dim)
                result.call(*inputs)
        assert result.oracle.identical
        assert [len(r.sites) for r in result.reports] == [1] * len(result.reports)
        assert all(r.replaced == {"rms_norm_quant": 1} for r in result.reports), result.report


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


@pytest.mark.parametrize("quant", [q for q in cases.QUANTS if q.granularity != "tensor"], ids=lambda q: q.name)
def test_no_rows(quant: cases.QuantForm) -> None:
    """Nothing in, nothing out. (The maximum of no tensor at all does not exist, in eager PyTorch either.)"""
    result = run(cases.NORM_FUSIONS[1], cases.NORMS[0], quant, (0,), torch.bfloat16, rows=("normal",))
    assert len(result.variants) == 1


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    norm=st.sampled_from(cases.NORMS),
    act=st.sampled_from(cases.ACTS),
    case=st.sampled_from(cases.NORM_FUSIONS + cases.ACT_FUSIONS),
    quant=st.sampled_from(cases.QUANTS),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    rows=st.sampled_from(cases.ROWS),
)
def test_any_combination(
    norm: cases.NormForm,
    act: cases.ActForm,
    case: cases.FusionCase,
    quant: cases.QuantForm,
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    rows: str,
) -> None:
    """Every part with every other: a form is always found, and the bits are the same."""
    producer = norm if case in cases.NORM_FUSIONS else act
    result = run(case, producer, quant, sizes, dtype, rows=(rows,))
    assert len(result.variants) == 1


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
        heads = x.relu().view(4, 4, 64).transpose(0, 1).sin().transpose(0, 1)
        return (*quant(cases.llama(x, w)), *quant(x.relu()), *quant(heads.reshape(4, 256)))

    result = checked(fn)
    with torch.no_grad():
        result.call(*cases.tensors(("x", "w"), (4,), torch.bfloat16, "normal"))
    assert result.oracle.identical
    found = [(site.family, site.variant) for site in result.report.sites]
    assert found == [("rms_norm_quant", granularity), ("fp8_quant", granularity), ("fp8_quant", granularity)]
