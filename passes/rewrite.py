"""Put planned ops into a graph. What can fail has been decided in the plan; this only builds nodes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor_config

from ..patterns.fx_facts import ASSERTIONS, readers
from .effects import mutates, sharing_memory
from .layout import Size
from .selection import View
from .sites import Plan

aten = torch.ops.aten

# What a fused node inherits from the value it replaces: where it comes from.
INHERITED = ("nn_module_stack", "stack_trace", "original_aten", "source_fn_stack", "from_node")


def rewrite(graph: fx.Graph, plans: Sequence[Plan]) -> list[list[fx.Node]]:
    """Insert every planned op after its last input, let its outputs take the place of what they replace, and erase
    the nodes that nothing reads any more, with the assertions about them: what these say of a value, the plan has found
    true of the output in its place. Returns the nodes inserted for each plan."""
    returned = sharing_memory(graph.output_node().all_input_nodes)
    written = sharing_memory([node for writer in graph.nodes if mutates(writer) for node in writer.all_input_nodes])
    moved: dict[fx.Node, fx.Node] = {}
    inserted: list[list[fx.Node]] = []
    for plan in plans:
        arguments = fx.map_arg(list(plan.arguments.values()), lambda node: moved.get(node, node))
        # not before the inputs that the plan was checked with, though what took their place may be earlier
        sizes = [view.others for views in plan.selected.values() for view in views]
        inputs: list[fx.Node] = []
        fx.map_arg((arguments, list(plan.arguments.values()), sizes), inputs.append)
        if plan.after is not None:
            inputs = [plan.after, *(moved[node] for node in inputs if node in moved)]
        builder = _Builder(graph, max(inputs), max(plan.replaced).meta)
        inserted.append(builder.added)
        fakes = plan.op.pack(plan.fakes)
        if plan.after is not None:
            arguments = fx.map_arg(arguments, builder.anew)
        arguments = [
            builder.select(value, plan.selected.get(name, ()))
            for name, value in zip(plan.arguments, arguments, strict=True)
        ]
        arguments = [
            fx.map_arg(value, partial(builder.permute, dims=plan.permuted[name])) if name in plan.permuted else value
            for name, value in zip(plan.arguments, arguments, strict=True)
        ]
        if _captured_in_parts():
            device = next(iter(plan.fakes.values())).device
            arguments = fx.map_arg(arguments, partial(builder.to, device=device))
        call = builder.add(plan.op.target, (*arguments, plan.provider.name), fakes)
        outputs = {
            name: call if plan.op.returns_one else builder.add(getitem, (call, index), fake)
            for index, (name, fake) in enumerate(plan.fakes.items())
        }
        sharing: dict[str, list[fx.Node]] = {name: [] for name in outputs}
        for node, (name, fit) in plan.replaced.items():
            new, others = outputs[name], sharing[name]
            both_returned = node in returned and not returned.isdisjoint(others)
            if others and (both_returned or not written.isdisjoint([node, *others])):
                # results that a caller or a later node may write to must stay tensors of their own
                new = builder.add(aten.clone.default, (new,), plan.fakes[name].clone())
            others.append(node)
            if fit.sizes is not None:
                new = builder.reshape(new, fit.sizes, fit.shape)
            if fit.dims is not None:
                new = builder.permute(new, fit.dims)
            node.replace_all_uses_with(new, lambda user: user.target not in ASSERTIONS)
            moved[node] = new
    for node in sorted({node for plan in plans for node in plan.nodes}, reverse=True):
        if not readers(node):
            for assertion in list(node.users):
                graph.erase_node(assertion)
            graph.erase_node(node)
    return inserted


def _captured_in_parts() -> bool:
    """Whether Inductor will capture CUDA graphs of the parts of this graph that run on a GPU.

    A replay reads host memory no more, so Inductor copies the numbers there that a part reads to the GPU before it, but
    only those that ATen's operations read. (Without parts it captures no graph that has any.)
    """
    return inductor_config.triton.cudagraphs and inductor_config.graph_partition


class _Builder:
    """Adds nodes one after another, starting after ``last`` (and after all placeholders)."""

    def __init__(self, graph: fx.Graph, last: fx.Node, meta: dict[str, Any]) -> None:
        while last.op == "placeholder" and last.next.op == "placeholder":
            last = last.next
        self._graph, self._last = graph, last
        self._meta = {key: meta[key] for key in INHERITED if key in meta}
        self.added: list[fx.Node] = []

    def add(self, target: Any, args: tuple[Any, ...], val: Any) -> fx.Node:
        with self._graph.inserting_after(self._last):
            self._last = self._graph.call_function(target, args)
        self._last.meta.update(self._meta, val=val)
        self.added.append(self._last)
        return self._last

    def anew(self, node: fx.Node) -> fx.Node:
        """A view of the graph's inputs, made here where the graph makes it later."""
        if not self._last < node:
            return node
        args = fx.map_arg(node.args, self.anew)
        return self.add(node.target, args, node.meta["val"])

    def select(self, node: Any, views: Sequence[View]) -> Any:
        """The rows of an argument that views select."""
        for view in views:
            node = self.add(view.target, (node, *view.others), view.of(node.meta["val"]))
        return node

    def permute(self, node: fx.Node, dims: Sequence[int]) -> fx.Node:
        return self.add(aten.permute.default, (node, list(dims)), node.meta["val"].permute(dims))

    def to(self, node: fx.Node, device: torch.device) -> fx.Node:
        """A copy on the device, unless the tensor is there; not waited for."""
        val = node.meta["val"]
        if val.device == device:
            return node
        copy = torch.ops.prims.device_put.default
        return self.add(copy, (node, device, True), copy(val, device, True))

    def reshape(self, node: fx.Node, sizes: tuple[int | Size | fx.Node, ...], shape: torch.Size) -> fx.Node:
        """Reshape; symbolic sizes are read off the tensor, so that none is baked in."""
        val = node.meta["val"]
        target = [
            self.add(aten.sym_size.int, (node, size.dim), val.shape[size.dim]) if isinstance(size, Size) else size
            for size in sizes
        ]
        return self.add(aten.reshape.default, (node, target), val.reshape(shape))
