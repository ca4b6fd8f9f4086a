"""The kernels of a call and their arguments, from shapes alone: for real tensors and for fakes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...op import FusedOp, width_of
from ...stages.quantise import granularity
from ..shapes import Int, hint, rows_of
from . import programs, rules
from .launch import Launch, Launches, Ref
from .whole import WHOLE

F32 = torch.float32


def is_known(op: FusedOp, arguments: Mapping[str, Any]) -> bool:
    """Whether the launches of a call are the same whatever its symbolic sizes are; else every call chooses its own."""
    return op.family not in WHOLE or WHOLE[op.family].is_known(arguments)


def has_site(op: FusedOp, arguments: Mapping[str, Any]) -> bool:
    """Whether a compiled graph may call ``site`` where launches are not known, which the op's dispatch would cost."""
    return WHOLE[op.family].has_site(arguments)


def site(op: FusedOp) -> Callable[..., Any]:
    """What a compiled graph calls where launches are not known: it takes the op's arguments and chooses at every
    call."""
    return WHOLE[op.family].site(op)


def number_or_pointer(eps: Tensor | None) -> float | Tensor | None:
    """The kernel's argument for an eps that is a tensor. Kernels cannot load from host memory, so there it is the
    value."""
    return eps.item() if eps is not None and eps.device.type == "cpu" else eps


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _segment(width: int) -> int:
    """The largest power of two up to 128 that divides the hidden size."""
    return math.gcd(width, 128)


def of(op: FusedOp, arguments: Mapping[str, Any], nvidia: bool) -> Launches:
    """The kernels of a call that ``refuse`` accepts."""
    if op.family in WHOLE:
        return WHOLE[op.family].of(arguments)
    return (_act_mul_quant if op.stage("act_mul") else _rms_norm_quant)(op, dict(arguments), nvidia)


def quantiser_arguments(
    op: FusedOp, arguments: Mapping[str, Any], width: int, value: torch.dtype, nvidia: bool
) -> dict[str, Any]:
    scales = granularity(op, arguments, width)
    assert scales is not None
    static = scales.name == "static"
    return {
        "scale": Ref("scale") if static else None,
        "maxima": None,
        "q": Ref("q"),
        "scale_out": None if static else Ref("scale"),
        "value_out": Ref("value") if "value" in op.features else None,
        "maxima_out": None,
        "WIDTH": width,
        "BLOCK": scales.block or width,
        "VALUE": dtype_name(value),
        "GROUPED": scales.name == "group",
        "COLUMN_MAJOR": arguments.get("column_major", False),
        "SCALE_STEPS": programs.steps(arguments.get("scale_steps", "")),
        "FACTOR_STEPS": programs.steps(arguments["factor_steps"]),
        "VALUE_STEPS": programs.value_steps(
            arguments["value_steps"],
            arguments["factor_steps"],
            value,
            arguments["quant_dtype"],
            scales.name in ("token", "group"),
            nvidia,
        ),
        "PARTS": 1,
        "PTX": nvidia,
    }


def _is_of_tensor(op: FusedOp, arguments: Mapping[str, Any], width: int) -> bool:
    """Whether one scale is for the whole tensor. Its maximum is known only after all rows are, so it takes two
    launches."""
    scales = granularity(op, arguments, width)
    return scales is not None and scales.name == "tensor"


