"""All-reduces before norms are found in forms and in tensor-parallel models, and all ranks decide alike."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from aiter_fusion.bench import allreduce
from aiter_fusion.op import FusedOp
from aiter_fusion.passes.verify import same_bits
from aiter_fusion.providers import collective
from aiter_fusion.providers.triton.all_reduce import algorithms, calls, symmetric
from aiter_fusion.registry import REGISTRY
from support import cases, gloo_ranks, gpu_ranks, processes
from support.checked import Checked, fused

pytestmark = pytest.mark.xdist_group("gloo_ranks")  # every worker would start the processes for itself


def reduce(x: Tensor, how: str = "sum") -> Tensor:
    return funcol.all_reduce(x, how, dist.group.WORLD)  # type: ignore[arg-type]


def reduce_in_place(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


def q3(value: Tensor) -> tuple[Tensor, ...]:
    return cases.q3(value)


Form = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def residual(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    summed = r + reduce(x)
    return (*q3(cases.llama(summed, w)), summed)


def reduced_again(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    value = reduce(x)
    return (*q3(cases.llama(r + value, w)), value)


def two_readers(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    summed = r + reduce(x)
    y = cases.llama(summed, w)
    return (*q3(y), *q3(y), y, summed)


# What is written, and the variants that are replaced.
FORMS: dict[str, tuple[Form, str]] = {
    "norm only": (lambda x, r, w: (cases.llama(reduce(x), w),), "unquantised"),
    "norm, quant": (lambda x, r, w: q3(cases.llama(reduce(x), w)), "token"),
    "residual": (residual, "add+token"),
    "the residual second": (lambda x, r, w: q3(cases.llama(reduce(x) + r, w)), "add+token"),
    "in place": (lambda x, r, w: q3(cases.llama(r + reduce_in_place(x), w)), "add+token"),
    "viewed before": (lambda x, r, w: q3(cases.llama(r + reduce(x.flatten(0, -2)).view(x.shape), w)), "add+token"),
    "rows of two dims": (lambda x, r, w: q3(cases.llama((r + reduce(x)).view(2, 8, -1), w)), "add+token"),
    "gemma": (lambda x, r, w: q3(cases.gemma(r + reduce(x), w)), "add+offset+token"),
    "groups": (lambda x, r, w: cases.q7(128)(cases.llama(r + reduce(x), w)), "add+group128"),
    "sum of two": (lambda x, r, w: q3(cases.llama(r + (reduce(x) + reduce(x * 2)), w)), "pair+add+token"),
    "the reduced value too": (reduced_again, "add+token+reduced"),
    "two quantisers and the value": (two_readers, "add+token+value"),
    "an embedding": (lambda x, r, w: (*q3(cases.llama(v := reduce(x), w)), r + v), "token+reduced"),
}


def run(fn: Form, **options: object) -> Checked:
    return fused(fn, *cases.tensors(("x", "r", "w"), (16,), torch.bfloat16, "normal"), verify=True, **options)


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, alone: None) -> None:
    fn, variant = FORMS[form]
    result = run(fn)
    assert result.variants == [f"all_reduce_rms_norm:{variant}"]
    assert not [target for target in result.targets if "all_reduce.default" in target]
    assert not result.report.skipped


@pytest.mark.parametrize("how", ["max", "avg"])
def test_other_reductions_stay(how: str, alone: None) -> None:
    (graph,) = run(lambda x, r, w: q3(cases.llama(r + reduce(x, how), w))).oracle.graphs
    # the norm and its quantiser are fused without it
    assert graph.report.replaced == {"rms_norm_quant": 1}
    (site,) = (site for site in graph.report.sites if site.status == "replaced")
    assert site.reason == f"without all_reduce: collective: the reduction is {how}, not sum"
    assert gloo_ranks.all_reduces(graph.after) == gloo_ranks.all_reduces(graph.before) == 1


def test_rows_are_taken_out_after_the_ranks_are_summed(alone: None) -> None:
    """No rank sums other rows than the graph says; the norm and the addition are of the last row alone."""
    (graph,) = run(lambda x, r, w: q3(cases.llama(r + reduce(x), w)[-1:])).oracle.graphs
    (site,) = graph.report.sites
    assert (site.family, site.variant) == ("rms_norm_quant", "add+token")
    assert re.fullmatch(
        r"without all_reduce: rows: slice_\d takes some of wait_tensor, which all_reduce gives whole", site.reason
    )
    (summed,) = (n for n in graph.after.graph.nodes if "all_reduce" in str(n.target))
    assert summed.args[0].meta["val"].shape == (16, cases.H)
    (fused_op,) = (n for n in graph.after.graph.nodes if "rms_norm_quant" in str(n.target))
    assert fused_op.args[0].meta["val"].shape == (1, cases.H)


def test_rows_of_a_sum_of_ranks_before_the_norm(alone: None) -> None:
    result = run(lambda x, r, w: (cases.llama(reduce(x)[-4:], w),))
    assert result.report.replaced == {}
    assert [site.reason.split(":")[0] for site in result.report.skipped] == ["rows"]


def test_a_second_group_stays(alone: None) -> None:
    """Ranks of two groups need not come to the ops of both in one order."""
    other = dist.new_group([0], backend="gloo")

    def fn(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        first = cases.llama(r + reduce(x), w)
        return first, cases.llama(r + funcol.all_reduce(first, "sum", other), w)  # type: ignore[arg-type]

    made = run(fn).report
    assert made.replaced == {"all_reduce_rms_norm": 1}
    (skipped,) = made.skipped
    assert re.match(r"collective: its group is \S+, that of the sites before it \S+", skipped.reason)


def test_below_level_3_nothing_is_taken(alone: None) -> None:
    assert run(residual, level=2).report.replaced == {"rms_norm_quant": 1}


Found = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What both ranks found."""
    first, second = processes.run(2, tmp_path_factory.mktemp("ranks"), gloo_ranks.everything)
    return first, second


