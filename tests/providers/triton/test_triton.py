"""Launches, arguments, refusals and programs of the Triton provider are right, and kernels compile, without a GPU."""

from __future__ import annotations

import ast
import itertools
import json
import multiprocessing
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from aiter_fusion.bench.ops import VARIANTS, Case
from aiter_fusion.bench.tune import questions
from aiter_fusion.formats import FORMATS
from aiter_fusion.op import FusedOp
from aiter_fusion.passes.identity import environment
from aiter_fusion.providers import PROVIDERS
from aiter_fusion.providers.triton import jit, launches, programs, provider, rules, tuned
from aiter_fusion.providers.triton.all_reduce import calls, symmetric
from aiter_fusion.providers.triton.linear import calls as linear
from aiter_fusion.providers.triton.terms import ALONE, COMBINING, STEPS
from aiter_fusion.registry import REGISTRY
from aiter_fusion.scale_program import WITH_NUMBER
from support.compiling import MOST_THREADS, TARGETS, compile_for, in_float64, kinds_of, needs_triton
from support.op_contract import chosen

KERNELS = Path(provider.__file__).parent / "kernels"
EVERY_OP = [op for op in REGISTRY.ops.values() if op.stages and not op.is_collective]
# Those of several scales or bounds have a test of their own.
SOME_OPS = [op for op in EVERY_OP if not any(feature[-1] in "23" for feature in op.features)][::3]
REDUCING = [op for op in REGISTRY.ops.values() if op.is_collective]
BF16, FN, FNUZ = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def covers(shape: rules.Shape, width: int, block: int) -> None:
    assert all(map(is_power_of_two, (shape.rows, shape.segments, shape.segment, shape.threads, shape.run)))
    assert shape.segment >= block
    assert shape.segments * block * shape.tiles >= width
    assert shape.threads <= 1024
    # Triton's limit on a tensor's elements, and what registers hold
    assert shape.rows * shape.segments * shape.segment <= 2**17


@given(width=st.integers(1, 65536), rows=st.integers(0, 10**6), divisor=st.integers(1, 64))
@settings(deadline=None, derandomize=True, database=None)
def test_rules_cover_every_row(width: int, rows: int, divisor: int) -> None:
    block = width // divisor if width % divisor == 0 else width
    covers(rules.norm(width, block, rows), width, block)
    covers(rules.row(width, rows), width, width)
    for grouped in (False, True):
        for packed in (False, True):
            shape = rules.flat(block, rows * divisor, grouped, packed)
            assert shape.segment >= block
            assert is_power_of_two(shape.segments)


def parameters(name: str) -> list[str]:
    """The parameters of a kernel, from its source: Triton need not be installed."""
    tree = ast.parse((KERNELS / f"{name}.py").read_text())
    (kernel,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == f"{name}_kernel")
    return [argument.arg for argument in kernel.args.args]


@pytest.mark.parametrize("op", chosen(EVERY_OP), ids=lambda op: op.name.split("::")[1])
def test_every_call_binds(op: FusedOp) -> None:
    """Every kernel gets exactly its parameters; every tensor that it names exists; every output is written once."""
    from aiter_fusion.providers.triton.lowering import WRITTEN

    for arguments in op.samples():
        known = {name: arguments[name] for name in op.arguments}
        plan = launches.of(op, known, True)
        assert 1 <= len(plan.launches) <= 2
        written = []
        for launch in plan.launches:
            assert sorted(launch.arguments) == sorted(parameters(launch.kernel))
            refs = {name: value.name for name, value in launch.arguments.items() if isinstance(value, launches.Ref)}
            for ref in refs.values():
                assert ref in {*op.outputs, *plan.scratch} or isinstance(known[ref], Tensor)
            written += [refs[name] for name in WRITTEN[launch.kernel] if refs.get(name) in op.outputs]
            assert launch.grid >= 1
        assert sorted(written) == sorted(op.outputs)


