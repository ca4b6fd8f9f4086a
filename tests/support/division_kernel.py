"""A kernel that only divides, in a module of its own because Triton compiles no functions of tests."""

import triton
import triton.language as tl

from aiter_fusion.providers.triton.kernels.steps import shared_division


@triton.jit
def divide_kernel(x, s, q, n, BLOCK: tl.constexpr):
    """Codes of ``x / s`` with a scale for each element."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value, scale = tl.load(x + at, mask=inside, other=0.0), tl.load(s + at, mask=inside, other=1.0)
    tl.store(q + at, shared_division(value, scale, True).to(q.dtype.element_ty), mask=inside)
