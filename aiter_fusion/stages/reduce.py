"""The sum of a tensor over the ranks of a process group, or of two such sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..domains import ANYTHING
from ..op import Spec
from ..stage import Sample, Stage, Value

# PyTorch's name for the default group.
_WORLD = "0"


def all_reduce(x: Tensor, group: str) -> Tensor:
    """The sum of every rank's ``x``, in its dtype."""
    return torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", group))


def _compute(value: None, x: Tensor, other: Tensor | None, group: str) -> tuple[Tensor, dict[str, Tensor]]:
    reduced = all_reduce(x, group)
    if other is not None:
        reduced = reduced.reshape(other.shape) + all_reduce(other, group)
    return reduced, {}


def _spec(value: None, x: Tensor, other: Tensor | None, group: str) -> tuple[Value, dict[str, Spec]]:
    return Value(x.shape if other is None else other.shape, x.dtype), {}


def _samples(sample: Sample) -> Sequence[dict[str, Any]]:
    """For a process that is the only one of the default group."""
    x = sample.rows()
    return [{"x": x, "other": other, "group": _WORLD} for other in (None, x.flip(0).contiguous())]


# ``reduced = all_reduce(x)``, or ``all_reduce(x) + all_reduce(other)``; x and other ``[..., H]``, of as many rows. A
# group's name is PyTorch's: the process that loads a graph looks it up among its own.
ALL_REDUCE = Stage(
    "all_reduce",
    {"x": "Tensor", "other": "Tensor?", "group": "str"},
    _compute,
    _spec,
    _samples,
    lambda setting: {"x": setting.random(), "other": None, "group": _WORLD},
    traits=("pair",),
    returns="reduced",
    one=("group",),
    domains={"group": ANYTHING},
    collective=True,
    order_free=frozenset({"x", "other"}),
    follows=False,
)