def test_a_symbolic_number_of_rows_is_not_looked_at() -> None:
    """Grids are expressions; no guard is added."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    environment = ShapeEnv()
    dynamic = StatelessSymbolicContext([DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    real = torch.empty(3, 5, 256, dtype=torch.bfloat16)
    with FakeTensorMode(shape_env=environment) as mode:
        x = mode.from_tensor(real, symbolic_context=dynamic, source=ConstantSource("x"))
        op = REGISTRY.ops["rms_norm_quant", frozenset()]
        known = {**next(iter(op.samples())), "x": x, "weight": None, "block": 256}
        (launch,) = launches.of(op, {name: known[name] for name in op.arguments}, True).launches
        assert isinstance(launch.grid, torch.SymInt)
    assert environment.guards == []


# What the kernels refuse, with the reason's first words.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "elsewhere": (
        {"x": torch.empty(4, 256, dtype=torch.bfloat16)},
        "the tensors are on cpu, and its kernels are for GPUs",
    ),
    "one elsewhere": ({"weight": torch.empty(256, dtype=torch.bfloat16)}, "weight is on cpu, x on cuda:0"),
    "format": (
        {"quant_dtype": FNUZ},
        "the quantiser's format is torch.float8_e4m3fnuz, and this GPU converts to torch.float8_e4m3fn",
    ),
    "columns": ({"x": (4, 256, torch.bfloat16, "columns")}, "the columns of x are 2 elements apart"),
    "rows": ({"x": (8, 256, torch.bfloat16, "rows")}, "the rows of x are not evenly spaced"),
    "wide": ({"x": (1, 262144, torch.bfloat16), "block": 262144}, "hidden size 262144 exceeds 65536"),
    "groups": ({"x": (1, 65536, torch.bfloat16), "block": 32768}, "group size 32768 exceeds 16384"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "native_fp8", lambda device: FN)
    changes, reason = REFUSED[case]
    op = REGISTRY.ops["rms_norm_quant", frozenset()]
    arguments = {**next(iter(op.samples())), "weight": None}
    with FakeTensorMode():
        usual = torch.empty(4, 256, dtype=torch.bfloat16, device="cuda")
        known = {**arguments, "x": usual, "block": 256, "quant_dtype": FN}
        assert PROVIDERS["triton"].why_not(op, {name: known[name] for name in op.arguments}) is None
        for name, change in changes.items():
            if isinstance(change, tuple):
                sizes, dtype = change[:2], change[2]
                strides = {"columns": (512, 2), "rows": (1024, 256, 1)}.get(change[-1], (sizes[-1], 1))
                sizes = (2, 3, 256) if len(strides) == 3 else sizes
                known[name] = torch.empty_strided(sizes, strides, dtype=dtype, device="cuda")
            else:
                known[name] = change
        answer = PROVIDERS["triton"].why_not(op, {name: known[name] for name in op.arguments})
    assert answer is not None
    assert answer.startswith(reason)


@pytest.mark.parametrize("family", dict.fromkeys(family for family, _ in REGISTRY.ops))
def test_the_package_has_kernels_for_its_ops(family: str, alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all-reduces too, one process being no group to reduce over; and none for ops from outside."""
    for asking in (provider, linear):
        monkeypatch.setattr(asking, "native_fp8", lambda device: FN)
    for op in REGISTRY.overloads(family).values():
        known: dict[str, Any] = {**next(op.samples()), "block": 64, "quant_dtype": FN}
        with FakeTensorMode():
            known = tree_map_only(
                Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda"), known
            )
            answer = PROVIDERS["triton"].why_not(op, {name: known[name] for name in op.arguments})
            assert answer is None or ("group" in op.arguments and answer.startswith("the group's size is 1"))
            outside = replace(op, family="of_somebody", stages=())
            known = {name: known[name] for name in op.arguments}
            assert PROVIDERS["triton"].why_not(outside, known) == "it declares no kernel for of_somebody"


def test_where_inductor_is_faster() -> None:
    op = REGISTRY.ops["rms_norm_quant", frozenset()]
    known = {name: next(iter(op.samples()))[name] for name in op.arguments}
    for rows, width, block, faster in (
        (1, 4096, 0, True),
        (1, 8192, 0, True),
        (3, 4096, 0, False),
        (1, 4096, 4096, False),
        (1, 4096, 128, False),
    ):
        reason = provider.slower(op, known | {"x": torch.empty(rows, width, dtype=BF16), "block": block})
        assert (reason is not None) == faster


