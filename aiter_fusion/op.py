"""What a fused op is: one declaration from which schema, fake, dispatch, samples and tolerance follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from .domains import Domain
from .registry import REGISTRY, Registry

if TYPE_CHECKING:
    from .stage import Setting, Stage

NAMESPACE = "aiter_fusion"
# One for each overload: PyTorch 2.11 to 2.13 abort at exit, taking down a library that has defined overloads of one op
# with three outputs, three and another number, in this order.
_LIBRARIES: list[torch.library.Library] = []

Implementation = Callable[..., Any]
T = TypeVar("T")
# Sizes and dtype of a dense tensor and, unless it is contiguous, its dimensions, the outermost in memory first.
Spec = tuple[Sequence[int], torch.dtype] | tuple[Sequence[int], torch.dtype, Sequence[int]]


class Tolerance(NamedTuple):
    """How far a provider may be from the reference on finite, non-zero rows.

    codes:  codes that an element may differ by. AITER keeps float32 where the graph rounds to bf16, which moves
            2.4 to 3.5 % of the elements by one code and none by two (512 x 4096, torchao per row).
    scale:  relative difference of any other output: two roundings to bf16 (2**-8 each) of the values below the maximum.
    kernel: the same of a provider that does not keep the graph's roundings, of which there are up to four to bf16: of
            the sum, the normalised value, its product with the weight, and the scale.
    doubled: where scales are powers of two, the share of them that may be one power apart by such a provider: those of
            blocks whose maximum is within these roundings of a power, about 2**-7 of all.
    sums:   difference of sums of products that round once, relative to the largest of their row: two codes of bf16.
    share:  share of the elements that may have another code, where the provider keeps the graph's roundings but sums a
            row in its own order: 3e-8 to 4e-7 were seen (32768 rows of 2880 to 8192, bf16).
    few:    elements that may in any case: of few, one is a large share, and a row's last bit can move several.
    """

    codes: int = 1
    scale: float = 1e-2
    kernel: float = 4 * 2**-8
    doubled: float = 2**-5
    sums: float = 2**-7
    share: float = 1e-5
    few: int = 16


@dataclass(frozen=True)
class FusedOp:
    """One overload of a fused op.

    family:     the op's name, ``torch.ops.aiter_fusion.<family>``.
    features:   what distinguishes this overload: extra inputs and extra outputs.
    arguments:  name -> schema type, in order.
    outputs:    names of the outputs, in order; all are tensors. None: the op returns nothing and writes to arguments,
                whose types say so (``Tensor(a!)``).
    reference:  plain PyTorch, the oracle and the fallback. Takes the arguments by name, returns name -> tensor.
    shape:      sizes, dtype and, unless contiguous, layout of every output, which is on the first tensor's device.
    samples:    argument sets for tests, with hostile rows.
    typical:    arguments as models give them, to time the op with, or to try it on a machine; None: nobody does.
    layouts:    arguments that say how outputs lie in memory, in the order in which the planner tries them: the last is
                for contiguous outputs, each other for where the graph would transpose and copy them.
    order_free: arguments that are summed over processes, in an order that is a library's own: what verifies the op
                gives them values whose sums are exact.
    domains:    argument -> the values that the op is defined for. One of type ``str``, which could be anything, must be
                named; of others that are not, all values of their type are.
    stages:     what it computes, one after another; empty for an op that is not made of stages.
    once:       arguments of which a row stands for several consecutive rows: whoever gives the op its rows in another
                order would tear these apart.
    each:       an argument, a list: the op computes as many tensors as this has entries, and returns them as one list,
                the one of ``outputs``. ``reference`` and ``shape`` then give them by names of their own, in order.
    products:   whether it computes sums of products, whose order is a library's own.
    cancels:    whether a sum follows a rounding that may be another where rows are summed in another order. Where its
                summands nearly cancel, the last bit of one is many codes of the result.
    by_rows:    whether it computes each row of its inputs for itself, so that rows may be given in any order.
    greatest:   arguments of integers -> the greatest that a call may have, from its other arguments; the least is 0.
    """

    family: str
    features: frozenset[str]
    arguments: Mapping[str, str]
    outputs: tuple[str, ...]
    reference: Callable[..., dict[str, Tensor]]
    shape: Callable[..., dict[str, Spec]]
    samples: Callable[[], Iterator[dict[str, Any]]]
    typical: Callable[[Setting], dict[str, Any]] | None = None
    layouts: tuple[Mapping[str, Any], ...] = ({},)
    tolerance: Tolerance = field(default_factory=Tolerance)
    order_free: frozenset[str] = frozenset()
    domains: Mapping[str, Domain] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    once: frozenset[str] = frozenset()
    each: str = ""
    products: bool = False
    cancels: bool = False
    by_rows: bool = True
    greatest: Mapping[str, Callable[[Mapping[str, Any]], int]] = field(default_factory=dict)
    table: ClassVar[str] = "ops"

    @property
    def key(self) -> tuple[str, frozenset[str]]:
        """Its place in the registry."""
        return self.family, self.features

    def admit(self, registry: Registry) -> None:
        """Raise a ValueError if an argument is text, and nothing says which, a domain is of no argument, or what a list
        of outputs is as long as is no list."""
        for argument, kind in self.arguments.items():
            if kind.startswith("str") and argument not in self.domains:
                raise ValueError(
                    f"{self.name}: argument {argument} is text, which can be anything: say in domains what it may be"
                )
        if unknown := self.domains.keys() - self.arguments:
            raise ValueError(f"{self.name}: domains of {', '.join(sorted(unknown))}, which are no arguments")
        if self.each and (not self.arguments.get(self.each, "").endswith("[]") or len(self.outputs) != 1):
            raise ValueError(f"{self.name}: each is {self.each}: it names a list argument of an op with one output")

    def stage(self, kind: str) -> Stage | None:
        """The stage of this kind, if there is one."""
        return next((stage for stage in self.stages if stage.kind == kind), None)

    @property
    def is_collective(self) -> bool:
        """Whether every rank of a group must call it, or none."""
        return any(stage.collective for stage in self.stages)

    @property
    def overload_name(self) -> str:
        """``default`` or the features joined, e.g. ``add_value``."""
        return "_".join(sorted(self.features)) or "default"

    @property
    def name(self) -> str:
        """The qualified name, e.g. ``aiter_fusion::rms_norm_quant.add``."""
        suffix = f".{self.overload_name}" if self.features else ""
        return f"{NAMESPACE}::{self.family}{suffix}"

    @property
    def target(self) -> torch._ops.OpOverload:
        """What a graph calls."""
        return getattr(getattr(getattr(torch.ops, NAMESPACE), self.family), self.overload_name)

    def allocate(self, **arguments: Any) -> dict[str, Tensor]:
        """The outputs, uninitialised: the fake implementation, and what kernels write to."""
        first = next(value for value in arguments.values() if isinstance(value, Tensor))
        specs = self.returned(self.shape(**arguments))
        return {name: dense(spec, first.new_empty) for name, spec in specs.items()}

    def returned(self, outputs: Mapping[str, T]) -> dict[str, T]:
        """What the op returns of something that there is for each of its outputs, and maybe for more, in order."""
        return dict(outputs) if self.each else {name: outputs[name] for name in self.outputs}

    @property
    def returns_one(self) -> bool:
        """Whether the op returns a tensor, not several."""
        return len(self.outputs) == 1 and not self.each

    def pack(self, outputs: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, ...] | list[Tensor] | None:
        """The outputs as the op returns them: one tensor alone, several as a tuple, as many as arguments as a list."""
        if not self.outputs:
            return None
        ordered = list(self.returned(outputs).values())
        if self.each:
            return ordered
        return ordered[0] if self.returns_one else tuple(ordered)


class BridgeOp(FusedOp):
    """An op that no fusion makes: it stands alone, in a model's own code."""

    products: bool = True
    table: ClassVar[str] = "bridge"


