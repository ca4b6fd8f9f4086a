"""What values the arguments of an op may have, as data: for which it is defined, and which a provider can compute.

A domain says why a value is not in it, with value and limit: ``activation 'relu' is none of silu, gelu``. What it asks
of symbolic sizes never adds a guard. (They are tuples: every import makes them,
and dataclasses take three times as long.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch

from .scale_program import parse

Dtypes = tuple[torch.dtype, ...]


class Domain(Protocol):
    """The values that an argument may have."""

    def why_not(self, name: str, value: Any, width: Any) -> str | None:
        """Why ``value`` of the argument ``name`` is none, in a call with rows of ``width`` elements, or None."""
        ...


def _none_of(what: str, known: Iterable[Any]) -> str:
    return f"{what} is none of {', '.join(map(str, known))}"


class Anything(NamedTuple):
    """Any value: PyTorch checks the argument's type, and ``refuse`` of a provider what else matters."""

    def why_not(self, name: str, value: Any, width: Any) -> str | None:
        return None


class OneOf(NamedTuple):
    """One of these values."""

    values: tuple[Any, ...]

    def why_not(self, name: str, value: Any, width: Any) -> str | None:
        return None if value in self.values else _none_of(f"{name} {value!r}", self.values)


class Number(NamedTuple):
    """A number that is known when the graph is compiled, or, where ``optional``, None."""

    optional: bool = False

    def why_not(self, name: str, value: Any, width: Any) -> str | None:
        if isinstance(value, (int, float)) or (value is None and self.optional):
            return None
        return f"{name} {value!r} is no number that is known when compiling"


class Tensors(NamedTuple):
    """A tensor of one of these dtypes, of so many ``elements`` (None: any number), or, where ``optional``, None."""

    dtypes: Dtypes
    optional: bool = False
    elements: int | None = None

    def why_not(self, name: str, value: Any, width: Any) -> str | None:
        if value is None:
            return None if self.optional else f"it wants a tensor {name}, and this call has none"
        if value.dtype not in self.dtypes:
            return _none_of(f"{name} is {value.dtype}, which", self.dtypes)
        if self.elements is not None and not _known(value.numel() == self.elements):
            return f"{name} has {value.numel()} elements, not {self.elements}"
        return None


class Each(NamedTuple):
    """A list of at most ``most`` values, at least one, all of them of this domain."""

    of: Any
    most: int

    def why_not(self, name: str, value: Any, width: Any) -> str | None:
        if not 1 <= len(value) <= self.most:
            return f"{name} are {len(value)}, not 1 to {self.most}"
        found = (self.of.why_not(f"{name}[{index}]", entry, width) for index, entry in enumerate(value))
        return next((why for why in found if why is not None), None)


class Activations(NamedTuple):
    """The name of an activation, behind which stand its numbers, if it has any: ``silu``, ``clamped_swiglu=1.702,7.0``.

    numbers: name -> what its numbers are called.
    """

    numbers: Mapping[str, tuple[str, ...]]

    def why_not(self, name: str, value: Any, width: Any) -> str | None:
        known, equals, given = str(value).partition("=")
        numbers = given.split(",") if equals else []
        if known in self.numbers and len(numbers) == len(self.numbers[known]) and all(map(_is_number, numbers)):
            return None
        return _none_of(f"activation {value!r}", self.written())

    def written(self) -> Iterator[str]:
        """How each is written."""
        for name, numbers in self.numbers.items():
            yield f"{name}={','.join(f'<{number}>' for number in numbers)}" if numbers else name


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Steps(NamedTuple):
    """A program (``aiter_fusion/scale_program.py``) of steps with these names."""

    names: tuple[str, ...]

    def why_not(self, name: str, value: Any, width: Any) -> str | None:
        try:
            steps = parse(value)
        except ValueError as error:
            return f"{name}: {error}"
        other = next((step for step, _ in steps if step not in self.names), None)
        return None if other is None else _none_of(f"step {other!r} of {name}", self.names)


class Sizes(NamedTuple):
    """Whole numbers from ``least`` to ``most`` that are multiples of ``multiple``; none that only a run will tell."""

    least: int
    most: int
    multiple: int = 1

    def why_not(self, name: str, value: Any, width: Any) -> str | None:
        if not isinstance(value, int):
            return f"{name} {value} is known only at run time"
        if value > self.most:
            return f"{name} {value} exceeds {self.most}"
        if value < self.least:
            return f"{name} {value} is below {self.least}"
        return f"{name} {value} is not a multiple of {self.multiple}" if value % self.multiple else None


# How many elements share a scale that is computed from them: all, those of a row, or those of a part of a row.
TENSOR, TOKEN, GROUP = "tensor", "token", "group"


class Blocks(NamedTuple):
    """How many elements share a scale: 0 (granularity ``tensor``), the row's (``token``), or a divisor of these of at
    most ``largest`` (``group``; None: of any size); if ``spanning``, also those of several rows, so many at most."""

    granularities: tuple[str, ...] = (TENSOR, TOKEN, GROUP)
    largest: int | None = None
    spanning: bool = False

    def why_not(self, name: str, value: Any, width: Any) -> str | None:
        if value < 0:
            return f"{name} {value} is below 0"
        granularity = TENSOR if value == 0 else TOKEN if _known(width == value) else GROUP
        if granularity not in self.granularities:
            return _none_of(f"granularity {granularity!r}", self.granularities)
        if granularity != GROUP:
            return None
        spans = self.spanning and isinstance(width, int) and value % max(1, width) == 0
        if not spans and not _known(width % value == 0):
            return f"group size {value} does not divide the hidden size {width}"
        if self.largest is not None and value > self.largest:
            return f"group size {value} exceeds {self.largest}"
        return None


def _known(condition: Any) -> bool:
    """Whether a condition, maybe about symbolic sizes, is known to hold."""
    # not before: it loads sympy, which registering ops must not
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


ANYTHING, FLAG = Anything(), OneOf((True, False))