@pytest.mark.parametrize(
    ("version", "variant", "rows", "width", "block", "left"),
    [
        ("2.15.0+cu132", "add", 1, 4096, 128, True),
        ("2.16.0a0+git0123456", "add", 8, 8192, 128, True),
        ("2.14.1", "add", 1, 4096, 128, False),
        ("2.17.0", "add", 1, 4096, 128, False),
        ("2.15.0", "default", 1, 4096, 128, False),
        ("2.15.0", "add", 1, 4096, 4096, False),
        ("2.15.0", "add", 9, 4096, 128, False),
        ("2.15.0", "add", 1, 2880, 64, False),
    ],
)
def test_where_inductor_is_faster_depends_on_its_version(
    monkeypatch: pytest.MonkeyPatch, version: str, variant: str, rows: int, width: int, block: int, left: bool
) -> None:
    """Other versions generate other code, so a measurement holds for those that it names."""
    measured = rules.InductorFaster(
        why="one kernel of a norm and groups",
        scales="group",
        family="rms_norm_quant",
        features=frozenset({"add"}),
        widths=(4096, 8192),
        rows=(1, 8),
        since=(2, 15),
        until=(2, 16),
    )
    monkeypatch.setattr(rules, "INDUCTOR_FASTER", (*rules.INDUCTOR_FASTER, measured))
    monkeypatch.setattr(torch, "__version__", version)
    (op,) = (op for op in EVERY_OP if op.family == "rms_norm_quant" and op.overload_name == variant)
    known = {name: next(iter(op.samples()))[name] for name in op.arguments}
    known |= {"x": torch.empty(rows, width, dtype=BF16), "block": block}
    assert provider.slower(op, known) == (measured.why if left else None)


