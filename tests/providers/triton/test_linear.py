"""FP8 products of few rows, as far as they can be tested without a GPU: rules, launches, refusals, compilation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from aiter_fusion import ops  # noqa: F401  (importing it registers ops)
from aiter_fusion.bench import tune_linear
from aiter_fusion.bench.linear import ROWS, SIZES, Case, Size, exact, functions, tensors_of
from aiter_fusion.ops.linear import LINEAR
from aiter_fusion.providers import PROVIDERS
from aiter_fusion.providers.triton import jit, provider, tuned
from aiter_fusion.providers.triton.gpu import Gpu
from aiter_fusion.providers.triton.launch import Ref, flat
from aiter_fusion.providers.triton.launches import is_known
from aiter_fusion.providers.triton.linear import calls, launches, rules
from support import models
from support.compiling import TARGETS, compile_for, kinds_of, needs_triton, spills

H200 = Gpu(True, True, 132, 232448)
GPUS = {
    "sm_90": H200,
    "gfx942": Gpu(False, False, 304, 64 << 10),
    "gfx950": Gpu(False, False, 256, 160 << 10),
}
# Every configuration that the rules choose for the sizes that they were measured at.
CHOSEN = [Case(Size.parse(size), rows) for size in SIZES for rows in (*ROWS, 32, 128)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is asked of a GPU, answered as an H200 does; tensors on it are fakes."""
    monkeypatch.setattr(calls, "native_fp8", lambda device: torch.float8_e4m3fn)
    monkeypatch.setattr(calls, "gpu_of", lambda device: H200)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(tuned, "_content", lambda: "")
    with FakeTensorMode():
        yield


def arguments(case: Case, **changes: Any) -> dict[str, Any]:
    """Fakes on a GPU."""
    made = {name: on_gpu(value) for name, value in case.arguments("cpu").items()}
    return {**made, **changes}


def on_gpu(value: Any) -> Any:
    """The same on a GPU: of tensors, a fake."""
    if isinstance(value, list):
        return [on_gpu(entry) for entry in value]
    if not isinstance(value, Tensor):
        return value
    return fake(value.shape, value.stride(), value.dtype)