def _finding(common: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the first of two launches, which finds the maximum."""
    return {**common, "maxima_out": Ref("maxima"), "q": None, "scale_out": None}


def _using(common: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the second of two launches, which uses the maximum."""
    return {**common, "maxima": Ref("maxima"), "PARTS": rules.PARTS, "value_out": None}


def _tiling(shape: rules.Shape) -> dict[str, Any]:
    return {"SEGMENTS": shape.segments, "SEGMENT": shape.segment, "TILES": shape.tiles, "RUN": shape.run}


def _programs(rows: Int, together: int) -> Int:
    """Programs for all rows, at least one: a scale for the whole tensor is written even if there are no rows."""
    programs: Int = torch.sym_max(1, (rows + together - 1) // together)  # type: ignore[assignment]
    return programs


def _rms_norm_quant(op: FusedOp, arguments: dict[str, Any], nvidia: bool) -> Launches:
    x, residual, weight = arguments["x"], arguments.get("residual"), arguments["weight"]
    width = width_of(op, x)
    found = rows_of(x)
    assert found is not None
    rows, stride = found
    apart = rows_of(residual) if residual is not None else None
    value = op.shape(**arguments)["value"][1]
    quantiser = quantiser_arguments(op, arguments, width, value, nvidia)
    sum_dtype = arguments.get("sum_dtype", x.dtype)
    common = quantiser | {
        "x": Ref("x"),
        "residual": Ref("residual") if residual is not None else None,
        "weight": Ref("weight") if weight is not None else None,
        "residual_out": Ref("residual_out") if residual is not None else None,
        "rows": rows,
        "x_stride": stride,
        "residual_stride": apart[1] if apart is not None else 0,
        "eps": Ref("eps_tensor") if arguments["eps_tensor"] is not None else None,
        "EPS": arguments["eps"],
        "OFFSET": arguments["offset"],
        "CAST_FIRST": arguments["cast_first"],
        "SUM": dtype_name(sum_dtype),
        "DTYPE": dtype_name(arguments["dtype"]),
    }
    shape = rules.norm(width, common["BLOCK"], hint(rows, rules.FEW))
    common |= _tiling(shape) | {"ROWS": shape.rows}
    grid = _programs(rows, shape.rows)
    if not _is_of_tensor(op, arguments, width):
        return Launches((Launch("rms_norm_quant", grid, common, shape.warps(nvidia)),))
    finding, using = _finding(common), _using(common)
    if residual is not None:
        using["residual_out"] = None
        if arguments.get("residual_dtype", x.dtype) == sum_dtype:
            using |= {"x": Ref("residual_out"), "residual": None, "x_stride": width, "residual_stride": 0}
    return Launches(
        (
            Launch("rms_norm_quant", rules.PARTS, finding, shape.warps(nvidia)),
            Launch("rms_norm_quant", grid, using, shape.warps(nvidia)),
        ),
        {"maxima": ((rules.PARTS,), F32)},
    )


def _activation(arguments: Mapping[str, Any], value: torch.dtype) -> dict[str, Any]:
    """The activation and its numbers. SiLU from bfloat16 to bfloat16 has a faster kernel that gives the same bits."""
    name, _, numbers = arguments["act"].partition("=")
    first = arguments["gate_up" if "gate_up" in arguments else "gate"]
    short = first.dtype == arguments["dtype"] == value == torch.bfloat16 and arguments["cast_first"]
    if short and name in ("silu", "swish"):
        name = "silu_of_bfloat16"
    alpha, limit = map(float, numbers.split(",")) if numbers else (0.0, 0.0)
    return {"ACT": name, "ALPHA": alpha, "LIMIT": limit}


def _gate_and_up(arguments: Mapping[str, Any], packed: bool, width: int) -> dict[str, Any]:
    """Where a kernel finds gate and up: in two tensors, in halves of one, or in its even and odd columns."""
    gate = arguments["gate_up" if packed else "gate"]
    found, apart = rows_of(gate), rows_of(gate if packed else arguments["up"])
    assert found is not None
    assert apart is not None
    interleaved, gate_first = arguments.get("interleaved", False), arguments.get("gate_first", True)
    second = (1 if interleaved else width) if packed else 0
    return {
        "gate": Ref("gate_up" if packed else "gate"),
        "up": Ref("gate_up" if packed else "up"),
        "rows": found[0],
        "gate_stride": found[1],
        "up_stride": apart[1],
        "GATE_FROM": 0 if gate_first else second,
        "UP_FROM": second if gate_first else 0,
        "INTERLEAVED": interleaved,
        "DENSE": not packed and all(statically_known_true(stride == width) for stride in (found[1], apart[1])),
    }


def _act_mul_quant(op: FusedOp, arguments: dict[str, Any], nvidia: bool) -> Launches:
    packed = "packed" in op.features
    width = width_of(op, arguments["gate_up" if packed else "gate"])
    value = op.shape(**arguments)["value"][1]
    quantiser = quantiser_arguments(op, arguments, width, value, nvidia)
    scales = granularity(op, arguments, width)
    by_row = scales is not None and scales.name == "token"
    common = quantiser | {
        **_gate_and_up(arguments, packed, width),
        "one": 1.0,
        **_activation(arguments, value),
        "CAST_FIRST": arguments["cast_first"],
        "DTYPE": dtype_name(arguments["dtype"]),
    }
    rows = common["rows"]
    if by_row:
        shape = rules.row(width, hint(rows, rules.FEW))
        grid = _programs(rows, 1)
    else:
        if not common["GROUPED"]:
            common["BLOCK"] = _segment(width)
        segments = rows * (width // common["BLOCK"])
        shape = rules.flat(common["BLOCK"], hint(segments, rules.FEW * 2048), common["GROUPED"], packed)
        grid = _programs(segments, shape.segments)
    common |= _tiling(shape)
    if not _is_of_tensor(op, arguments, width):
        return Launches((Launch("act_mul_quant", grid, common, shape.warps(nvidia)),))
    return Launches(
        (
            Launch("act_mul_quant", rules.PARTS, _finding(common), shape.warps(nvidia)),
            Launch("act_mul_quant", grid, _using(common), shape.warps(nvidia)),
        ),
        {"maxima": ((rules.PARTS,), F32)},
    )
