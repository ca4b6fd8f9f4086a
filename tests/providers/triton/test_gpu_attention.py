"""On a GPU: attention of a decode step by our kernels, against float64 and against the attention that it replaces."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from aiter_fusion import ops  # noqa: F401  (importing it registers ops)
from aiter_fusion.bench.attention import WORSE, Case, error, exact, functions, tensors_of
from aiter_fusion.ops.attention import ATTENTION
from aiter_fusion.passes.verify import same_bits
from aiter_fusion.providers import PROVIDERS
from aiter_fusion.providers.triton import launcher
from aiter_fusion.providers.triton.attention import calls, launches, rules
from aiter_fusion.providers.triton.gpu import gpu_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

BF16, FP16 = torch.bfloat16, torch.float16
# The relative error of a result that is rounded once, of weights that are rounded once: two roundings.
ROUNDED = {BF16: 2 * 2**-9, FP16: 2 * 2**-12}


def alternating(x: Tensor) -> Tensor:
    """Every second element negated and large, so that sums cancel."""
    return torch.where(torch.arange(x.shape[-1], device=x.device) % 2 == 0, x.abs() + 8, -x.abs() - 8)


# Queries, keys and values of these kinds.
DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "positive": torch.abs,
    "large": lambda x: x * 16,
    "small": lambda x: x * 2**-10,
    "outliers": lambda x: torch.where(torch.arange(x.shape[-1], device=x.device) % 61 == 0, x * 64, x),
    "alternating": alternating,
}


def arguments(case: Case, data: str = "normal", seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A call on this GPU."""
    made = case.arguments("cuda", seed)
    return {**made, **{name: DATA[data](made[name]) for name in "qkv"}, **changes}


def launched(given: dict[str, Any]) -> Tensor:
    """The result of the kernels."""
    assert PROVIDERS["triton"].why_not(ATTENTION, given) is None
    return calls.run(ATTENTION, **given)["y"]


def is_near(given: dict[str, Any], data: str = "normal") -> None:
    """The error to float64 is not above that of PyTorch's call over repeated keys, with the mask made for it."""
    y = launched(given).transpose(1, 2)
    replaced = functions(given)["inductor_us"](*tensors_of(given))
    have, want = error(given, y), error(given, replaced)
    # where a call happens to be better than its roundings, we need not be
    assert have <= max(WORSE * want, ROUNDED[given["q"].dtype]), (have, want, data)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("size", [64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
def test_errors(tokens: int, group: int, size: int, dtype: torch.dtype) -> None:
    for batch, context, filled in ((1, 1024, 0), (3, 1000, 600), (2, 77, 33), (8, 4096, 0)):
        is_near(arguments(Case(batch, context, group, 16, size, tokens, dtype, filled=filled)))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 5])
@pytest.mark.parametrize("tokens", [17, 100, 600])
def test_errors_of_many_tokens(tokens: int, group: int, size: int, dtype: torch.dtype) -> None:
    for batch, context, filled in ((1, 1024, 0), (3, 1000, tokens), (2, 777, 700)):
        is_near(arguments(Case(batch, context, group, 4 * group, size, tokens, dtype, filled=filled)))


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("mask", ["none", "bool", "added", "rows"])
@pytest.mark.parametrize("window", [0, 1, 100])
def test_masks_windows_and_values(window: int, mask: str, group: int, data: str) -> None:
    for tokens, filled in ((1, 700), (4, 0), (200, 700)):
        case = Case(3, 1024, group, 16, 128, tokens, filled=filled, mask=mask, window=window)
        if mask != "none" and window:
            case = replace(case, batch=1)  # else padding masks every key of a window
        is_near(arguments(case, data), data)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("filled", [1, 2, 63, 64, 65, 1023, 1024])
def test_every_filling(filled: int, group: int) -> None:
    """A cache of one key, of whole blocks, and of one key more or less."""
    is_near(arguments(Case(2, 1024, group, filled=filled)))


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("tokens", "window"), [(1, 0), (1, 50), (100, 0)])
def test_slots_that_are_not_filled_may_hold_anything(tokens: int, window: int, group: int) -> None:
    given = arguments(Case(2, 1024, group, tokens=tokens, filled=300, window=window))
    want = launched(given)
    for number in (math.nan, math.inf):
        for name in "kv":
            given[name][:, :, 300:] = number
            if window:
                given[name][:, :, : 300 - window] = number
        assert torch.equal(launched(given), want)


