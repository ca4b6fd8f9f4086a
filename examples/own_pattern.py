"""A fusion of your own, from outside the package: RMSNorm and int16 quantisation with one scale for each row.

    python examples/own_pattern.py

Three steps: a form for what is new in the graph, a stage that computes it, a family that joins it to the norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import aiter_fusion
from aiter_fusion.op import Spec
from aiter_fusion.patterns.form import Branch, Form
from aiter_fusion.patterns.fx_facts import aten
from aiter_fusion.patterns.language import Call, Const, Named, Var, convert, in_float32, last_dim
from aiter_fusion.stage import Family, Sample, Stage, Value, maybe
from aiter_fusion.stages.norm import RMS_NORM
from aiter_fusion.stages.residual import INPUT, RESIDUAL


def quantise(y: Tensor) -> tuple[Tensor, Tensor]:
    scale = (y.abs().amax(-1, keepdim=True).float() / 32767).clamp(min=1e-10)
    return (y.float() / scale).round().clamp(-32768, 32767).to(torch.int16), scale


# 1. The form: what quantise() is in a graph. Every argument counts; a dtype is demanded where it decides the rounding.
LARGEST = Call((aten.amax.default,), (Call((aten.abs.default,), (Var("x"),)), last_dim(), Const(True)))
DIVIDED = Call((aten.div.Tensor,), (in_float32(LARGEST), Const(32767)), dtype=torch.float32)
SCALE = Named("scale", Call((aten.clamp_min.default,), (DIVIDED, Const(1e-10))))
ROUNDED = Call((aten.round.default,), (Call((aten.div.Tensor,), (in_float32(Var("x")), SCALE)),))
CLAMPED = Call((aten.clamp_max.default,), (Call((aten.clamp_min.default,), (ROUNDED, Const(-32768))), Const(32767)))
BRANCH = Branch("scale", source="scale", attribute="scale")  # the second output
FORM = Form("int16_quant", "row", convert(CLAMPED, torch.int16), output="q", branches=(BRANCH,))


# 2. The stage: compute() repeats the graph's arithmetic on the value that the stage before hands on, spec() says what
# comes out; samples() are for tests, its arguments for one shape: it has none.
def compute(value: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    q, scale = quantise(value)
    return value, {"q": q, "scale": scale}


def spec(value: Value) -> tuple[Value, dict[str, Spec]]:
    return value, {"q": (value.sizes, torch.int16), "scale": ((*value.sizes[:-1], 1), torch.float32)}


def samples(sample: Sample) -> Sequence[dict[str, Any]]:
    return [{}]


INT16 = Stage("int16_quant", {}, compute, spec, samples, outputs=("q", "scale"), label=lambda attributes, sizes: "row")

# 3. The family: the stages in order. It makes every op: with and without the residual, with and without the norm's
# value where something else reads that.
FAMILY = Family("rms_norm_int16", (INPUT, maybe(RESIDUAL), RMS_NORM, INT16))

aiter_fusion.register_form(FORM)
aiter_fusion.register_family(FAMILY)


def main() -> None:
    norm = torch.nn.RMSNorm(512, dtype=torch.bfloat16)
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    oracle = aiter_fusion.Backend().oracle()
    with torch.no_grad():
        torch.compile(lambda x: quantise(norm(x)), backend=oracle)(x)
    print(oracle.report)
    print("the same bits as the original graph:", oracle.identical)
    for op in FAMILY.ops():
        finite = (given for given in op.samples() if given["x"].isfinite().all())  # opcheck takes NaN for a difference
        torch.library.opcheck(op.target, (*next(finite).values(), "reference"))
        print("opcheck:", op.name)


if __name__ == "__main__":
    main()
