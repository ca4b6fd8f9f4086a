"""Calls that take every path of the provider ``aiter``, and the comparison of their results with the op's contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aiter_fusion.op import FusedOp
from aiter_fusion.passes.verify import difference
from aiter_fusion.providers import PROVIDERS
from aiter_fusion.registry import REGISTRY
from aiter_fusion.scale_program import is_of_bytes

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
AITER = PROVIDERS["aiter"]


def quantiser(block: int, dtype: torch.dtype) -> dict[str, Any]:
    top = torch.finfo(dtype).max
    return {
        "block": block,
        "column_major": False,
        "scale_steps": f"div={top} float32",
        "factor_steps": f"div={top} float32",
        "value_steps": f"float32 div_scale clamp_min={-top} clamp_max={top}",
        "quant_dtype": dtype,
    }


def static(dtype: torch.dtype) -> dict[str, Any]:
    top = torch.finfo(dtype).max
    values = f"float32 div_scale clamp_min={-top} clamp_max={top}"
    return {"scale": torch.full((1, 1), 0.02), "factor_steps": "", "value_steps": values, "quant_dtype": dtype}


@dataclass(frozen=True)
class Drive:
    """A call: the op's family and features, the size of its tensors, and what differs from a plain norm."""

    family: str
    features: str
    sizes: tuple[int, ...]
    block: int = 0  # 0: the row
    changes: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype = BF16

    def arguments(self, fp8: torch.dtype, seed: int = 0) -> tuple[FusedOp, dict[str, Any]]:
        features = frozenset(self.features.split())
        generator = torch.Generator().manual_seed(seed)
        width = self.sizes[-1]

        def tensor(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator).to(self.dtype)

        quant = static(fp8) if "static" in features else quantiser(self.block or width, fp8)
        if self.family != "act_mul_quant":
            given = {"x": tensor(*self.sizes), "weight": tensor(width), "offset": None}
            given |= {"eps": 1e-5, "eps_tensor": None}
            given |= {"cast_first": True, "dtype": self.dtype}
            if "add" in features:
                given |= {"residual": tensor(*self.sizes), "sum_dtype": self.dtype, "residual_dtype": self.dtype}
            given |= {"other": None, "group": "0"}  # PyTorch's name of the default group
        else:
            given = {"gate_up": tensor(*self.sizes[:-1], 2 * width), "gate_first": True, "interleaved": False}
            given |= {"act": "silu", "cast_first": True, "dtype": self.dtype}
        op = REGISTRY.ops[self.family, features]
        given |= quant | dict(self.changes)
        return op, {name: given[name] for name in op.arguments}


NORM, ACT = "rms_norm_quant", "act_mul_quant"
# torchao's MXFP8; gfx950's format, whatever the GPU's is.
BYTES = (
    ("scale_steps", "float32 div=448.0 e8m0"),
    ("factor_steps", "float32 div=448.0 e8m0_inverse"),
    ("value_steps", "float32 mul_scale clamp_min=-448.0 clamp_max=448.0"),
    ("quant_dtype", torch.float8_e4m3fn),
)
F32_WEIGHT = ("weight", torch.linspace(0.5, 1.5, 256))
# Every path, by the entry point that must be called.
DRIVES = {
    "rmsnorm_quant": [
        Drive(NORM, "", (5, 256)),
        Drive(NORM, "", (1, 2880), dtype=F16),
        Drive(NORM, "", (2, 3, 256), 128),
        Drive(NORM, "", (3, 4096), 64),
        Drive(NORM, "", (2, 8192), 128),
        Drive(NORM, "", (1, 72)),
        Drive(NORM, "", (4, 256), changes=(("factor_steps", "float32 unless_positive=1.0 div=240.0"),)),
        Drive(NORM, "", (4, 256), 16, changes=(("eps", 1e-2), ("factor_steps", "float32 clamp_min=1e-10 div=240.0"))),
        Drive(NORM, "", (2, 5120)),  # a scale for the row, where groups would be refused
        Drive(NORM, "", (5, 256), changes=(("offset", 1.0), ("cast_first", False))),
    ],
    "add_rmsnorm_quant": [
        Drive(NORM, "add", (5, 256)),
        Drive(NORM, "add", (2, 3, 256), 128, dtype=F16),
        Drive(NORM, "add", (5, 256), 32, changes=(("offset", 1.0), ("cast_first", False), ("sum_dtype", F32))),
    ],
    "fused_rms_fp8_group_quant": [
        Drive(NORM, "", (3, 5120), 128),
        Drive(NORM, "add", (3, 4608), 128),
        Drive(NORM, "", (2, 10240), 128),
        Drive(NORM, "", (2, 10240)),
        Drive(NORM, "value", (2, 3, 200)),
        Drive(NORM, "add value", (4, 256), 64),
        Drive(NORM, "", (4, 256), changes=(F32_WEIGHT, ("cast_first", False))),
        Drive(NORM, "", (1, 76)),
    ],
    "fused_rms_fp8_per_tensor_static_quant": [
        Drive(NORM, "static", (5, 256)),
        Drive(NORM, "static value add", (2, 3, 200)),
        Drive(
            NORM,
            "static",
            (5, 256),
            changes=(("factor_steps", "reciprocal"), ("value_steps", "mul_scale clamp_min=-240 clamp_max=240")),
        ),
    ],
    "silu_and_mul_quant": [Drive(ACT, "packed", (5, 256), 128), Drive(ACT, "packed", (2, 3, 8192), 64)],
    "act_mul_and_fp8_group_quant": [
        Drive(ACT, "packed", (3, 5120), 128),
        Drive(ACT, "packed", (2, 3, 256)),
        Drive(ACT, "packed", (3, 256), 64, changes=(("act", "gelu"),)),
        Drive(ACT, "packed", (3, 256), 64, changes=(("act", "gelu_tanh"), ("cast_first", False))),
        Drive(ACT, "packed", (3, 9600), 128, changes=(("act", "swish"),), dtype=F16),
    ],
    "fused_silu_mul_fp8_per_tensor_static_quant": [
        Drive(ACT, "packed static", (5, 200)),
        Drive(ACT, "packed static", (2, 3, 256), changes=(("cast_first", False),)),
    ],
}


def compare(op: FusedOp, arguments: dict[str, Any], have: dict[str, Tensor]) -> str | None:
    """How the outputs break the op's contract, or None; rows are finite and not zero."""
    want = op.reference(**arguments)
    for name in op.outputs:
        if (have[name].shape, have[name].stride()) != (want[name].shape, want[name].stride()):
            return f"{name}: {have[name].shape} {have[name].stride()}"
        doubles = is_of_bytes(arguments.get("factor_steps", ""))
        problem = difference(op, AITER, name, want[name], have[name], doubles=doubles)
        if problem is not None:
            return f"{name}: {problem}"
    return None
