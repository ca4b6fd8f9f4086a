"""Accuracy on a model of your own: did the rewriting change a bit, and how far is the result from eager PyTorch?

python examples/accuracy.py
"""

from __future__ import annotations

import torch
from tiny import batch, build

import aiter_fusion


@torch.no_grad()
def main() -> None:
    model, inputs = build(), [batch(seed=seed) for seed in range(3)]  # your model, and calls as it gets them

    # The ten lines. First the graphs, interpreted before and after rewriting: any other bit is a defect of ours.
    oracle = aiter_fusion.Backend(provider="reference").oracle()
    interpreted = torch.compile(model, backend=oracle)
    for x in inputs:
        interpreted(x)
    print("rewritten graphs give the original's bits:", oracle.identical)
    # Then the compiled models against eager: Inductor drops intermediate roundings, so it differs without us too.
    for backend in ("aiter_fusion", "inductor"):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend)
        errors = [(compiled(x).float() - model(x).float()).norm() / model(x).float().norm() for x in inputs]
        print(f"{backend:13} to eager: relative difference at most {max(errors):.1e}")
    if not oracle.identical:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
