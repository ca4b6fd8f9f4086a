"""What to do when a count is lower than expected: read the reasons, one cause at a time.

    python examples/lower_count.py

One block, four times: as it should be, and with one of the usual causes. Graphs are interpreted, not compiled to code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny import batch, build
from torch import Tensor, nn

import aiter_fusion


def scaled(module: nn.Module, args: object, value: Tensor) -> Tensor:
    """A hook that comes between a norm and what quantises its value."""
    return value * 1.5


def broken(module: nn.Module, args: object, value: Tensor) -> Tensor:
    """A hook that Dynamo cannot trace through; no fusion reaches over a graph break."""
    torch._dynamo.graph_break()
    return value


def show(title: str, model: nn.Module, **options: Any) -> None:
    torch._dynamo.reset()
    oracle = aiter_fusion.Backend(**options).oracle()
    torch.compile(model, backend=oracle)(batch())
    print(f"\n## {title}\n{oracle.report}")


def hooked(hook: Callable[..., Tensor]) -> nn.Module:
    model = build()
    model.get_submodule("norm").register_forward_hook(hook)
    return model


@torch.no_grad()
def main() -> None:
    show("as it should be", build())
    show("not quantised: the last line says what to do", build(None))
    show("something between norm and quantiser: 'producer' names it", hooked(scaled))
    show("a graph break: 'boundary'; TORCH_LOGS=graph_breaks names the line", hooked(broken))
    show("level 1: 'level' names the level that each needs", build(), level=1)
    print(
        "\nMore: explain(model, args).to_html('report.html') shows the nodes of every site; strict=True and"
        "\nexpect={...} raise on what is missing; aiter-fusion info says what this machine can run."
    )


if __name__ == "__main__":
    main()
