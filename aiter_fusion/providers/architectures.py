"""AMD's GPU architectures that this package knows: their FP8 format, and what AITER's kernels lack on them."""

from __future__ import annotations

from typing import NamedTuple

import torch

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz


class Architecture(NamedTuple):
    """One architecture.

    fp8:          the format that its matrix cores read.
    experimental: AITER calls its support so. Then AITER is used only where it is asked for by name.
    hip_converts: AITER's HIP kernels convert to FP8; where this is False, they write zeros.
    all_reduces:  AITER has fused all-reduces for it.
    """

    fp8: torch.dtype
    experimental: bool = True
    hip_converts: bool = True
    all_reduces: bool = True


# Source: ROCm/aiter, v0.1.20.post1.
ARCHITECTURES = {
    #                       FP8   experimental  hip_converts  all_reduces
    "gfx942": Architecture(FNUZ, False, True, True),  # MI300
    "gfx950": Architecture(FN, False, True, True),  # MI350
    "gfx1100": Architecture(FN, True, False, True),
    "gfx1151": Architecture(FN, True, False, True),
    "gfx1201": Architecture(FN, True, True, True),
    "gfx1250": Architecture(FN, True, True, False),
}
SUPPORTED = tuple(name for name, row in ARCHITECTURES.items() if not row.experimental)
