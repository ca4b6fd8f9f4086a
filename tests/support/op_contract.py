"""What every op keeps, whoever declares it: each function fails if an op, called through a provider, does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from aiter_fusion.op import FusedOp
from aiter_fusion.passes.verify import difference, same_bits
from aiter_fusion.providers import PROVIDERS
from aiter_fusion.registry import REGISTRY


def chosen(every: list[FusedOp]) -> list[Any]:
    """Of a family of many overloads those that differ in one stage from the least, and the fullest; others are slow."""
    made = []
    for op in every:
        many = REGISTRY.overloads(op.family)
        fullest = max(many, key=len)
        slow = len(many) > 4 and len(op.features) > 1 and op.features != fullest
        made.append(pytest.param(op, marks=pytest.mark.slow if slow else ()))
    return made


def sampled(op: FusedOp, provider: str) -> Iterator[dict[str, Any]]:
    """The op's samples on the provider's device, but for those that it refuses."""
    device = "cpu" if provider == "reference" else "cuda"
    for arguments in op.samples():
        given = {name: arguments[name] for name in op.arguments}
        given = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
        if PROVIDERS[provider].why_not(op, given) is None:
            yield given


def call(op: FusedOp, provider: str, arguments: dict[str, Any]) -> dict[str, Tensor]:
    result = op.target(*arguments.values(), provider)
    return dict(zip(op.outputs, (result,) if isinstance(result, Tensor) else result, strict=True))


def strided(x: Tensor) -> Tensor:
    """The same values with a gap after each row."""
    wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 8)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def schema_is_functional(op: FusedOp) -> None:
    schema = op.target._schema
    assert not schema.is_mutable
    names = {argument.name for argument in schema.arguments} | {result.name for result in schema.returns}
    assert not names & {"out", "self"}
    assert torch.Tag.needs_exact_strides in op.target.tags
    assert [result.name for result in schema.returns] == list(op.outputs)


def passes_opcheck(op: FusedOp, provider: str) -> None:
    """On ordinary rows: opcheck compares without regard for NaN, which a zero row quantises to."""
    generator = torch.Generator().manual_seed(0)
    samples = list(sampled(op, provider))
    for given in samples[:: max(1, len(samples) // 3)]:
        for name, value in given.items():
            if isinstance(value, Tensor) and value.dim():
                given[name] = torch.randn(value.shape, generator=generator).to(value)
        torch.library.opcheck(op.target, (*given.values(), provider))


def fake_equals_real(op: FusedOp, provider: str) -> None:
    """Over dtypes, ranks, no rows, one row and strided rows: size, stride, dtype and device."""
    count = 0
    for arguments in sampled(op, provider):
        for gaps in (False, True):
            given = arguments
            if gaps:
                given = {k: strided(v) if isinstance(v, Tensor) and v.dim() > 1 else v for k, v in given.items()}
            real = call(op, provider, given)
            with FakeTensorMode() as mode:
                faked = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in given.items()}
                fake = call(op, provider, faked)
            for name, tensor in real.items():
                other = fake[name]
                assert (tensor.shape, tensor.stride(), tensor.dtype, tensor.device) == (
                    other.shape,
                    other.stride(),
                    other.dtype,
                    other.device,
                ), name
            count += 1
    # Triton's all-reduces refuse a group of one: tests/providers/triton/test_multi_gpu.py has them
    assert count >= 20 or (provider == "triton" and "group" in op.arguments)


def strided_rows_give_the_same_bits(op: FusedOp, provider: str) -> None:
    for given in sampled(op, provider):
        with_gaps = {k: strided(v) if isinstance(v, Tensor) and v.dim() > 1 else v for k, v in given.items()}
        dense, gapped = call(op, provider, given), call(op, provider, with_gaps)
        for name in op.outputs:
            assert same_bits(dense[name], gapped[name]), name


def agrees_with_the_reference(op: FusedOp, provider: str) -> None:
    """On hostile rows too, as far as the provider's numerics promise."""
    for given in sampled(op, provider):
        want, have = op.reference(**given), call(op, provider, given)
        for name in op.outputs:
            assert difference(op, PROVIDERS[provider], name, want[name], have[name]) is None, name


def every_promise(op: FusedOp, provider: str) -> None:
    """All of the above, but for the reference's agreement with itself."""
    schema_is_functional(op)
    passes_opcheck(op, provider)
    fake_equals_real(op, provider)
    strided_rows_give_the_same_bits(op, provider)
    if provider != "reference":
        agrees_with_the_reference(op, provider)
