"""Graphs as text: what reports and pages show of a graph long after it has been compiled.

Taken only when somebody asks (``journal.recording``): it costs more than the pass. Nothing here holds on to a graph.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from math import prod
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._guards import CompileContext


class NodeText(NamedTuple):
    """One node of a graph.

    name:   what other nodes call it; that of a parameter, buffer or argument where it is one, e.g. ``norm.weight``.
    code:   what it computes, e.g. ``aten.mul.Tensor(x, 2.0)``.
    value:  dtype, shape, and the strides of what is not contiguous, e.g. ``bf16[4, 256]``.
    where:  the module that it comes from, e.g. ``model.layers.0.mlp``.
    source: the line of Python that it comes from, e.g. ``model.py:12: return self.norm(x)``.
    moved:  how many bytes it reads and writes if it runs alone; 0 for views.
    """

    name: str
    code: str
    value: str
    where: str
    source: str
    moved: int = 0


@dataclass(frozen=True)
class Recorded:
    """A compiled graph before and after the pass.

    name:  PyTorch's name of the compilation, e.g. ``0/0``.
    sites: for each site of the graph's report the names of its original nodes and of those in their place, both in
           graph order.
    first: the position of the first of these sites in the report, which may be of several graphs.
    model: the class of the outermost module, e.g. ``LlamaForCausalLM``; empty where a function was compiled.
    """

    name: str
    before: tuple[NodeText, ...]
    after: tuple[NodeText, ...]
    sites: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    first: int = 0
    model: str = field(default_factory=lambda: _COMPILED.get().model)


@dataclass(frozen=True)
class _Compiled:
    """What Dynamo's graph says and those made from it do not: the names of its inputs, and the model's class."""

    inputs: tuple[str, ...] = ()
    model: str = ""


_UNKNOWN = _Compiled()
_COMPILED: ContextVar[_Compiled] = ContextVar("compiled", default=_UNKNOWN)


@contextmanager
def compiling(module: fx.GraphModule) -> Iterator[None]:
    """Within, graphs that are made from Dynamo's are shown with the names of the model's parameters and arguments."""
    inputs = tuple(_input(node) for node in module.graph.nodes if node.op == "placeholder")
    stacks = (node.meta.get("nn_module_stack") for node in module.graph.nodes)
    outermost = next((next(iter(stack.values())) for stack in stacks if stack), None)
    token = _COMPILED.set(_Compiled(inputs, _class(outermost[1]) if outermost else ""))
    try:
        yield
    finally:
        _COMPILED.reset(token)


def _class(given: Any) -> str:
    return (given if isinstance(given, str) else given.__qualname__).rpartition(".")[2]


def _input(node: fx.Node) -> str:
    """The model's name of an input: ``norm.weight`` of ``L['self']._modules['norm']._parameters['weight']``; empty if
    Dynamo does not say where it comes from."""
    source: Any = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return ""
    name = source.name() if callable(source.name) else source.name  # a property from torch 2.10 on
    return _top(str(name))


def nodes(graph: fx.Graph) -> tuple[NodeText, ...]:
    """All nodes of a graph as text."""
    shown = _names(graph)
    return tuple(
        NodeText(shown[n], _code(n, shown), _value(n.meta.get("val")), where(n), _source(n), _moved(n))
        for n in graph.nodes
    )


def _names(graph: fx.Graph) -> dict[fx.Node, str]:
    """Each node's name, and for inputs that are tensors those of the model, unless a node has that name."""
    taken = {node.name for node in graph.nodes}
    shown = {}
    for node in graph.nodes:
        name = _parameter(node.meta.get("desc")) if node.op == "placeholder" and _is_tensor(node) else ""
        shown[node] = node.name if not name or name in taken else name
        taken.add(shown[node])
    return shown


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _parameter(described: Any) -> str:
    """The model's name of an input, from AOTAutograd's description of it; empty if it has none."""
    if (base := getattr(described, "base", None)) is not None:  # a part of a subclass of Tensor
        name = _parameter(base)
        return f"{name}.{described.attr}" if name and hasattr(described, "attr") else name
    if hasattr(described, "target"):  # a parameter or a buffer of an exported program
        return described.target
    inputs = _COMPILED.get().inputs
    position = getattr(described, "idx", len(inputs))
    return inputs[position] if position < len(inputs) else ""


def names(given: Iterable[fx.Node]) -> tuple[str, ...]:
    """The names of nodes in graph order; erased ones count where they were."""
    return tuple(node.name for node in sorted(given))


