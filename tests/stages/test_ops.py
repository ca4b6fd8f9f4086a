"""Every op of every provider keeps its contract: schema, fake against real, scales, layouts, agreement."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from aiter_fusion.op import FusedOp
from aiter_fusion.passes.verify import difference, differing_codes, same_bits
from aiter_fusion.providers import PROVIDERS
from aiter_fusion.registry import REGISTRY
from aiter_fusion.scale_program import is_inverse, is_of_bytes, parse, run
from support.op_contract import (
    agrees_with_the_reference,
    call,
    chosen,
    fake_equals_real,
    passes_opcheck,
    sampled,
    schema_is_functional,
    strided_rows_give_the_same_bits,
)

EVERY_OP = [op for op in REGISTRY.ops.values() if op.stages]  # tests/ops has the others
EVERY_PROVIDER = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(provider.missing() is not None, reason=f"needs provider {name}: {provider.missing()}"),
    )
    for name, provider in PROVIDERS.items()
]

QUANTISING = [op for op in EVERY_OP if "quant_dtype" in op.arguments]


@pytest.fixture(autouse=True, scope="module")
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process alone, for the ops that are collectives."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{store}")
    yield
    dist.destroy_process_group()


def _named(op: FusedOp) -> str:
    return op.name.split("::")[1]


ops = pytest.mark.parametrize("op", chosen(EVERY_OP), ids=_named)
providers = pytest.mark.parametrize("provider", EVERY_PROVIDER)


@ops
@providers
def test_opcheck(op: FusedOp, provider: str) -> None:
    passes_opcheck(op, provider)


@ops
@providers
def test_fake_equals_real(op: FusedOp, provider: str) -> None:
    fake_equals_real(op, provider)


@ops
@providers
def test_strided_rows_give_the_same_bits(op: FusedOp, provider: str) -> None:
    strided_rows_give_the_same_bits(op, provider)


@pytest.mark.parametrize("op", chosen(QUANTISING), ids=_named)
@providers
def test_scale_contract(op: FusedOp, provider: str) -> None:
    """On finite, non-zero rows q * scale is the value within half an FP8 step, and no input is written to.

    Not of rows whose scale is subnormal in the dtype of the value: the graph divides their maximum in that dtype, so
    the scale has lost bits in the graph as well (or the sum has, where it is returned in that dtype).
    """
    for given in sampled(op, provider):
        if "scale" not in op.outputs:
            continue
        before = {k: v.clone() for k, v in given.items() if isinstance(v, Tensor)}
        outputs = call(op, provider, given)
        computed = op.reference(**given)
        rounded = computed["value" if "value" in computed else "residual_out"]  # where there is no norm, the sum
        value, normal = rounded.float(), max(1e-30, torch.finfo(rounded.dtype).tiny)
        if "bound" in given:  # what is above it is saturated
            value = value.clamp(-given["bound"], given["bound"])
        q, scale, block = outputs["q"].float(), outputs["scale"], given["block"]
        assert scale.dtype is (torch.uint8 if is_of_bytes(given["factor_steps"]) else torch.float32)
        assert scale.shape == (() if block == 0 else (*value.shape[:-1], value.shape[-1] // block))
        if scale.dtype is torch.uint8:
            scale = scale.view(torch.float8_e8m0fnu).float()
        spread = scale if block == 0 else scale.repeat_interleave(block, -1)
        usable = value.isfinite() & (spread >= normal) & spread.isfinite()
        # half a step of e4m3 is 2**-4 of the value (subnormals: 2**-10 scales), that of int8 half a scale, and one that
        # its largest number leaves; a scale in bf16 adds 2**-8
        near, least = (0.0, 1.0) if given["quant_dtype"] is torch.int8 else (2**-4, 2**-10)
        error = (q.double() * spread - value).abs()[usable]  # in float32 the largest overflow
        bound = (value.abs() * (near + 2**-8) + spread * least).expand_as(value)[usable]
        assert (error <= bound).all()
        for name, tensor in before.items():
            assert same_bits(tensor, given[name]), f"{name} was written to"


@ops
@pytest.mark.parametrize("provider", [p for p in EVERY_PROVIDER if p.values != ("reference",)])
def test_agrees_with_the_reference(op: FusedOp, provider: str) -> None:
    agrees_with_the_reference(op, provider)


def test_codes_where_summands_cancel() -> None:
    """A sum after a rounding may be many codes apart, if that is little beside the largest of its row; no other may."""
    largest = torch.tensor([[1.0, 448.0]])
    want, near, far = ((largest * torch.tensor([[v, 1.0]])).to(torch.float8_e4m3fn) for v in (0.0, 3.0, 5.0))
    shifted, triton = REGISTRY.ops["layer_norm_quant", frozenset({"modulate"})], PROVIDERS["triton"]
    assert difference(shifted, triton, "q", want, near) is None
    assert "codes apart" in str(difference(shifted, triton, "q", want, far))
    assert "codes apart" in str(difference(shifted, triton, "q", want, torch.full_like(want, math.nan)))
    assert "codes apart" in str(difference(REGISTRY.ops["rms_norm_quant", frozenset()], triton, "q", want, near))


@ops
def test_schema_is_functional(op: FusedOp) -> None:
    schema_is_functional(op)


def test_programs() -> None:
    x = torch.tensor([3.0, -5.0])
    assert run("float32 clamp_min=1.0 div=2.0", x).tolist() == [1.5, 0.5]
    assert run("div_scale clamp_max=1.0", x, torch.tensor(2.0)).tolist() == [1.0, -2.5]
    zeros = torch.tensor([2.0, 0.0, -0.0, -1.0, float("nan")], dtype=torch.bfloat16)
    assert repr(run("if_zero=0.5", zeros).tolist()) == "[2.0, 0.5, 0.5, -1.0, nan]"
    assert repr(run("unless_positive=0.5", zeros).tolist()) == "[2.0, 0.5, 0.5, 0.5, 0.5]"
    assert run("if_zero=1e-09", zeros[1]).dtype is torch.bfloat16  # without dimensions too
    assert is_inverse("clamp_min=1.0 reciprocal mul=448.0")
    assert not is_inverse("reciprocal mul=448.0 reciprocal")
    assert parse(f"mul={1 / (448.0 * 512.0)!r}")[0][1] == 1 / (448.0 * 512.0)
    for wrong in ("sqrt", "div", "reciprocal=2.0", "float64"):
        with pytest.raises(ValueError, match="unknown step"):
            parse(wrong)


def test_unknown_provider_and_activation() -> None:
    op = next(op for op in REGISTRY.overloads("act_mul_quant").values() if not op.features)
    arguments = next(sampled(op, "reference"))
    with pytest.raises(ValueError, match="unknown provider 'cutlass'; known are aiter, triton, reference"):
        op.target(*arguments.values(), "cutlass")
    with pytest.raises(ValueError, match="unknown activation 'sine'; known are silu"):
        op.target(*(arguments | {"act": "sine"}).values(), "reference")


def test_differing_codes() -> None:
    x = torch.tensor([1.0, -1.0, 0.0, 448.0]).to(torch.float8_e4m3fn)
    assert differing_codes(x, x) == 0
    y = (x.view(torch.uint8) + torch.tensor([1, 0, 0, 0], dtype=torch.uint8)).view(torch.float8_e4m3fn)
    assert differing_codes(x, y) == 1
    nan = torch.full((4,), float("nan")).to(torch.float8_e4m3fn)
    assert differing_codes(nan, nan) == 0
    assert differing_codes(x, nan) == 255
    assert differing_codes(torch.zeros(1).to(x.dtype), (-torch.zeros(1)).to(x.dtype)) == 0
