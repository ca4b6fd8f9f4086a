"""How far results of the bridge's ops may be from their references."""

from __future__ import annotations

import torch
from torch import Tensor

# How far results of one arithmetic may be apart that sum in another order and round once: two codes of the result's
# dtype, of the largest value in the row of which the sum is part.
APART = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}
# Quantised values may have the next code, since kernels multiply by the reciprocal of the scale: FP8's is 2**-3 of a
# value away, and among the smallest 2**-9 (FNUZ: 2**-10).
CODE, LEAST_CODE = 2**-3, 2**-9
# Experts quantise what their first product rounded: some of the inner values go to the next FP8 code, 2**-4 away.
APART_QUANTISED = 2**-5


def alike(want: Tensor, have: Tensor, apart: float = 0.0) -> bool:
    assert (want.shape, want.dtype) == (have.shape, have.dtype)
    if want.dtype is torch.int8:
        return bool(((want.int() - have.int()).abs() <= 1).all())
    if not want.is_floating_point():
        return torch.equal(want, have)
    if want.itemsize == 1:
        near = (want.float() - have.float()).abs() <= want.float().abs() * CODE + LEAST_CODE
        return bool(near.all())
    want, have, least = want.float(), have.float(), apart or APART[want.dtype]
    finite = torch.where(want.isfinite(), want, 0.0)  # an lse may be infinite
    size = finite.abs().amax(-1, keepdim=True) if want.numel() else want
    return bool(((want == have) | ((want - have).abs() <= least * size)).all())


def same_routing(want: tuple[Tensor, Tensor], have: tuple[Tensor, Tensor]) -> bool:
    """The same experts and weights, in whichever order."""
    dense = []
    for weights, ids in (want, have):
        dense.append(torch.zeros(weights.shape[0], 256).scatter_(1, ids.long(), weights.float()))
    return torch.allclose(*dense, rtol=1e-5)