@pytest.mark.parametrize("group", [1, 4])
def test_values_that_are_not_finite_are_seen(group: int) -> None:
    given = arguments(Case(1, 256, group))
    given["v"][0, 0, 100, 5] = math.nan
    nan = launched(given).isnan()
    assert nan[0, :group, 0, 5].all()
    assert int(nan.sum()) == group


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("mask", ["bool", "added"])
def test_a_query_all_of_whose_keys_are_masked(mask: str, group: int) -> None:
    """The result of that query is 0, and that of others is what it is without it."""
    given = arguments(Case(2, 512, group, mask=mask))
    given["mask"][0] = False if mask == "bool" else -math.inf
    y = launched(given)
    assert (y[0] == 0).all()
    assert torch.equal(y[1], launched(arguments(Case(2, 512, group, mask=mask)))[1])


@pytest.mark.parametrize("group", [1, 4])
def test_a_finite_mask_of_everything(group: int) -> None:
    """The least number of a dtype swallows the scores: all keys count alike, as in PyTorch's call."""
    given = arguments(Case(2, 512, group, mask="added"))
    given["mask"].fill_(torch.finfo(BF16).min)
    want = given["v"].double().mean(2, keepdim=True).repeat_interleave(group, 1)
    y = launched(given).double()
    assert float((y - want).norm() / want.norm()) < 2**-7


def test_softcap_and_a_call_without_position() -> None:
    for softcap in (0.0, 30.0):
        given = arguments(Case(2, 1000, softcap=softcap), "large") | {"position": None}
        y = launched(given).transpose(1, 2)
        assert error(given, y) < 2**-7


@pytest.mark.parametrize("by_tokens", [True, False])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_strides(by_tokens: bool, kind: torch.dtype) -> None:
    """Operands are read where they lie: caches by tokens, parts of larger tensors, expanded masks."""
    given = arguments(Case(3, 512, tokens=2, mask="bool"))
    want = launched(given)
    around = torch.full((3, 600, 2, 8, 256), math.nan, dtype=BF16, device="cuda")
    for place, name in enumerate("kv"):
        around[:, 40:552, place, :, 64:192] = given[name].transpose(1, 2)
        given[name] = around[:, 40:552, place, :, 64:192].transpose(1, 2)
    given |= {"mask": given["mask"].expand(3, 32, 2, 512), "by_tokens": by_tokens}
    given["position"] = given["position"].to(kind)
    y = launched(given)
    assert torch.equal(y, want)
    assert y.is_contiguous() is not by_tokens
    assert y.transpose(1, 2).is_contiguous() is by_tokens


