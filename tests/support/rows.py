"""Rows of ``cases``, several as one model, since tracing that takes less time than each alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from support import cases

Row = tuple[cases.FusionCase, cases.AnyForm, cases.QuantForm]


class Rows(nn.Module):
    """Several rows, each with inputs of its own, so that each is one site.

    ``w32`` gives the norms a weight in float32, whatever the dtype is.
    """

    def __init__(self, rows: Sequence[Row], *, w32: bool = False) -> None:
        super().__init__()
        made = [cases.built(*row) for row in rows]
        self.calls, self.names = [call for call, _ in made], [tuple(names) for _, names in made]
        if w32:
            self.names = [tuple("w32" if name == "w" else name for name in names) for names in self.names]
        self.variants = sorted(cases.variant(*row) for row in rows)

    def inputs(
        self, sizes: tuple[int, ...] = (2, 3), dtype: torch.dtype = torch.bfloat16, kind: str = "normal"
    ) -> tuple[Tensor, ...]:
        return tuple(x for names in self.names for x in cases.tensors(names, sizes, dtype, kind))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        left = iter(inputs)
        pairs = zip(self.calls, self.names, strict=True)
        return tuple(result for call, names in pairs for result in call(*itertools.islice(left, len(names))))
