"""The declaration of an op of the bridge: one typed reference, from which schema, fake and public function follow."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from ..domains import Domain
from ..op import NAMESPACE, BridgeOp, Spec, define
from ..providers.choice import bridge_implementation

P = ParamSpec("P")
R = TypeVar("R")


def bridge_op(
    *outputs: str,
    shape: Callable[..., dict[str, Spec]],
    samples: Callable[[], Iterator[dict[str, Any]]],
    domains: Mapping[str, Domain] | None = None,
    mutates: tuple[str, ...] = (),
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make an op of a reference in plain PyTorch, and return its public function.

    The decorated function has the public signature, whose last parameter is ``provider: str = "auto"``; its docstring
    is the public one; its body is the reference, which ignores ``provider``. The op is called as the function is.

    Args:
        outputs: names of the tensors that the reference returns, in order.
        shape: (arguments by name) -> sizes and dtype of each output.
        samples: argument sets for tests, each with all arguments but ``provider``, in order.
        domains: argument -> the values that the op is defined for; every argument of type ``str`` must be named.
        mutates: the arguments that it writes to. Such an op returns nothing; its schema says what it writes to.

    Raises:
        ValueError: a type in the signature is none that a schema can have (``torch.library.infer_schema``).
    """

    def declare(reference: Callable[P, R]) -> Callable[P, R]:
        define(
            BridgeOp(
                family=reference.__name__,
                features=frozenset(),
                arguments=_arguments(reference, mutates),
                outputs=outputs,
                reference=functools.partial(_by_name, reference, outputs),
                shape=shape,
                samples=samples,
                domains=domains or {},
            ),
            bridge_implementation,
            unsaid="auto",
        )
        return _public(reference)

    return declare


# Annotation -> schema type. ``torch.library.infer_schema`` evaluates every annotation by itself, which for all ops took
# as long as the rest of the import of this package; it is asked where an annotation is not here.
_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "int": "int",
    "int | None": "int?",
    "float": "float",
    "float | None": "float?",
    "bool": "bool",
    "str": "str",
    "torch.dtype": "ScalarType",
    "torch.dtype | None": "ScalarType?",
}


def _arguments(reference: Callable[..., Any], mutates: tuple[str, ...]) -> dict[str, str]:
    """Argument -> schema type, in order, without ``provider``, which ``define`` adds. Defaults stay in Python: the
    dispatcher drops arguments that equal a schema's default."""
    annotations = {n: kind for n, kind in reference.__annotations__.items() if n not in ("provider", "return")}
    if not mutates and all(kind in _TYPES for kind in annotations.values()):
        return {name: _TYPES[kind] for name, kind in annotations.items()}
    schema = torch.library.infer_schema(reference, mutates_args=mutates)
    parameters = schema.partition(" -> ")[0].removeprefix("(").removesuffix(")").split(", ")
    typed = (parameter.partition("=")[0].split(" ") for parameter in parameters if parameter != "*")
    # sizes of a mixture or a cache are numbers, which a graph is specialised for
    return {name: kind.replace("SymInt", "int") for kind, name in typed if name != "provider"}


def _by_name(reference: Callable[..., Any], outputs: tuple[str, ...], **arguments: Any) -> dict[str, Tensor]:
    returned = reference(**arguments)
    if not outputs:
        return {}
    return dict(zip(outputs, returned if isinstance(returned, tuple) else (returned,), strict=True))


def _public(reference: Callable[P, R]) -> Callable[P, R]:
    """A function with the signature and docstring of the reference that calls the op.

    It is compiled from text, as ``dataclasses`` compiles an ``__init__``, so that Python itself binds the arguments: to
    bind them by ``inspect`` takes 20 us a call, and the dispatcher does not know which are keyword-only.
    """
    code: Any = cast(Any, reference).__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    parameters = [*names[: code.co_argcount], "*", *names[code.co_argcount :]]
    text = f"lambda {', '.join(parameters)}: ops.{NAMESPACE}.{reference.__name__}({', '.join(names)})"
    public: Any = eval(text, {"ops": torch.ops})
    public.__defaults__ = cast(Any, reference).__defaults__
    public.__kwdefaults__ = cast(Any, reference).__kwdefaults__
    return functools.update_wrapper(public, reference)
