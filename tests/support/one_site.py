"""One site, its inputs, and a pass of the user's own: the smallest thing to compile."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from support import cases


def site(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return cases.q3(cases.llama(x, w))


def inputs(*names: str) -> list[Tensor]:
    return cases.tensors(names or ("x", "w"), (4,), torch.bfloat16, "normal")


class UserPass(CustomGraphPass):
    """Counts its calls; on the class, since Inductor may copy it."""

    calls = 0

    def __init__(self, uuid: str | None = "user 1") -> None:
        self._uuid = uuid

    def __call__(self, graph: fx.Graph) -> None:
        UserPass.calls += 1

    def uuid(self) -> str | None:
        return self._uuid