def fake(sizes: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on a GPU, of the mode that is on."""
    return torch.empty_strided(sizes, strides, dtype=dtype, device="cuda:0")


def few(rows: int = 16, scales: str = "row", ns: str = "512,256") -> Case:
    return Case(Size.parse(f"1024x{ns}"), rows, scales=scales)


@pytest.mark.parametrize("table", [rules.FAST, rules.PRECISE], ids=["fast", "precise"])
def test_tables_are_whole(table: Any) -> None:
    """Every class of rows has every size, and every tile fits an H200 and Triton's limits."""
    assert sorted(table) == [1, 16, 32, 64, 128]
    assert len({tuple(sizes) for sizes in table.values()}) == 1
    for rows, sizes in table.items():
        for tile in filter(None, sizes.values()):
            assert tile.rows == 1 if rows == 1 else tile.rows in (rows, 64)
            assert all(n & (n - 1) == 0 for n in (tile.rows, tile.block_n, tile.block_k, tile.warps))
            assert tile.block_n <= rules.BLOCK  # rows of a program are in one block of scales
            assert tile.rows == 1 or tile.stage_bytes * tile.stages < H200.shared_memory


def test_rules_split_only_what_leaves_multiprocessors_idle() -> None:
    for k, n, rows in itertools.product((512, 1024, 4096, 14336), (16, 1024, 2048, 4096, 6144, 28672), (1, 2, 16, 64)):
        tile, split = rules.plan(k, (n,), rows, True, False, 132, H200.shared_memory)
        programs = -(-n // tile.block_n) * -(-rows // tile.rows)
        assert split == 1 or (tile.rows > 1 and programs * split <= 132)
        assert split == 1 or k >= split * rules.LEAST_STEPS * tile.block_k
    assert rules.plan(4096, (4096,), 16, True, False, 132, H200.shared_memory).split == 2
    assert rules.plan(4096, (4096, 1024, 1024), 16, True, False, 132, H200.shared_memory).split == 1
    assert rules.plan(4096, (1024,), 16, True, False, 132, H200.shared_memory).split == 4


def test_a_gpu_with_less_of_everything_gets_fewer_stages() -> None:
    tile, _ = rules.plan(4096, (6144,), 64, True, False, 132, 64 << 10)
    assert tile.stages == 1
    assert rules.tile(4096, (6144,), 16, True, 66) == rules.tile(4096, (12288,), 16, True, 132)


def test_where_separate_calls_are_as_fast(gpu: None) -> None:
    wide = Size.parse("8192x28672,28672")
    assert calls.slower(arguments(Case(wide, 64))) is None
    assert calls.slower(arguments(Case(wide, 128))) == (
        "torch._scaled_mm is as fast for 128 rows x 8192 by 57344 columns in all"
    )
    assert calls.slower(arguments(few(128))) is None
    assert calls.slower(arguments(few(129))) is not None
    assert calls.slower(arguments(few(2048))) is not None


def test_only_some_gpus_are_measured(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(few())
    assert provider.unmeasured(LINEAR, given) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "AMD Instinct MI300X")
    why = "1024x512,256 was not measured on AMD Instinct MI300X: run 'aiter-fusion tune --linear 1024x512,256' there"
    assert (provider.unmeasured(LINEAR, given) or "").startswith(why)
    for percent in (90, 120):
        with tuned.trying({rules.key(1024, (512, 256), 16, True): {"percent": percent}}):
            assert provider.unmeasured(LINEAR, given) is None
            assert (provider.slower(LINEAR, given) is None) == (percent < 100)


REFUSED = {
    "cpu": "the tensors are on cpu",
    "format": "this GPU multiplies",
    "columns": "x has 1024 columns, 2 elements apart",
    "rows": "the rows of x are 1032 elements apart",
    "weight": "weights[0] has strides",
    "scales": "are not of one tensor, row or block each",
    "strides": "weight_scales[1] has strides",
    "empty": "x has no rows",
    "dtype": "dtype torch.float8_e4m3fn is none of",
    "many": "weights are 9, not 1 to 8",
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, gpu: None) -> None:
    """What the kernels cannot compute is refused, with the value and its limit."""
    given = arguments(few())
    fp8, (first, second) = torch.float8_e4m3fn, given["weights"]
    changed: dict[str, dict[str, Any]] = {
        "cpu": few().arguments("cpu"),
        "format": {"x": fake((16, 1024), (1024, 1), torch.float8_e4m3fnuz)},
        "columns": {"x": fake((16, 1024), (2048, 2), fp8)},
        "rows": {"x": fake((16, 1024), (1032, 1), fp8)},
        "weight": {"weights": [fake(first.shape, (512, 1), fp8), second]},
        "scales": {"x_scale": fake((16, 3), (3, 1), torch.float32)},
        "strides": {"weight_scales": [given["weight_scales"][0], fake((1, 256), (512, 2), torch.float32)]},
        "empty": {"x": fake((0, 1024), (1024, 1), fp8), "x_scale": fake((0, 1), (1, 1), torch.float32)},
        "dtype": {"dtype": fp8},
        "many": {name: [given[name][0]] * 9 for name in ("weights", "weight_scales", "biases")},
    }
    why = PROVIDERS["triton"].why_not(LINEAR, {**given, **changed[case]})
    assert why is not None
    assert REFUSED[case] in why


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """The launchers of calls that were made, none of which a CPU has."""
    known: dict[Any, Any] = {}
    monkeypatch.setattr(calls, "_prepared", known)
    monkeypatch.setattr(calls, "gpu_of", lambda device: H200)
    return known


@pytest.mark.parametrize("rows", [0, 5, 129])
@pytest.mark.parametrize("scales", ["row", "tensor", "block"])
def test_calls_that_no_kernel_takes(rows: int, scales: str, prepared: dict[Any, Any]) -> None:
    """The products that the graph had compute them; a scale of a tensor has no dimension."""
    if scales == "row":
        models.need_scaled_rows()
    given = Case(Size(256, (256, 16)), rows, scales=scales).arguments("cpu")
    for name, y in calls.run(LINEAR, **given).items():
        assert torch.equal(y, LINEAR.reference(**given)[name])
    assert len(prepared) == (rows == 5 or (rows > 0 and scales == "block"))


def test_a_launcher_is_for_pointers_of_its_alignment(prepared: dict[Any, Any]) -> None:
    """A kernel that is compiled for a misaligned x loads 16 bytes at a time from the weights."""
    models.need_scaled_rows()
    given = Case(Size(256, (16,)), 5).arguments("cpu")

    def moved(x: Tensor) -> Tensor:
        room = torch.empty(x.numel() + 1, dtype=x.dtype)
        return room[1:].view(x.shape).copy_(x)

    for changes in ({}, {"x": moved(given["x"])}, {"weights": [moved(given["weights"][0].t()).t()]}):
        calls.run(LINEAR, **{**given, **changes})
    assert len(prepared) == 3


def test_how_scales_of_one_row_lie_does_not_matter(gpu: None) -> None:
    """``[1, N]`` may be of any stride along its one row."""
    given = arguments(few())
    assert calls.refuse(given) is None
    scales = [scale.contiguous() for scale in given["weight_scales"]]
    assert (
        calls.refuse({**given, "weight_scales": [scales[0].as_strided(scales[0].shape, (1, 1)), *scales[1:]]}) is None
    )


def test_symbolic_rows_are_not_looked_at(gpu: None) -> None:
    """A symbolic number of rows adds no guard: every call chooses anew."""
    env = ShapeEnv()
    given = arguments(few())
    with FakeTensorMode(shape_env=env):
        rows = env.create_unbacked_symint()
        given["x"] = torch.empty(rows, 1024, dtype=torch.float8_e4m3fn, device="cuda:0")
        given["x_scale"] = torch.empty(rows, 1, device="cuda:0")
        for name in ("weights", "weight_scales"):
            given[name] = on_gpu(given[name])
        assert PROVIDERS["triton"].why_not(LINEAR, given) is None
        assert provider.slower(LINEAR, given) is None
        assert not is_known(LINEAR, given)
    assert not env.guards


@pytest.mark.parametrize("scales", ["row", "tensor", "block"])
@pytest.mark.parametrize("ns", ["512", "512,256", "48,16,32,64,16,16,16,16"])
@pytest.mark.parametrize("rows", [1, 7, 64, 100])
def test_every_call_binds(rows: int, ns: str, scales: str) -> None:
    """Every kernel gets exactly its parameters, every tensor that it names exists, every output is written once."""
    jit_kernels = {"fp8_gemv", "fp8_matmul", "fp8_combine"}
    with FakeTensorMode():
        given = Case(Size.parse(f"1024x{ns}"), rows, scales=scales, bias=rows == 7).arguments("cpu")
        outputs = LINEAR.allocate(**given)
    plan = launches.of(given, H200)
    written: list[str] = []
    for launch in plan.launches:
        assert launch.kernel in jit_kernels
        refs = {name: value.name for name, value in launch.arguments.items() if isinstance(value, Ref)}
        assert set(refs.values()) <= {*flat(given), *outputs, *plan.scratch}
        written += [refs[name] for name in refs if name in ("y0", "y1", "y2", "y3")]
        assert launch.grid >= 1
        assert launch.arguments["BLOCKED"] == (scales == "block")
    assert sorted(written) == sorted(outputs)


def compiled(case: Case, target: str, folder: Path) -> None:
    fp8, name = TARGETS[target][1:3]
    with FakeTensorMode():
        given = case.arguments("cpu", fp8=fp8)
        outputs = LINEAR.allocate(**given)
    kinds = kinds_of({n: v for n, v in flat(given).items() if isinstance(v, Tensor)} | outputs, name)
    for launch in launches.of(given, GPUS[target]).launches:
        assert sorted(launch.arguments) == sorted(p.name for p in jit.kernel(launch.kernel).params)
        assert spills(compile_for(target, launch, kinds, aligned=True), folder) == 0, launch


SOME = [
    Case(Size.parse("4096x4096,1024,1024"), 1),
    Case(Size.parse("14336x4096"), 64, fast=False),
    Case(Size.parse("1040x48,32"), 17, bias=True, dtype=torch.float16),
    Case(Size.parse("1024x256,128"), 16, fast=False, scales="block"),
    Case(Size.parse("1024x256"), 1, scales="block", dtype=torch.float32),
]


@needs_triton
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_kernels_compile(case: Case, target: str, tmp_path: Path) -> None:
    compiled(case, target, tmp_path)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("case", [Case(c.size, c.rows, fast) for c in CHOSEN for fast in (True, False)], ids=str)
def test_every_configuration_compiles(case: Case, target: str, tmp_path: Path) -> None:
    compiled(case, target, tmp_path)


def test_the_benchmark_knows_the_product() -> None:
    """What errors are measured against is what the reference computes."""
    models.need_scaled_rows()
    for scales in ("row", "tensor", "block"):
        given = Case(Size.parse("256x128,32"), 3, scales=scales, bias=True).arguments("cpu")
        for index, y in enumerate(LINEAR.reference(**given).values()):
            want = exact(given, index=index)
            assert float((y.double() - want).norm() / want.norm()) < 4e-3


@pytest.mark.parametrize("text", ["4096", "4096x", "4096x12,16", "0x16", "16x" + ",".join(["16"] * 9)])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="--sizes"):
        Size.parse(text)


def test_a_tuned_tile_wins_over_the_table() -> None:
    choice = {"rows": 64, "block_n": 128, "block_k": 128, "stages": 3, "warps": 8, "split": 2, "percent": 80}
    with tuned.trying({rules.key(4096, (6144,), 40, True): choice}):
        assert rules.plan(4096, (6144,), 40, True, False, 132, H200.shared_memory) == ((64, 128, 128, 3, 8), 2)
        assert rules.plan(4096, (6144,), 40, False, False, 132, H200.shared_memory).tile.block_n == 64


@pytest.mark.parametrize("case", [few(1), few(16), few(128)], ids=str)
@pytest.mark.parametrize("nvidia", [True, False])
def test_what_is_tuned_is_what_the_file_may_have(case: Case, nvidia: bool) -> None:
    found = list(tune_linear.candidates(case, nvidia))
    assert len(found) > 5
    for choice in found:
        assert choice.keys() == {*rules.Tile._fields, "split"}
        assert all(0 < n <= tuned.FREE[name] for name, n in choice.items())


def test_generated_code_calls_no_dispatcher() -> None:
    """With symbolic rows the code calls an object of its own, here for calls that no kernel takes."""
    PROVIDERS["triton"].prepare()
    torch._dynamo.reset()
    size = Size.parse("256x128,64")
    ours, separate = functions(Case(size, 64, scales="tensor").arguments("cpu"))
    compiled = torch.compile(ours, fullgraph=True)

    def check(rows: int, run: Callable[..., Any]) -> str:
        tensors = tensors_of(Case(size, rows, scales="tensor").arguments("cpu"))
        torch._dynamo.mark_dynamic(tensors[0], 0)
        results, codes = run(*tensors)
        assert all(torch.equal(y, want) for y, want in zip(results, separate(*tensors), strict=True))
        return "".join(codes)

    code = check(64, lambda *tensors: run_and_get_code(compiled, *tensors))
    assert "site('aiter_fusion::fp8_linear', 'default')" in code
    assert "ops.aiter_fusion.fp8_linear.default(" not in code
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (7, 600):
            check(rows, lambda *tensors: (compiled(*tensors), []))


def test_sites_are_for_symbolic_rows_alone() -> None:
    """Where anything else is symbolic, the op itself is called."""
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env):
        rows, weight = env.create_unbacked_symint(), torch.empty(4, 8).t()
        assert calls.has_site({"x": torch.empty(rows, 8), "weights": [weight], "biases": [None]})
        assert not calls.has_site({"x": torch.empty(rows, 8), "weights": [weight, torch.empty(rows, 8).t()]})
