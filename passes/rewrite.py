"""Put planned ops into a graph. What can fail has been decided in the plan; this only builds nodes."""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
from torch import fx

from ..patterns.language import VIEWS
from .plan import Plan, Size

aten = torch.ops.aten

# What a fused node inherits from the value it replaces: where it comes from.
INHERITED = ("nn_module_stack", "stack_trace", "original_aten", "source_fn_stack", "from_node")


def rewrite(graph: fx.Graph, plans: Sequence[Plan]) -> None:
    """Insert every planned op after its last input, let its outputs take the place of what they replace, and erase
    the nodes that nothing reads any more."""
    escaping = _escaping(graph)
    moved: dict[fx.Node, fx.Node] = {}
    for plan in plans:
        arguments = [moved.get(v, v) if isinstance(v, fx.Node) else v for v in plan.arguments.values()]
        origin = max(plan.replaced)
        builder = _Builder(graph, max(a for a in arguments if isinstance(a, fx.Node)), origin.meta)
        fakes = plan.op.pack(plan.fakes)
        call = builder.add(plan.op.target, (*arguments, plan.provider.name), fakes)
        outputs = {
            name: call if len(plan.op.outputs) == 1 else builder.add(getitem, (call, index), plan.fakes[name])
            for index, name in enumerate(plan.op.outputs)
        }
        returned: set[str] = set()
        for node, (name, sizes) in plan.replaced.items():
            new = outputs[name]
            if node in escaping:
                if name in returned:  # two results that a caller may write to must stay two tensors
                    new = builder.add(aten.clone.default, (new,), plan.fakes[name].clone())
                returned.add(name)
            if sizes is not None:
                new = builder.reshape(new, sizes, node.meta["val"].shape)
            node.replace_all_uses_with(new)
            moved[node] = new
    for node in sorted({node for plan in plans for node in plan.nodes}, reverse=True):
        if not node.users:
            graph.erase_node(node)


class _Builder:
    """Adds nodes one after another, starting after ``last`` (and after all placeholders)."""

    def __init__(self, graph: fx.Graph, last: fx.Node, meta: dict[str, Any]) -> None:
        while last.op == "placeholder" and last.next.op == "placeholder":
            last = last.next
        self._graph, self._last = graph, last
        self._meta = {key: meta[key] for key in INHERITED if key in meta}

    def add(self, target: Any, args: tuple[Any, ...], val: Any) -> fx.Node:
        with self._graph.inserting_after(self._last):
            self._last = self._graph.call_function(target, args)
        self._last.meta.update(self._meta, val=val)
        return self._last

    def reshape(self, node: fx.Node, sizes: tuple[int | Size, ...], shape: torch.Size) -> fx.Node:
        """Reshape; symbolic sizes are read off the tensor, so that none is baked in."""
        val = node.meta["val"]
        target = [
            self.add(aten.sym_size.int, (node, size.dim), val.shape[size.dim]) if isinstance(size, Size) else size
            for size in sizes
        ]
        return self.add(aten.reshape.default, (node, target), val.reshape(shape))


def _escaping(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose memory a result of the graph may share."""
    stack = list(graph.output_node().all_input_nodes)
    escaping: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node not in escaping:
            escaping.add(node)
            if node.op == "call_function" and _may_alias(node.target):
                stack += node.all_input_nodes
    return escaping


def _may_alias(target: Any) -> bool:
    if target in VIEWS or target is getitem:
        return True
    schema = getattr(target, "_schema", None)
    return schema is not None and any(argument.alias_info is not None for argument in schema.arguments)
