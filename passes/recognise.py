"""Find records: values in a graph that a form explains. Reads the graph, never changes it."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from ..patterns.form import Form
from ..patterns.fx_facts import behind, is_fp8_cast, operator, readers
from ..patterns.language import heads
from ..reasons import Reason, Refusal
from .matcher import Matcher, follow

logger = logging.getLogger("aiter_fusion")

# How many nodes of a form must match before what is missing is worth naming.
NEAR = 4


@dataclass(frozen=True, eq=False)
class Record:
    """A recognised form: one value (``outputs[form.output]``), what it is computed from, and how.

    branches: attributes that came with further outputs; they override ``attributes``.
    rooted: the same, with the value itself in place of a branch that took its place; None where none did.
    nodes:  every node on the way from the inputs to the outputs, outputs included, inputs not.
    rows, shared: the names of inputs, as in ``Form``.
    refusal: why no fused op can compute it, None if one might.
    serves: the kind of record that this one was looked for as an input of; its site accounts for it.
    alone:   why it is left alone where no fusion begins or ends with it.
    listed:  whether it counts; if not, it only keeps the value from being of another form, or unknown.
    """

    kind: str
    variant: str
    inputs: Mapping[str, fx.Node]
    outputs: Mapping[str, fx.Node]
    attributes: Mapping[str, Any]
    branches: Mapping[str, Any]
    features: frozenset[str]
    nodes: frozenset[fx.Node]
    root: fx.Node
    alone: Refusal
    rows: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    serves: str | None = None
    listed: bool = True
    refusal: Refusal | None = None
    rooted: Record | None = None


@dataclass
class Recognised:
    """The records of a graph in its order, what no form explains (node, kind, reason), the forms by the calls that
    they end in, and why a value that would serve a record does not (kind and condition)."""

    records: list[Record] = field(default_factory=list)
    unknown: list[tuple[fx.Node, str, Refusal]] = field(default_factory=list)
    by_target: Mapping[Any, Sequence[Form]] = field(default_factory=dict)
    unserved: dict[fx.Node, str] = field(default_factory=dict)

    def near_miss(self, node: fx.Node) -> str | None:
        """Which node kept a value from being one of the forms, if a good part of one matched."""
        found = _why(node, self.by_target.get(node.target, ()))
        return found[0] if found[1] >= NEAR else None


def recognise(graph: fx.Graph, forms: Sequence[Form], strict: bool = False) -> Recognised:
    """All records of a graph.

    Values are tried from the last to the first, so that a form is found before its own parts are: a node inside a
    record, and read nowhere else, is never the root of another record of the same kind. Two records may share nodes
    (two weights on one normalised tensor), never a root.

    An exception concerns the value at which it was raised, and is reported there; with ``strict`` it is raised.
    """
    by_target: dict[Any, list[Form]] = defaultdict(list)
    serving: dict[str, list[Form]] = defaultdict(list)
    for form in forms:
        if form.serves is not None:
            serving[form.serves].append(form)
            continue
        targets = heads(form.pattern)
        if targets is None:
            raise TypeError(f"form {form.name} can end in any call: the matcher would try it on every node")
        for target in filter(None, map(operator, targets)):
            by_target[target].append(form)

    matcher = Matcher()
    found = Recognised(by_target=by_target)
    inside: dict[str, set[fx.Node]] = defaultdict(set)  # kind -> nodes inside its records

    def first(candidates: Sequence[Form], node: fx.Node) -> Record | None:
        try:
            record = _first(matcher, candidates, node)
            if record is None and is_fp8_cast(node):
                found.unknown.append((node, "fp8_quant", Refusal(Reason.UNKNOWN, _why(node, candidates)[0])))
            return record if record is None or record.listed else None
        except Exception as error:
            # A defect concerns this value alone: nothing has been changed, and the report says what happened.
            if strict:
                raise
            logger.warning("aiter_fusion: matching %s failed", node.name, exc_info=True)
            refusal = Refusal(Reason.ERROR, f"{type(error).__name__}: {error}")
            found.unknown.append((node, candidates[0].kind, refusal))
            return None

    for node in reversed(graph.nodes):
        forms_here = by_target.get(node.target, ())
        read = readers(node) if forms_here else []
        candidates = [
            form for form in forms_here if node not in inside[form.kind] or not inside[form.kind].issuperset(read)
        ]
        record = first(candidates, node) if candidates else None
        if record is not None:
            found.records.append(record)
            inside[record.kind] |= record.nodes
    served = {}
    roots = {record.root for record in found.records}
    for record in found.records:
        helpers = serving.get(record.kind, ())
        root = behind(record.inputs["x"]) if helpers else None
        if root is not None and root not in served and root not in roots:
            served[root] = first(helpers, root)
            if served[root] is None and (failed := _failed(Matcher(), helpers, root)) is not None:
                found.unserved[root] = f"{next(iter(helpers)).kind}: {failed[0]}"
    found.records += [helper for helper in served.values() if helper is not None]
    found.records.sort(key=lambda record: record.root)
    return found


def _first(matcher: Matcher, forms: Iterable[Form], node: fx.Node) -> Record | None:
    """The record of the first form that explains the value, or None."""
    inputs = {source.target for source in node.all_input_nodes}
    for form in forms:
        if form.reads is not None and form.reads.isdisjoint(inputs):
            continue
        for found in matcher.match(form.pattern, node):
            completion = form.complete(node, found)
            if isinstance(completion, str):
                continue
            inputs = found.inputs if completion.inputs is None else completion.inputs
            record = Record(
                kind=form.kind,
                variant=completion.variant or form.name,
                inputs=inputs,
                outputs={form.output: node},
                attributes=completion.attributes,
                branches={},
                features=completion.features,
                nodes=frozenset({node, *found.nodes, *completion.nodes} - set(inputs.values())),
                root=node,
                rows=form.rows,
                shared=form.shared,
                serves=form.serves,
                alone=form.alone,
                listed=form.listed,
                refusal=completion.refusal,
            )
            for branch in form.branches:
                end = follow(branch, found, node)
                if end is not None:
                    last, steps, way = end
                    record = replace(
                        record,
                        outputs={**record.outputs, branch.output: last},
                        branches={**record.branches, branch.attribute: branch.value(last, steps)},
                        nodes=record.nodes.union(way),
                        rooted=record if branch.output == form.output else None,
                    )
            return record
    return None


def _why(node: fx.Node, forms: Iterable[Form]) -> tuple[str, int]:
    """Why no form explains a value, and how many nodes deep the best match went: a condition that a complete match
    failed, else the node at which matching ended."""
    matcher = Matcher(trace=True)
    failed = _failed(matcher, forms, node)
    if failed is not None:
        return failed
    culprit = matcher.misfit if matcher.misfit is not None else node
    return f"{culprit.name} ({culprit.target}) fits none", matcher.depth


def _failed(matcher: Matcher, forms: Iterable[Form], node: fx.Node) -> tuple[str, int] | None:
    """The condition that a complete match failed, and its number of nodes; None if no pattern matches."""
    for form in forms:
        for found in matcher.match(form.pattern, node):
            completion = form.complete(node, found)
            if isinstance(completion, str):
                return completion, len(found.nodes)
    return None
