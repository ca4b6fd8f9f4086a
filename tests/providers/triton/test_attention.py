"""Attention of a decode step, as far as it can be tested without a GPU: rules, launches, refusals, compilation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from aiter_fusion import ops  # noqa: F401  (importing it registers ops)
from aiter_fusion.bench.attention import Case, cases, exact, functions, tensors_of
from aiter_fusion.ops.attention import ATTENTION
from aiter_fusion.providers import PROVIDERS
from aiter_fusion.providers.triton import jit, provider
from aiter_fusion.providers.triton.attention import calls, launches, rules
from aiter_fusion.providers.triton.gpu import Gpu
from aiter_fusion.providers.triton.launch import Ref
from aiter_fusion.providers.triton.launches import has_site, is_known
from support.compiling import TARGETS, compile_for, in_float64, kinds_of, needs_triton, spills

H200 = Gpu(True, True, 132, 232448)
GPUS = {"sm_90": H200, "gfx942": Gpu(False, False, 304, 64 << 10), "gfx950": Gpu(False, False, 256, 160 << 10)}
KERNELS = {"decode_attention", "attention_combine", "prefill_attention"}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is asked of a GPU, answered as an H200 does; tensors on it are fakes."""
    monkeypatch.setattr(calls, "gpu_of", lambda device: H200)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    with FakeTensorMode():
        yield


