"""The op of a decode step's attention: against its formula in float64, with every mask, position, window and layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from aiter_fusion.ops.attention import ATTENTION, INDICES, operands
from aiter_fusion.passes.verify import same_bits
from aiter_fusion.providers import PROVIDERS
from support.op_contract import every_promise

REFERENCE = PROVIDERS["reference"]
SAMPLES = list(ATTENTION.samples())


def call(given: dict[str, Any], **changes: Any) -> Tensor:
    return ATTENTION.target(*(given | changes).values(), "reference")


def in_float64(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    position: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    by_tokens: bool,
) -> Tensor:
    """The formula of the op, one query and one head at a time, over the keys that it sees alone."""
    batch, heads, queries, _ = q.shape
    y = torch.zeros(q.shape, dtype=torch.float64)
    mask = None if mask is None else mask.expand(batch, heads, queries, k.shape[2])
    for b, h, t in torch.cartesian_prod(*map(torch.arange, (batch, heads, queries))).tolist():
        seen = torch.ones(k.shape[2], dtype=torch.bool)
        if position is not None:
            own = int(position) + t
            seen[own + 1 :] = False
            seen[: max(own - window + 1, 0) if window else 0] = False
        added = torch.zeros(k.shape[2], dtype=torch.float64)
        if mask is not None and mask.dtype is torch.bool:
            seen &= mask[b, h, t]
        elif mask is not None:
            added, seen = mask[b, h, t].double(), seen & (mask[b, h, t] != -math.inf)
        if seen.any():
            of = h // (heads // k.shape[1])
            scores = k[b, of, seen].double() @ q[b, h, t].double() * scale
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            y[b, h, t] = (scores + added[seen]).softmax(-1) @ v[b, of, seen].double()
    return y


def test_schema() -> None:
    assert str(ATTENTION.target._schema) == (
        "aiter_fusion::decode_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? position, float scale, "
        'int window, float softcap, bool by_tokens, str provider="reference") -> Tensor y'
    )


def test_every_promise() -> None:
    every_promise(ATTENTION, "reference")


@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_the_formula(index: int) -> None:
    """Within two roundings to the dtype: of the weights before the last product, as flash attention has it, and of the
    result. What the slots beyond the filled ones hold is NaN."""
    given = SAMPLES[index]
    want, have = in_float64(**given), call(given)
    assert have.dtype is given["q"].dtype
    assert not have.isnan().any()
    close = 2 * torch.finfo(have.dtype).eps if have.dtype != torch.float32 else 1e-4  # of scores up to 1e5
    assert (have.double() - want).norm() <= close * want.norm()
    assert same_bits(call(given, by_tokens=not given["by_tokens"]), have)


def test_layouts() -> None:
    """y lies as it is or by tokens; a dimension of one element has the stride that says nothing else either way."""
    given = SAMPLES[4]
    assert call(given, by_tokens=False).is_contiguous()
    assert call(given, by_tokens=True).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bits_of_pytorch(dtype: torch.dtype, queries: int) -> None:
    """As PyTorch's call on a CPU has them after the copies, and as what is masked there is left out here."""
    given = operands(2, 8, 2, queries, 300, 64, dtype)
    copied = [given[name].repeat_interleave(4, 1) for name in "kv"]
    own = torch.arange(queries)[:, None] + 200
    for window in (0, 50):
        seen = torch.arange(300) <= own
        seen = seen & (torch.arange(300) > own - window) if window else seen
        mask = torch.where(seen, 0.0, -math.inf).to(dtype)[None, None]
        want = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            given["q"], *copied, attn_mask=mask, scale=0.125
        )[0]
        numbers = {"scale": 0.125, "window": 0, "softcap": 0.0, "by_tokens": True}
        for one in (mask, seen[None, None], mask.expand(2, 1, queries, 300), mask.float()):
            assert same_bits(call(given | {"mask": one, "position": None} | numbers), want)
        for indices in INDICES:
            for position in (torch.tensor(200, dtype=indices), torch.tensor([200], dtype=indices)):
                filled = given | {"mask": None, "position": position} | numbers
                assert same_bits(call(filled, window=window), want)


def test_queries_that_see_nothing_give_0() -> None:
    given = operands(2, 4, 2, 3, 16, 64) | {"mask": None, "position": None, "scale": 0.125, "window": 0}
    nothing = torch.zeros(2, 1, 3, 16, dtype=torch.bool)
    for mask in (nothing, torch.where(nothing, 0.0, -math.inf)):
        for softcap in (0.0, 30.0):
            y = call(given, mask=mask, softcap=softcap, by_tokens=False)
            assert (y == 0).all()
    before = call(given, position=torch.tensor(-2), softcap=0.0, by_tokens=False)
    assert (before[:, :, :2] == 0).all()
    assert (before[:, :, 2] != 0).all()


REFUSED = {
    "q is torch.float8_e4m3fn, which is none of": {"q": torch.zeros(1, 2, 1, 64).to(torch.float8_e4m3fn)},
    "mask is torch.int64, which is none of": {"mask": torch.zeros(1, 1, 1, 16).long()},
    "position is torch.float32, which is none of": {"position": torch.tensor(3.0)},
    "position has 2 elements, not 1": {"position": torch.tensor([3, 4])},
    "window -1 is below 0": {"window": -1},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_is_not_defined_for(reason: str) -> None:
    assert str(REFERENCE.why_not(ATTENTION, SAMPLES[0] | REFUSED[reason])).startswith(reason)


def test_sizes_that_do_not_go_together() -> None:
    given = SAMPLES[0]
    with pytest.raises(ValueError, match="k has 3 heads, which do not divide the 4 of q"):
        call(given, k=torch.zeros(2, 3, 16, 64).bfloat16())
    with pytest.raises(ValueError, match="mask has 2 dimensions, not 4"):
        call(given, mask=torch.zeros(1, 16).bool())
    with pytest.raises(ValueError, match="window 8 says nothing without a position"):
        call(given, position=None, window=8)