def test_tensor_parallel_models(both: Found, record_property) -> None:
    """Every all-reduce of these models is followed by a norm; all are taken, on both ranks."""
    first, second = (found["families"] for found in both)
    for name, found in first.items():
        record_property("row", f"{name[0]} {name[1]} on 2 ranks: {found['summary']}")
        assert len(found["reduced"]) == 3  # the embedding; of the layer, attention and feed-forward
        assert found["before"] == len(found["reduced"])
        assert found["after"] == 0
        taken = [site for site in found["sites"] if site.status == "replaced" and site.family == "all_reduce_rms_norm"]
        assert len(taken) == len(found["reduced"])
        assert not [site for site in found["sites"] if site.status == "skipped"]
        assert all(site.reason for site in found["sites"] if site.status == "bare")
        assert found["unaccounted"] == 0
        assert found["identical"]
        assert found["distance"] < 0.02  # a sum of two rounded halves is one of bf16's roundings away
        assert found["sites"] == second[name]["sites"]


def test_dtensor(both: Found) -> None:
    assert [found["dtensor"] for found in both] == [["all_reduce_rms_norm:add+token"]] * 2


def test_ranks_with_unequal_environments(both: Found) -> None:
    """They decide alike; both say what differs."""
    first, second = (found["unequal"] for found in both)
    assert first[0] == second[0] == [("replaced all_reduce_rms_norm:token", "")]
    for (variables, _), mine, theirs in zip(gloo_ranks.UNEQUAL[1:], first[1:], second[1:], strict=True):
        option = next(iter(variables)).rpartition("_")[2].lower()
        assert any(f"collective: {option} is " in reason and " on rank 0 and " in reason for _, reason in mine)
        for status, _ in (*mine, *theirs):
            assert not status.startswith("replaced all_reduce_rms_norm")


REDUCING = [
    op for family in ("all_reduce_rms_norm", "all_reduce_rms_norm_quant") for op in REGISTRY.overloads(family).values()
]


@pytest.mark.parametrize("op", REDUCING, ids=lambda op: op.name.split("::")[1])
def test_what_the_gpus_are_given_is_a_call(op: FusedOp, alone: None) -> None:
    """The op takes it, and returns what its shape function says."""
    given = gpu_ranks.arguments(op, 3, 256, 128, 0)
    outputs, specs = gpu_ranks.call(op, given, "reference"), op.shape(**given)
    for name in op.outputs:
        assert (tuple(outputs[name].shape), outputs[name].dtype) == (tuple(specs[name][0]), specs[name][1])


def test_what_is_timed_is_what_follows_the_sum(alone: None) -> None:
    x, residual, weight = cases.tensors(("x", "r", "w"), (16,), torch.bfloat16, "normal")
    op, given = allreduce.fused_call(x, residual, weight, dist.group.WORLD.group_name)  # type: ignore[union-attr]
    assert all(map(same_bits, op.target(*given, "reference"), allreduce.rest(x, residual, weight)))


@pytest.mark.parametrize("way", ["one_shot", "two_shot"])
@pytest.mark.parametrize("world", collective.WORLDS)
def test_pieces_fit_into_their_memory(world: int, way: str) -> None:
    for tensors, memory in itertools.product((1, 2), (symmetric.CLASSES[-1] // (2 * 16384), 8192, 1 << 24)):
        most = algorithms.at_once(way, world, tensors, memory)
        assert 0 < most <= algorithms.ROWS
        assert algorithms.needed(way, world, most, tensors) <= memory
        if most < algorithms.ROWS:
            assert algorithms.needed(way, world, most + world, tensors) > memory


def test_the_way_is_what_was_measured() -> None:
    assert [algorithms.choose(2, rows, 8192, 2) for rows in (1, 8192)] == ["one_shot", "one_shot"]
    assert [algorithms.choose(4, rows, 8192, 2) for rows in (1, 16, 32)] == ["one_shot", "one_shot", "two_shot"]
    # of 8 ranks AITER's rule: rows, bytes over ranks, and any multiple of eight elements up to 8192
    rows = {2880: 39, 8192: 14, 16384: 0}
    for width, most in rows.items():
        assert algorithms.choose(8, max(most, 1), width, 2) == ("one_shot" if most else "two_shot")
        assert algorithms.choose(8, most + 1, width, 2) == "two_shot"
    assert algorithms.choose(8, 81, 256, 2) == "two_shot"


def test_on_rocm_it_names_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.2")
    op = REGISTRY.ops["all_reduce_rms_norm", frozenset()]
    assert calls.refuse(op, {"group": "0"}) == (
        "its all-reduces are for NVIDIA GPUs: on AMD's, provider 'aiter' has them"
    )
