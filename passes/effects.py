"""Effects: which nodes write to memory, which share it, and which nothing reads any more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from ..patterns.fx_facts import VIEWS, readers
from ..reasons import Reason, Refused

# Higher-order operators that write to their arguments; all others are functional in a post-grad graph.
WRITING = frozenset({"triton_kernel_wrapper_mutation"})


def writes_of(graph: fx.Graph) -> Iterable[tuple[fx.Node, set[int] | None]]:
    """Nodes that write to tensors, with the storages written to; None where that cannot be told."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema
            if not schema.is_mutable:
                continue
            written: set[int] | None = set()
            for position, argument in enumerate(schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
                    values = value if isinstance(value, (list, tuple)) else [value]
                    written |= {storage_of(v) for v in values if isinstance(v, fx.Node)}
            yield node, None if 0 in written else written  # 0: something without a storage of its own is written to
        elif isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() in WRITING:
            yield node, {storage_of(n) for n in node.all_input_nodes} - {0}


def storage_of(node: fx.Node) -> int:
    """The identity of the storage that a node's tensor lives in; 0 where it has none."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else 0


def dead_after(nodes: frozenset[fx.Node], replaced: set[fx.Node]) -> set[fx.Node]:
    """The nodes that nothing reads any more once ``replaced`` have been replaced."""
    dead = set(replaced)
    for node in sorted(nodes, reverse=True):
        if all(reader in dead for reader in readers(node)):
            dead.add(node)
    return dead


def check_order(inputs: set[fx.Node], replaced: Iterable[fx.Node], dead: set[fx.Node]) -> None:
    """The op goes after its last input; nothing may read an output before that."""
    last = max(inputs)
    for node in replaced:
        for reader in readers(node):
            if reader not in dead and not last < reader:
                raise Refused(Reason.ORDER, f"{reader.name} reads {node.name} before {last.name} exists")


def check_writes(
    inputs: set[fx.Node], nodes: frozenset[fx.Node], writes: list[tuple[fx.Node, set[int] | None]]
) -> None:
    """Nothing may write to what the op reads, or to what lies inside it, between where the op goes (after its last
    input) and the last node that it replaces."""
    first, last = min(min(nodes), max(inputs)), max(nodes)
    touched = {storage_of(node) for node in inputs | nodes} - {0}
    for writer, storages in writes:
        if first < writer < last and (storages is None or storages & touched):
            raise Refused(Reason.MUTATION, f"{writer.name} ({writer.target}) writes to a tensor of this site")


def written_between(
    nodes: Iterable[fx.Node], a: fx.Node, b: fx.Node, writes: Sequence[tuple[fx.Node, set[int] | None]]
) -> fx.Node | None:
    """The first node between two others, in either order, that writes to the memory of one of ``nodes``."""
    within = [(writer, storages) for writer, storages in writes if min(a, b) < writer < max(a, b)]
    touched = {storage_of(node) for node in nodes} - {0} if within else set()
    return next((writer for writer, storages in within if storages is None or storages & touched), None)


def sharing_memory(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes whose memory any of ``nodes`` may share."""
    stack = list(nodes)
    sharing: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in sharing:
            sharing.add(node)
            if node.op == "call_function" and _may_alias(node.target):
                stack += node.all_input_nodes
    return sharing


def mutates(node: fx.Node) -> bool:
    """Whether a call writes to one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _may_alias(target: Any) -> bool:
    if target in VIEWS or target is getitem:
        return True
    schema = getattr(target, "_schema", None)
    return schema is not None and any(argument.alias_info is not None for argument in schema.arguments)
