"""Facts about FX nodes: what the tracer recorded of them, and what kind of call they are. No fact adds a guard."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .. import formats

aten = torch.ops.aten
prims = torch.ops.prims

# What a call of a graph calls, or its name, where a library may register the operator later.
Target = Callable[..., Any] | str

HALVES = frozenset({torch.bfloat16, torch.float16})
FLOATS = HALVES | {torch.float32}
FP8 = frozenset(formats.FP8)
QUANTISED = frozenset(formats.DTYPES)

CONVERT = prims.convert_element_type.default

# Views that keep the row-major order of the elements; clone changes strides, never order.
VIEWS: frozenset[Target] = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.clone.default,
    }
)

# Views of some of the rows, unless their argument ``dim`` is the last. (What takes rows by an index copies them.)
SELECTIONS: frozenset[Target] = frozenset({aten.slice.Tensor, aten.select.int})

# Calls that give elements of their first argument as they are, or converted, in another place, order or number.
MOVING: frozenset[Target] = (
    VIEWS
    | SELECTIONS
    | {
        getitem,
        CONVERT,
        aten.permute.default,
        aten.expand.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unbind.int,
    }
)

# What computes a value, in words, by a part of the call's name; the first that fits.
GROUPED = "a grouped product"
PRODUCERS = {
    "grouped_mm": GROUPED,
    "scaled_dot_product": "attention",
    "flash_attention": "attention",
    "embedding": "an embedding",
    "mm": "a matrix product",
    "convolution": "a convolution",
}

# Calls that assert a tensor's dtype, device, layout, sizes or strides and return nothing. They held when the graph was
# traced, and are no reason to compute a value. ``torch.export`` leaves one before each conversion; Inductor removes all
# of them, but after our slot. What reads values is none (``_assert_async``), nor what returns a size, since others read
# that: AOTAutograd takes a symbolic size from the tensor that brought it, an input or the result of a call such as
# ``nonzero``, and these lie inside no form.
ASSERTIONS: frozenset[Target] = frozenset({aten._assert_tensor_metadata.default})

# Scalar operations that a program can hold, by ATen target; see aiter_fusion/scale_program.py.
STEPS: Mapping[Target, tuple[str, ...]] = {
    aten.reciprocal.default: ("reciprocal",),
    aten.log2.default: ("log2",),
    aten.exp2.default: ("exp2",),
    aten.ceil.default: ("ceil",),
    aten.floor.default: ("floor",),
    aten.round.default: ("round",),
    aten.mul.Tensor: ("mul",),
    aten.div.Tensor: ("div",),
    aten.clamp_min.default: ("clamp_min",),
    aten.clamp_max.default: ("clamp_max",),
    aten.clamp.default: ("clamp_min", "clamp_max"),
}

# Choices between a value and a number, ``where(value <comparison> 0, .., ..)``, by the comparison and by whether it is
# the value that stands where the comparison holds. NaN holds only for "not equal".
CHOICES: Mapping[tuple[Target, bool], str] = {
    (aten.gt.Scalar, True): "unless_positive",
    (aten.eq.Scalar, False): "if_zero",
    (aten.ne.Scalar, True): "if_zero",
}


def operator(target: Target) -> Callable[..., Any] | None:
    """What a target calls, or None if it is the name of an operator that no library has registered."""
    if not isinstance(target, str):
        return target
    namespace, name, overload = target.split(".")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    return getattr(packet, overload, None)


def is_number(node: fx.Node, value: Any) -> bool:
    """A Python number, so neither a node nor a symbolic size."""
    return type(value) in (int, float)


def same_number(a: float, b: float) -> bool:
    """Equal after rounding to float32."""
    return ctypes.c_float(a).value == ctypes.c_float(b).value


def readers(node: fx.Node) -> list[fx.Node]:
    """The calls that need a node's value: its users but for assertions about it, which go where it goes."""
    return [user for user in node.users if user.target not in ASSERTIONS]


def shape(node: fx.Node) -> torch.Size:
    """The shape that the tracer recorded for a tensor node."""
    return node.meta["val"].shape


