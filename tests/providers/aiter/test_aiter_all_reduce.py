"""AITER's all-reduces are called as each release takes them, and all ranks decide alike: two processes on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from aiter_fusion.providers import collective
from aiter_fusion.providers.aiter import all_reduce, releases
from support import aiter_double, aiter_ranks, processes
from support.aiter_double import Double
from support.aiter_drives import AITER, Drive

pytestmark = pytest.mark.xdist_group("aiter_ranks")  # every worker would start the processes for itself

Found = tuple[dict[tuple[str, str], Any], dict[tuple[str, str], Any]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What both ranks found."""
    first, second = processes.run(2, tmp_path_factory.mktemp("ranks"), aiter_ranks.everything)
    return first, second


@pytest.mark.parametrize("case", aiter_ranks.CASES)
def test_call(case: str, both: Found) -> None:
    """The method, bound by keyword, in one stage or two as sizes say; within the op's tolerance; all ranks alike."""
    for found in both:
        assert found["case", case] is None


def test_every_path_is_driven() -> None:
    driven = {case.method for case in aiter_ranks.CASES.values()}
    assert driven >= {path.entry.name for path in all_reduce.PATHS}


@pytest.mark.parametrize("fault", aiter_ranks.FAULTS)
def test_a_faulty_adapter_is_caught(fault: str, both: Found) -> None:
    for found in both:
        assert found["fault", fault] != "None"
        assert "refuse" not in found["fault", fault]


def scenes(both: Found, name: str) -> Any:
    """What both ranks found in a scene, where that is the same."""
    first, second = (found["scene", name] for found in both)
    assert first == second
    return first


def test_a_scale_in_columns_that_says_so(both: Found) -> None:
    assert scenes(both, "in columns") is None


def test_rows_with_gaps_are_packed(both: Found) -> None:
    assert scenes(both, "gaps") == (None, True)


def test_no_rows(both: Found) -> None:
    assert scenes(both, "no rows") == (None, [])


def test_hostile_rows(both: Found) -> None:
    """Zero rows have codes 0 and scale 1; a NaN on one rank is one on all, and in no other row."""
    assert scenes(both, "hostile") == ([1.0, True], [True, True, False])


def test_any_number_of_rows(both: Found) -> None:
    """One graph serves all: in one stage, in two, and without AITER."""
    variants, apart, called = scenes(both, "dynamic")
    assert variants == ["all_reduce_rms_norm:add+token"]
    assert called == [aiter_ranks.METHOD + "_quant"] * 2 + ["add_rmsnorm_quant"]
    assert all(a <= limit for each in apart for a, limit in zip(each, (1, 0.02, 2**-6), strict=True))


def test_none_is_an_answer(both: Found) -> None:
    """PyTorch's all-reduce then, and AITER's kernel for the rest."""
    method = f"{aiter_ranks.METHOD}_quant"
    assert scenes(both, "None") == (None, ["CustomAllreduce", method, "add_rmsnorm_quant"])


def test_one_communicator_for_a_group(both: Found) -> None:
    assert scenes(both, "one communicator") == ([None] * 4, 1, 2, True, True, {64 << 20})


@pytest.mark.parametrize(
    ("scene", "said"),
    [
        ("disabled", "rank 1: AITER has disabled it, its log says why"),
        ("failing", "rank 1: no memory"),
        ("silent", "rank 1: this version of AITER has no _IS_CAPTURING, which says when it returns zeros"),
    ],
)
def test_all_ranks_go_without(scene: str, said: str, both: Found) -> None:
    problems, called, warnings = scenes(both, scene)
    assert problems == [None, None]
    assert called == ["CustomAllreduce", "add_rmsnorm_quant", "add_rmsnorm_quant"]
    (warning,) = warnings
    assert warning == f"aiter_fusion: no AITER communicator for group '0': PyTorch's all-reduce instead: {said}"


def test_a_group_of_nccl(both: Found) -> None:
    assert scenes(both, "NCCL") == (None, True, "gloo", [0, 1])


def test_a_capture_makes_none_and_uses_one(both: Found) -> None:
    said, *problems = scenes(both, "captured")
    assert "would be created while a CUDA graph is captured: call aiter_fusion.warmup" in said
    assert problems == [None, None]


