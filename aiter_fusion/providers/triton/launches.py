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

# Kinds of stages: norms, by the kernel's name of them, and those that begin what the kernel of activations computes.
NORMS = {"rms_norm": "rms", "layer_norm": "layer"}
ACTIVATING = ("act_mul", "act", "cat")
# What rules of launches are called, by the name of the norm, and by the kind of the stage that activates.
NORM_RULES = {"rms": "norm", "layer": "layer_norm", "": "sum"}
ROW_RULES = {"act_mul": "row", "act": "act_row", "cat": "cat_row"}


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
    return (_act_quant if op.stages[0].kind in ACTIVATING else _norm_quant)(op, dict(arguments), nvidia)


def quantiser_arguments(
    op: FusedOp, arguments: Mapping[str, Any], width: int, value: torch.dtype, nvidia: bool
) -> dict[str, Any]:
    scales = granularity(op, arguments, width)
    assert scales is not None
    static = scales.name == "static"
    return {
        "scale": Ref("scale") if static else None,
        "maxima": None,
        "bound": Ref("bound") if "bound" in arguments else None,
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


def spans(arguments: Mapping[str, Any], width: int) -> int:
    """How many rows share a scale where several do, else 1."""
    block = arguments.get("block", 0)
    return block // width if block > width else 1


# The constant that is true of a norm's kernel where a call has no such argument.
_UNNORMED: Mapping[str, Any] = {"offset": None, "cast_first": False, "eps": None, "plus_one": False}


def _summand(op: FusedOp, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What is added to x before a norm, and what that is multiplied by."""
    residual = arguments.get("residual")
    apart = rows_of(residual) if residual is not None else None
    dtypes = {name: arguments.get(name, arguments["x"].dtype) for name in ("product_dtype", "sum_dtype")}
    return {
        "residual": Ref("residual") if residual is not None else None,
        "residual_out": Ref("residual_out") if residual is not None else None,
        "residual_stride": apart[1] if apart is not None else 0,
        "PRODUCT": dtype_name(dtypes["product_dtype"]),
        "SUM": dtype_name(dtypes["sum_dtype"]),
    }


def _once(arguments: Mapping[str, Any], name: str, rows: Int) -> dict[str, Any]:
    """A tensor of which each row stands for equally many consecutive ones of ``rows``."""
    found = rows_of(arguments[name]) if arguments.get(name) is not None else None
    period: Int = rows // torch.sym_max(1, found[0]) if found is not None else 1  # type: ignore[operator]
    return {
        name: Ref(name) if found is not None else None,
        f"{name}_stride": found[1] if found is not None else 0,
        f"{name}_period": torch.sym_max(1, period),
    }


def _norm_quant(op: FusedOp, arguments: dict[str, Any], nvidia: bool) -> Launches:
    x, residual = arguments["x"], arguments.get("residual")
    width = width_of(op, arguments)
    found = rows_of(x)
    assert found is not None
    rows, stride = found
    returned = op.shape(**arguments)
    value = returned["value"][1] if "value" in returned else arguments.get("sum_dtype", x.dtype)
    known = {**_UNNORMED, **arguments}
    z = rows_of(arguments["z"]) if "z" in arguments else None
    joined = spans(arguments, width)
    normed, width = width, width * joined
    common = {
        **quantiser_arguments(op, arguments, width, value, nvidia),
        **_summand(op, arguments),
        **{name: Ref(name) if name in arguments else None for name in ("scale2", "scale3", "bound2", "bound3")},
        **{name: Ref(name) if name in returned else None for name in ("q2", "q3")},
        **{f"{name}_out": Ref(name) if name in returned else None for name in ("scale2", "scale3")},
        "x": Ref("x"),
        **{name: Ref(name) if known.get(name) is not None else None for name in ("weight", "bias")},
        **{key: entry for name in ("gate", "gain", "shift") for key, entry in _once(arguments, name, rows).items()},
        "z": Ref("z") if z is not None else None,
        "rows": rows // joined,
        "x_stride": stride,
        "z_stride": z[1] if z is not None else 0,
        "eps": Ref("eps_tensor") if known.get("eps_tensor") is not None else None,
        "one": 1.0,
        "NORM": next((NORMS[stage.kind] for stage in op.stages if stage.kind in NORMS), ""),
        "EPS": known["eps"],
        "OFFSET": known["offset"],
        "CAST_FIRST": known["cast_first"],
        "DTYPE": dtype_name(known.get("dtype", value)),
        "PLUS_ONE": known["plus_one"],
        "ACT": known.get("act", ""),
        "ACT_DTYPE": dtype_name(known.get("act_dtype", value)),
        "BY_SEGMENT": joined > 1,
    }
    rows = common["rows"]
    if joined > 1:
        common["BLOCK"] = normed
    rule = "gated_norm" if z is not None else NORM_RULES[common["NORM"]]
    shape = rules.norm(width, common["BLOCK"], hint(rows, rules.FEW), rule)
    common |= _tiling(shape) | {"ROWS": shape.rows, "LATE": shape.late, "BLOCK": shape.block or common["BLOCK"]}
    grid = _programs(rows, shape.rows)
    if not _is_of_tensor(op, arguments, width):
        return Launches((Launch("norm_quant", grid, common, shape.warps(nvidia)),))
    finding, using = _finding(common), _using(common)
    if residual is not None:
        using["residual_out"] = None
        if arguments["residual_dtype"] == arguments["sum_dtype"]:
            read = {"x": Ref("residual_out"), "residual": None, "x_stride": width, "residual_stride": 0}
            using |= read | {"gate": None}
    return Launches(
        (
            Launch("norm_quant", rules.PARTS, finding, shape.warps(nvidia)),
            Launch("norm_quant", grid, using, shape.warps(nvidia)),
        ),
        {"maxima": ((rules.PARTS,), F32)},
    )


def _activation(arguments: Mapping[str, Any], first: torch.dtype, value: torch.dtype) -> dict[str, Any]:
    """The activation of values of the dtype ``first``, and its numbers. SiLU from bfloat16 to bfloat16 has a faster
    kernel that gives the same bits."""
    name, _, numbers = arguments["second_act" if "second" in arguments else "act"].partition("=")
    short = first == arguments["dtype"] == value == torch.bfloat16 and arguments.get("cast_first", True)
    if short and name in ("silu", "swish"):
        name = "silu_of_bfloat16"
    alpha, limit = map(float, numbers.split(",")) if numbers else (0.0, 0.0)
    return {"ACT": name, "ALPHA": alpha, "LIMIT": limit}


def _is_dense(stride: Int, width: int) -> bool:
    return statically_known_true(stride == width)


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
        "DENSE": not packed and all(_is_dense(stride, width) for stride in (found[1], apart[1])),
    }


# Where a kernel of activations finds its values if there is one tensor.
_ALONE: Mapping[str, Any] = {
    "up": None,
    "up_stride": 0,
    "before": None,
    "before_stride": 0,
    "GATE_FROM": 0,
    "UP_FROM": 0,
    "INTERLEAVED": False,
    "BEFORE": 0,
    "BEFORE_ACT": "",
}


def _beside(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Two tensors, the columns of the second after those of the first."""
    before, after = rows_of(arguments["first"]), rows_of(arguments["second"])
    assert before is not None
    assert after is not None
    return {
        "gate": Ref("second"),
        "rows": after[0],
        "gate_stride": after[1],
        "before": Ref("first"),
        "before_stride": before[1],
        "BEFORE": arguments["first"].shape[-1],
        "BEFORE_ACT": arguments["first_act"],
        "DENSE": False,
    }


def _activated(op: FusedOp, arguments: Mapping[str, Any], width: int) -> dict[str, Any]:
    """The tensors of activations, and how rows lie in them."""
    if op.stage("act_mul"):
        return {**_ALONE, **_gate_and_up(arguments, "packed" in op.features, width)}
    if op.stage("cat"):
        return {**_ALONE, **_beside(arguments)}
    found = rows_of(arguments["x"])
    assert found is not None
    placed = {"gate": Ref("x"), "rows": found[0], "gate_stride": found[1], "DENSE": _is_dense(found[1], width)}
    return {**_ALONE, **placed}


def _act_quant(op: FusedOp, arguments: dict[str, Any], nvidia: bool) -> Launches:
    packed = "packed" in op.features
    first = next(value for value in arguments.values() if isinstance(value, Tensor))
    width = width_of(op, arguments)
    value = op.shape(**arguments)["value"][1]
    quantiser = quantiser_arguments(op, arguments, width, value, nvidia)
    scales = granularity(op, arguments, width)
    by_row = scales is not None and scales.name == "token"
    common = quantiser | {
        **_activated(op, arguments, width),
        "one": 1.0,
        **_activation(arguments, first.dtype, value),
        "CAST_FIRST": arguments.get("cast_first", True),
        "DTYPE": dtype_name(arguments["dtype"]),
    }
    rows = common["rows"]
    if by_row:
        shape = rules.row(width, hint(rows, rules.FEW), ROW_RULES[op.stages[0].kind])
        grid = _programs(rows, 1)
    else:
        if not common["GROUPED"]:
            common["BLOCK"] = _segment(width)
        segments = rows * (width // common["BLOCK"])
        shape = rules.flat(common["BLOCK"], hint(segments, rules.FEW * 2048), common["GROUPED"], packed)
        grid = _programs(segments, shape.segments)
    common |= _tiling(shape)
    if not _is_of_tensor(op, arguments, width):
        return Launches((Launch("act_quant", grid, common, shape.warps(nvidia)),))
    return Launches(
        (
            Launch("act_quant", rules.PARTS, _finding(common), shape.warps(nvidia)),
            Launch("act_quant", grid, _using(common), shape.warps(nvidia)),
        ),
        {"maxima": ((rules.PARTS,), F32)},
    )