def fake(sizes: Sequence[int], strides: Sequence[int] | None = None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor on a GPU, of the mode that is on."""
    if strides is None:
        return torch.empty(sizes, dtype=dtype, device="cuda:0")
    return torch.empty_strided(sizes, strides, dtype=dtype, device="cuda:0")


def arguments(case: Case, **changes: Any) -> dict[str, Any]:
    """Fakes on a GPU."""
    made = {
        name: fake(value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value
        for name, value in case.arguments("cpu").items()
    }
    return {**made, **changes}


FEW = Case(2, 256)

# Heads, group, tokens, keys, size, and whether a mask is added, of calls measured on an H200: what was the best there,
# or within 3 % of it.
BEST = [
    ((8, 4, 1, 1024, 128, False), rules.Plan("decode_attention", rules.Tile(16, 128, 2, 4), 8)),
    ((8, 4, 1, 4096, 128, False), rules.Plan("decode_attention", rules.Tile(16, 64, 3, 4, True), 16)),
    ((8, 4, 1, 32768, 128, False), rules.Plan("decode_attention", rules.Tile(16, 128, 3, 4), 16)),
    ((64, 4, 1, 4096, 128, False), rules.Plan("decode_attention", rules.Tile(16, 64, 3, 4, True), 4)),
    ((256, 4, 1, 4096, 128, False), rules.Plan("decode_attention", rules.Tile(16, 64, 3, 4, True), 1)),
    ((8, 4, 1, 4096, 64, False), rules.Plan("decode_attention", rules.Tile(16, 128, 3, 4), 32)),
    ((4, 4, 1, 4096, 256, False), rules.Plan("decode_attention", rules.Tile(16, 32, 3, 4), 64)),
    ((8, 4, 16, 4096, 128, False), rules.Plan("decode_attention", rules.Tile(64, 32, 4, 4), 16)),
    ((8, 4, 32, 4096, 128, False), rules.Plan("decode_attention", rules.Tile(64, 64, 2, 4), 16)),
    ((8, 4, 128, 4096, 128, False), rules.Plan("decode_attention", rules.Tile(64, 32, 4, 4), 4)),
    ((8, 4, 256, 4096, 128, False), rules.Plan("decode_attention", rules.Tile(64, 64, 3, 4), 2)),
    ((8, 4, 2048, 4096, 128, False), rules.Plan("prefill_attention", rules.Tile(128, 64, 3, 8), 1)),
    ((16, 4, 1024, 4096, 128, True), rules.Plan("prefill_attention", rules.Tile(64, 64, 3, 4), 1)),
    ((4, 4, 2048, 4096, 256, False), rules.Plan("prefill_attention", rules.Tile(128, 32, 2, 8), 1)),
]


@pytest.mark.parametrize(("call", "best"), BEST, ids=str)
def test_rules_choose_what_was_the_fastest(call: tuple[Any, ...], best: rules.Plan) -> None:
    given: list[Any] = [*call[:5], 2, H200, call[5]]
    assert rules.plan(*given) == best


def test_rules_fill_the_multiprocessors_and_no_more() -> None:
    heads = (1, 8, 64, 256, 1024)
    sizes = itertools.product(heads, (1, 4, 8), (1, 4, 16, 40), (1, 64, 1024, 32768), (64, 80, 128, 256))
    for heads, group, tokens, keys, size in sizes:
        kernel, tile, splits = rules.plan(heads, group, tokens, keys, size, 2, H200)
        assert (kernel == "prefill_attention") == (tokens > rules.FEW_TOKENS and splits == 1)
        assert all(n & (n - 1) == 0 for n in (tile.rows, tile.block, tile.warps))
        assert tile.stages * tile.stage_bytes(size, 2) < H200.shared_memory
        assert 1 <= splits <= rules.MOST_SPLITS
        programs = heads * -(-group * tokens // tile.rows)
        assert splits == 1 or programs * splits <= rules.WAVES * 132
        assert splits <= max(1, -(-keys // tile.block))


def test_every_part_of_a_full_cache_has_keys() -> None:
    for keys, heads in itertools.product(range(1, 9000, 37), (1, 3, 8, 50)):
        _, tile, splits = rules.plan(heads, 4, 1, keys, 128, 2, H200)
        length = math.ceil(math.ceil(keys / splits) / tile.block) * tile.block  # as ``split_length``
        assert (splits - 1) * length < keys


def test_a_gpu_with_less_of_everything_gets_fewer_stages() -> None:
    less = Gpu(False, False, 304, 64 << 10)
    for tokens in (1, 2048):
        tile = rules.plan(8, 4, tokens, 4096, 256, 2, less).tile
        assert tile.stages >= 1
        assert tile.stages * tile.stage_bytes(256, 2) < less.shared_memory


REFUSED = {
    "cpu": "the tensors are on cpu",
    "dtypes": "its kernels need one dtype",
    "float32": "q is torch.float32, which is none of",
    "none": "k has no tokens",
    "elements": "elements of k are 2 apart",
    "keys": "keys of v are 8388608 elements apart",
    "size": "hidden size 68 is not a multiple of 8",
    "narrow": "hidden size 32 is below 64",
    "wide": "hidden size 512 exceeds 256",
    "window": "a window without a position",
    "mask": "mask is torch.int64, which is none of",
    "position": "position has 2 elements, not 1",
    "device": "position is on cpu, q on cuda:0",
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, gpu: None) -> None:
    """What the kernels cannot compute is refused, with the value and its limit."""
    given = arguments(FEW)

    def of_size(size: int) -> dict[str, Any]:
        return {"q": fake((2, 32, 1, size)), "k": fake((2, 8, 256, size)), "v": fake((2, 8, 256, size))}

    changed: dict[str, dict[str, Any]] = {
        "cpu": FEW.arguments("cpu"),
        "dtypes": {"k": fake((2, 8, 256, 128), dtype=torch.float16)},
        "float32": {"q": fake((2, 32, 1, 128), dtype=torch.float32)},
        "none": {"k": fake((2, 8, 0, 128)), "v": fake((2, 8, 0, 128))},
        "elements": {"k": fake((2, 8, 256, 128), (524288, 65536, 256, 2))},
        "keys": {"v": fake((2, 8, 256, 128), (1 << 40, 1 << 36, 1 << 23, 1))},
        "size": of_size(68),
        "narrow": of_size(32),
        "wide": of_size(512),
        "window": {"window": 64, "position": None},
        "mask": {"mask": fake((1, 1, 1, 256), dtype=torch.int64)},
        "position": {"position": fake((2,), dtype=torch.int64)},
        "device": {"position": torch.zeros((), dtype=torch.int64)},
    }
    why = PROVIDERS["triton"].why_not(ATTENTION, {**given, **changed[case]})
    assert why is not None
    assert REFUSED[case] in why


def test_only_some_gpus_are_measured(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(FEW)
    assert provider.unmeasured(ATTENTION, given) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "AMD Instinct MI300X")
    assert "was not measured on AMD Instinct MI300X" in (provider.unmeasured(ATTENTION, given) or "")


@pytest.mark.parametrize("dim", ["sequences", "tokens"])
def test_symbolic_sizes_are_not_looked_at(dim: str, gpu: None) -> None:
    """A symbolic number of sequences or tokens adds no guard: every call chooses anew."""
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env):
        some = env.create_unbacked_symint()
        batch, tokens = (some, 1) if dim == "sequences" else (2, some)
        given = arguments(FEW, q=torch.empty(batch, 32, tokens, 128, dtype=torch.bfloat16, device="cuda:0"))
        for name in ("k", "v"):
            given[name] = torch.empty(batch, 8, 256, 128, dtype=torch.bfloat16, device="cuda:0")
        assert PROVIDERS["triton"].why_not(ATTENTION, given) is None
        assert provider.slower(ATTENTION, given) is None
        assert not is_known(ATTENTION, given)
        assert has_site(ATTENTION, given)
    assert not env.guards


BOUND = [
    FEW,
    Case(1, 4096),
    Case(4, 4096, group=1),
    Case(1, 128, group=1),
    Case(2, 1024, group=8, tokens=16, size=80, mask="rows", window=100),
    Case(128, 1024, mask="bool"),
    Case(2, 4096, tokens=1000, window=100),
    Case(1, 4096, tokens=40),
]


@pytest.mark.parametrize("case", BOUND, ids=str)
def test_every_call_binds(case: Case, gpu: None) -> None:
    """Every kernel gets exactly its parameters, every tensor that it names exists, y is written once."""
    given = arguments(case)
    plan = launches.of(given, H200)
    known = {name for name, value in given.items() if isinstance(value, Tensor)} | {"y", *plan.scratch}
    writing = [launch for launch in plan.launches if launch.arguments["y"] == Ref("y")]
    assert writing == [plan.launches[-1]]
    for index, launch in enumerate(plan.launches):
        assert launch.kernel in KERNELS
        assert launch.grid >= 1
        assert {value.name for value in launch.arguments.values() if isinstance(value, Ref)} <= known
        few = launch.kernel != "prefill_attention"
        assert launch.dependent == few
        assert launch.arguments.get("DEPENDENT", False) == few
        assert launch.arguments.get("FOLLOWED", False) == (few and index == 0 and len(plan.launches) == 2)


def test_strides_of_a_mask_that_is_one_for_all(gpu: None) -> None:
    """Dimensions of one element have a stride of 0 for the kernel; whether rows differ is known."""
    for sizes, strides, by_row in (
        ((1, 1, 1, 256), (0, 0, 0, 1), False),
        ((2, 1, 1, 256), (256, 0, 0, 1), False),
        ((2, 1, 4, 256), (1024, 0, 256, 1), True),
        ((2, 32, 1, 256), (8192, 256, 0, 1), True),
    ):
        given = arguments(replace(FEW, tokens=4), mask=fake(sizes, dtype=torch.bool))
        (launch, *_) = launches.of(given, H200).launches
        assert tuple(launch.arguments[f"mask_{d}"] for d in ("batch", "head", "token", "key")) == strides
        assert launch.arguments["MASK_BY_ROW"] is by_row


def compiled(case: Case, target: str, folder: Path) -> None:
    with FakeTensorMode():
        given = case.arguments("cpu")
        outputs = ATTENTION.allocate(**given)
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    kinds = kinds_of(tensors | outputs, TARGETS[target][2])
    for launch in launches.of(given, GPUS[target]).launches:
        assert sorted(launch.arguments) == sorted(p.name for p in jit.kernel(launch.kernel).params)
        assert spills(compile_for(target, launch, kinds, aligned=True), folder) == 0, launch


SOME = [
    Case(8, 4096),
    Case(128, 1024, group=8, dtype=torch.float16),
    Case(8, 4096, group=1, size=96),
    Case(8, 4096, size=256, tokens=16, mask="rows", window=512, softcap=50.0),
    Case(8, 4096, size=256, tokens=16, mask="bool"),
    Case(1, 4096, size=80, tokens=4, mask="bool"),
    Case(8, 1024, group=1, mask="added", softcap=30.0),
    Case(1, 4096, tokens=2048),
    Case(4, 4096, tokens=1024, mask="bool", window=512),
    Case(4, 4096, tokens=1024, mask="added"),
    Case(1, 4096, tokens=64),
    Case(1, 4096, tokens=200),
    Case(1, 16384),
    Case(1, 4096, size=256, tokens=100, mask="rows", window=512, softcap=50.0),
]


@needs_triton
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_kernels_compile(case: Case, target: str, tmp_path: Path) -> None:
    compiled(case, target, tmp_path)


@needs_triton
@pytest.mark.parametrize("group", [1, 4])
def test_numbers_in_float64(group: int) -> None:
    """Inductor passes a Python number in float64, which must not spread to the arithmetic."""
    case = Case(2, 1024, group, softcap=30.0)
    with FakeTensorMode():
        given = case.arguments("cpu")
    kinds = kinds_of({name: value for name, value in given.items() if isinstance(value, Tensor)}, "")
    launch = launches.of(given, H200).launches[0]
    assert not in_float64(compile_for("sm_90", launch, kinds | {"y": "*bf16"}, number="fp64"))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", GPUS)
@pytest.mark.parametrize("mask", ["none", "bool", "added", "rows"])
@pytest.mark.parametrize("tokens", [1, 2, 16, 512])
@pytest.mark.parametrize("size", [64, 112, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 8])
def test_every_configuration_compiles(
    group: int, size: int, tokens: int, mask: str, target: str, tmp_path: Path
) -> None:
    for batch in (1, 128):
        compiled(Case(batch, 1024, group, size=size, tokens=tokens, mask=mask), target, tmp_path)


@pytest.mark.parametrize(
    "case",
    [
        Case(2, 48, heads=4, size=64),
        Case(2, 48, heads=4, size=64, tokens=3, filled=20, window=7, mask="bool"),
        Case(2, 48, 1, heads=4, size=64, tokens=2, mask="rows"),
    ],
    ids=str,
)
def test_the_benchmark_knows_attention(case: Case) -> None:
    """What errors are measured against is what the reference and both of the compared forms compute."""
    given = case.arguments("cpu")
    want = exact(given)
    found = functions(given)
    both = [found[name](*tensors_of(given)) for name in ("inductor_us", "gqa_us")]
    for y in (ATTENTION.reference(**given)["y"].transpose(1, 2), *both):
        assert float((y.double() - want).norm() / want.norm()) < 1e-2


def test_cases_of_the_benchmark() -> None:
    assert [str(case) for case in cases((1,), (512,), (1, 8))] == [
        "1x512 heads 32/32x128 bfloat16",
        "1x512 heads 32/4x128 bfloat16",
    ]
    assert not cases((128,), (32768,), (1,))
    with pytest.raises(ValueError, match="--groups 5: does not divide"):
        cases((1,), (512,), (5,))
