"""The vocabulary of patterns: plain data, matched by ``passes/matcher.py``.

A pattern describes a value in an FX graph by the call that computes it. Matching is strict: every argument that a
pattern does not mention must have its schema's default value, so ``add(x, r, alpha=2)`` is not ``add(x, r)``.
How many users a value has never matters.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..formats import FORMATS
from ..registry import Registry

aten = torch.ops.aten
prims = torch.ops.prims

# What a call calls; by name (``"ao.blockwise_fp8_gemm.default"``) an operator that is there once its library is loaded.
Target = Callable[..., Any] | str


class Pattern:
    """Anything that can stand for a value: the classes below."""


@dataclass(frozen=True)
class Var(Pattern):
    """Any tensor, captured as the input ``name``; a second occurrence must be the same node."""

    name: str


@dataclass(frozen=True)
class Const(Pattern):
    """A literal. Numbers are compared after rounding to float32, in which every kernel applies them."""

    value: float | bool


@dataclass(frozen=True)
class Attr(Pattern):
    """A literal captured as the attribute ``name`` (or not at all, if empty), if ``test(consumer, value)`` holds."""

    name: str
    test: Callable[[fx.Node, Any], bool]


@dataclass(frozen=True)
class Call(Pattern):
    """A call of one of ``targets`` with these arguments in schema order.

    ``commute`` also tries the first two arguments exchanged; ``dtype`` is demanded of the result. ``order`` is that in
    which the matcher looks at the arguments: literals first, since they fail at once. ``heads`` has, for each argument,
    the calls that it can be (None: any), so that most candidates are turned away by a look at their arguments' calls.
    """

    targets: tuple[Target, ...]
    args: tuple[Pattern, ...]
    commute: bool = False
    dtype: torch.dtype | None = None
    order: tuple[int, ...] = field(init=False, repr=False)
    heads: tuple[frozenset[Target] | None, ...] = field(init=False, repr=False)
    by_name: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        literal = [isinstance(pattern, (Attr, Const)) for pattern in self.args]
        object.__setattr__(self, "order", tuple(sorted(range(len(literal)), key=lambda i: not literal[i])))
        object.__setattr__(self, "heads", tuple(map(_known_heads, self.args)))
        object.__setattr__(self, "by_name", any(isinstance(target, str) for target in self.targets))


@dataclass(frozen=True)
class OneOf(Pattern):
    """Alternatives, tried in order.

    ``by_head`` has those that a value computed by a call can be, for each call that one of them ends in; ``others``
    those that any value can be. Most alternatives differ in their last call, and one look at it turns them away.
    """

    options: tuple[Pattern, ...]
    by_head: Mapping[Target, tuple[Pattern, ...]] = field(init=False, repr=False, compare=False)
    others: tuple[Pattern, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ends = [(option, _known_heads(option)) for option in self.options]
        every = frozenset().union(*(targets for _, targets in ends if targets is not None))
        by_head = {head: tuple(o for o, targets in ends if targets is None or head in targets) for head in every}
        object.__setattr__(self, "by_head", by_head)
        object.__setattr__(self, "others", tuple(option for option, targets in ends if targets is None))


@dataclass(frozen=True)
class With(Pattern):
    """``of``, and these attributes where it matched; no match where one has another value already."""

    of: Pattern
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Named(Pattern):
    """``of``, and the matched node kept as ``name`` for the form's ``complete``."""

    name: str
    of: Pattern


@dataclass(frozen=True)
class Both(Pattern):
    """A value that both explain, such as an input under two names."""

    of: Pattern
    also: Pattern


@dataclass(frozen=True)
class Items(Pattern):
    """A list argument of exactly these items."""

    items: tuple[Pattern, ...]


@dataclass(frozen=True)
class Views(Pattern):
    """``of`` behind any number of views that keep the row-major order of elements (``VIEWS``)."""

    of: Pattern


