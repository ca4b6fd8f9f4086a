"""What a fused op is made of: stages, one after another, and families, which say what stages may follow each other.

A *stage* is one step, such as a norm or a quantiser: its arguments, its arithmetic, and what it returns. A *family* is
a row of stages. From the row follow the overloads of its op with their schemas, fakes, references and samples, the
chains of records that the op replaces, and the names of its variants in reports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, combinations, product
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .domains import Domain
from .formats import Format
from .op import FusedOp, Spec, Tolerance, first_width
from .registry import Registry


class Value(NamedTuple):
    """Sizes and dtype of the value that one stage hands to the next."""

    sizes: Sequence[int]
    dtype: torch.dtype


class Sample(NamedTuple):
    """One shape to test an op with: the sizes of its values, their dtype, and a seed."""

    sizes: tuple[int, ...]
    dtype: torch.dtype
    seed: int

    def rows(self, width: int | None = None) -> Tensor:
        """Hostile rows of these sizes; ``width`` is another length of the last dimension."""
        sizes = (*self.sizes[:-1], self.sizes[-1] if width is None else width)
        return hostile_rows(torch.Size(sizes[:-1]).numel(), sizes[-1], self.dtype, self.seed).reshape(sizes)

    def weight(self) -> Tensor:
        """One number for each column."""
        return hostile_rows(1, self.sizes[-1], self.dtype, self.seed + 100)[0]


# Several rows, more dimensions, one row, none, and no dimension of rows.
SAMPLES = tuple(
    Sample(sizes, dtype, seed)
    for seed, (sizes, dtype) in enumerate(
        (
            ((9, 64), torch.bfloat16),
            ((2, 4, 64), torch.float16),
            ((1, 64), torch.float32),
            ((0, 64), torch.bfloat16),
            ((64,), torch.float32),
        )
    )
)


class Setting(NamedTuple):
    """What ops are timed and tried with: ``rows`` of ``hidden`` bfloat16 values on a device, quantised as torchao does.

    granularity: of the scales, as a site's variant names it, e.g. ``group128``; format: of the quantised values; words:
    what else the benchmark calls the variant, such as the name of an activation.
    """

    rows: int
    hidden: int
    device: str
    granularity: str
    format: Format
    words: frozenset[str] = frozenset()

    def said(self, known: Iterable[str], unless: str) -> str:
        """The one of these words that the variant has, or another."""
        return next((word for word in known if word in self.words), unless)

    def random(self, *sizes: int) -> Tensor:
        """Normal values, by default a row each of ``rows``."""
        return torch.randn(sizes or (self.rows, self.hidden), device=self.device, dtype=torch.bfloat16)


def hostile_rows(rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows of normal values, then zeros, tiny, subnormal, huge, NaN, infinity: as many as ``rows`` asks for."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=generator)
    special = [0.0, 1e-30, torch.finfo(dtype).smallest_normal / 4, torch.finfo(dtype).max, float("nan"), float("inf")]
    for row, factor in zip(range(1, rows), special, strict=False):
        if factor in (0.0, 1e-30) or abs(factor) < 1:
            values[row] *= factor
        else:
            values[row, row % width] = factor
    return values.to(dtype)


@dataclass(frozen=True)
class Stage:
    """One step of a fused op.

    kind:       the kind of record that it computes; empty for a stage that only brings a tensor in, or that is part of
                the record of the stage before it.
    follows:    whether it takes the value of a stage before it; else it begins a family, with tensors of its own.
    arguments:  name -> schema type, in order.
    compute:    plain PyTorch: ``compute(value, **arguments) -> (value after it, outputs by name)``. The value is None
                for the first stage. The result is the oracle, and runs where no kernel does.
    spec:       the same of sizes and dtypes: ``spec(Value or None, **arguments) -> (Value, specs by name)``.
    samples:    its arguments to test an op with, for one shape.
    typical:    its arguments as models give them, to time an op with.
    feature:    what distinguishes it from another stage that may stand in its place: part of the overload's name and
                of a site's variant. Empty where nothing need be said.
    traits:     further features of its records, which a site's variant names too.
    outputs:    what it returns in any case.
    returns:    the name under which the value after it can be returned as well, where something else reads it. Of two
                stages with one name, that of the later one is.
    levels:     the optimisation level from which one of these features or outputs is taken; others need 1.
    label:      names a site's variant from the record's attributes and the sizes of the value that the stage reads;
                None: the feature does.
    fits:       why it cannot follow a value of these sizes, or None.
    layouts:    arguments that say how outputs lie in memory, in the order in which the planner tries them.
    one:        attributes that must be the same at all sites of a graph that are taken.
    domains:    argument -> the values that it is defined for; one that is text must be named.
    once:       tensors of which a row stands for several consecutive rows of the value.
    width:      the length of the value's rows from the arguments of a call, where it begins a family; by default that
                of the first tensor's.
    collective: every rank of a group must compute it, or none.
    cancels:    as in ``FusedOp``.
    order_free: tensors that are summed over ranks, in an order that is a library's own.
    """

    kind: str
    arguments: Mapping[str, str]
    compute: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    spec: Callable[..., tuple[Value, dict[str, Spec]]]
    samples: Callable[[Sample], Sequence[Mapping[str, Any]]]
    typical: Callable[[Setting], Mapping[str, Any]] = lambda setting: {}
    follows: bool = True
    feature: str = ""
    traits: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    returns: str = ""
    levels: Mapping[str, int] = field(default_factory=dict)
    label: Callable[[Mapping[str, Any], Sequence[Any]], str] | None = None
    fits: Callable[[Mapping[str, Any], Sequence[Any]], str | None] = lambda attributes, sizes: None
    layouts: tuple[Mapping[str, Any], ...] = ({},)
    one: tuple[str, ...] = ()
    domains: Mapping[str, Domain] = field(default_factory=dict)
    once: tuple[str, ...] = ()
    width: Callable[[Mapping[str, Any]], Any] = first_width
    collective: bool = False
    cancels: bool = False
    order_free: frozenset[str] = frozenset()


# What can stand at one place of a family: any of these stages, or, with None among them, none.
Place = tuple[Stage | None, ...]


def maybe(*stages: Stage) -> Place:
    """A place at which one of these stages may stand."""
    return (*stages, None)


@dataclass(frozen=True)
class Family:
    """Fused ops of the same stages: ``Family("rms_norm_quant", (INPUT, maybe(RESIDUAL), RMS_NORM, QUANTISE))``.

    name:      the name in options and reports.
    places:    what stands where: a stage, or several of which one does (``maybe``: or none).
    also:      places of further ops, of fewer combinations.
    op:        the name in ``torch.ops.aiter_fusion``; empty: the family's.
    level:     the optimisation level from which it is taken at all.
    ending:    what the variants of its sites end in where no stage's label says it.
    tolerance: how far a provider may be from the reference.
    """

    name: str
    places: tuple[Stage | Place, ...]
    also: tuple[Stage | Place, ...] = ()
    op: str = ""
    level: int = 1
    ending: str = ""
    tolerance: Tolerance = field(default_factory=Tolerance)
    table: ClassVar[str] = "families"

    def __post_init__(self) -> None:
        object.__setattr__(self, "op", self.op or self.name)

    @property
    def key(self) -> str:
        """Its place in the registry."""
        return self.op

    def admit(self, registry: Registry) -> None:
        """Raise a ValueError if its stages do not make ops."""
        for row in self.rows():
            names = [name for stage in row for name in stage.arguments]
            if twice := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"family {self.name}: two of its stages have an argument {', '.join(sorted(twice))}")
            if row[0].follows:
                raise ValueError(
                    f"family {self.name}: its first stage, {row[0].kind}, takes a value from a stage before it"
                )

    @property
    def levels(self) -> dict[str, int]:
        """The optimisation level from which a feature or output of its stages is taken; others need 1."""
        return {name: level for row in self.rows() for stage in row for name, level in stage.levels.items()}

    def rows(self) -> Iterator[tuple[Stage, ...]]:
        """The stages of every overload, outputs apart; the fullest first."""
        for row in filter(None, (self.places, self.also)):
            for stages in product(*(place if isinstance(place, tuple) else (place,) for place in row)):
                yield tuple(stage for stage in stages if stage is not None)

    @property
    def features(self) -> frozenset[str]:
        """What the records of its sites may have: its ops compute it, whether or not they are distinguished by it."""
        stages = [stage for row in self.rows() for stage in row]
        return frozenset().union(*({stage.feature, *stage.traits} for stage in stages)) - {""}

    def chains(self) -> tuple[tuple[str, ...], ...]:
        """The kinds of records that its ops compute, each chain once, the fullest first."""
        return tuple(dict.fromkeys(tuple(stage.kind for stage in row if stage.kind) for row in self.rows()))

    def ops(self) -> Iterator[FusedOp]:
        """The declaration of every overload: every row, with every choice of values that are returned as well."""
        for row in self.rows():
            extra = list(dict.fromkeys(stage.returns for stage in row[:-1] if stage.returns))
            for returned in chain.from_iterable(combinations(extra, count) for count in range(len(extra) + 1)):
                yield self._declare(row, frozenset(returned))

    def _declare(self, row: tuple[Stage, ...], returned: frozenset[str]) -> FusedOp:
        outputs: list[str] = []
        for stage in reversed(row):
            always = stage is row[-1]
            outputs += stage.outputs
            outputs += [stage.returns] if stage.returns and (always or stage.returns in returned) else []
        layouts = [stage.layouts for stage in row]
        return FusedOp(
            family=self.op,
            features=_features(row) | returned,
            arguments={name: kind for stage in row for name, kind in stage.arguments.items()},
            outputs=tuple(dict.fromkeys(outputs)),
            reference=partial(compute, row),
            shape=partial(spec, row),
            samples=partial(samples, row),
            typical=partial(typical, row),
            layouts=tuple({k: v for part in parts for k, v in part.items()} for parts in product(*layouts)),
            tolerance=self.tolerance,
            order_free=frozenset().union(*(stage.order_free for stage in row)),
            domains={name: domain for stage in row for name, domain in stage.domains.items()},
            stages=row,
            once=frozenset(name for stage in row for name in stage.once),
            cancels=any(stage.cancels for stage in row),
        )

    def variant(self, features: frozenset[str], attributes: Mapping[str, Any], sizes: Sequence[Any]) -> str:
        """The name of a site in reports, e.g. ``add+token``, ``packed+group128+value``, ``add+unquantised``.

        features, attributes: of its records; sizes: of the value that its last stage reads.
        """
        rows = [row for row in self.rows() if _features(row) <= features]
        row = max(rows, key=lambda row: len(_features(row)))
        words = []
        for stage in row:
            words += [stage.feature] if stage.feature else []
            words += [trait for trait in stage.traits if trait in features]
            words += [stage.label(attributes, sizes)] if stage.label is not None else []
        words += [self.ending]
        returned = dict.fromkeys(stage.returns for stage in reversed(row[:-1]) if stage.returns in features)
        return "+".join([*filter(None, words), *returned])


def _features(row: Sequence[Stage]) -> frozenset[str]:
    return frozenset(stage.feature for stage in row if stage.feature)


def compute(row: Sequence[Stage], **arguments: Any) -> dict[str, Tensor]:
    """What the stages return, one after another; every value also by its name, whether or not the op returns it.

    Stages may lay rows out in different dimensions; in what the op returns, they are as in the last value.
    """
    value, outputs, values = None, {}, {}
    for stage in row:
        value, made = stage.compute(value, **{name: arguments[name] for name in stage.arguments})
        outputs |= made
        if stage.returns:
            values[stage.returns] = value
    assert value is not None
    return outputs | {n: v.reshape(*value.shape[:-1], v.shape[-1]).contiguous() for n, v in values.items()}


def spec(row: Sequence[Stage], **arguments: Any) -> dict[str, Spec]:
    """Sizes, dtypes and layouts of what ``compute`` returns."""
    value: Value | None = None
    outputs: dict[str, Spec] = {}
    values: dict[str, Value] = {}
    for stage in row:
        value, made = stage.spec(value, **{name: arguments[name] for name in stage.arguments})
        outputs |= made
        if stage.returns:
            values[stage.returns] = value
    assert value is not None
    for name, returned in values.items():
        outputs[name] = ((*value.sizes[:-1], returned.sizes[-1]), returned.dtype)
    return outputs


def samples(row: Sequence[Stage]) -> Iterator[dict[str, Any]]:
    """Arguments to test an op with: the last stage's with each of those before it, which take turns."""
    for sample in SAMPLES:
        *before, last = [stage.samples(sample) for stage in row]
        for index in range(max(len(choices) for choices in before)):
            given = {name: value for choices in before for name, value in choices[index % len(choices)].items()}
            for more in last:
                yield {name: {**given, **more}[name] for stage in row for name in stage.arguments}


def typical(row: Sequence[Stage], setting: Setting) -> dict[str, Any]:
    """Arguments as models give them, in order."""
    given = {name: value for stage in row for name, value in stage.typical(setting).items()}
    return {name: given[name] for stage in row for name in stage.arguments}