@pytest.fixture
def tuned_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's cache, on a machine with a GPU."""
    monkeypatch.setenv("AITER_FUSION_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200 (1)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tuned.machine, "triton_version", lambda: "3.6.0")
    forget()
    yield tmp_path / "launches-nvidia-h200-1-triton-3.6.0.json"
    forget()


def forget() -> None:
    tuned._content.cache_clear()
    tuned.choices.cache_clear()


def test_tuned_launches_win_over_the_rule(tuned_file: Path) -> None:
    assert tuned.path() == tuned_file
    assert tuned.state() == ""
    by_rule = rules.norm(4096, 128, 1), rules.row(4096, 1), rules.flat(128, 10**6, True, False)
    tuned.write(tuned_file, {"norm 4096 128 1": {"threads": 64, "run": 4}}, {"device": "H200"})
    tuned.write(tuned_file, {"flat 128 0 1 0": {"segments": 2}}, {"device": "H200"})
    assert rules.norm(4096, 128, 1) == replace(by_rule[0], threads=64, run=4)
    assert rules.norm(4096, 128, 1000).threads == rules.norm(4096, 4096, 1000).threads == 128
    assert rules.row(4096, 1) == by_rule[1]
    assert rules.flat(128, 10**6, True, False) == replace(by_rule[2], segments=2)
    with tuned.trying({"norm 4096 128 1": {}}):
        assert rules.norm(4096, 128, 1) == by_rule[0]


def _write_ten(file: Path, process: int) -> None:
    for number in range(10):
        tuned.write(file, {f"row {number} {process}": {"threads": 64}}, {})


def test_processes_that_write_at_the_same_time_lose_nothing(tuned_file: Path) -> None:
    """Forked: they have this process's GPU that is none."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_ten, args=(tuned_file, process)) for process in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    forget()
    assert len(tuned.choices()) == 40


def test_a_file_of_its_own_has_only_what_was_measured(tuned_file: Path, tmp_path: Path) -> None:
    tuned.write(tuned_file, {"row 1 1": {"threads": 64}}, {})
    tuned.write(tmp_path / "own" / "launches.json", {"row 2 1": {"threads": 64}}, {})
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["launches.json"]
    assert list(json.loads((tmp_path / "own" / "launches.json").read_text())["launches"]) == ["row 2 1"]


def test_where_the_cache_is(tuned_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AITER_FUSION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tuned.path() == tmp_path / "cache" / "aiter_fusion" / tuned_file.name


def test_code_compiled_with_other_launches_is_not_reused(tuned_file: Path) -> None:
    before = environment()
    tuned.write(tuned_file, {"row 4096 1": {"threads": 256}}, {})
    assert environment() != before


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"launches": {"row 4096 1": 8}}',
        '{"launches": {"row 4096 1": {"threads": 96}}}',
        '{"launches": {"row 4096 1": {"threads": 2048}}}',
    ],
)
def test_a_tuned_file_that_is_none(tuned_file: Path, content: str) -> None:
    tuned_file.write_text(content)
    if not content:
        assert tuned.choices() == {}
        return
    with pytest.raises(ValueError, match="delete it"):
        tuned.choices()


@pytest.mark.parametrize("nvidia", [True, False])
def test_what_is_tuned_is_what_the_rules_ask(nvidia: bool) -> None:
    """Every question is about a key that the launches of its cases look up, and every candidate can be launched."""
    lanes = 32 if nvidia else 64
    for question in questions((2880, 4096), nvidia):
        for case in question.cases:
            known = case.arguments("meta")
            usual = launches.of(case.op, known, nvidia)
            for candidate in question.candidates:
                with tuned.trying({question.key: candidate}):
                    (launch,) = launches.of(case.op, known, nvidia).launches
                assert launch.warps * lanes == candidate["threads"] <= MOST_THREADS
                names = {"run": "RUN", "segments": "SEGMENTS"}
                assert all(launch.arguments[names[n]] == v for n, v in candidate.items() if n in names)
            assert len(usual.launches) == 1


def test_programs() -> None:
    """As PyTorch computes on a GPU: a division by a number is a product with its float32 reciprocal."""
    assert programs.steps("div=448.0 float32") == (("mul", 0.0022321429569274187), ("float32", None))
    assert programs.steps("float32 clamp_min=1e-12") == (("float32", None), ("clamp_min", 9.999999960041972e-13))
    torchao = "float32 div_scale clamp_min=-448.0 clamp_max=448.0"
    scale = "div=448.0 float32"
    # the cast saturates
    assert programs.value_steps(torchao, scale, BF16, FN, True, True) == (("shared_div_scale", None),)
    assert programs.value_steps(torchao, "", BF16, FN, False, True) == (("shared_div_scale", None),)
    # only for half precision are two parts of the reciprocal enough
    assert programs.value_steps(torchao, "", torch.float32, FN, False, True)[1] == ("div_scale", None)
    # no clamp: the cast's own end
    assert programs.value_steps("float32 div_scale", scale, BF16, FNUZ, True, True)[-1] == ("nan_from", 248.0)
    # a cast that does not saturate keeps the clamps
    assert programs.value_steps(torchao, scale, BF16, FN, True, False)[1:] == (
        ("clamp_min", -448.0),
        ("clamp_max", 448.0),
    )
    # half precision stays half precision, unless a factor with dimensions promotes it
    assert programs.value_steps("div_scale", scale, BF16, FN, False, True)[0] == ("div_scale", None)
    assert programs.value_steps("div_scale", "div=448.0", BF16, FN, True, True)[0] == ("div_scale", None)
    assert programs.value_steps("div_scale", scale, BF16, FN, True, True)[0] == ("shared_div_scale", None)


@pytest.mark.parametrize("dtype", [FN, FNUZ], ids=str)
def test_where_pytorch_casts_to_nan(dtype: torch.dtype) -> None:
    every = torch.arange(0x43000000, 0x44000000, 1 << 12, dtype=torch.int32).view(torch.float32)  # 128 to 512
    every = torch.cat([every, torch.tensor([248.0, 464.0, 1e9, float("inf")])])
    least = programs.nan_from(dtype)
    want = torch.zeros_like(every, dtype=torch.bool) if least is None else every >= least
    assert torch.equal(every.to(dtype).float().isnan(), want)


# (warps, run, rows, segments, segment, tiles) of launches on NVIDIA's GPUs, by rule and arguments, which the H200's
# measurements decided: a change must be meant, and measured.
MEASURED: dict[tuple[Any, ...], tuple[int, ...]] = {
    ("norm", 2880, 2880, 1): (8, 8, 1, 1, 4096, 1),
    ("row", 2880, 1): (16, 8, 1, 1, 4096, 1),
    ("norm", 2880, 2880, 16384): (4, 8, 1, 1, 4096, 1),
    ("row", 2880, 16384): (4, 8, 1, 1, 4096, 1),
    ("norm", 4096, 4096, 1): (8, 8, 1, 1, 4096, 1),
    ("norm", 4096, 128, 1): (8, 8, 1, 32, 128, 1),
    ("row", 4096, 1): (16, 8, 1, 1, 4096, 1),
    ("norm", 4096, 4096, 16384): (4, 8, 1, 1, 4096, 1),
    ("norm", 4096, 128, 16384): (4, 16, 1, 32, 128, 1),
    ("row", 4096, 16384): (4, 8, 1, 1, 4096, 1),
    ("norm", 8192, 8192, 1): (8, 8, 1, 1, 8192, 1),
    ("norm", 8192, 128, 1): (8, 8, 1, 64, 128, 1),
    ("row", 8192, 1): (32, 8, 1, 1, 8192, 1),
    ("norm", 8192, 8192, 16384): (4, 8, 1, 1, 8192, 1),
    ("norm", 8192, 128, 16384): (4, 16, 1, 64, 128, 1),
    ("row", 8192, 16384): (8, 8, 1, 1, 8192, 1),
    ("norm", 14336, 14336, 1): (8, 8, 1, 1, 16384, 1),
    ("norm", 14336, 128, 1): (8, 8, 1, 128, 128, 1),
    ("row", 14336, 1): (32, 8, 1, 1, 16384, 1),
    ("norm", 14336, 14336, 16384): (8, 8, 1, 1, 16384, 1),
    ("norm", 14336, 128, 16384): (8, 8, 1, 128, 128, 1),
    ("row", 14336, 16384): (8, 8, 1, 1, 16384, 1),
    ("norm", 16384, 16384, 1): (8, 8, 1, 1, 16384, 1),
    ("norm", 16384, 128, 1): (8, 8, 1, 128, 128, 1),
    ("row", 16384, 1): (32, 8, 1, 1, 16384, 1),
    ("norm", 16384, 16384, 16384): (8, 8, 1, 1, 16384, 1),
    ("norm", 16384, 128, 16384): (8, 8, 1, 128, 128, 1),
    ("row", 16384, 16384): (8, 8, 1, 1, 16384, 1),
    ("norm", 65536, 65536, 1): (8, 8, 1, 1, 65536, 1),
    ("norm", 65536, 128, 1): (8, 8, 1, 128, 128, 4),
    ("row", 65536, 1): (32, 8, 1, 1, 65536, 1),
    ("norm", 65536, 65536, 16384): (8, 8, 1, 1, 65536, 1),
    ("norm", 65536, 128, 16384): (8, 8, 1, 128, 128, 4),
    ("row", 65536, 16384): (8, 8, 1, 1, 65536, 1),
    ("norm", 128, 128, 1): (8, 8, 8, 1, 128, 1),
    ("norm", 128, 128, 16384): (4, 8, 8, 1, 128, 1),
    ("row", 128, 1): (1, 8, 1, 1, 128, 1),
    ("flat", 128, 64, True, False): (4, 8, 1, 8, 128, 1),
    ("flat", 128, 64, True, True): (4, 8, 1, 8, 128, 1),
    ("flat", 128, 64, False, False): (4, 8, 1, 8, 128, 1),
    ("flat", 128, 64, False, True): (4, 8, 1, 8, 128, 1),
    ("flat", 128, 524288, True, False): (4, 8, 1, 8, 128, 1),
    ("flat", 128, 524288, True, True): (1, 16, 1, 8, 128, 1),
    ("flat", 128, 524288, False, False): (8, 8, 1, 16, 128, 1),
    ("flat", 128, 524288, False, True): (1, 16, 1, 8, 128, 1),
}


@pytest.mark.parametrize("asked", MEASURED, ids=str)
def test_launches_are_those_that_were_measured(asked: tuple[Any, ...]) -> None:
    rule, *arguments = asked
    shape = getattr(rules, rule)(*arguments)
    assert (shape.warps(True), shape.run, shape.rows, shape.segments, shape.segment, shape.tiles) == MEASURED[asked]


@pytest.mark.parametrize("target", ["sm_90", "gfx942", "gfx950"])
def test_every_launch_fits_its_target(target: str) -> None:
    """Every rule over all widths, and every op's launches and all-reduces' over some: 1024 threads are the most."""
    machine = TARGETS[target][0]
    nvidia, lanes = machine[0] == "cuda", machine[2]
    most = MOST_THREADS // lanes
    for width in range(32, 65537, 32):
        for rows in (1, 65536):
            assert 1 <= rules.row(width, rows).warps(nvidia) <= most
            for block in (width, 128, 32):
                assert 1 <= rules.norm(width, block, rows).warps(nvidia) <= most
    for block, segments, grouped, packed in itertools.product((32, 128, 4096, 16384), (1, 10**6), *[(True, False)] * 2):
        assert 1 <= rules.flat(block, segments, bool(grouped), bool(packed)).warps(nvidia) <= most
    for width, rows in itertools.product((32, 128, 2880, 4096, 4128, 8192, 16384, 65536), (1, 255, 256, 65536)):
        for family, variant in VARIANTS:
            if variant.endswith("group128") and width % 128:
                continue
            case = Case(family, variant, width, rows)
            for launch in launches.of(case.op, case.arguments("meta"), nvidia).launches:
                assert 1 <= launch.warps <= most
        constants = {"SEGMENTS": 1, "SEGMENT": rules.power_of_two(width), "PTX": nvidia}
        assert 1 <= calls.launch(constants, rows, 132)["num_warps"] <= most


def compiled(op: FusedOp, known: dict[str, Any], target: str) -> list[Mapping[str, str]]:
    """The code of all kernels of a call, compiled for a GPU that need not be here."""
    machine, _, fp8, _ = TARGETS[target]
    tensors = {name: value for name, value in known.items() if isinstance(value, Tensor)} | op.allocate(**known)
    kinds = kinds_of(tensors, fp8)
    return [compile_for(target, launch, kinds) for launch in launches.of(op, known, machine[0] == "cuda").launches]


@needs_triton
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", SOME_OPS, ids=lambda op: op.name.split("::")[1])
def test_kernels_compile(op: FusedOp, target: str) -> None:
    samples = list(op.samples())
    for arguments in samples[:: max(1, len(samples) // 4)]:
        compiled(op, {name: arguments[name] for name in op.arguments} | {"quant_dtype": TARGETS[target][1]}, target)


# The fullest variants in formats other than FP8, and with several scales or bounds.
OTHER_FORMATS = [
    (family, variant)
    for family, variant in VARIANTS
    if variant.startswith(("add+", "packed+")) and any(format.word() in variant.split("+") for format in FORMATS)
]
SEVERAL = [("rms_norm_quant", "add+static3"), ("rms_norm_quant", "add+bounded3+token")]


@needs_triton
@pytest.mark.parametrize("target", ["sm_90", "gfx942", "gfx950"])
@pytest.mark.parametrize("variant", [*OTHER_FORMATS, *SEVERAL], ids="-".join)
def test_other_formats_compile(variant: tuple[str, str], target: str) -> None:
    case = Case(*variant, 4096, 16384)
    compiled(case.op, case.arguments("meta", TARGETS[target][1]), target)


# Where a program has the most threads: the decoding of a large model.
LARGEST = (Case("act_mul_quant", "token", 8192, 1), Case("act_mul_quant", "packed+token", 8192, 1))


@needs_triton
@pytest.mark.parametrize("target", ["gfx942", "gfx950"])
@pytest.mark.parametrize("case", LARGEST, ids=str)
def test_the_largest_launches_of_amd(case: Case, target: str) -> None:
    compiled(case.op, case.arguments("meta", TARGETS[target][1]), target)


@needs_triton
def test_every_declared_step_compiles() -> None:
    """One program of all of them, a division by nothing too."""
    case = Case("rms_norm_quant", "token", 64, 1)
    numbers = dict.fromkeys(WITH_NUMBER, "=0.5")
    steps = " ".join(f"{name}{numbers.get(name, '')}" for name in STEPS) + " div=0.0 float32"
    values = " ".join(("float32", *COMBINING, *steps.split()))
    programs = {"scale_steps": steps, "factor_steps": steps, "value_steps": values}
    compiled(case.op, case.arguments("meta") | programs, "sm_90")


@needs_triton
@pytest.mark.parametrize("act", [*ALONE[1:], "clamped_swiglu=1.702,7.0"])
def test_every_declared_activation_compiles(act: str) -> None:
    """Those but for SiLU, which others compile."""
    case = Case("act_quant" if act in ALONE else "act_mul_quant", "group128", 128, 1)
    compiled(case.op, case.arguments("meta") | {"act": act}, "sm_90")


@needs_triton
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(("step", "comparison"), [("unless_positive=0.5", "ogt"), ("if_zero=0.5", "oeq")])
def test_numbers_for_zero_compile(step: str, comparison: str, target: str) -> None:
    """Both are comparisons that do not hold for NaN, and a choice; one serves the factor and the scale."""
    case = Case("rms_norm_quant", "token", 64, 1)
    programs = dict.fromkeys(("scale_steps", "factor_steps"), f"{step} div=448.0 float32")
    (code,) = compiled(case.op, case.arguments("meta", TARGETS[target][1]) | programs, target)
    assert len(re.findall(rf"arith\.cmpf {comparison}, %\S+, %cst.*\n.*arith\.select", code["ttir"])) == 1


@needs_triton
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_an_eps_that_is_no_constant(target: str) -> None:
    """By value or in memory, of any dtype; it is read before the loop over rows, in whose arithmetic it is float32."""
    machine, quant_dtype, fp8, _ = TARGETS[target]
    op = REGISTRY.ops["rms_norm_quant", frozenset()]
    sample = next(sample for sample in op.samples() if sample["eps"] is None)
    known = {name: sample[name] for name in op.arguments} | {"quant_dtype": quant_dtype}
    tensors = {name: value for name, value in known.items() if isinstance(value, Tensor)} | op.allocate(**known)
    (launch,) = launches.of(op, known, machine[0] == "cuda").launches
    assert launch.arguments["EPS"] is None
    for kind in ("fp32", "*fp64"):  # float64 by value is among what test_kernels_compile compiles
        code = compile_for(target, launch, kinds_of(tensors, fp8) | {"eps_tensor": kind})["ttgir"]
        before_the_loop = code[: code.index("scf.for")]
        assert ("tt.load" in before_the_loop) == kind.startswith("*")
        assert "f64" not in code[len(before_the_loop) :]


@needs_triton
def test_the_number_one_in_float64() -> None:
    """Inductor passes it in float64, which must not spread to the activation."""
    op = REGISTRY.ops["act_mul_quant", frozenset()]
    known = {name: next(op.samples())[name] for name in op.arguments} | {"act": "gelu_tanh"}
    tensors = {name: value for name, value in known.items() if isinstance(value, Tensor)} | op.allocate(**known)
    for launch in launches.of(op, known, True).launches:
        assert not in_float64(compile_for("sm_90", launch, kinds_of(tensors, "fp8e4nv"), number="fp64"))


@pytest.mark.parametrize("op", REDUCING, ids=lambda op: op.name.split("::")[1])
def test_constants_are_of_the_call(op: FusedOp) -> None:
    """They are kept, and a call that differs in any of what they depend on gets its own."""
    for sample in op.samples():
        known = {name: sample[name] for name in op.arguments}
        other_eps = {"eps": 0.25, "eps_tensor": None}
        for changes in ({}, other_eps, {"offset": 0.5}, {"cast_first": not known["cast_first"]}, {"block": 32}):
            arguments = {name: {**known, **changes}[name] for name in op.arguments}
            found = calls._found_constants(op, arguments, 64, True)
            assert calls.constants(op, arguments, 64, True) == found


@needs_triton
@pytest.mark.parametrize("way", ["one_shot", "two_shot", "fallback"])
@pytest.mark.parametrize("rows", [9, 900])
@pytest.mark.parametrize("op", REDUCING[::3], ids=lambda op: op.name.split("::")[1])
def test_all_reduces_compile(op: FusedOp, rows: int, way: str) -> None:
    """Every way, for two ranks and few or many rows; each gets exactly its parameters."""
    compile_all_reduce(op, rows, way, {})


@needs_triton
def test_all_reduces_compile_with_an_eps_that_is_no_constant() -> None:
    for eps in (torch.tensor(1e-6, dtype=torch.float64), torch.empty((), dtype=torch.float64, device="meta")):
        compile_all_reduce(REDUCING[-1], 9, "one_shot", {"eps": None, "eps_tensor": eps})


def compile_all_reduce(op: FusedOp, rows: int, way: str, changes: Mapping[str, Any]) -> None:
    triton = import_module("triton")
    compiler = import_module("triton.compiler")
    machine_of = import_module("triton.backends.compiler").GPUTarget

    names = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", FN: "*fp8e4nv"}
    names |= {torch.int32: "*i32", torch.int64: "*i64", torch.float64: "*fp64"}
    samples = [s for s in op.samples() if s["x"].dtype is not torch.float32 and s.get("block", 64) and s["x"].numel()]
    changed = {**samples[1], "quant_dtype": FN, "block": 32, "column_major": True, **changes}
    known = {name: changed[name] for name in op.arguments}
    outputs = op.allocate(**known)
    tensors = {"q": "q", "scale_out": "scale", "value_out": "value", "residual_out": "residual_out"}
    given = {name: outputs.get(output) for name, output in (tensors | {"reduced_out": "reduced"}).items()}
    if "static" in op.features or "q" not in outputs:
        given["scale_out"] = None
    given = calls._views(known, given, 64) | calls.constants(op, known, 64, True)
    memory = torch.zeros(4, dtype=torch.int32)
    channel = symmetric.Channel(symmetric.CLASSES[0], torch.zeros(2, dtype=torch.int64), memory)
    group = symmetric.Communicator("0", None, memory.device, 0, [0, 1], memory, memory, cores=132)
    given |= calls._placed(way, None if way == "fallback" else channel, group, rows, rows, known["x"])
    kernel = jit.kernel(calls.KERNEL)
    assert sorted(given) == sorted(parameter.name for parameter in kernel.params)
    signature, constants = {}, {}
    for index, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if isinstance(value, Tensor):
            signature[parameter.name] = names[value.dtype]
        elif value is None or parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        else:
            signature[parameter.name] = {"limit": "i64", "eps": "fp32"}.get(parameter.name, "i32")
    source = compiler.ASTSource(kernel, signature=signature, constexprs=constants)
    triton.compile(source, target=machine_of("cuda", 90, 32), options=calls.launch(given, rows, group.cores))


@needs_triton
def test_inductor_is_told_what_every_kernel_writes() -> None:
    """But of the one of collectives, which Inductor never launches."""
    from aiter_fusion.providers.triton.lowering import WRITTEN

    folder = Path(jit.__file__).parent / "kernels"
    names = {path.stem for path in folder.glob("*.py") if f"def {path.stem}_kernel(" in path.read_text()}
    assert set(WRITTEN) == names - {"all_reduce_rms_norm"}
    for name, written in WRITTEN.items():
        assert set(written) & set(jit.kernel(name).arg_names)
