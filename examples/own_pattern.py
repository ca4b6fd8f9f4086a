"""A fusion of your own, from outside the package: RMSNorm and int8 quantisation with one scale for each row.

    python examples/own_pattern.py

Three steps: a form for what is new in the graph, an op that computes the chain, a row that joins them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import aiter_fusion
from aiter_fusion.op import FusedOp
from aiter_fusion.ops.rms_norm_quant import NORM, rms_norm
from aiter_fusion.patterns.language import (
    Branch,
    Call,
    Const,
    Form,
    Fusion,
    Named,
    Var,
    aten,
    convert,
    in_float32,
    last_dim,
)


def quantise(y: Tensor) -> tuple[Tensor, Tensor]:
    scale = (y.abs().amax(-1, keepdim=True).float() / 127).clamp(min=1e-10)
    return (y.float() / scale).round().clamp(-128, 127).to(torch.int8), scale


# 1. The form: what quantise() is in a graph. Every argument counts; a dtype is demanded where it decides the rounding.
LARGEST = Call((aten.amax.default,), (Call((aten.abs.default,), (Var("x"),)), last_dim(), Const(True)))
DIVIDED = Call((aten.div.Tensor,), (in_float32(LARGEST), Const(127)), dtype=torch.float32)
SCALE = Named("scale", Call((aten.clamp_min.default,), (DIVIDED, Const(1e-10))))
ROUNDED = Call((aten.round.default,), (Call((aten.div.Tensor,), (in_float32(Var("x")), SCALE)),))
CLAMPED = Call((aten.clamp_max.default,), (Call((aten.clamp_min.default,), (ROUNDED, Const(-128))), Const(127)))
BRANCH = Branch("scale", source="scale", attribute="scale")  # the second output
aiter_fusion.register_form(Form("int8_quant", "row", convert(CLAMPED, torch.int8), output="q", branches=(BRANCH,)))


# 2. The op: the reference repeats the graph's arithmetic, shape() is what it returns, samples() are for tests.
def reference(x: Tensor, **norm: Any) -> dict[str, Tensor]:
    q, scale = quantise(rms_norm(x, **norm).contiguous())
    return {"q": q, "scale": scale}


def shape(x: Tensor, **norm: Any) -> dict[str, Any]:
    return {"q": (x.shape, torch.int8), "scale": ((*x.shape[:-1], 1), torch.float32)}


def samples() -> Iterator[dict[str, Any]]:
    for dtype in (torch.bfloat16, torch.float32):
        norm = {"weight": torch.ones(64, dtype=dtype), "eps": 1e-6, "eps_tensor": None, "offset": None}
        norm |= {"cast_first": True, "dtype": dtype}
        for sizes in ((64,), (0, 64), (1, 64), (2, 3, 64)):
            yield {"x": torch.linspace(-3, 2, torch.Size(sizes).numel()).to(dtype).reshape(sizes), **norm}


FAMILY, OUTPUTS = "rms_norm_int8", ("q", "scale")
OP = aiter_fusion.fused_op(FusedOp(FAMILY, frozenset(), {"x": "Tensor"} | NORM, OUTPUTS, reference, shape, samples))

# 3. The row: any norm that the package knows, then the form. Its variant is what reports call it.
aiter_fusion.register_fusion(Fusion(FAMILY, ("rms_norm", "int8_quant"), variant=lambda *_: "row"))


def main() -> None:
    norm = torch.nn.RMSNorm(512, dtype=torch.bfloat16)
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    oracle = aiter_fusion.Backend().oracle()
    with torch.no_grad():
        torch.compile(lambda x: quantise(norm(x)), backend=oracle)(x)
    print(oracle.report)
    print("the same bits as the original graph:", oracle.identical)
    for sample in OP.samples():
        torch.library.opcheck(OP.target, (*sample.values(), "reference"))
    print("opcheck:", OP.name)


if __name__ == "__main__":
    main()
