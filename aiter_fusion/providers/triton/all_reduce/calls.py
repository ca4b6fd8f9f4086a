"""Calls of the all-reduce ops: the kernel's arguments, launched in pieces that fit the channel's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .... import config, machine
from ....op import FusedOp
from ....registry import REGISTRY
from ....stages.quantise import granularity
from ...collective import all_reduce_by_torch, refuse_group
from ...shapes import power_of_two, rows_of
from .. import eager, launches, rules
from ..jit import compiling_nothing, kernel
from .algorithms import at_once, choose, needed
from .symmetric import Channel, Communicator, communicator


def refuse(op: FusedOp, arguments: Mapping[str, Any]) -> str | None:
    """Why no kernel can take a call, from facts that are the same on all ranks; called after ``provider.refuse``."""
    if torch.version.hip is not None:
        return "its all-reduces are for NVIDIA GPUs: on AMD's, provider 'aiter' has them"
    return refuse_group(arguments["group"])


def _rows(x: Tensor, width: int) -> Tensor:
    """``x`` as ``[rows, width]``, a copy unless every row begins at a multiple of 16 bytes, which it loads."""
    found = rows_of(x)
    step = x.element_size()
    if found is None or x.stride(-1) != 1 or found[1] * step % 16 or x.data_ptr() % 16:
        return x.reshape(-1, width).clone(memory_format=torch.contiguous_format)
    if x.dim() == 2 and x.stride(0) == found[1]:
        return x
    return x.as_strided((int(found[0]), width), (int(found[1]), 1))


_constants: dict[tuple[Any, ...], dict[str, Any]] = {}


def constants(op: FusedOp, arguments: Mapping[str, Any], width: int, nvidia: bool) -> dict[str, Any]:
    """The kernel's compile-time constants that do not depend on the algorithm. Of tensors only the dtypes matter, so
    they are found once for each kind of call."""
    given = (value.dtype if isinstance(value, Tensor) else value for value in arguments.values())
    key = (op.family, op.features, width, nvidia, *given)
    if key not in _constants:
        _constants[key] = _found_constants(op, arguments, width, nvidia)
    return _constants[key]


def _found_constants(op: FusedOp, arguments: Mapping[str, Any], width: int, nvidia: bool) -> dict[str, Any]:
    value = op.shape(**arguments)["value"][1]
    if op.stage("fp8_quant"):
        quantiser = launches.quantiser_arguments(op, arguments, width, value, nvidia)
    else:
        quantiser = {"WIDTH": width, "BLOCK": width, "VALUE": launches.dtype_name(value), "GROUPED": False}
        quantiser |= {"SCALE_STEPS": (), "FACTOR_STEPS": (), "VALUE_STEPS": (), "COLUMN_MAJOR": False, "PTX": nvidia}
    names = ("WIDTH", "BLOCK", "VALUE", "GROUPED", "COLUMN_MAJOR", "SCALE_STEPS", "FACTOR_STEPS", "VALUE_STEPS", "PTX")
    return {name: quantiser[name] for name in names} | {
        "EPS": arguments["eps"],
        "OFFSET": arguments["offset"],
        "CAST_FIRST": arguments["cast_first"],
        "SUM": launches.dtype_name(arguments.get("sum_dtype", arguments["x"].dtype)),
        "DTYPE": launches.dtype_name(arguments["dtype"]),
        "SEGMENTS": power_of_two(width // quantiser["BLOCK"]),
        "SEGMENT": power_of_two(quantiser["BLOCK"]),
        "NORM": True,
    }


def launch(constants: Mapping[str, Any], rows: int, cores: int) -> dict[str, int]:
    """Launch options for blocks of one row each.

    While every block has a multiprocessor to itself, a thread has 8 elements. With more rows than that, 16 elements and
    64 registers a thread let two blocks of 8192 elements share a multiprocessor: one computes while the other polls.

    Args:
        cores: multiprocessors of the GPU.
    """
    elements = constants["SEGMENTS"] * constants["SEGMENT"]
    alone = rows <= cores
    threads = rules.threads(rules.MOST_THREADS, elements, each=8 if alone else 16)
    return {"num_warps": max(1, threads // rules.lanes(constants["PTX"])), **({} if alone else {"maxnreg": 64})}


def run(op: FusedOp, nvidia: bool, **arguments: Any) -> dict[str, Tensor]:
    """Compute a call, whose outputs are all new tensors.

    One scale for the whole tensor takes a second op, because its maximum is known only after all rows are reduced.

    Raises:
        LateRankError: an earlier kernel missed a rank.
        RuntimeError: memory would be registered, or a kernel compiled, while a CUDA graph is captured.
    """
    x = arguments["x"]
    scales = granularity(op, arguments, x.shape[-1])
    if scales is not None and scales.name == "tensor":
        return _then_quantise(op, nvidia, arguments)
    outputs = op.allocate(**arguments)
    tensors = {
        "q": outputs.get("q"),
        "scale_out": outputs.get("scale"),
        "value_out": outputs.get("value"),
        "residual_out": outputs.get("residual_out"),
        "reduced_out": outputs.get("reduced"),
    }
    _reduce(arguments, tensors, constants(op, arguments, x.shape[-1], nvidia))
    return outputs


def _then_quantise(op: FusedOp, nvidia: bool, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The all-reduce alone, then ``rms_norm_quant`` of the sum."""
    given = dict(arguments)
    sizes, dtype, *_ = op.shape(**arguments)["reduced"]
    x, other, group = given.pop("x"), given.pop("other"), given.pop("group")
    width = x.shape[-1]
    reduced = x.new_empty(sizes, dtype=dtype)
    known = constants(op, arguments, width, nvidia) | {"NORM": False, "BLOCK": width, "SEGMENTS": 1}
    known |= {"SEGMENT": power_of_two(width), "GROUPED": False, "COLUMN_MAJOR": False}
    nothing = dict.fromkeys(("q", "scale_out", "value_out", "residual_out"))
    _reduce({"x": x, "other": other, "group": group, "weight": None}, {**nothing, "reduced_out": reduced}, known)
    quantise = REGISTRY.overload("rms_norm_quant", op.features)
    assert quantise is not None
    return {**eager.run(quantise, x=reduced, **given), "reduced": reduced}


