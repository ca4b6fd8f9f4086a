"""The op of FP8 linear layers: lists in and out, the products that graphs have, what it is defined for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map

import aiter_fusion
from aiter_fusion.op import FusedOp
from aiter_fusion.ops.linear import LINEAR, operands
from aiter_fusion.passes.verify import difference, same_bits
from aiter_fusion.providers import PROVIDERS
from aiter_fusion.scaled_product import BLOCKS, MOST, ROWS, TENSORS, granularity
from support import models

REFERENCE = PROVIDERS["reference"]
SAMPLES = list(LINEAR.samples())


@pytest.fixture(autouse=True)
def _scaled_rows() -> None:
    models.need_scaled_rows()


def call(given: dict[str, Any]) -> list[Tensor]:
    return LINEAR.target(*given.values(), "reference")


def sample(scales: str = ROWS, **changes: Any) -> dict[str, Any]:
    given = operands(5, 256, (48, 32), scales)
    return {**given, "biases": [None, None], "dtype": torch.bfloat16, "fast_accum": False} | changes


def test_schema() -> None:
    """Functional; as many tensors as weights."""
    schema = LINEAR.target._schema
    assert str(schema) == (
        "aiter_fusion::fp8_linear(Tensor x, Tensor[] weights, Tensor x_scale, Tensor[] weight_scales, "
        'Tensor?[] biases, ScalarType dtype, bool fast_accum, str provider="reference") -> Tensor[] y'
    )
    assert torch.Tag.needs_exact_strides in LINEAR.target.tags


@pytest.mark.parametrize("index", [3, 9])
def test_opcheck(index: int) -> None:
    """opcheck compares what is written to by ``allclose``, which FP8 does not have."""
    with mock.patch("torch.allclose", lambda a, b, **_: same_bits(a, b)):
        torch.library.opcheck(LINEAR.target, (*SAMPLES[index].values(), "reference"))


def test_fake_equals_real() -> None:
    """Sizes, strides, dtype and device, and storages of their own, for every sample."""
    for given in SAMPLES:
        assert REFERENCE.why_not(LINEAR, given) is None
        real = call(given)
        with FakeTensorMode() as mode:
            faked = tree_map(lambda value: mode.from_tensor(value) if isinstance(value, Tensor) else value, given)
            fake = call(faked)
        assert len(real) == len(fake) == len(given["weights"])
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
        assert len({tensor.untyped_storage()._cdata for tensor in real}) == len(real)


@pytest.mark.parametrize("scales", [TENSORS, ROWS, BLOCKS])
def test_the_reference(scales: str) -> None:
    """Near the product in float64, with what each scale covers spelled out; as ``_scaled_mm`` where a CPU has it."""
    bias = torch.arange(48, dtype=torch.bfloat16)
    given = sample(scales, biases=[bias, None])
    for index, y in enumerate(call(given)):
        weight, w_scale = given["weights"][index], given["weight_scales"][index]
        own = (given["x_scale"], w_scale)
        assert granularity(given["x"], weight, *own) == scales
        x_scale, w_scale = (
            (own[0].repeat_interleave(128, 1), own[1].repeat_interleave(128, 0).repeat_interleave(128, 1))
            if scales == BLOCKS
            else own
        )
        want = (given["x"].double() * x_scale) @ (weight.double() * w_scale[:, : weight.shape[1]])
        want = want if given["biases"][index] is None else want + given["biases"][index].double()
        assert (y.double() - want).norm() <= 2**-8 * want.norm()
        if scales != BLOCKS:
            theirs = torch.ops.aten._scaled_mm(
                given["x"], weight, *own, bias=given["biases"][index], out_dtype=torch.bfloat16, use_fast_accum=False
            )
            assert same_bits(y, theirs)


def test_strides_of_one_element_say_nothing() -> None:
    """Compiled code gives any, and ``_scaled_mm`` looks at them."""
    given = sample(ROWS)
    shuffled = {**given, "x_scale": given["x_scale"].as_strided((5, 1), (1, 0))}
    shuffled["weight_scales"] = [s.as_strided(s.shape, (0, 1)) for s in given["weight_scales"]]
    assert all(map(same_bits, call(given), call(shuffled)))
    row = sample(ROWS) | operands(1, 256, (48, 32), ROWS)
    assert all(map(same_bits, call(row), call({**row, "x": row["x"].as_strided((1, 256), (1, 1))})))


WEIGHT, SCALE = torch.zeros(256, 16), torch.zeros(1, 16)
REFUSED = {
    "x is torch.bfloat16, which is none of torch.float8_e4m3fn, torch.float8_e4m3fnuz": {
        "x": torch.zeros(5, 256).bfloat16()
    },
    "weights are 9, not 1 to 8": {"weights": [WEIGHT.to(torch.float8_e4m3fn)] * (MOST + 1)},
    "weights are 0, not 1 to 8": {"weights": []},
    "weights[1] is torch.float32": {"weights": [WEIGHT.to(torch.float8_e4m3fn), WEIGHT]},
    "weight_scales[0] is torch.bfloat16": {"weight_scales": [SCALE.bfloat16(), SCALE]},
    "biases[0] is torch.float64": {"biases": [torch.zeros(16).double(), None]},
    "dtype torch.float64 is none of torch.bfloat16": {"dtype": torch.float64},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_is_not_defined_for(reason: str) -> None:
    assert str(REFERENCE.why_not(LINEAR, sample() | REFUSED[reason])).startswith(reason)


def test_exactness_is_the_providers_for_each_op() -> None:
    """Triton sums products in its own order, but no norm's roundings."""
    triton, norm = PROVIDERS["triton"], FusedOp("rms_norm_quant", *(None,) * 6)  # type: ignore[arg-type]
    assert REFERENCE.keeps_roundings(LINEAR)
    assert not triton.keeps_roundings(LINEAR)
    assert triton.keeps_roundings(norm)
    want = call(sample())[0]
    near, far = want + want.abs().amax(-1, keepdim=True) * 2**-8, want + want.abs().amax(-1, keepdim=True) * 2**-5
    assert difference(LINEAR, REFERENCE, "y0", want, near) == "not bit-identical"
    assert difference(LINEAR, triton, "y0", want, near) is None
    assert "of the row's largest value apart" in str(difference(LINEAR, triton, "y0", want, far))
    assert difference(LINEAR, REFERENCE, "y0", want, near, exact=False) is None


@pytest.mark.parametrize("each", ["x", "values"])
def test_a_list_of_outputs_is_as_long_as_a_list(each: str) -> None:
    with pytest.raises(ValueError, match="it names a list argument of an op with one output"):
        aiter_fusion.fused_op(replace(LINEAR, family="of_somebody", each=each))
