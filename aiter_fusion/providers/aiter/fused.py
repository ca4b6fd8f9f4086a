"""The fused ops by AITER's kernels: which entry point takes which call, and how it is called.

An entry point's limits stand here as data, as AITER documents them or its source shows. Its outputs are brought into
the op's own contract: values ``[..., H]``, scales ``[..., H / block]`` in float32, contiguous, strides that are true.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ... import platform
from ...domains import (
    ANYTHING,
    FLAG,
    GROUP,
    TENSOR,
    TOKEN,
    Activations,
    Blocks,
    Domain,
    Number,
    OneOf,
    Sizes,
    Steps,
    Tensors,
)
from ...op import FusedOp, width_of
from ..terms import Terms
from ..triton.launches import rows_of
from ..triton.rules import power_of_two
from . import quantiser
from .entry_points import EntryPoint, call, probe

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)

# Elements that a thread of AITER's HIP kernels takes, by the row's length up to which it does; groups must be whole
# numbers of threads, a power of two of them. The quantising activation does not check, and is silently wrong.
THREADS = ((2048, 8), (4096, 16), (6144, 24), (8192, 32))
WAVE = 64


@dataclass(frozen=True)
class Limits:
    """What an entry point takes.

    scales:  granularities: ``token``, ``group``, ``static``, or ``none`` where nothing is quantised.
    needs:   features that a call must have: ``add``, ``offset``, ``value``.
    may:     features that it may have besides: ``add``, ``value``.
    widest:  the longest row.
    dense:   whether rows must follow each other without gaps.
    by_wave: whether groups are divided among threads as ``THREADS`` says.
    alike:   whether the weight must be of the dtype of x: kernels reinterpret it, unchecked.
    powers:  granularities whose blocks must be a power of two of elements.
    acts:    activations, by their names here, and what AITER calls them.
    """

    scales: frozenset[str]
    needs: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    widest: int = 8192
    dense: bool = False
    by_wave: bool = False
    alike: bool = False
    powers: frozenset[str] = frozenset()
    acts: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Call:
    """A call of a fused op, in AITER's terms.

    gaps: which of its tensors have gaps between rows; width: of a row of values; block: elements that share a scale (0:
    given from outside).
    """

    op: FusedOp
    arguments: Mapping[str, Any]
    x: Tensor
    gaps: tuple[str, ...]
    width: int
    block: int

    @property
    def scales(self) -> str:
        if "quant_dtype" not in self.op.arguments:
            return "none"
        if "static" in self.op.features:
            return "static"
        return "tensor" if self.block == 0 else "token" if self.block == self.width else "group"

    @property
    def features(self) -> frozenset[str]:
        offset = {"offset"} if self.arguments.get("offset") is not None else set()
        return (self.op.features & {"add", "value"}) | offset


def why_zeros(given: Call) -> str | None:
    """Why a HIP kernel that converts to FP8 writes zeros, or None if it does not."""
    arch = platform.architecture(given.x.device.index or 0)
    known = platform.ARCHITECTURES.get(arch or "")
    if known is None or known.hip_converts:
        return None
    return f"writes zeros on {arch}: HIP's conversion to FP8 is not written for it yet"


@dataclass(frozen=True)
class Candidate:
    """One way to compute calls of a fused op: an entry point, and what it takes."""

    family: str
    entry: EntryPoint
    limits: Limits

    def is_for(self, given: Call) -> bool:
        """Whether it computes such calls at all: their granularity, inputs and outputs."""
        needs = self.limits.needs
        return given.scales in self.limits.scales and needs <= given.features <= needs | self.limits.may

    def why_not(self, given: Call) -> str | None:
        """Why this path, which is for such calls, cannot take one, or None; ``probe`` asks the installed version."""
        limits = self.limits
        if self.entry.homes == ("aiter",) and (why := why_zeros(given)) is not None:
            return why
        if given.width > limits.widest:
            return f"takes rows of up to {limits.widest}, not {given.width}"
        if limits.acts is not None and given.arguments["act"] not in limits.acts:
            return f"has no activation {given.arguments['act']}"
        if limits.dense and given.gaps:
            return f"wants rows without gaps, and {', '.join(given.gaps)} has them"
        if limits.dense and given.width % 8:
            return f"loads 8 elements at a time, which rows of {given.width} do not divide into"
        if limits.alike and given.arguments["weight"].dtype != given.x.dtype:
            return f"reads the weight as {given.x.dtype}, and it is {given.arguments['weight'].dtype}"
        if limits.by_wave and given.scales == "group":
            each = next(taken for upto, taken in THREADS if given.width <= upto)
            threads = given.block // each
            if given.block % each or threads & (threads - 1) or threads > WAVE:
                return f"gives each thread {each} elements of rows of {given.width}, and groups are of {given.block}"
        if given.scales in limits.powers and given.block & (given.block - 1):
            return f"takes blocks of a power of two of elements, not of {given.block}"
        return None


@dataclass(frozen=True)
class Path(Candidate):
    """One that this process computes alone, and how it is called.

    ``run(call, rows, outputs)`` gets a function that makes an argument 2-D, and the outputs, allocated and 2-D; it
    returns those that AITER allocated itself.
    """

    run: Callable[[Path, Call, Callable[[str], Tensor], Mapping[str, Tensor]], Mapping[str, Tensor]]


_QUANT = ("aiter.ops.triton.quant.fused_fp8_quant", "aiter.ops.triton.fused_fp8_quant")
_NORM = ("input", "weight", "epsilon")


def _hip_norm(
    path: Path, given: Call, rows: Callable[[str], Tensor], out: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    add = "add" in given.op.features
    residual = {"residual_in": rows("residual"), "residual_out": out["residual_out"]} if add else {}
    offset = {"gemma_norm": True} if "offset" in given.features else {}
    call(
        path.entry,
        out=out["q"],
        input=rows("x"),
        **residual,
        scale=out["scale"],
        weight=given.arguments["weight"],
        epsilon=given.arguments["eps"],
        group_size=given.block if given.scales == "group" else 0,
        shuffle_scale=False,
        **offset,
    )
    return {}


def _triton_norm(
    path: Path, given: Call, rows: Callable[[str], Tensor], out: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    (q, scale), value, _, residual = call(
        path.entry,
        inp1=rows("x"),
        inp1_weight=given.arguments["weight"],
        inp1_epsilon=given.arguments["eps"],
        # a group that covers the row is a scale for the row; groups are of a power of two
        group_size=power_of_two(given.block),
        dtype_quant=given.arguments["quant_dtype"],
        res1=rows("residual") if "add" in given.op.features else None,
        output_unquantized_inp1="value" in given.op.features,
        transpose_scale=False,
    )
    return {"q": q, "scale": scale, "value": value, "residual_out": residual}


def _triton_static_norm(
    path: Path, given: Call, rows: Callable[[str], Tensor], out: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    q, value, _, residual = call(
        path.entry,
        inp1=rows("x"),
        inp1_weight=given.arguments["weight"],
        inp1_epsilon=given.arguments["eps"],
        inp1_scale=given.arguments["scale"].reshape(1),
        dtype_quant=given.arguments["quant_dtype"],
        res1=rows("residual") if "add" in given.op.features else None,
        output_unquantized_inp1="value" in given.op.features,
        rmsnorm_convert_to_inp1_type=True,
    )
    return {"q": q, "value": value, "residual_out": residual}


def _hip_act(path: Path, given: Call, rows: Callable[[str], Tensor], out: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    call(
        path.entry,
        out=out["q"],
        input=rows("gate_up"),
        scale=out["scale"],
        group_size=given.block,
        limit=0.0,
        shuffle_scale=False,
    )
    return {}


def _triton_act(
    path: Path, given: Call, rows: Callable[[str], Tensor], out: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    assert path.limits.acts is not None
    q, scale = call(
        path.entry,
        x=rows("gate_up"),
        activation=path.limits.acts[given.arguments["act"]],
        group_size=given.block,
        dtype_quant=given.arguments["quant_dtype"],
    )
    return {"q": q, "scale": scale}


def _triton_static_act(
    path: Path, given: Call, rows: Callable[[str], Tensor], out: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    q = call(
        path.entry,
        inp=rows("gate_up"),
        inp_scale=given.arguments["scale"].reshape(1),
        dtype_quant=given.arguments["quant_dtype"],
        silu_convert_to_inp_type=given.arguments["cast_first"],
    )
    return {"q": q}


def _hip_norm_path(name: str, *needs: str) -> Path:
    residual = ("residual_in", "residual_out") if "add" in needs else ()
    offset = ("gemma_norm",) if "offset" in needs else ()
    keywords = ("out", *_NORM, *residual, "scale", "group_size", "shuffle_scale", *offset)
    limits = Limits(frozenset({"token", "group"}), frozenset(needs), dense=True, by_wave=True, alike=True)
    return Path("rms_norm_quant", EntryPoint(name, ("aiter",), keywords), limits, _hip_norm)


_TRITON_NORM = ("inp1", "inp1_weight", "inp1_epsilon", "dtype_quant", "res1", "output_unquantized_inp1")
_SILU = {"silu": "silu", "swish": "silu"}

# In order of preference: HIP kernels first, as AITER's own models use them.
PATHS = (
    _hip_norm_path("rmsnorm_quant"),
    _hip_norm_path("rmsnorm_quant", "offset"),
    _hip_norm_path("add_rmsnorm_quant", "add"),
    _hip_norm_path("add_rmsnorm_quant", "add", "offset"),
    Path(
        "rms_norm_quant",
        EntryPoint("fused_rms_fp8_group_quant", _QUANT, (*_TRITON_NORM, "group_size", "transpose_scale")),
        # one program holds a row: past this it no longer fits into registers
        Limits(
            frozenset({"token", "group"}), may=frozenset({"add", "value"}), widest=16384, powers=frozenset({"group"})
        ),
        _triton_norm,
    ),
    Path(
        "rms_norm_quant",
        EntryPoint(
            "fused_rms_fp8_per_tensor_static_quant",
            _QUANT,
            (*_TRITON_NORM, "inp1_scale", "rmsnorm_convert_to_inp1_type"),
        ),
        Limits(frozenset({"static"}), may=frozenset({"add", "value"}), widest=16384),
        _triton_static_norm,
    ),
    Path(
        "act_mul_quant",
        EntryPoint("silu_and_mul_quant", ("aiter",), ("out", "input", "scale", "group_size", "limit", "shuffle_scale")),
        Limits(frozenset({"group"}), dense=True, by_wave=True, powers=frozenset({"group"}), acts=_SILU),
        _hip_act,
    ),
    Path(
        "act_mul_quant",
        EntryPoint(
            "act_mul_and_fp8_group_quant",
            ("aiter.ops.triton.activation",),
            ("x", "activation", "group_size", "dtype_quant"),
        ),
        Limits(
            frozenset({"token", "group"}),
            widest=16384,
            powers=frozenset({"token", "group"}),  # the last of a row is loaded without regard for its end
            acts=_SILU | {"gelu": "gelu", "gelu_tanh": "gelu_tanh"},
        ),
        _triton_act,
    ),
    Path(
        "act_mul_quant",
        EntryPoint(
            "fused_silu_mul_fp8_per_tensor_static_quant",
            _QUANT,
            ("inp", "inp_scale", "dtype_quant", "silu_convert_to_inp_type"),
        ),
        Limits(frozenset({"static"}), widest=16384, acts=_SILU),
        _triton_static_act,
    ),
)


def terms(candidates: Sequence[Candidate], op: FusedOp) -> Terms | None:
    """What of an op one of the candidates at least computes."""
    limits = [candidate.limits for candidate in candidates if candidate.family == op.family]
    if not limits:
        return None
    scales = frozenset().union(*(limit.scales for limit in limits))
    features = frozenset({"packed"}).union(scales & {"static"}, *(limit.needs | limit.may for limit in limits))
    acts = dict.fromkeys((act for limit in limits for act in limit.acts or ()), ())
    arguments: dict[str, Domain] = {
        **dict.fromkeys(("x", "residual", "gate", "up", "gate_up"), Tensors(HALVES)),
        **dict.fromkeys(("dtype", "residual_dtype"), OneOf(HALVES)),
        **dict.fromkeys(("cast_first", "gate_first", "interleaved", "column_major"), FLAG),
        **dict.fromkeys(("other", "group"), ANYTHING),  # ``all_reduce.refuse`` looks at them
        "weight": Tensors(FLOATS),
        "sum_dtype": OneOf(FLOATS),
        "eps": Number(optional=True),  # ``refuse`` says that it takes no tensor in its place
        "eps_tensor": ANYTHING,
        "offset": OneOf((None, 1.0)),
        "act": Activations(acts),
        "block": Blocks(tuple(name for name in (TENSOR, TOKEN, GROUP) if name in scales)),
        "scale": Tensors((torch.float32,), elements=1),
        "scale_steps": Steps(quantiser.STEPS),
        "factor_steps": Steps(quantiser.STEPS),
        "value_steps": Steps((*quantiser.STEPS, *quantiser.COMBINING)),
        "quant_dtype": OneOf((torch.float8_e4m3fn, torch.float8_e4m3fnuz)),
    }
    return Terms(arguments, features - {"offset"}, Sizes(8, max(limit.widest for limit in limits)))


def describe(op: FusedOp, arguments: Mapping[str, Any]) -> Call | str:
    """The call in AITER's terms, or why none of its kernels can take it, whichever it is."""
    if (eps := arguments.get("eps_tensor")) is not None:
        return f"its norms take eps as a number, and here it is a {eps.dtype} tensor on {eps.device}"
    tensors = {name: v for name, v in arguments.items() if isinstance(v, Tensor) and name not in ("scale", "weight")}
    x = next(iter(tensors.values()))
    if x.dtype not in HALVES:
        return f"{next(iter(tensors))} is {x.dtype}, and its kernels take bfloat16 and float16"
    gaps = []
    for name, tensor in tensors.items():
        if tensor.dtype != x.dtype:
            return f"{name} is {tensor.dtype}, {next(iter(tensors))} {x.dtype}"
        if not isinstance(tensor.shape[-1], int):
            return f"the width of {name} is known only at run time"
        found = rows_of(tensor) if statically_known_true(tensor.stride(-1) == 1) else None
        if found is None:
            return f"the rows of {name} are not evenly spaced (strides {tuple(tensor.stride())})"
        if not statically_known_true(found[1] == tensor.shape[-1]):
            gaps.append(name)
    given = _numerics(op, arguments, x)
    if given is not None:
        return given
    width = width_of(op, x)
    if width < 8:
        return f"rows of {width} elements"
    return Call(op, arguments, x, tuple(gaps), width, arguments.get("block", 0))


