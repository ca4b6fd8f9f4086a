"""Find records: values in a graph that a form explains. Reads the graph, never changes it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..patterns.language import FP8, Form, heads
from .matcher import CONVERT, Matcher, follow


@dataclass(frozen=True, eq=False)
class Record:
    """A recognised form: one value (``outputs[form.output]``), what it is computed from, and how.

    nodes:  every node on the way from the inputs to the outputs, outputs included, inputs not.
    serves: the kind of record that this one was looked for as an input of; its site accounts for it.
    """

    kind: str
    variant: str
    inputs: Mapping[str, fx.Node]
    outputs: Mapping[str, fx.Node]
    attributes: Mapping[str, Any]
    features: frozenset[str]
    nodes: frozenset[fx.Node]
    root: fx.Node
    serves: str | None = None


@dataclass
class Recognised:
    """The records of a graph in its order, and the FP8 casts that no form explains, each with the reason."""

    records: list[Record] = field(default_factory=list)
    unknown: list[tuple[fx.Node, str]] = field(default_factory=list)


def recognise(graph: fx.Graph, forms: Sequence[Form]) -> Recognised:
    """All records of a graph.

    Values are tried from the last to the first, so that a form is found before its own parts are: a node inside a
    record is never the root of another record of the same kind. Two records may share nodes (two weights on one
    normalised tensor), never a root.
    """
    by_target: dict[Any, list[Form]] = defaultdict(list)
    serving: dict[str, list[Form]] = defaultdict(list)
    for form in forms:
        if form.serves is not None:
            serving[form.serves].append(form)
        else:
            targets = heads(form.pattern)
            if targets is None:
                raise TypeError(f"form {form.name} can end in any call: the matcher would try it on every node")
            for target in targets:
                by_target[target].append(form)

    matcher = Matcher()
    found = Recognised()
    inside: dict[str, set[fx.Node]] = defaultdict(set)  # kind -> nodes inside its records
    for node in reversed(graph.nodes):
        candidates = by_target.get(node.target, ()) if node.op == "call_function" else ()
        candidates = [form for form in candidates if node not in inside[form.kind]]
        record = _first(matcher, candidates, node) if candidates else None
        if record is not None:
            found.records.append(record)
            inside[record.kind] |= record.nodes
        elif is_fp8_cast(node):
            found.unknown.append((node, _why(node, candidates)))
    served = [
        (record, helper)
        for record in found.records
        if "x" in record.inputs
        for helper in [_first(matcher, serving[record.kind], record.inputs["x"])]
        if helper is not None
    ]
    found.records += list({helper.root: helper for _, helper in served}.values())
    found.records.sort(key=lambda record: record.root)
    found.unknown.reverse()
    return found


def _first(matcher: Matcher, forms: Iterable[Form], node: fx.Node) -> Record | None:
    """The record of the first form that explains the value, or None."""
    for form in forms:
        for found in matcher.match(form.pattern, node):
            completion = form.complete(node, found)
            if isinstance(completion, str):
                continue
            attributes = dict(completion.attributes)
            outputs, nodes = {form.output: node}, {node, *found.nodes}
            for branch in form.branches:
                end = follow(branch, found, node)
                if end is not None:
                    outputs[branch.output], attributes[branch.steps], way = end
                    nodes.update(way)
            nodes -= set(found.inputs.values())
            return Record(
                form.kind,
                completion.variant or form.name,
                found.inputs,
                outputs,
                attributes,
                completion.features,
                frozenset(nodes),
                node,
                form.serves,
            )
    return None


def is_fp8_cast(node: fx.Node) -> bool:
    """A conversion to FP8: what a quantiser ends in, whether or not a form explains it."""
    return node.op == "call_function" and node.target is CONVERT and node.args[1] in FP8


def _why(node: fx.Node, forms: Iterable[Form]) -> str:
    """Why no form explains a value: a condition that a match failed, else the node at which matching ended."""
    matcher = Matcher(trace=True)
    for form in forms:
        for found in matcher.match(form.pattern, node):
            completion = form.complete(node, found)
            if isinstance(completion, str):
                return completion
    culprit = matcher.misfit if matcher.misfit is not None else node
    return f"no form has {culprit.target} at {culprit.name}"
