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
    return [(x.float() / scale.unsqueeze(-1)).clamp(-448.0, 448.0).to(cases.FN), scale]


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


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_fbgemms(layers: int) -> None:
    """A bound for each layer, and layers without one."""

    def fn(x: Tensor, w: Tensor, gate: Tensor, *bounds: Tensor) -> list[Tensor]:
        value = cases.llama(x, w).reshape(-1, cases.H)
        q = torch.ops.fbgemm.quantize_fp8_per_row
        made = [q(value, scale_ub=bound) for bound in bounds]
        made += [q(cases.llama(x, w, 1.0).reshape(-1, cases.H))]
        made += [q((torch.nn.functional.silu(gate) * x).reshape(-1, cases.H), scale_ub=bounds[0])]
        return [tensor for pair in made for tensor in pair]

    result = checked(fn, verify=True)
    with torch.no_grad():
        for rows in ("normal", "zero", "nonfinite"):
            x, w, gate = cases.tensors(("x", "w", "r"), (2, 3), torch.bfloat16, rows)
            result.call(x, w, gate, *(torch.tensor([1.5 * (n + 1)]) for n in range(layers)))
            assert result.oracle.identical
    bounded = f"bounded{layers}" if layers > 1 else "bounded"
    assert result.variants == [f"rms_norm_quant:{bounded}+token", "rms_norm_quant:token", "act_mul_quant:bounded+token"]
    assert result.report.unaccounted == 0


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
