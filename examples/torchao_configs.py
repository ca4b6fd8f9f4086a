"""torchao's configurations, and what is fused of each: activations must be quantised too.

    python examples/torchao_configs.py

Every configuration quantises the same block. The graphs are interpreted (``oracle``), so nothing is compiled to code,
and every rewritten graph is compared with the original bit by bit.
"""

from __future__ import annotations

import torch
from tiny import batch, build
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    PerRow,
    PerTensor,
)

import aiter_fusion

CONFIGS = {
    "Float8DynamicActivationFloat8Weight, PerRow": Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    "Float8DynamicActivationFloat8Weight, PerTensor": Float8DynamicActivationFloat8WeightConfig(
        granularity=PerTensor()
    ),
    "Float8WeightOnly": Float8WeightOnlyConfig(),
    "Int8DynamicActivationInt8Weight": Int8DynamicActivationInt8WeightConfig(),
    "Int8WeightOnly": Int8WeightOnlyConfig(),
}


@torch.no_grad()
def main() -> None:
    for name, config in CONFIGS.items():
        torch._dynamo.reset()
        oracle = aiter_fusion.Backend().oracle()
        torch.compile(build(config), backend=oracle)(batch())
        fused = ", ".join(f"{family} {count}" for family, count in oracle.report.replaced.items()) or "nothing"
        print(f"{name:48} {fused:52} {'same bits' if oracle.identical else 'OTHER BITS'}")


if __name__ == "__main__":
    main()
