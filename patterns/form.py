"""Forms and fusions: one way to spell a computation, and which computations follow each other in a fused op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from torch import fx

from ..reasons import Reason, Refusal
from ..registry import Registry
from .fx_facts import Target
from .language import Found, Pattern, first_inputs, heads

# Why a value that begins no fusion is left alone, unless its form says otherwise.
UNQUANTISED = Refusal(Reason.UNQUANTISED, "no quantiser in this graph reads it")


@dataclass(frozen=True)
class Completion:
    """A match that holds: the record's attributes (arguments of fused ops) and features.

    variant, called: its name in reports and that of its kind, where these say more than the form's.
    refusal: why no fused op can compute it, None if one might.
    exact:   whether the pattern says what it computes bit by bit.
    inputs:  what to compute the value from, where the form knows better than its pattern; ``nodes`` are then those
             between them and the pattern's.
    """

    attributes: Mapping[str, Any] = field(default_factory=dict)
    features: frozenset[str] = frozenset()
    variant: str | None = None
    called: str | None = None
    exact: bool = True
    refusal: Refusal | None = None
    inputs: Mapping[str, fx.Node] | None = None
    nodes: frozenset[fx.Node] = frozenset()


@dataclass(frozen=True)
class Branch:
    """A second output, looked for forward from the node named ``source`` through scalar operations and views.

    It is the first value on the way that something outside the form reads and ``test(node, steps)`` accepts, where
    ``steps`` is the program of ``start`` and of the operations up to it; ``value(node, steps)`` becomes the attribute
    ``attribute``. Records that differ only in whether they have the branch compute the same. By default the output is
    the value named ``source`` itself.

    Where ``item`` is said, the source is a call that returns several values, and the output is that of them.

    A branch whose ``output`` is also the form's takes the place of the form's value, unless that is read elsewhere.
    """

    output: str
    source: str
    attribute: str
    test: Callable[[fx.Node, str], bool] = lambda node, steps: not steps
    start: Callable[[Found], tuple[str, ...]] = lambda found: ()
    value: Callable[[fx.Node, str], Any] = lambda node, steps: steps
    item: int | None = None


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
    several:   inputs of which a fused op may take several: records of one value that differ in these alone are one
               site. The second is called ``scale2`` where the first is ``scale``, and so are its outputs; the features
               of all say how many there are (``static2``).
    serves:    kinds: the form is looked for only where its value is the input ``x`` of a record of one of these; none:
               anywhere.
    alone:     why a record that begins no fusion is left alone.
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
    several: tuple[str, ...] = ()
    serves: tuple[str, ...] = ()
    alone: Refusal = UNQUANTISED
    listed: bool = True
    reads: frozenset[Target] | None = field(init=False, repr=False, compare=False)
    table: ClassVar[str] = "forms"

    def __post_init__(self) -> None:
        object.__setattr__(self, "reads", first_inputs(self.pattern))

    @property
    def key(self) -> tuple[str, str]:
        """Its place in the registry."""
        return self.kind, self.name

    def admit(self, registry: Registry) -> None:
        """Raise a ValueError if its pattern can end in any call: then it would be tried on every node."""
        if not self.serves and heads(self.pattern) is None:
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
    features: what its records may have that its op computes; None: whatever they have.
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
    features: frozenset[str] | None = None
    join: Join | None = None
    exact: bool = True
    table: ClassVar[str] = "fusions"

    def __post_init__(self) -> None:
        object.__setattr__(self, "op", self.op or self.family)

    @property
    def key(self) -> tuple[str, tuple[str, ...], str, frozenset[str]]:
        """Its place in the registry."""
        return self.family, self.chain, self.op, self.only or frozenset()

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
