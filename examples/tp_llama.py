"""Tensor parallelism: an FP8 Llama split over processes, whose all-reduces are fused with the norms after them.

    torchrun --nproc-per-node 2 examples/tp_llama.py      # one process a GPU
    python examples/tp_llama.py                           # two processes on a CPU

Random weights, split by Hugging Face's ``tp_plan="auto"``, quantised by torchao, compiled at level 3. Prints that the
reports of all processes are the same, one of them, and how far the result is from that of the whole model, which has
other scales: each process quantises its parts by themselves.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any, cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is made here, nothing is downloaded
os.environ.setdefault("AITER_FUSION_LOG", "WARNING")  # the reports are printed below

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerTensor, quant_api, quantize_
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

import aiter_fusion

PROCESSES = 2  # without torchrun
CONFIG = LlamaConfig(
    hidden_size=512,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=1024,
    vocab_size=1024,
)


def build(device: torch.device) -> nn.Module:
    """The whole model; the same on every process."""
    torch.manual_seed(0)
    return cast(nn.Module, LlamaForCausalLM(CONFIG)).to(device, torch.bfloat16).eval()


def split(model: Any, device: torch.device) -> None:
    """What ``from_pretrained(..., distributed_config=DistributedConfig(tp_plan="auto"))`` does with a checkpoint."""
    world = dist.get_world_size()
    plan, *_ = model._resolve_parallel_plans(DistributedConfig(tp_size=world, tp_plan="auto"))
    apply_tensor_parallelism(model, init_device_mesh(device.type, (world,), mesh_dim_names=("tp",)), plan)
    for module in model.modules():  # torchao quantises tensors, not DTensors
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and isinstance(weight, DTensor):
            module.weight = nn.Parameter(weight.to_local(), requires_grad=False)


def quantise(model: nn.Module, device: torch.device) -> None:
    """FP8 with a scale for each tensor."""
    if device.type == "cpu":
        # torchao demands a GPU with FP8 units; a CPU computes the same graph, slowly: bypassed for this demonstration.
        quant_api._check_hardware_support = lambda granularity: None
    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor()))


def distance(logits: Tensor, other: Tensor) -> str:
    """Relative (Frobenius) difference."""
    return f"relative {((logits - other).norm() / other.norm()).item():.1e}"


@torch.no_grad()
def run(device: torch.device) -> bool:
    """One process; whether the processes agree and all all-reduces are fused."""
    prompt = torch.randint(0, CONFIG.vocab_size, (1, 64), generator=torch.Generator().manual_seed(1)).to(device)
    exact = build(device)(prompt, use_cache=False).logits.float()
    whole = build(device)
    quantise(whole, device)
    single = whole(prompt, use_cache=False).logits.float()

    model = build(device)
    split(model, device)
    quantise(model, device)
    compiled = torch.compile(model, backend=aiter_fusion.Backend(level=3))
    logits = compiled(prompt, use_cache=False).logits.float()
    aiter_fusion.check()

    (report,) = aiter_fusion.reports()
    sites: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(sites, report.sites)
    same = all(other == report.sites for other in sites)
    if dist.get_rank() == 0:
        print(report)
        print(f"\nreports of {len(sites)} processes: {'identical' if same else 'DIFFERENT'}")
        print(f"split and fused to the quantised model in one process: {distance(logits, single)}")
        print(f"quantised to bfloat16, in one process:                 {distance(single, exact)}")
    return same and report.replaced.get("all_reduce_rms_norm") == 1 + 2 * CONFIG.num_hidden_layers


def process(rank: int, world: int, store: str) -> None:
    """Join the group, run, leave."""
    device = torch.device("cuda", rank) if store == "env://" and torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world, init_method=store)
    try:
        good = run(device)
    finally:
        dist.destroy_process_group()
    if not good:
        raise SystemExit(1)


def main() -> None:
    if "LOCAL_RANK" in os.environ:  # torchrun
        process(int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]), "env://")
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="aiter_fusion_") as folder:
        spawn(process, (PROCESSES, f"file://{folder}/store"), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
