"""The graphs before and after each pass, as files: with ``aiter_fusion.dump``, and with depyf alone.

python examples/depyf_dump.py [folder]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import depyf
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch_nn_block import quantise

import aiter_fusion


def norm_and_quantise(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return quantise(torch.nn.functional.rms_norm(x, x.shape[-1:], weight))


def main(folder: Path) -> None:
    compiled = torch.compile(norm_and_quantise, backend="aiter_fusion")
    x, weight = torch.randn(4, 256).bfloat16(), torch.ones(256).bfloat16()

    with aiter_fusion.dump(folder / "dump"):
        compiled(x, weight)
    print((folder / "dump" / "index.md").read_text())

    # The same files with depyf alone. It shows what is really compiled, so what may be cached must be forgotten first.
    torch._dynamo.reset()
    with inductor_config.patch(force_disable_caches=True), depyf.prepare_debug(str(folder / "depyf")):
        compiled(x, weight)
    for path in sorted((folder / "depyf").glob("*AITER_FUSION*")):
        print(path.name, "- names the fused op" if "torch.ops.aiter_fusion." in path.read_text() else "")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