def _reduce(arguments: Mapping[str, Any], outputs: Mapping[str, Tensor | None], constants: dict[str, Any]) -> None:
    """Fill the outputs that are not None, by the algorithm for the call's size, in as many launches as its memory
    takes."""
    x, other, width = arguments["x"], arguments["other"], arguments["x"].shape[-1]
    rows = x.numel() // width
    known = communicator(arguments["group"], x.device)
    known.check()
    if rows == 0:
        return
    world, tensors = len(known.ranks), 1 if other is None else 2
    row_bytes = width * x.element_size()
    algorithm = choose(world, rows, width, x.element_size())
    channel = None
    if algorithm != "fallback":
        channel = known.channel(needed(algorithm, world, rows, tensors) * row_bytes)
    with torch.cuda.device(x.device), compiling_nothing() if machine.is_capturing() else contextlib.nullcontext():
        known.order.enter()
        if channel is None:
            algorithm = "fallback"
            x = all_reduce_by_torch(x, arguments["group"])
            other = None if other is None else all_reduce_by_torch(other, arguments["group"])
        views = _views({**arguments, "x": x, "other": other}, outputs, width)
        most = rows if channel is None else at_once(algorithm, world, tensors, channel.half // row_bytes)
        for first in range(0, rows, most):
            count = min(most, rows - first)
            piece = views if count == rows else _part(views, first, count)
            placed = _placed(algorithm, channel, known, count, rows, x)
            kernel(KERNEL)[(count,)](**piece, **constants, **placed, **launch(constants, count, known.cores))


KERNEL = "all_reduce_rms_norm"
WHOLE = ("weight", "scale", "eps")  # tensors that all rows share


def _part(views: Mapping[str, Any], first: int, count: int) -> dict[str, Any]:
    return {
        name: value[first : first + count] if isinstance(value, Tensor) and name not in WHOLE else value
        for name, value in views.items()
    }


def _views(arguments: Mapping[str, Any], outputs: Mapping[str, Tensor | None], width: int) -> dict[str, Any]:
    """The kernel's tensors as rows, and the strides of the inputs' rows."""
    rows = {
        name: None if arguments.get(name) is None else _rows(arguments[name], width)
        for name in ("x", "other", "residual")
    }
    strides = {f"{name}_stride": 0 if tensor is None else tensor.stride(0) for name, tensor in rows.items()}
    made = {
        name: None if tensor is None else tensor.view(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor[None]
        for name, tensor in outputs.items()
    }
    eps = launches.number_or_pointer(arguments.get("eps_tensor"))
    return {**rows, **strides, **made, "weight": arguments["weight"], "scale": arguments.get("scale"), "eps": eps}


def _placed(
    algorithm: str, channel: Channel | None, known: Communicator, rows: int, all_rows: int, x: Tensor
) -> dict[str, Any]:
    """The kernel's arguments about the ranks and their memory; without a channel the kernel runs on this rank alone.

    Args:
        rows: of this launch.
        all_rows: of the call, which may take several launches.
    """
    return {
        "peers": None if channel is None else channel.peers,
        "epoch": None if channel is None else channel.epoch,
        "failed": None if channel is None else known.failed,
        "late": None if channel is None else known.late,
        "rank": known.rank,
        "rows": rows,
        "all_rows": all_rows,
        "half": 0 if channel is None else channel.half,
        "limit": int(config.timeout() * 1e9),
        "ALGORITHM": algorithm,
        "TICKETS": rows > known.cores,
        "W": 1 if channel is None else len(known.ranks),
        "ITEM": x.element_size(),
    }
