"""Two processes, each with its part of a model, on a CPU: run by tests/providers/triton/test_all_reduce.py."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from support import cases, models
from support.checked import checked

# What a module of these styles returns has been all-reduced.
REDUCING = ("rowwise", "moe_tp_experts", "embedding_rowwise")


def _mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def shard(model: Any) -> list[str]:
    """Split a model by ``tp_plan="auto"``, as ``from_pretrained`` does (which needs accelerate, and a file).

    Returns the modules whose results are all-reduced.
    """
    from transformers.distributed.configuration_utils import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    config = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    plan, *_ = model._resolve_parallel_plans(config)
    apply_tensor_parallelism(model, _mesh(), plan)
    for module in model.modules():  # inference takes the local parts anyway; quantisers know nothing else
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and isinstance(weight, DTensor):
            module.weight = nn.Parameter(weight.to_local(), requires_grad=False)
    modules = dict(model.named_modules())
    return [name for name, style in plan.items() if style in REDUCING and name in modules]


def all_reduces(graph: torch.fx.GraphModule) -> int:
    return sum(node.target is torch.ops._c10d_functional.all_reduce.default for node in graph.graph.nodes)


def family(name: str, quantisation: str) -> dict[str, Any]:
    """A layer of a model of Hugging Face, split and compiled: what of it is fused, and how far it is from the whole."""
    tokens = models.tokens(2)
    with torch.no_grad():
        whole = models.build(name, num_hidden_layers=1)(tokens, use_cache=False).logits.float()
        model = models.build(name, num_hidden_layers=1)
        reduced = shard(model)
        split = model(tokens, use_cache=False).logits.float()
        if quantisation:
            models.QUANTISATIONS[quantisation](model)
        result = checked(model, verify=True)
        result.call(tokens, use_cache=False)
    (graph,) = result.oracle.graphs
    return {
        "distance": ((split - whole).norm() / whole.norm()).item(),
        "reduced": reduced,
        "before": all_reduces(graph.before),
        "after": all_reduces(graph.after),
        "identical": result.oracle.identical,
        "unaccounted": graph.report.unaccounted,
        "sites": graph.report.sites,
        "summary": graph.report.summary(),
    }


FAMILIES = (("Llama", "PerTensor"), ("Mixtral", ""))


class Block(nn.Module):
    """A feed-forward block and the norm after it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(128, 256, bias=False), nn.Linear(256, 128, bias=False)
        self.weight = nn.Parameter(torch.ones(128))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x + self.down(nn.functional.relu(self.up(x)))
        return (*cases.q3(cases.llama(x, self.weight)), x)


def dtensor() -> list[str]:
    """PyTorch's own tensor parallelism; the variants of what is fused."""
    torch.manual_seed(0)
    block = parallelize_module(
        Block().to(torch.bfloat16).eval(), _mesh(), {"up": ColwiseParallel(), "down": RowwiseParallel()}
    )
    result = checked(block, verify=True)
    with torch.no_grad():
        result.call(torch.randn(2, 4, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16))
    assert result.oracle.identical
    return result.variants


def _reduced_norm(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return cases.q3(cases.llama(funcol.all_reduce(x, "sum", dist.group.WORLD), w))  # type: ignore[arg-type]


# What rank 1 has in its environment, and the options that both ranks give (what was compared once is not again).
UNEQUAL: tuple[tuple[dict[str, str], dict[str, Any]], ...] = (
    ({}, {}),
    ({"AITER_FUSION_LEVEL": "2"}, {"numerics": "exact"}),
    ({"AITER_FUSION_PROVIDER": "reference"}, {"numerics": "kernel"}),
    ({"AITER_FUSION_DISABLE": "all_reduce_rms_norm"}, {"enable": ("act_mul_quant",)}),
)


def unequal() -> list[list[tuple[str, str]]]:
    """(variant, reason) of every site, case after case, each with a call: it would hang if one rank had the fused op
    and another had not."""
    inputs = cases.tensors(("x", "w"), (4,), torch.bfloat16, "normal")
    found = []
    for variables, options in UNEQUAL:
        if dist.get_rank() == 1:
            os.environ.update(variables)
        result = checked(_reduced_norm, **options)
        with torch.no_grad():
            result.call(*inputs)
        for name in variables:
            os.environ.pop(name, None)
        assert result.oracle.identical
        found.append([(f"{s.status} {s.family}:{s.variant}", s.reason) for s in result.report.sites])
    return found


def everything() -> dict[str, Any]:
    """What this rank found, by subject."""
    return {
        "families": {each: family(*each) for each in FAMILIES},
        "dtensor": dtensor(),
        "unequal": unequal(),
    }