@pytest.mark.parametrize("splits", [1, 2, 7, 64])
@pytest.mark.parametrize("tile", [rules.Tile(16, 64, 3, 4), rules.Tile(16, 64, 3, 4, True), rules.Tile(64, 32, 2, 4)])
def test_tiles_and_splits(tile: rules.Tile, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any tile with any split, however few keys there are."""
    monkeypatch.setattr(rules, "plan", lambda *_: rules.Plan("decode_attention", tile, splits))
    for filled in (1, 64, 500, 1024):
        given = arguments(Case(2, 1024, filled=filled))
        made = launches.of(given, gpu_of(0))
        names = [name for name, value in given.items() if isinstance(value, Tensor)]
        run = launcher.prepare(ATTENTION, given, made, names)
        y = run([given[name].data_ptr() for name in names])["y"]
        assert error(given, y.transpose(1, 2)) < 2**-7


@pytest.mark.parametrize("case", [Case(1, 4096), Case(8, 4096), Case(1, 4096, 1), Case(2, 2048, tokens=16)], ids=str)
def test_equal_bits_in_a_thousand_runs(case: Case) -> None:
    given = arguments(case)
    first = launched(given)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        different += (launched(given).view(torch.int16) != first.view(torch.int16)).sum()
    assert different.item() == 0


def test_two_streams() -> None:
    """Partial results of calls at the same time do not meet."""
    every = [arguments(Case(1, 8192), seed=seed) for seed in (1, 2)]
    want = [launched(given) for given in every]
    streams = [torch.cuda.Stream() for _ in every]
    torch.cuda.synchronize()
    for _ in range(100):
        found = []
        for stream, given in zip(streams, every, strict=True):
            with torch.cuda.stream(stream):
                found.append(launched(given))
        torch.cuda.synchronize()
        assert all(torch.equal(y, w) for y, w in zip(found, want, strict=True))


@pytest.mark.parametrize("group", [1, 4])
def test_a_graph_replays_with_any_position(group: int) -> None:
    """What a CUDA graph reads follows the position on the device."""
    given = arguments(Case(2, 2048, group))
    launched(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = launched(given)
    for filled in (1, 100, 2048):
        given["position"].fill_(filled - 1)
        graph.replay()
        assert error(given, y.transpose(1, 2)) < 2**-7


@pytest.mark.parametrize("group", [1, 4])
def test_a_cache_of_more_than_two_to_the_31_elements(group: int) -> None:
    """The last sequence is far from the first, and the last key of a sequence from its first."""
    heads = 32 // group
    for sizes in ((132 * group, heads, 4096, 128), (1, 1, (1 << 24) + 4096, 128)):
        batch, key_heads, keys, _ = sizes
        cache = torch.zeros(sizes, dtype=BF16, device="cuda")
        assert cache.numel() > 1 << 31
        part = min(keys, 4096)
        cache[-1:, :, keys - part :].normal_()
        wide = group * key_heads
        given = arguments(Case(batch, 64, group, wide)) | {"k": cache, "v": cache}
        given["position"] = torch.full((), keys - 1, device="cuda")
        if keys > part:
            given["window"] = part
        y = launched(given)[-1:]
        last = {name: given[name][-1:, :, keys - part :] for name in "kv"}
        alone = {**given, **last, "q": given["q"][-1:], "position": torch.full((), part - 1, device="cuda")}
        want = exact({**alone, "window": 0}).transpose(1, 2)
        assert float((y.double() - want).norm() / want.norm()) < 2**-7


@pytest.mark.parametrize("case", [Case(1, 512), Case(2, 512, 1, mask="added"), Case(1, 512, tokens=4)], ids=str)
def test_opcheck(case: Case) -> None:
    given = arguments(case)
    with mock.patch("torch.allclose", lambda a, b, **_: same_bits(a, b)):
        torch.library.opcheck(ATTENTION.target, (*given.values(), "triton"))


@pytest.mark.parametrize(
    "case",
    [Case(1, 4096), Case(1, 4096, 1), Case(128, 1024), Case(2, 1024, tokens=90), Case(2, 1024, tokens=900)],
    ids=str,
)
def test_inductor_launches_the_same(case: Case) -> None:
    """Our kernels are in the generated code, which allocates no copy of the cache, with heads repeated or not."""
    given = arguments(case)
    PROVIDERS["triton"].prepare()
    ours = functions(given)["ours_us"]
    y, (code,) = run_and_get_code(torch.compile(ours, dynamic=False, fullgraph=True), *tensors_of(given))
    assert torch.equal(y, launched(given).transpose(1, 2))
    few = launches.of(given, gpu_of(0)).launches[0].kernel == "decode_attention"
    assert ("decode_attention_kernel" if few else "prefill_attention_kernel") in code
    body = code.split("def call")[-1]
    assert "torch.ops.aiter_fusion" not in body
    assert not re.search(rf"empty_strided_cuda\(\({case.batch}, \d+, {case.context}, {case.size}\)", body)
    if few and torch.version.hip is None:
        assert ("'launch_pdl': True" in code) == (torch.cuda.get_device_capability() >= (9, 0))


def test_one_graph_for_all_batches() -> None:
    """A symbolic number of sequences: every call chooses its launches."""
    PROVIDERS["triton"].prepare()
    torch._dynamo.reset()
    ours = functions(arguments(Case(4, 512)))["ours_us"]
    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    for batch in (4, 2, 9):
        given = arguments(Case(batch, 512))
        assert error(given, compiled(*tensors_of(given))) < 2**-7


def test_one_graph_for_all_numbers_of_tokens() -> None:
    """Prompts of any length, and the step of one token too."""
    PROVIDERS["triton"].prepare()
    torch._dynamo.reset()

    def ours(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        return ATTENTION.target(q, k, v, None, position, 0.1, 0, 0.0, True, "triton")

    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    for tokens in (40, 3, 300):
        given: dict[str, Any] = {**arguments(Case(2, 512, tokens=tokens)), "scale": 0.1}
        y = compiled(*(given[name] for name in ("q", "k", "v", "position")))
        assert error(given, y.transpose(1, 2)) < 2**-7