def _numerics(op: FusedOp, arguments: Mapping[str, Any], x: Tensor) -> str | None:
    """Why AITER's kernels compute something else than the call asks for, roundings apart, or None."""
    value = op.shape(**arguments)["value"][1]
    if value != x.dtype:
        what = "quantised" if "quant_dtype" in op.arguments else "normalised"
        return f"what is {what} is {value}, and its kernels work on {x.dtype} all through"
    if "weight" in op.arguments:
        if arguments["weight"] is None:
            return "its norms have a weight"
        if not statically_known_true(arguments["weight"].stride(0) == 1):
            return f"the elements of the weight are {arguments['weight'].stride(0)} apart"
        if arguments["offset"] not in (None, 1.0):
            return f"the offset of the weight is {arguments['offset']}, and it adds 1 or nothing"
        if "add" in op.features and arguments["residual_dtype"] != x.dtype:
            return f"the sum leaves as {arguments['residual_dtype']}, and its kernels round it to {x.dtype}"
    else:
        if "packed" not in op.features:
            return "its activations take gate and up as halves of one tensor"
        if arguments["interleaved"] or not arguments["gate_first"]:
            return "its activations want gate in the first half of the columns, up in the second"
    if "quant_dtype" not in op.arguments:
        return None
    steps = {name: arguments[name] for name in ("factor_steps", "value_steps", "quant_dtype")}
    if "static" in op.features:
        return quantiser.why_not_static(**steps)
    return quantiser.why_not_dynamic(arguments["scale_steps"], value=value, **steps)


