"""A block of torch.nn modules, quantised by hand: what is fused, what is not, and as a page.

    python examples/torch_nn_block.py [report.html]

Needs nothing but torch: no model, no quantisation library.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import aiter_fusion

FP8 = torch.float8_e4m3fn
TOP = torch.finfo(FP8).max


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 codes and one scale for each row; ``codes * scale`` is about x."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / TOP
    return (x.float() / scale).clamp(-TOP, TOP).to(FP8), scale


class Linear8(nn.Linear):
    """A linear layer whose input is quantised. It multiplies in bfloat16, which runs everywhere."""

    def forward(self, input: Tensor) -> Tensor:
        codes, scale = quantise(input)
        return F.linear((codes.float() * scale).to(input.dtype), self.weight)


class Block(nn.Module):
    """Attention and a gated MLP. RMSNorm and SiLU times up each go into a quantiser; so does the attention's result,
    for which there is no fusion."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = Linear8(width, 3 * width, bias=False), Linear8(width, width, bias=False)
        self.gate_up, self.down = Linear8(width, 4 * width, bias=False), Linear8(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm_1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def build() -> tuple[nn.Module, tuple[Tensor]]:
    """The block and an input: ``aiter-fusion explain torch_nn_block:build`` shows the same report."""
    torch.manual_seed(0)
    return Block().to(torch.bfloat16).eval(), (torch.randn(2, 16, 256).bfloat16(),)


def main(page: Path) -> None:
    model, inputs = build()
    report = aiter_fusion.explain(model, inputs)
    print(report)
    report.to_html(page)
    print(f"\nas a page: {page}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()) / "report.html")