@dataclass(frozen=True)
class Steps(Pattern):
    """``of`` followed by any number of scalar operations (``STEPS``) and views.

    The longest walk is tried first. The operations are captured as the attribute ``name``, in order, as text.
    """

    name: str
    of: Pattern


def heads(pattern: Pattern) -> frozenset[Target] | None:
    """The calls with which a value of this pattern can end; None if any, or if it is no call."""
    match pattern:
        case Call():
            return frozenset(pattern.targets)
        case With() | Named():
            return heads(pattern.of)
        case Both():
            return heads(pattern.also) or heads(pattern.of)
        case OneOf():
            every = [heads(option) for option in pattern.options]
            known = [targets for targets in every if targets is not None]
            return frozenset().union(*known) if len(known) == len(every) else None
        case _:
            return None


def _known_heads(pattern: Pattern) -> frozenset[Target] | None:
    """``heads``, but None where one of them is a name: a library may register that operator later."""
    ends = heads(pattern)
    return None if ends is None or any(isinstance(target, str) for target in ends) else ends


def _first_inputs(pattern: Pattern) -> frozenset[Target] | None:
    """Calls of which a value of this pattern reads at least one; None if it may read none of those it names."""
    match pattern:
        case Call():
            return next((ends for ends in pattern.heads if ends is not None), None)
        case With() | Named() | Both():
            return _first_inputs(pattern.of)
        case OneOf():
            every = [_first_inputs(option) for option in pattern.options]
            known = [ends for ends in every if ends is not None]
            return frozenset().union(*known) if len(known) == len(every) else None
        case _:
            return None


class Found(NamedTuple):
    """What a pattern captured: input tensors, named nodes, attributes, and the nodes it walked over."""

    inputs: Mapping[str, fx.Node] = MappingProxyType({})
    named: Mapping[str, fx.Node] = MappingProxyType({})
    attributes: Mapping[str, Any] = MappingProxyType({})
    nodes: tuple[fx.Node, ...] = ()

    def with_input(self, name: str, node: fx.Node) -> Found:
        return Found({**self.inputs, name: node}, self.named, self.attributes, self.nodes)

    def with_name(self, name: str, node: fx.Node) -> Found:
        return Found(self.inputs, {**self.named, name: node}, self.attributes, self.nodes)

    def with_attributes(self, attributes: Mapping[str, Any]) -> Found:
        return Found(self.inputs, self.named, {**self.attributes, **attributes}, self.nodes)

    def with_nodes(self, nodes: Iterable[fx.Node]) -> Found:
        return Found(self.inputs, self.named, self.attributes, (*self.nodes, *nodes))


@dataclass(frozen=True)
class Completion:
    """A match that holds: the record's attributes (arguments of fused ops), its features, its name in reports where
    that says more than the form's, and, where no fused op can compute it, the reason (with its code)."""

    attributes: Mapping[str, Any] = field(default_factory=dict)
    features: frozenset[str] = frozenset()
    variant: str | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Branch:
    """A second output, looked for forward from the node named ``source`` through scalar operations and views.

    It is the first value on the way that something outside the form reads and ``test(node, steps)`` accepts, where
    ``steps`` is the program of ``start`` and of the operations up to it; ``value(node, steps)`` becomes the attribute
    ``attribute``. Records that differ only in whether they have the branch compute the same. By default the output is
    the value named ``source`` itself.

    A branch whose ``output`` is also the form's takes the place of the form's value, unless that is read elsewhere.
    """

    output: str
    source: str
    attribute: str
    test: Callable[[fx.Node, str], bool] = lambda node, steps: not steps
    start: Callable[[Found], tuple[str, ...]] = lambda found: ()
    value: Callable[[fx.Node, str], Any] = lambda node, steps: steps


def operator(target: Target) -> Callable[..., Any] | None:
    """What a target calls, or None if it is the name of an operator that no library has registered."""
    if not isinstance(target, str):
        return target
    namespace, name, overload = target.split(".")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    return getattr(packet, overload, None)