C = TypeVar("C", bound=Candidate)


def choose(op: FusedOp, arguments: Mapping[str, Any]) -> tuple[Path, Call] | str:
    """The first path that takes a call, or why none does."""
    return first_of(PATHS, op, arguments)


def first_of(candidates: Sequence[C], op: FusedOp, arguments: Mapping[str, Any]) -> tuple[C, Call] | str:
    """The first candidate that takes a call, or why none does."""
    given = describe(op, arguments)
    if isinstance(given, str):
        return given
    paths = [path for path in candidates if path.family == op.family and path.is_for(given)]
    if not paths:
        also = f" with {', '.join(sorted(given.features))}" if given.features else ""
        return f"AITER has no kernel for it with a scale per {given.scales}{also}"
    refusals = []
    for path in paths:
        why = path.why_not(given)
        if why is None and isinstance(found := probe(path.entry), str):
            why = found
        if why is None:
            return path, given
        refusals.append(f"{path.entry.name} {why}")
    return "; ".join(refusals)


def run(op: FusedOp, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Compute a call that ``choose`` takes, but for scales in columns."""
    outputs = op.allocate(**arguments)
    if arguments["x" if "x" in arguments else "gate_up"].numel() == 0:
        return outputs  # a grid without programs is an error in HIP; an empty result is complete as it is
    chosen = choose(op, arguments)
    if isinstance(chosen, str):
        raise RuntimeError(f"{op.name} by aiter: {chosen}")
    path, given = chosen
    flat = {name: tensor.view(-1, tensor.shape[-1]) for name, tensor in outputs.items()}
    returned = path.run(path, given, lambda name: _rows(arguments[name]), flat)
    return outputs | presented(path.entry, returned, outputs)


def _rows(x: Tensor) -> Tensor:
    """Two-dimensional, a view: rows are evenly spaced."""
    found = rows_of(x)
    assert found is not None
    return x.as_strided((found[0], x.shape[-1]), (found[1], 1))


def presented(entry: EntryPoint, returned: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs that AITER allocated, in the shape and layout that the op promises; strides must be true.

    Scales come as ``[M]``, ``[M, 1]`` or ``[M, G]``, row- or column-major; a transposed one is copied.
    """
    found = {}
    for name, want in outputs.items():
        if name not in returned:
            continue
        have = returned[name]
        rows = want.view(-1, want.shape[-1])
        if have.dtype != want.dtype or have.numel() != want.numel() or have.shape[0] != rows.shape[0]:
            raise RuntimeError(
                f"{entry} returned {name} {list(have.shape)} of {have.dtype}, and {list(want.shape)} of {want.dtype} "
                "was expected: this version of AITER is not supported"
            )
        found[name] = have.reshape(rows.shape).contiguous().view(want.shape)
    return found