def dtype(node: fx.Node) -> torch.dtype:
    """The dtype that the tracer recorded for a tensor node."""
    return node.meta["val"].dtype


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal; never adds a guard."""
    return statically_known_true(a == b)


def same_shape(a: Any, b: Any) -> bool:
    """Whether two shapes are known to be equal; never adds a guard."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def is_last_dim(node: fx.Node, dims: Any) -> bool:
    """``dims`` (an int or a list) is the last dimension of the first argument of ``node``, spelled either way."""
    source = node.args[0]
    rank = len(shape(source)) if isinstance(source, fx.Node) else 0
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    return len(dims) == 1 and type(dims[0]) is int and rank > 0 and dims[0] % rank == rank - 1


REQUIRED = object()


@cache
def _schema(target: Any) -> tuple[tuple[str, Any], ...]:
    """The (name, default) of every argument; REQUIRED where there is none."""
    return tuple((a.name, a.default_value if a.has_default_value() else REQUIRED) for a in target._schema.arguments)


def arguments(node: fx.Node) -> tuple[list[Any], int]:
    """The arguments of a call in schema order, and how many of them must be looked at: the rest are their defaults."""
    args, kwargs = list(node.args), node.kwargs
    if not isinstance(node.target, torch._ops.OpOverload):
        args += kwargs.values()
        return args, len(args)
    schema = _schema(node.target)
    args += [kwargs.get(name, default) for name, default in schema[len(args) :]]
    count = len(args)
    while count and _is_default(args[count - 1], schema[count - 1][1]):
        count -= 1
    return args, count


def _is_default(given: Any, default: Any) -> bool:
    """Whether a literal is the schema's default; 1 equals 1.0, but no number equals a bool."""
    if given is default:
        return True
    if isinstance(given, (bool, fx.Node)) or isinstance(default, bool):
        return False
    numbers = isinstance(given, (int, float)) and isinstance(default, (int, float))
    return (numbers or type(given) is type(default)) and given == default


def behind(node: fx.Node) -> fx.Node:
    """The value of which a node is a view that has its rows, or some of them."""
    while _keeps_rows(node) or selects_rows(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _keeps_rows(node: fx.Node) -> bool:
    return node.target in VIEWS and same_shape(shape(node.args[0])[-1:], shape(node)[-1:])  # type: ignore[arg-type]


def is_promoted(result: fx.Node, left: fx.Node, right: fx.Node) -> bool:
    """Whether a result has the promoted dtype of two tensors. An op that reads them as they are, and not as a graph
    converts them before, computes in that dtype; so a conversion is left out only where it changes nothing."""
    return dtype(result) is torch.promote_types(dtype(left), dtype(right))


def origin(node: fx.Node) -> fx.Node:
    """What computed the elements of a node."""
    while node.target in MOVING and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def called(node: fx.Node) -> str | None:
    """What a call computes, in words; None if there is no word for it."""
    if node.op != "call_function":
        return None
    return next((words for part, words in PRODUCERS.items() if part in str(node.target)), None)


def reading(node: fx.Node) -> list[fx.Node]:
    """The calls that compute something from a node's elements, as they are."""
    found, pending = [], readers(node)
    while pending:
        reader = pending.pop()
        if reader.target in MOVING:
            pending += readers(reader)
        else:
            found.append(reader)
    return found


def selects_rows(node: fx.Node) -> bool:
    """Whether a node is a view of some of the rows of its input."""
    if node.target not in SELECTIONS:
        return False
    (_, dim, *_), _ = arguments(node)
    return type(dim) is int and not is_last_dim(node, dim)


def is_quantising_cast(node: fx.Node) -> bool:
    """A conversion of floats to a format of ``formats.py``: what a quantiser ends in, whether or not a form explains
    it."""
    if node.op != "call_function" or node.target is not CONVERT or node.args[1] not in QUANTISED:
        return False
    return dtype(node.args[0]).is_floating_point  # type: ignore[arg-type]
