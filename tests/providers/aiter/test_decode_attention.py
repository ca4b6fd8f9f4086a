"""A decode step's attention by AITER's dense kernel: what it takes, what it refuses, in graphs, and its faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from aiter_fusion.ops.attention import ATTENTION, operands
from aiter_fusion.passes.verify import same_bits
from aiter_fusion.providers import PROVIDERS
from aiter_fusion.providers.aiter import decode, entry_points
from support import aiter_double
from support.aiter_double import Double
from support.bridge_results import alike
from support.checked import checked

BF16, F16 = torch.bfloat16, torch.float16
AITER = PROVIDERS["aiter"]


def arguments_of(*sizes: int, dtype: torch.dtype = BF16, **changes: Any) -> dict[str, Any]:
    """A call, as the op's samples have them: batch, heads, key heads, queries, slots, elements."""
    given = operands(*(sizes or (2, 4, 2, 1, 24, 64)), dtype)  # type: ignore[arg-type]
    rest = {"mask": None, "position": None, "scale": 0.125, "window": 0, "softcap": 0.0, "by_tokens": True}
    return {**given, **rest, **changes}


def compute(arguments: dict[str, Any]) -> None:
    """Fails unless AITER's result is the reference's, in memory of its own."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    before = [tensor.clone() for tensor in tensors]
    want = ATTENTION.reference(**arguments)["y"]
    have = ATTENTION.target(*arguments.values(), "aiter")
    assert have.stride() == want.stride()
    assert alike(want, have), "the results differ"
    assert have.untyped_storage().nbytes() == have.nbytes
    assert all(map(same_bits, before, tensors)), "an argument was written to"


@pytest.mark.parametrize("by_tokens", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [(2, 4, 2, 1, 24, 64), (1, 8, 1, 3, 17, 32), (1, 4, 4, 16, 20, 40), (0, 4, 2, 1, 8, 64), (2, 2, 2, 1, 0, 64)],
)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_all_slots(sizes: tuple[int, ...], by_tokens: bool, dtype: torch.dtype, make: Callable[..., Double]) -> None:
    """However many queries and slots; a cache that lies by tokens, too."""
    double = make()
    arguments = arguments_of(*sizes, dtype=dtype, by_tokens=by_tokens)
    for by_heads in (True, False):
        if not by_heads:
            laid = {name: arguments[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("k", "v")}
            arguments |= laid
        assert AITER.why_not(ATTENTION, arguments) is None
        compute(arguments)
    assert ("flash_attn_func" in double.called) == bool(sizes[0] and sizes[4])


REFUSED: dict[str, dict[str, Any]] = {
    "the cache is filled up to a position, and its kernels multiply by what lies beyond it, NaN included": {
        "position": torch.tensor(3)
    },
    "there is a mask, and its kernel takes none": {"mask": torch.ones(2, 1, 1, 24, dtype=torch.bool)},
    "softcap is 3.0, and its kernel has no cap": {"softcap": 3.0},
    "q is torch.float32, which is none of torch.bfloat16, torch.float16": {"q": torch.zeros(2, 4, 1, 64)},
    "v is torch.float16, and its kernel needs torch.bfloat16, like q": {"v": torch.zeros(2, 2, 24, 64, dtype=F16)},
    "the elements of k are 2 apart": {"k": torch.zeros(2, 2, 24, 128, dtype=BF16)[..., ::2]},
    "hidden size 264 exceeds 256": {name: torch.zeros(2, 2, 1, 264, dtype=BF16) for name in ("q", "k", "v")},
    "takes no argument q, k, v": {},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusal(reason: str, make: Callable[..., Double]) -> None:
    make(signatures={"flash_attn_func": "(a, b)"} if not REFUSED[reason] else {})
    assert reason in str(AITER.why_not(ATTENTION, arguments_of(**REFUSED[reason])))


def test_binds_in_every_release(record_property: Callable[[str, object], None]) -> None:
    good = [version for version in aiter_double.VERSIONS if aiter_double.binds([decode.DENSE], version)]
    assert good == aiter_double.VERSIONS
    record_property("row", f"binds with AITER from {good[0]:36} on: decode_attention")


def test_in_a_graph(make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step over keys that grow with the sequence; unasked only where it is preferred."""
    double = make()

    def step(q: Tensor, k: Tensor, v: Tensor, new_k: Tensor, new_v: Tensor) -> Tensor:
        keys, values = torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)
        keys, values = (x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(2, 4, 24, 64) for x in (keys, values))
        return F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).reshape(2, 1, 256)

    given = arguments_of()
    q, k, v = (given[name] for name in ("q", "k", "v"))
    inputs = q, k[:, :, :23], v[:, :, :23], k[:, :, 23:], v[:, :, 23:]
    with torch.no_grad():
        want = step(*inputs)
        result = checked(step, provider="aiter")
        have = result.call(*inputs)
        (site,) = result.report.sites
        assert (site.status, site.provider, site.op) == ("replaced", "aiter", "aiter_fusion::decode_attention"), site
        assert alike(want, have)
        assert double.called == ["flash_attn_func"]


FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "another scale": ("softmax_scale", lambda g: 1.0),
    "causal": ("causal", lambda g: True),
    "keys for values": ("v", lambda g: g["k"]),
    "queries by heads": ("q", lambda g: g["q"].transpose(1, 2).reshape(g["q"].shape)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: str, make: Callable[..., Double], monkeypatch: pytest.MonkeyPatch) -> None:
    make()
    arguments = arguments_of(1, 4, 2, 3, 24, 64)
    compute(arguments)
    keyword, change = FAULTS[fault]
    real = entry_points.call
    monkeypatch.setattr(decode, "call", lambda entry, **given: real(entry, **{**given, keyword: change(given)}))
    with pytest.raises(AssertionError):
        compute(arguments)
