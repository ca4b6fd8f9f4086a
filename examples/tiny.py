"""What the recipes share: a gated block of torch.nn modules, quantised by torchao, in bf16, small enough for a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quant_api, quantize_

WIDTH = 256
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP8 = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())

if DEVICE == "cpu":
    # torchao demands a GPU with FP8 units; a CPU computes the same graph, slowly: bypassed for these demonstrations.
    quant_api._check_hardware_support = lambda granularity: None


class Block(nn.Module):
    """RMSNorm and a gated MLP, added to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def build(config: object = FP8) -> nn.Module:
    """The block with the same random weights every time, quantised as ``config`` says (None: not at all)."""
    torch.manual_seed(0)
    model = Block().to(DEVICE, torch.bfloat16).eval()
    if config is not None:
        quantize_(model, config)  # type: ignore[arg-type]
    return model


def batch(rows: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.bfloat16)