def test_zeros_never_come_back(both: Found) -> None:
    said, after = scenes(both, "warming up")
    assert "the communicator is in its capture(), where AITER returns zeros" in said
    assert after is None


def test_what_aiter_returns_is_checked(both: Found) -> None:
    fewer, other = scenes(both, "other results")
    assert "returned 2 tensors, and 3 were expected: this version of AITER is not supported" in fewer
    assert "returned value [5, 256] of torch.float32, and [5, 256] of torch.bfloat16 was expected" in other


def test_preference(both: Found) -> None:
    assert scenes(both, "preferred") == ("AITER_FUSION_ALLREDUCE is off (set it to 1)", None)


GRAPHS = {
    "unquantised": ("add+unquantised", "", (2**-6, 2**-6)),
    "token": ("add+token", "_quant", (1, 0.02, 2**-6)),
    "value": ("add+token+value", "_quant", (1, 0.02, 2**-6, 2**-6)),
    "group": ("add+group64", "_per_group_quant", (1, 0.02)),
    "gemma": ("add+offset+token", "_quant", (1, 0.02)),
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs(graph: str, both: Found) -> None:
    variant, method, most = GRAPHS[graph]
    sites, called, apart, _ = scenes(both, "graphs")[graph]
    assert sites == [("replaced", "all_reduce_rms_norm", variant, "aiter", "")]
    assert set(called) - {"CustomAllreduce"} == {aiter_ranks.METHOD + method}
    assert all(a <= limit for a, limit in zip(apart, most, strict=True))


def test_compiled(both: Found) -> None:
    """Inductor's code, twice: the graph's bits, by one communicator."""
    same, called = scenes(both, "compiled")
    assert same == [True, True]
    assert called == ["CustomAllreduce", *[aiter_ranks.METHOD + "_quant"] * 2]


def test_without_a_residual(both: Found) -> None:
    """What AITER has no kernel for goes without the all-reduce, and says so."""
    (site,), called, *_ = scenes(both, "graphs")["no residual"]
    assert site[:4] == ("replaced", "rms_norm_quant", "token", "aiter")
    assert site[4] == "without all_reduce: provider: aiter: the call has no residual, and its kernels add one"
    assert called == ["rmsnorm_quant"]


def test_ranks_whose_communicators_would_take_other_sizes(both: Found) -> None:
    (site,), called = scenes(both, "unequal")
    assert site[:2] == ("replaced", "rms_norm_quant")
    assert "what aiter depends on is '' on rank 0 and 'AITER_CUSTOM_AR_MAX_SIZE=4096' on rank 1" in site[2]
    assert "CustomAllreduce" not in called


# ---- in one process --------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Double]:
    """Doubles in a group of two, which need not be there: nothing is called."""
    monkeypatch.setattr(all_reduce, "refuse_group", lambda group: None)
    monkeypatch.setattr(all_reduce, "world_of", lambda group: 2)
    return make


@pytest.fixture
def double(pair: Callable[..., Double]) -> Double:
    return pair()


def drive(features: str = "add", sizes: tuple[int, ...] = (3, 256), block: int = 0, quant: bool = True, **given: Any):
    family = aiter_ranks.QUANT if quant else aiter_ranks.PLAIN
    return Drive(family, features, sizes, block, tuple(given.items()))


F32 = torch.float32
OFFSET = {"offset": 1.0, "cast_first": False}
REFUSED = {
    "the call sums two tensors over the ranks, and its kernels sum one": drive(other=torch.zeros(3, 256)),
    "the all-reduced value is read elsewhere, and its kernels do not return it": drive("add reduced"),
    "the call has no residual, and its kernels add one": drive(""),
    "x is torch.float32": Drive(aiter_ranks.PLAIN, "add", (3, 256), dtype=F32),
    "residual is torch.float32": drive(residual=torch.zeros(3, 256)),
    "the residual stream is torch.float32": drive(residual_dtype=F32),
    "its norms need a weight": drive(weight=None),
    "the normalised value is torch.float32": drive(quant=False, weight=torch.ones(256)),
    "needs a weight of torch.bfloat16, like x, and the weight is torch.float32": drive(
        quant=False, weight=torch.ones(256), cast_first=False
    ),
    "the offset of the weight is 0.5": drive(offset=0.5, cast_first=False),
    "no kernel for it with a scale per static": drive("add static"),
    "no kernel for it with a scale per group with add, offset": drive(block=64, **OFFSET),
    "takes groups of up to 512 elements, in multiples of 8, not of 1024": drive(sizes=(3, 2048), block=1024),
    "takes groups of up to 512 elements, in multiples of 8, not of 4": drive(block=4),
    "takes groups of a power of two of elements, not of 96": drive(sizes=(3, 192), block=96),
    "takes hidden sizes up to 16384, not 16640": drive(sizes=(3, 16640), quant=False),
    "takes hidden sizes up to 8192, not 8208": drive(sizes=(3, 8208)),
    "takes hidden sizes in packs of 8 elements, above 8192 only if 2 ranks can share them, not 8200": drive(
        sizes=(3, 8200), quant=False
    ),
    "takes hidden sizes in packs of 8 elements, above 8192 only if 2 ranks can share them, not 260": drive(
        sizes=(3, 260)
    ),
    "not the maximum over 240": drive(scale_steps="div=240.0 float32 log2 ceil exp2"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusal(reason: str, double: Double) -> None:
    op, arguments = REFUSED[reason].arguments(double.fp8)
    assert reason in str(AITER.refuse(op, arguments))
    assert double.called == []


def test_one_scale_for_the_tensor(double: Double) -> None:
    op, arguments = drive().arguments(double.fp8)
    assert "with a scale per tensor" in str(AITER.refuse(op, arguments | {"block": 0}))


@pytest.mark.parametrize(
    ("arch", "why"),
    [
        ("gfx1250", "AITER has no fused all-reduces for gfx1250"),
        ("gfx1100", "CustomAllreduce.custom_fused_ar_rms_quant writes zeros on gfx1100"),
    ],
)
def test_architectures(arch: str, why: str, pair: Callable[..., Double]) -> None:
    op, arguments = drive().arguments(pair(arch=arch).fp8)
    assert why in str(AITER.refuse(op, arguments))


@pytest.mark.parametrize(("world", "one_host"), [(1, True), (3, True), (6, True), (16, True), (2, False)])
def test_groups(world: int, one_host: bool, make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other sizes, or of several hosts, as all ranks have compared."""
    double = make()
    monkeypatch.setattr(collective, "process_group", lambda name: None)
    monkeypatch.setattr("torch.distributed.get_process_group_ranks", lambda group: list(range(world)))
    monkeypatch.setattr(collective.agreement, "on_one_host", lambda ranks: one_host)
    op, arguments = drive().arguments(double.fp8)
    why = f"the group's size is {world}, and its all-reduces are for 2, 4, 8 ranks"
    hosts = "the ranks of the group are on several hosts, and its all-reduces share memory within one"
    assert AITER.refuse(op, arguments) == (why if one_host else hosts)


def test_what_is_refused_is_not_run(double: Double) -> None:
    op, arguments = drive(offset=0.5, cast_first=False).arguments(double.fp8)
    with pytest.raises(RuntimeError, match=r"by aiter: the offset of the weight is 0\.5"):
        op.target(*arguments.values(), "aiter")


def test_stages() -> None:
    """AITER's gate, in packs of 16 bytes and bytes of a rank: rows of 2880 are as good as rows of 4096."""
    plain, token = all_reduce.PATHS[0], all_reduce.PATHS[2]
    most = {(2, 2880): 80, (2, 8192): 56, (4, 8192): 28, (8, 2880): 39, (8, 8192): 14}
    for (world, width), rows in most.items():
        assert [plain.stages(world, n, width, 2) for n in (1, rows, rows + 1)] == [1, 1, 2]
    assert [plain.stages(2, n, 8208, 2) for n in (1, 4088, 4089)] == [2, 2, None]  # 64 MiB
    assert [plain.stages(8, n, 8208, 2) for n in (1,)] == [None]  # 1026 packs are not divided by 8
    assert plain.stages(2, 81, 504, 2) is None
    for world in collective.WORLDS:
        assert [token.stages(world, n, 2880, 2) for n in (1, 22, 23)] == [1, 1, None]
        assert [token.stages(world, n, 4096, 2) for n in (1, 16, 17, 512, 513)] == [1, 1, 2, 2, None]


# ---- versions ------------------------------------------------------------------------------------------------------


def names(path: all_reduce.Collective) -> str:
    return "+".join([path.entry.name.rpartition(".")[2], *sorted(path.limits.needs - {"add"})])


# Path -> the first version with which it binds; and the first with which it is called.
FIRST = {
    "custom_fused_ar_rms": "v0.1.10.post2",
    "custom_fused_ar_rms+offset": "v0.1.17",
    "custom_fused_ar_rms_quant": "v0.1.10.post3",
    "custom_fused_ar_rms_quant+offset": "v0.1.17",
    "custom_fused_ar_rms_quant+value": "v0.1.18",
    "custom_fused_ar_rms_quant+offset+value": "v0.1.18",
    "custom_fused_ar_rms_per_group_quant": "v0.1.14",
}
CALLED = "v0.1.19.post1"


def test_binding_table(record_property: Callable[[str, object], None]) -> None:
    found = {}
    for path in all_reduce.PATHS:
        bound = [v for v in aiter_double.VERSIONS if aiter_double.binds([path.entry, all_reduce.COMMUNICATOR], v)]
        assert bound == aiter_double.VERSIONS[aiter_double.VERSIONS.index(bound[0]) :], names(path)
        found[names(path)] = bound[0]
        called = [v for v in bound if releases.known_bad(path.entry.name, v) is None]
        assert called == aiter_double.VERSIONS[aiter_double.VERSIONS.index(CALLED) :], names(path)
    assert found == FIRST
    for path, version in FIRST.items():
        record_property("row", f"binds with AITER from {version:14} on: {path} (called from {CALLED} on)")


@pytest.mark.parametrize("version", ["v0.1.1", "v0.1.6.post2", "v0.1.10.post1", "v0.1.14", "v0.1.19", CALLED])
def test_an_older_version(version: str, pair: Callable[..., Double]) -> None:
    older = pair(version)
    for path, case in zip(all_reduce.PATHS, DRIVEN, strict=True):
        op, arguments = case.arguments(older.fp8)
        why = AITER.refuse(op, arguments)
        if version == CALLED:
            assert why is None
        elif aiter_double.at(path.entry.name, version) and releases.known_bad(path.entry.name, version):
            assert "lets a rank go on while others read its data" in str(why)
            assert str(why).endswith("upgrade AITER")
        else:
            assert f"AITER {version} has no" in str(why) or "takes no argument" in str(why)


# A call for each path.
DRIVEN = [
    drive(quant=False),
    drive(quant=False, **OFFSET),
    drive(),
    drive(**OFFSET),
    drive("add value"),
    drive("add value", **OFFSET),
    drive(block=64),
]


def test_a_drifted_communicator(pair: Callable[..., Double]) -> None:
    drifted = pair(signatures={"CustomAllreduce": "(group, device, pool)"})
    op, arguments = drive().arguments(drifted.fp8)
    assert str(AITER.refuse(op, arguments)).endswith("takes no argument max_size")


@pytest.mark.parametrize(
    "signature",
    [
        "(self, input, residual_inp, weight, eps)",
        "(self, inp, residual_inp, weight, eps, use_1stage)",
        "(self, input, residual_inp, weight, eps, use_1stage, stream)",
    ],
)
def test_a_drifted_version_is_refused_before_it_is_called(signature: str, pair: Callable[..., Double]) -> None:
    drifted = pair(signatures={aiter_ranks.METHOD: signature})
    op, arguments = drive(quant=False).arguments(drifted.fp8)
    why = str(AITER.refuse(op, arguments))
    assert "takes no argument" in why or "also wants stream" in why
    with pytest.raises(RuntimeError, match="by aiter: CustomAllreduce"):
        op.target(*arguments.values(), "aiter")
    assert drifted.called == []