def width_of(op: FusedOp, arguments: Mapping[str, Any]) -> Any:
    """The length of the rows that a call works on."""
    return op.stages[0].width(arguments) if op.stages else first_width(arguments)


def first_width(arguments: Mapping[str, Any]) -> Any:
    """The length of the rows of the first tensor."""
    return columns(next((value for value in arguments.values() if isinstance(value, Tensor)), None))


def columns(x: Any) -> Any:
    """The length of a tensor's rows; 1 for a number and for what is no tensor, which terms refuse."""
    return x.shape[-1] if isinstance(x, Tensor) and x.dim() else 1


def dense(spec: Spec, empty: Callable[..., Tensor]) -> Tensor:
    """The tensor of a spec, from ``empty(sizes, dtype=...)``, which makes contiguous ones."""
    sizes, dtype, *order = spec
    if not order:
        return empty(sizes, dtype=dtype)
    dims = order[0]
    return empty([sizes[d] for d in dims], dtype=dtype).permute([dims.index(d) for d in range(len(dims))])


def is_contiguous(x: Tensor) -> bool:
    """Whether a tensor, maybe of symbolic sizes, is known to be contiguous; never adds a guard."""
    # not before: it loads sympy, which registering ops must not
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    expected: Any = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        if not statically_known_true(size == 1) and not statically_known_true(stride == expected):
            return False
        expected = expected * size
    return True