def compile_id() -> str:
    """What PyTorch calls the compilation that is under way; empty outside one."""
    return str(CompileContext.current_compile_id() or "")


def where(node: fx.Node) -> str:
    """The module that a node comes from, e.g. ``model.layers.0.input_layernorm``; empty outside modules."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return _top(str(stack[-1][0]) if stack else "")


def _top(path: str) -> str:
    """A path of Dynamo's as the model's own code has it, without the model that it starts from."""
    path = re.sub(r"\.(?:__dict__\['_modules'\]|_modules|_parameters|_buffers)\['(\w+)'\]", r".\1", path)
    path = path.removeprefix("L['self']").removeprefix("L['fn']").lstrip(".")
    path = re.sub(r"^L\['kwargs'\]\['(\w+)'\]", r"\1", path)
    return re.sub(r"^[LG]\['(\w+)'\]", r"\1", path)  # a module that a function reads from its surroundings


def _code(node: fx.Node, shown: Mapping[fx.Node, str]) -> str:
    if node.op in ("placeholder", "get_attr"):
        return f"{node.op} {node.target}"
    if node.op == "output":
        return f"return {_argument(node.args[0], shown)}"
    if node.target is getitem:
        return f"{_argument(node.args[0], shown)}[{_argument(node.args[1], shown)}]"
    positional = [_argument(value, shown) for value in node.args]
    if getattr(node.target, "namespace", "") == "aiter_fusion":  # a dozen arguments: unreadable without their names
        named = zip(node.target._schema.arguments, positional, strict=False)  # type: ignore[union-attr]
        positional = [f"{argument.name}={value}" for argument, value in named]
    given = [*positional, *(f"{name}={_argument(value, shown)}" for name, value in node.kwargs.items())]
    return f"{str(node.target).removesuffix('.default')}({', '.join(given)})"


def _argument(value: Any, shown: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return shown[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(one, shown) for one in value)}]"
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return str(value).removeprefix("torch.")
    return repr(value)


_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "bool": "b", "complex": "c"}


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    if not isinstance(value, Tensor):
        return "" if value is None else str(value)
    letters, digits, rest = re.fullmatch(r"([a-z]+)(\d*)(.*)", str(value.dtype).removeprefix("torch.")).groups()  # type: ignore[union-attr]
    text = f"{_SHORT.get(letters, letters)}{digits}{rest}[{', '.join(map(str, value.shape))}]"
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if str(size) != "1" and str(stride) != str(expected):
            return f"{text} strides ({', '.join(map(str, value.stride()))})"
        expected = expected * size
    return text


def _moved(node: fx.Node) -> int:
    """The bytes of the tensors that a node reads and of those that it writes; nothing for views and their like."""
    if node.op != "call_function" or node.target is getitem or _is_view(node.target):
        return 0
    return sum(_bytes(one.meta.get("val")) for one in node.all_input_nodes) + _bytes(node.meta.get("val"))


@cache
def _is_view(target: Any) -> bool:
    """Whether an op returns its input seen otherwise."""
    schema = getattr(target, "_schema", None)
    aliases = [value.alias_info for value in schema.returns] if schema is not None else []
    return any(alias is not None and not alias.is_write for alias in aliases)


def _bytes(value: Any) -> int:
    """What a value has in memory: an expanded dimension counts once, a symbolic size as it was when compiling."""
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes, value))
    if not isinstance(value, Tensor):
        return 0
    sizes = zip(value.shape, value.stride(), strict=True)
    return prod(_size(size) for size, stride in sizes if str(stride) != "0") * value.element_size()


def _size(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    return size.node.hint if size.node.has_hint() else 1


_TORCH = os.path.dirname(torch.__file__) + os.sep
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)')


def _source(node: fx.Node) -> str:
    """The innermost line outside torch, whose own are the same for every model."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    theirs = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    if not theirs:
        return ""
    file, line, code = theirs[-1]
    return f"{short(file)}:{line}: {code}"


def short(file: str) -> str:
    """A file from the folder that it is found in: the working one or one that Python imports from. The package that it
    belongs to then comes first, e.g. ``transformers/models/llama/modeling_llama.py``."""
    folders = [os.getcwd(), *(os.path.abspath(folder) for folder in sys.path)]
    within = [folder + os.sep for folder in folders if file.startswith(folder.rstrip(os.sep) + os.sep)]
    return file.removeprefix(max(within, key=len, default=""))
