"""The fused ops by AITER's kernels: a table of functions, each with its limits, its keywords, and what it returns.

What AITER returns is brought into the op's contract: values ``[..., H]``, scales ``[..., H / block]`` in float32,
contiguous, with true strides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ...op import FusedOp
from ..shapes import power_of_two
from .candidates import Candidate, Limits, first_of
from .entry_points import EntryPoint, Value, call, constant
from .kernel_call import KernelCall

# The outputs that a function returns, as it nests them; None for one that is not used. No names: it writes to its
# arguments.
Names = str | None | tuple["Names", ...]


@dataclass(frozen=True)
class Path(Candidate):
    """A function that one process calls alone."""

    returns: Names = ()


# ---- values for keywords -----------------------------------------------------------------------------------------


def rows(name: str) -> Value:
    """A tensor argument as ``[M, H]``, None if the op does not take it."""
    return lambda call: call.rows(name)


def output(name: str) -> Value:
    """An output, allocated, as ``[M, H]``."""
    return lambda call: call.outputs[name]


def has(feature: str) -> Value:
    """Whether the call has a feature."""
    return lambda call: feature in call.features


def scalar(name: str) -> Value:
    """A tensor of one element as ``[1]``."""
    return lambda call: call[name].reshape(1)


# ---- functions -------------------------------------------------------------------------------------------------------


_QUANT = ("aiter.ops.triton.quant.fused_fp8_quant", "aiter.ops.triton.fused_fp8_quant")
_SILU = {"silu": "silu", "swish": "silu"}
_TRITON_ACTS = _SILU | {"gelu": "gelu", "gelu_tanh": "gelu_tanh"}
_TOKEN_OR_GROUP = frozenset({"token", "group"})
_ADD_OR_VALUE = frozenset({"add", "value"})


def _hip_norm(name: str, *needs: str) -> Path:
    takes: dict[str, Value] = {
        "out": output("q"),
        "input": rows("x"),
        "weight": "weight",
        "epsilon": "eps",
        "scale": output("scale"),
        "group_size": lambda call: call.block if call.scales == "group" else 0,
        "shuffle_scale": constant(False),
    }
    if "add" in needs:
        takes |= {"residual_in": rows("residual"), "residual_out": output("residual_out")}
    if "offset" in needs:
        takes |= {"gemma_norm": constant(True)}
    # scales that are bytes: ROCm/aiter#4231
    limits = Limits(_TOKEN_OR_GROUP, frozenset(needs), dense=True, by_wave=True, alike=True, bytes="0.1.18")
    return Path("rms_norm_quant", EntryPoint(name, ("aiter",), takes), limits)


_TRITON_NORM: dict[str, Value] = {
    "inp1": rows("x"),
    "inp1_weight": "weight",
    "inp1_epsilon": "eps",
    "dtype_quant": "quant_dtype",
    "res1": rows("residual"),
    "output_unquantized_inp1": has("value"),
}

# In order of preference: HIP kernels first, as in AITER's own models.
PATHS = (
    _hip_norm("rmsnorm_quant"),
    _hip_norm("rmsnorm_quant", "offset"),
    _hip_norm("add_rmsnorm_quant", "add"),
    _hip_norm("add_rmsnorm_quant", "add", "offset"),
    Path(
        "rms_norm_quant",
        EntryPoint(
            "fused_rms_fp8_group_quant",
            _QUANT,
            {
                **_TRITON_NORM,
                # groups are of a power of two; one that covers the row is a scale for the row
                "group_size": lambda call: power_of_two(call.block),
                "transpose_scale": constant(False),
            },
        ),
        # a program holds a whole row, and longer rows do not fit into registers
        Limits(_TOKEN_OR_GROUP, may=_ADD_OR_VALUE, widest=16384, powers=frozenset({"group"})),
        returns=(("q", "scale"), "value", None, "residual_out"),
    ),
    Path(
        "rms_norm_quant",
        EntryPoint(
            "fused_rms_fp8_per_tensor_static_quant",
            _QUANT,
            {**_TRITON_NORM, "inp1_scale": scalar("scale"), "rmsnorm_convert_to_inp1_type": constant(True)},
        ),
        Limits(frozenset({"static"}), may=_ADD_OR_VALUE, widest=16384),
        returns=("q", "value", None, "residual_out"),
    ),
    Path(
        "act_mul_quant",
        EntryPoint(
            "silu_and_mul_quant",
            ("aiter",),
            {
                "out": output("q"),
                "input": rows("gate_up"),
                "scale": output("scale"),
                "group_size": lambda call: call.block,
                "limit": constant(0.0),
                "shuffle_scale": constant(False),
            },
        ),
        Limits(frozenset({"group"}), dense=True, by_wave=True, powers=frozenset({"group"}), acts=_SILU),
    ),
    Path(
        "act_mul_quant",
        EntryPoint(
            "act_mul_and_fp8_group_quant",
            ("aiter.ops.triton.activation",),
            {
                "x": rows("gate_up"),
                "activation": lambda call: _TRITON_ACTS[call["act"]],
                "group_size": lambda call: call.block,
                "dtype_quant": "quant_dtype",
            },
        ),
        Limits(
            _TOKEN_OR_GROUP,
            widest=16384,
            powers=_TOKEN_OR_GROUP,  # the last group of a row is loaded without a mask
            acts=_TRITON_ACTS,
        ),
        returns=("q", "scale"),
    ),
    Path(
        "act_mul_quant",
        EntryPoint(
            "fused_silu_mul_fp8_per_tensor_static_quant",
            _QUANT,
            {
                "inp": rows("gate_up"),
                "inp_scale": scalar("scale"),
                "dtype_quant": "quant_dtype",
                "silu_convert_to_inp_type": "cast_first",
            },
        ),
        Limits(frozenset({"static"}), widest=16384, acts=_SILU),
        returns="q",
    ),
)


# ---- calls -----------------------------------------------------------------------------------------------------------


def choose(op: FusedOp, arguments: Mapping[str, Any]) -> tuple[Path, KernelCall] | str:
    """The first path that takes a call, or why none does."""
    return first_of(PATHS, op, arguments)


def compute(op: FusedOp, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Compute a call whose scales are in rows.

    Raises:
        RuntimeError: no path takes it, or AITER returned something else than the op's outputs.
    """
    outputs = op.allocate(**arguments)
    if arguments["x" if "x" in arguments else "gate_up"].numel() == 0:
        return outputs  # HIP rejects a grid without programs; an empty result is complete as it is
    chosen = choose(op, arguments)
    if isinstance(chosen, str):
        raise RuntimeError(f"{op.name} by aiter: {chosen}")
    path, found = chosen
    found = replace(found, outputs={name: tensor.view(-1, tensor.shape[-1]) for name, tensor in outputs.items()})
    returned = call(path.entry, **path.entry.arguments(found))
    return outputs | presented(path.entry, named(path.entry, path.returns, returned), outputs)


def named(entry: EntryPoint, names: Names, returned: Any) -> dict[str, Tensor]:
    """What a function returned, by name; nothing where ``names`` is empty.

    Raises:
        RuntimeError: it returned another number of tensors.
    """
    if not names:
        return {}
    if isinstance(names, str):
        return {names: returned}
    have: Sequence[Any] = returned
    if len(have) != len(names):
        raise RuntimeError(
            f"{entry} returned {len(have)} tensors, and {len(names)} were expected: this version of AITER is not "
            "supported"
        )
    found: dict[str, Tensor] = {}
    for name, value in zip(names, have, strict=True):
        found |= named(entry, name, value)
    return found


def presented(entry: EntryPoint, returned: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that AITER allocated, in the shape and layout that the op promises.

    Scales come as ``[M]``, ``[M, 1]`` or ``[M, G]``, row- or column-major, with true strides; column-major ones are
    copied.

    Raises:
        RuntimeError: a tensor has another dtype or number of elements than the output.
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