# What PyTorch has been told of, which it cannot forget: qualified name -> (schema, the declaration in force).
_DEFINED: dict[str, tuple[str, list[FusedOp]]] = {}


def define(
    declaration: FusedOp, implementation: Callable[[FusedOp, str], Implementation], unsaid: str = "reference"
) -> FusedOp:
    """Register a declaration, with PyTorch too, and return it.

    ``implementation(op, provider)`` gives the callable that runs a call; the provider's name is the last argument of
    every op, chosen when the graph is compiled, and ``unsaid`` where a call does not say.

    Raises:
        ValueError: there is an op of this family with these features already, or was one with another schema; an
            argument is text, and nothing says which; or a domain is of no argument.
    """
    names = [*declaration.arguments, "provider"]
    arguments = ", ".join(f"{kind} {name}" for name, kind in declaration.arguments.items())
    returned = "Tensor[]" if declaration.each else "Tensor"
    returns = ", ".join(f"{returned} {name}" for name in declaration.outputs)
    suffix = f".{declaration.overload_name}" if declaration.features else ""
    qualified = f"{declaration.family}{suffix}"
    schema = f'{qualified}({arguments}, str provider="{unsaid}") -> ({returns})'
    if qualified in _DEFINED and _DEFINED[qualified][0] != schema:
        raise ValueError(
            f"{declaration.name} was {_DEFINED[qualified][0]} in this process, which PyTorch cannot forget: choose "
            "another family or other features"
        )
    REGISTRY.register(declaration)
    if qualified in _DEFINED:
        _DEFINED[qualified][1][0] = declaration
        return declaration
    in_force = [declaration]
    _DEFINED[qualified] = schema, in_force
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    _LIBRARIES.append(library)
    library.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))

    def call(*args: Any) -> Tensor | tuple[Tensor, ...] | list[Tensor] | None:
        provider = args[len(names) - 1] if len(args) == len(names) else unsaid
        run = implementation(in_force[0], provider)
        return in_force[0].pack(run(**dict(zip(names[:-1], args, strict=False))))

    def fake(*args: Any) -> Tensor | tuple[Tensor, ...] | list[Tensor] | None:
        return in_force[0].pack(in_force[0].allocate(**dict(zip(names[:-1], args, strict=False))))

    library.impl(qualified, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{qualified}", fake, lib=library)
    return declaration
