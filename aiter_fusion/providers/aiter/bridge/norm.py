"""RMSNorm without quantisation."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .adapter import HALVES, Adapter, Arguments, Condition, contiguous, entry, flat

# The kernel's limits: the longest row, and the elements that it loads at once.
WIDEST, PACK = 8192, 8


def _conditions(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    x, weight, width = a["x"], a["weight"], a["x"].shape[-1]
    yield x.dtype in HALVES, f"x is {x.dtype}, and the kernel takes bfloat16 and float16"
    yield weight.dtype == x.dtype, f"the weight is {weight.dtype}, and the kernel needs {x.dtype}, like x"
    yield width <= WIDEST, f"the hidden size is {width}, and the kernel takes up to {WIDEST}"
    yield width % PACK == 0, f"the hidden size is {width}, and the kernel loads {PACK} elements at once"
    yield contiguous("x", x)
    yield contiguous("weight", weight)
    if "residual" in a:
        yield (
            a["residual"].dtype == x.dtype,
            f"residual is {a['residual'].dtype}, and the kernel needs {x.dtype}, like x",
        )
        yield contiguous("residual", a["residual"])


ADAPTERS = {
    "rms_norm": Adapter(
        entry("aiter.rms_norm", {"input": flat("x"), "weight": "weight", "epsilon": "eps"}),
        _conditions,
        returns=lambda y, outputs: {"y": y.view(outputs["y"].shape)},
    ),
    "add_rms_norm": Adapter(
        entry(
            "aiter.rmsnorm2d_fwd_with_add",
            {
                "out": flat("y"),
                "input": flat("x"),
                "residual_in": flat("residual"),
                "residual_out": flat("residual_out"),
                "weight": "weight",
                "epsilon": "eps",
            },
        ),
        _conditions,
    ),
}
