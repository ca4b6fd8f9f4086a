"""Graphs as text: what reports and pages show of a graph long after it has been compiled.

Taken only when somebody asks (``journal.recording``): it costs more than the pass. Nothing here holds on to a graph.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._guards import CompileContext


class NodeText(NamedTuple):
    """One node of a graph.

    name:   what other nodes call it.
    code:   what it computes, e.g. ``aten.mul.Tensor(x, 2.0)``.
    value:  dtype, shape, and the strides of what is not contiguous, e.g. ``bf16[4, 256]``.
    where:  the module that it comes from, e.g. ``model.layers.0.mlp``.
    source: the line of Python that it comes from, e.g. ``model.py:12: return self.norm(x)``.
    """

    name: str
    code: str
    value: str
    where: str
    source: str


@dataclass(frozen=True)
class Recorded:
    """A compiled graph before and after the pass.

    name:  PyTorch's name of the compilation, e.g. ``0/0``.
    sites: for each site of the graph's report the names of its original nodes and of those in their place, both in
           graph order.
    first: the position of the first of these sites in the report, which may be of several graphs.
    """

    name: str
    before: tuple[NodeText, ...]
    after: tuple[NodeText, ...]
    sites: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    first: int = 0


def nodes(graph: fx.Graph) -> tuple[NodeText, ...]:
    """All nodes of a graph as text."""
    return tuple(NodeText(n.name, _code(n), _value(n.meta.get("val")), where(n), _source(n)) for n in graph.nodes)


def names(given: Iterable[fx.Node]) -> tuple[str, ...]:
    """The names of nodes in graph order; erased ones count where they were."""
    return tuple(node.name for node in sorted(given))


def compile_id() -> str:
    """What PyTorch calls the compilation that is under way; empty outside one."""
    return str(CompileContext.current_compile_id() or "")


def where(node: fx.Node) -> str:
    """The module that a node comes from, e.g. ``model.layers.0.input_layernorm``; empty outside modules."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    path = path.removeprefix("L['self']").removeprefix("L['fn']").lstrip(".")
    return re.sub(r"^[LG]\['(\w+)'\]", r"\1", path)  # a module that a function reads from its surroundings


def _code(node: fx.Node) -> str:
    if node.op in ("placeholder", "get_attr"):
        return f"{node.op} {node.target}"
    if node.op == "output":
        return f"return {_argument(node.args[0])}"
    if node.target is getitem:
        return f"{_argument(node.args[0])}[{_argument(node.args[1])}]"
    positional = [_argument(value) for value in node.args]
    if getattr(node.target, "namespace", "") == "aiter_fusion":  # a dozen arguments: unreadable without their names
        named = zip(node.target._schema.arguments, positional, strict=False)  # type: ignore[union-attr]
        positional = [f"{argument.name}={value}" for argument, value in named]
    given = [*positional, *(f"{name}={_argument(value)}" for name, value in node.kwargs.items())]
    return f"{str(node.target).removesuffix('.default')}({', '.join(given)})"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_argument, value))}]"
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


_TORCH = os.path.dirname(torch.__file__) + os.sep
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)')


def _source(node: fx.Node) -> str:
    """The innermost line outside torch, whose own are the same for every model."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    theirs = [frame for frame in frames if not frame[0].startswith(_TORCH)] or frames
    if not theirs:
        return ""
    file, line, code = theirs[-1]
    here = os.getcwd() + os.sep
    return f"{file.removeprefix(here)}:{line}: {code}"
