"""LayerNorm without quantisation."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .adapter import HALVES, Adapter, Arguments, Condition, contiguous, entry, flat


def _conditions(a: Arguments, native: torch.dtype | None) -> Iterator[Condition]:
    x = a["x"]
    yield x.dtype in HALVES, f"x is {x.dtype}, and the kernel takes bfloat16 and float16"
    yield contiguous("x", x)
    for name in ("weight", "bias", *(("residual",) if "residual" in a else ())):
        yield a[name].dtype == x.dtype, f"{name} is {a[name].dtype}, and the kernel needs {x.dtype}, like x"
        yield contiguous(name, a[name])


_AFFINE = {"weight": "weight", "bias": "bias", "epsilon": "eps"}

ADAPTERS = {
    "layer_norm": Adapter(
        entry("aiter.layernorm2d_fwd", {"input": flat("x"), **_AFFINE}),
        _conditions,
        returns=lambda y, outputs: {"y": y.view(outputs["y"].shape)},
    ),
    "add_layer_norm": Adapter(
        entry(
            "aiter.layernorm2d_fwd_with_add",
            {
                "out": flat("y"),
                "input": flat("x"),
                "residual_in": flat("residual"),
                "residual_out": flat("residual_out"),
                **_AFFINE,
            },
        ),
        _conditions,
    ),
}
