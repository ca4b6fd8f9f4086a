"""A package that AOTInductor compiled ahead of time, with the fused ops in it, and what loads it.

    python examples/aot_inductor.py [folder]

A model is exported with a symbolic number of rows, compiled with ``Backend(...).graph_pass()`` in Inductor's slot for
passes, and packaged. Then two other processes load the package: one imports aiter_fusion, and has to give the bits of
the exported program, interpreted here; the other does not, and shows what it is told.

The package calls the fused ops by name, and PyTorch looks the names up when it is loaded. To import aiter_fusion before
that registers them; nothing else of it is needed to load.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_nn_block import quantise

import aiter_fusion

WIDTH = 256
ROWS = (6, 1, 33)  # the first is what the model is exported with

LOAD = """
import sys, torch
{first}
from torch._inductor import aoti_load_package

model = aoti_load_package(sys.argv[1])
with torch.no_grad():
    torch.save([model(*inputs) for inputs in torch.load(sys.argv[2])], sys.argv[3])
"""


class Block(nn.Module):
    """Two norms, each quantised to FP8, the second with a residual addition before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.RMSNorm(WIDTH, dtype=torch.bfloat16) for _ in "12")

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        q, scale = quantise(self.first(x))
        hidden = (q.float() * scale).to(x.dtype) + residual
        return (*quantise(self.second(hidden)), hidden)


def load(first: str, *files: Path) -> subprocess.CompletedProcess[str]:
    """Run the package in a process of its own that starts with the statement ``first``."""
    command = [sys.executable, "-c", LOAD.format(first=first), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    inputs = [tuple(torch.randn(rows, WIDTH).bfloat16() for _ in range(2)) for rows in ROWS]
    rows = {0: torch.export.Dim("rows", min=1, max=4096)}
    with torch.no_grad():
        exported = torch.export.export(Block(), inputs[0], dynamic_shapes=(rows, rows))
        want = [exported.module()(*given) for given in inputs]
        fusions = aiter_fusion.Backend(strict=True, expect={"rms_norm_quant": 2}).graph_pass()
        package, given, got = (folder / name for name in ("block.pt2", "inputs.pt", "outputs.pt"))
        torch._inductor.aoti_compile_and_package(
            exported, package_path=str(package), inductor_configs={"post_grad_custom_pre_pass": fusions}
        )
    (report,) = aiter_fusion.reports()
    print(report)

    torch.save(inputs, given)
    done = load("import aiter_fusion", package, given, got)
    if done.returncode != 0:
        raise SystemExit(f"the package failed in a process that imports aiter_fusion:\n{done.stderr}")
    pairs = [
        (a, b) for have, right in zip(torch.load(got), want, strict=True) for a, b in zip(have, right, strict=True)
    ]
    same = all(a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)
    print(f"another process, which imports aiter_fusion: {'the same bits' if same else 'OTHER bits'} for {ROWS} rows")

    done = load("", package, given, got)
    told = done.stderr.strip().splitlines()[-1:]
    print(f"another process, which does not: exit status {done.returncode}", *told, sep="\n    ")
    print("    (the first part of that name is the package to import before aoti_load_package)")
    if not same or "Could not find schema for aiter_fusion::" not in done.stderr:
        raise SystemExit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
