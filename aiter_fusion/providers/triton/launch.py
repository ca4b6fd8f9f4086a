"""What a launch of a kernel is: its grid and its arguments, tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..shapes import Int


@dataclass(frozen=True)
class Ref:
    """A tensor of the call by name: an argument, an output, or scratch."""

    name: str


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    kernel:    its name (``jit.kernel``).
    grid:      programs.
    arguments: by name, tensors as ``Ref``.
    warps:     of a program.
    dependent: whether it may begin before the launch before it ends, for which the kernel waits itself (NVIDIA's
               programmatic dependent launch).
    """

    kernel: str
    grid: Int
    arguments: Mapping[str, Any]
    warps: int
    dependent: bool = False


@dataclass(frozen=True)
class Launches:
    """All launches of a call in order, and the scratch tensors that they share: name -> (sizes, dtype)."""

    launches: tuple[Launch, ...]
    scratch: Mapping[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)


def flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by the names that launches have for them: entries of lists are ``<name>.<index>``."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, (list, tuple)):
            found |= {f"{name}.{index}": entry for index, entry in enumerate(value)}
        else:
            found[name] = value
    return found
