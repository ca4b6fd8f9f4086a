"""A norm is fused whether its eps is a number or, as Dynamo makes it of a second value, a tensor of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import config as inductor_config
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import aiter_fusion
from aiter_fusion.config import options
from aiter_fusion.passes.manager import PassManager
from aiter_fusion.registry import REGISTRY
from support import cases, models
from support.checked import checked

EPSILONS = (1e-6, 0.25, 3.0)


class Layer(nn.Module):
    """A norm with an eps of its own, its quantiser, and something of the input's shape for the next layer."""

    def __init__(self, norm: type[nn.Module], eps: float) -> None:
        super().__init__()
        self.norm = norm(cases.H).to(torch.bfloat16)
        setattr(self.norm, "eps", eps)  # noqa: B010 (a plain attribute, as the class has it)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, scale = cases.q3(self.norm(x)[0])
        return x + (q.float() * scale).to(x.dtype), q, scale


def some_rows() -> Tensor:
    return cases.tensors(("x",), (4,), torch.bfloat16, "normal")[0]


@pytest.mark.parametrize(
    ("norm", "dynamic"),
    [
        (models.RoundFirstRMSNorm, None),
        (models.WeighFirstRMSNorm, True),
        pytest.param(models.RoundFirstRMSNorm, True, marks=pytest.mark.slow),
        pytest.param(models.WeighFirstRMSNorm, None, marks=pytest.mark.slow),
    ],
)
def test_modules_of_one_class(norm: type[nn.Module], dynamic: bool | None) -> None:
    """A second graph takes any eps, and is fused as the first is; each call has the bits of its own."""
    torch._dynamo.reset()
    oracle = aiter_fusion.Backend(verify=True).oracle()
    x, scales = some_rows(), []
    with torch.no_grad():
        for eps in EPSILONS:
            compiled = torch.compile(Layer(norm, eps), backend=oracle, dynamic=dynamic)
            scales.append(compiled(x)[2])
    assert oracle.identical
    assert [graph.report.replaced for graph in oracle.graphs] == [{"rms_norm_quant": 1}] * (1 if dynamic else 2)
    assert not torch.equal(scales[0], scales[1])
    assert not torch.equal(scales[1], scales[2])


def test_layers_compiled_one_by_one() -> None:
    torch._dynamo.reset()
    oracle = aiter_fusion.Backend().oracle()
    layers = [Layer(models.RoundFirstRMSNorm, eps) for eps in EPSILONS]
    x = some_rows()
    with torch.no_grad():
        for layer in layers:
            layer.compile(backend=oracle)
        for layer in (*layers, *layers[::-1]):
            x = layer(x)[0]
    assert oracle.identical
    assert [graph.report.replaced for graph in oracle.graphs] == [{"rms_norm_quant": 1}] * 2
    assert sum(graph.calls for graph in oracle.graphs) == 2 * len(layers)


def added(eps: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    return lambda x, w: cases.q3(cases.llama(x, w, eps(x)))  # type: ignore[arg-type]


TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "float64": lambda x: torch.full((), 0.3, dtype=torch.float64),
    "float32": lambda x: torch.full((), 0.3),
    "bfloat16": lambda x: torch.full((), 0.3, dtype=torch.bfloat16),
    "rounded twice": lambda x: torch.full((), 0.3, dtype=torch.float64).bfloat16().float(),
    "whole, converted": lambda x: torch.full((), 3).float(),
    "computed": lambda x: x.float().abs().amax() * 0.1,
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_one_number(name: str) -> None:
    result = checked(added(TENSORS[name]), verify=True)
    with torch.no_grad():
        result.call(*cases.tensors(("x", "w"), (4,), torch.bfloat16, "normal"))
    assert result.oracle.identical
    assert result.variants == ["rms_norm_quant:token"]


@pytest.mark.parametrize("name", ["of shape [1]", "whole"])
def test_tensors_that_are_no_eps(name: str) -> None:
    eps = {"of shape [1]": lambda x: x.float().amax((0, 1))[None] * 0 + 0.3, "whole": lambda x: torch.full((), 3)}[name]
    result = checked(added(eps))
    with torch.no_grad():
        result.call(*cases.tensors(("x", "w"), (4,), torch.bfloat16, "normal"))
    assert result.oracle.identical
    assert "is not one floating-point number" in result.report.bare[0].reason


@pytest.mark.parametrize("family", ["rms_norm_quant", "all_reduce_rms_norm_quant"])
@pytest.mark.parametrize(
    ("eps", "eps_tensor", "message"),
    [
        (None, None, "is given once: as a number, eps, or as a tensor, eps_tensor"),
        (1e-6, torch.tensor(1e-6), "is given once: as a number, eps, or as a tensor, eps_tensor"),
        (None, torch.tensor([1e-6]), r"eps_tensor is one number, without dimensions, and has shape \[1\]"),
    ],
)
def test_an_eps_that_is_not_given_once(
    family: str, eps: float | None, eps_tensor: Tensor | None, message: str, alone: None
) -> None:
    op = REGISTRY.ops[family, frozenset()]
    given = {**next(op.samples()), "eps": eps, "eps_tensor": eps_tensor}
    with pytest.raises(ValueError, match=message):
        op.target(*(given[name] for name in op.arguments))


def on_a_gpu(eps: Tensor) -> fx.Graph:
    """The graph of a norm and its quantiser, as on a GPU, with ``eps`` as an input."""
    with FakeTensorMode() as mode:
        x, w = (torch.empty(sizes, dtype=torch.bfloat16, device="cuda") for sizes in ((4, 256), (256,)))

        def fn(x: Tensor, w: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
            return cases.q3(cases.llama(x, w, eps))  # type: ignore[arg-type]

        return make_fx(fn, select_decomp_table())(x, w, mode.from_tensor(eps)).graph


@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("cudagraphs", [True, False])
def test_cuda_graphs_read_no_host_memory(cudagraphs: bool, parts: bool) -> None:
    """What a replayed graph would not read again is copied to the GPU before it; without parts nothing is captured."""
    graph = on_a_gpu(torch.tensor(1e-6, dtype=torch.float64))
    patches: dict[str, Any] = {"triton.cudagraphs": cudagraphs, "graph_partition": parts}
    with inductor_config.patch(patches):
        report = PassManager(options(provider="reference")).run(graph, True)
    assert report.replaced == {"rms_norm_quant": 1}
    (call,) = (node for node in graph.nodes if "rms_norm_quant" in str(node.target))
    eps = call.args[3]
    assert isinstance(eps, fx.Node)
    copied = cudagraphs and parts
    assert eps.meta["val"].device.type == ("cuda" if copied else "cpu")
    assert (eps.target is torch.ops.prims.device_put.default) == copied