@dataclass(frozen=True)
class Form:
    """One way to spell a computation.

    kind:      what it computes; fusions are chains of kinds.
    name:      which spelling, for reports.
    pattern:   the value that it computes.
    output:    the name of that value among the record's outputs.
    complete:  conditions that a pattern cannot express. It returns the record's attributes, or a sentence saying why
               the match does not hold, which the report shows for values that no form explains.
    branches:  further outputs that leave the pattern on the way.
    rows:      the inputs that have a row for each row of the value, which is computed from these rows alone (and from
               all of the other inputs); none where the rows cannot be computed apart.
    shared:    the inputs that must be the same in all records of the kind that read one value: of several, a fused op
               could take only one, and the others would read the value from memory.
    serves:    a kind: the form is looked for only where its value is the input ``x`` of a record of that kind.
    alone:     why a record that begins no fusion is left alone, with the reason's code.
    listed:    whether there is a record of it; if not, the form only says that its values are of no other form.
    reads:     calls of which at least one is an input of any such value (None: it can read anything). Most nodes are
               turned away by it before the matcher begins.
    """

    kind: str
    name: str
    pattern: Pattern
    output: str
    complete: Callable[[fx.Node, Found], Completion | str] = lambda root, found: Completion(found.attributes)
    branches: tuple[Branch, ...] = ()
    rows: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    serves: str | None = None
    alone: str = "unquantised: no FP8 quantiser in this graph reads it"
    listed: bool = True
    reads: frozenset[Target] | None = field(init=False, repr=False, compare=False)
    table: ClassVar[str] = "forms"

    def __post_init__(self) -> None:
        object.__setattr__(self, "reads", _first_inputs(self.pattern))

    @property
    def key(self) -> tuple[str, str]:
        """Its place in the registry."""
        return self.kind, self.name

    def admit(self, registry: Registry) -> None:
        """Raise a ValueError if its pattern can end in any call: then it would be tried on every node."""
        if self.serves is None and heads(self.pattern) is None:
            raise ValueError(f"form {self.name} can end in any call: let its pattern be a Call, or OneOf of them")


class Join(NamedTuple):
    """How one op computes several records that are equal but for some inputs, of which it takes lists.

    lists:    argument of the op -> the input of which each record gives it one, or None.
    most:     how many records, at most.
    permuted: argument -> the order of dimensions in which the op takes each of these, where it is another.
    reshaped: argument -> the shape in which the op takes it, from a record's inputs, where it may be another.
    """

    lists: Mapping[str, str]
    most: int
    permuted: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    reshaped: Mapping[str, Callable[[Mapping[str, fx.Node]], list[int]]] = MappingProxyType({})


