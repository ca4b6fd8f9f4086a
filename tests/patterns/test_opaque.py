"""Quantisers inside the operators of libraries: found by their names, replaced within one code of the operators."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from aiter_fusion.passes.verify import differing_codes
from aiter_fusion.patterns.opaque import OPERATORS
from aiter_fusion.scale_program import run
from support import cases
from support.checked import checked


def act_quant(x: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """What the hub's kernel says that it computes."""
    blocks = x.float().unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1) / 448.0
    return (blocks / scale.clamp(min=1e-12).unsqueeze(-1)).to(cases.FN).reshape(x.shape), scale


def per_row(
    x: Tensor,
    bs: Tensor | None = None,
    scale_ub: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
    stochastic_rounding: bool = False,
) -> list[Tensor]:
    """What FBGEMM's kernel says that it computes."""
    top = x.float().abs().amax(-1)
    top = top if scale_ub is None else torch.minimum(top, scale_ub)
    scale = (top / 448.0).clamp(min=1 / (448.0 * 512.0))
    return [(x.float() / scale.unsqueeze(-1)).to(cases.FN), scale]


@pytest.fixture(autouse=True)
def _libraries() -> Iterator[None]:
    """The operators, by the libraries' names, on a machine without these."""
    hub = torch.library.Library("_finegrained_fp8_0a1b2c3", "FRAGMENT")
    hub.define("fp8_act_quant(Tensor x, int block_size=128) -> (Tensor, Tensor)")
    fbgemm = torch.library.Library("fbgemm", "FRAGMENT")
    fbgemm.define(
        "quantize_fp8_per_row(Tensor input, Tensor? bs=None, Tensor? scale_ub=None, ScalarType? output_dtype=None, "
        "bool stochastic_rounding=False) -> Tensor[]"
    )
    for library, name, call in ((hub, "fp8_act_quant", act_quant), (fbgemm, "quantize_fp8_per_row", per_row)):
        library.impl(name, call, "CPU")
        library.impl(name, call, "Meta")
    yield
    hub._destroy()
    fbgemm._destroy()


@pytest.mark.parametrize("block", [128, cases.H])
def test_the_hubs(block: int) -> None:
    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        value = cases.llama(x, w).reshape(-1, cases.H)
        return torch.ops._finegrained_fp8_0a1b2c3.fp8_act_quant(value, block)

    result = checked(fn, verify=True)
    x, w = cases.tensors(("x", "w"), (2, 3), torch.bfloat16, "zero")
    with torch.no_grad():
        result.call(x, w)
    assert result.oracle.identical
    assert result.variants == ["rms_norm_quant:group128" if block == 128 else "rms_norm_quant:token"]
    assert result.report.unaccounted == 0


def test_fbgemms() -> None:
    def fn(x: Tensor, w: Tensor, bound: Tensor) -> list[Tensor]:
        value = cases.llama(x, w).reshape(-1, cases.H)
        q = torch.ops.fbgemm.quantize_fp8_per_row
        return [*q(value), *q(cases.llama(x, w, 1.0).reshape(-1, cases.H), scale_ub=bound)]

    result = checked(fn)
    x, w = cases.tensors(("x", "w"), (2, 3), torch.bfloat16, "normal")
    with torch.no_grad():
        result.call(x, w, torch.tensor([1200.0]))
    assert result.oracle.identical
    assert result.variants == ["rms_norm_quant:token"]
    (skipped,) = result.report.skipped
    assert "bounds its scale by" in skipped.reason


def test_they_are_of_kernel_numerics() -> None:
    """No graph says how they divide."""

    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return torch.ops._finegrained_fp8_0a1b2c3.fp8_act_quant(cases.llama(x, w), 128)

    result = checked(fn, numerics="exact")
    with torch.no_grad():
        result.call(*cases.tensors(("x", "w"), (4,), torch.bfloat16, "normal"))
    assert not result.variants
    assert result.report.skipped[0].reason.startswith("numerics")


@pytest.mark.gpu
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_the_libraries_own_code(operator: object) -> None:
    """The declared programs against the operators, within one code: their kernels may divide in other ways."""
    if operator is OPERATORS[0]:
        kernels = pytest.importorskip("kernels", reason="needs kernels, and kernels-community/finegrained-fp8")
        quantise = kernels.get_kernel("kernels-community/finegrained-fp8").fp8_act_quant
    else:
        pytest.importorskip("fbgemm_gpu.experimental.gen_ai", reason="needs fbgemm-gpu-genai")
        quantise = torch.ops.fbgemm.quantize_fp8_per_row
    x = torch.randn(300, 4096, device="cuda", dtype=torch.bfloat16)
    x[0], x[1] = 0.0, x[1] * 1e-30
    q, scale = quantise(x, 128) if operator is OPERATORS[0] else quantise(x)
    blocks = x.unflatten(-1, (-1, 128)) if operator is OPERATORS[0] else x.unsqueeze(-2)
    top = blocks.abs().amax(-1, keepdim=True)
    want = run(operator.values, blocks, run(operator.factor, top)).to(q.dtype).reshape(q.shape)  # type: ignore[attr-defined]
    assert differing_codes(want, q) <= 1
    torch.testing.assert_close(run(operator.scale, top).reshape(scale.shape), scale, rtol=2**-22, atol=0.0)  # type: ignore[attr-defined]