@dataclass(frozen=True)
class Fusion:
    """A chain of kinds that one fused op computes, each the input ``x`` of the next.

    family:  the name in reports and options.
    levels:  the optimisation level from which a feature of the site (an overload, a variant) is taken; others need 1.
    against: what the environment prefers against this op where others are for the same chain: asked in every case.
    only:    the providers that are asked for it, if not all; where none of them can be, nobody looks for the chain.
    fits:    a condition on the last record and the value that it reads: a sentence saying why the chain does not
             hold, or None.
    variant: names the site within its family, from the features and the attributes of its records.
    level:   the optimisation level from which it is taken at all.
    one:     attributes that must be the same at all sites of a graph that are taken; the first site decides.
    jointly: all processes must take it or none: it is taken only if all of them compile alike.
    op:      the name in ``torch.ops.aiter_fusion``; empty: the family's.
    join:    how the op computes several records (of a chain of one kind); None: it computes one.
    exact:   whether the op's reference computes what the records do bit by bit; not where a library's own kernel does.
    """

    family: str
    chain: tuple[str, ...]
    variant: Callable[[frozenset[str], Mapping[str, Any], fx.Node], str]
    levels: Mapping[str, int] = field(default_factory=dict)
    fits: Callable[[Mapping[str, Any], fx.Node], str | None] = lambda attributes, value: None
    level: int = 1
    one: tuple[str, ...] = ()
    jointly: bool = False
    op: str = ""
    against: Callable[[], list[str]] = list
    only: frozenset[str] | None = None
    join: Join | None = None
    exact: bool = True
    table: ClassVar[str] = "fusions"

    def __post_init__(self) -> None:
        object.__setattr__(self, "op", self.op or self.family)

    @property
    def key(self) -> tuple[str, tuple[str, ...], str]:
        """Its place in the registry."""
        return self.family, self.chain, self.op

    def admit(self, registry: Registry) -> None:
        """Raise a ValueError if it has no op, or a kind of its chain no form."""
        if not registry.overloads(self.op):
            raise ValueError(f"family {self.family!r} has no op: declare one with aiter_fusion.fused_op first")
        kinds = dict.fromkeys(form.kind for form in registry.forms.values())
        if unknown := [kind for kind in self.chain if kind not in kinds]:
            raise ValueError(
                f"no form is of kind {unknown[0]!r}: call aiter_fusion.register_form first; kinds are "
                f"{', '.join(sorted(kinds))}"
            )


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
# Calls that assert a tensor's dtype, device, layout, sizes or strides and return nothing. They held when the graph was
# traced, and are no reason to compute a value. ``torch.export`` leaves one before each conversion; Inductor removes all
# of them, but after our slot. What reads values is none (``_assert_async``), nor what returns a size, since others read
# that: AOTAutograd takes a symbolic size from the tensor that brought it, an input or the result of a call such as
# ``nonzero``, and these lie inside no form.
ASSERTIONS: frozenset[Target] = frozenset({aten._assert_tensor_metadata.default})

# Scalar operations that a program can hold, by ATen target; see aiter_fusion/arithmetic.py.
STEPS: Mapping[Target, tuple[str, ...]] = {
    aten.reciprocal.default: ("reciprocal",),
    aten.log2.default: ("log2",),
    aten.exp2.default: ("exp2",),
    aten.ceil.default: ("ceil",),
    aten.floor.default: ("floor",),
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


def number(name: str) -> Attr:
    """A number captured under ``name``."""
    return Attr(name, is_number)


def last_dim() -> Attr:
    """The last dimension, as -1 or counted from the front, alone or in a list."""
    return Attr("", is_last_dim)


def anything(name: str = "") -> Attr:
    """Any literal; its effect is checked by the form's ``complete``, on the result's shape or by ``name``."""
    return Attr(name, lambda node, value: True)


def convert(of: Pattern, to: torch.dtype) -> Call:
    """A conversion to one dtype."""
    return Call((prims.convert_element_type.default,), (of, Attr("", lambda node, value: value is to)))


def convert_to(of: Pattern, name: str, allowed: frozenset[torch.dtype]) -> Call:
    """A conversion to any of the allowed dtypes, captured under ``name``."""
    return Call((prims.convert_element_type.default,), (of, Attr(name, lambda node, value: value in allowed)))


def in_float32(of: Pattern) -> OneOf:
    """``of`` converted to float32, or ``of`` as it is: the consumer's dtype decides which is right."""
    return OneOf((convert(of, torch.float32), of))


def mul(a: Pattern, b: Pattern, dtype: torch.dtype | None = None) -> Call:
    """A product, in either order."""
    return Call((aten.mul.Tensor,), (a, b), commute=True, dtype=dtype)


def add(a: Pattern, b: Pattern, dtype: torch.dtype | None = None) -> Call:
    """A sum, in either order; ``alpha`` must be 1."""
    return Call((aten.add.Tensor, aten.add.Scalar), (a, b), commute=True, dtype=dtype)


HALVES = frozenset({torch.bfloat16, torch.float16})
FLOATS = HALVES | {torch.float32}
FP8 = frozenset(FORMATS)
