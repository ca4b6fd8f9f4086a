"""Find records: values in a graph that a form explains. Reads the graph, never changes it."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from ..formats import format_of
from ..patterns.form import Form
from ..patterns.fx_facts import behind, dtype, is_quantising_cast, operator, readers
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
    rows, several: the names of inputs, as in ``Form``.
    refusal: why no fused op can compute it, None if one might.
    serves: the kinds of records that this one was looked for as an input of; the site of such a one accounts for it.
    alone:   why it is left alone where no fusion begins or ends with it.
    listed:  whether it counts; if not, it only keeps the value from being of another form, or unknown.
    called:  the name of its kind in reports where no fusion takes it.
    exact:   whether its pattern says what it computes bit by bit; not that of an operator of a library.
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
    several: tuple[str, ...] = ()
    serves: tuple[str, ...] = ()
    listed: bool = True
    called: str = ""
    exact: bool = True
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

    Values are tried from the last to the first, so that a form is found before its own parts are: a node inside
    records of one kind, and read nowhere else, is never the root of another record (the product in a gated norm is no
    activation). Two records may share nodes (two weights on one normalised tensor), never a root.

    An exception concerns the value at which it was raised, and is reported there; with ``strict`` it is raised.
    """
    by_target: dict[Any, list[Form]] = defaultdict(list)
    anywhere: dict[Any, list[Form]] = defaultdict(list)
    serving: dict[str, list[Form]] = defaultdict(list)
    for form in forms:
        targets = heads(form.pattern)
        if targets is None and not form.serves:
            raise TypeError(f"form {form.name} can end in any call: the matcher would try it on every node")
        for target in filter(None, map(operator, targets or ())):
            by_target[target].append(form)
            if not form.serves:
                anywhere[target].append(form)
        for kind in form.serves:
            serving[kind].append(form)

    matcher = Matcher()
    found = Recognised(by_target=by_target)
    records: dict[fx.Node, Record] = {}
    inside: dict[str, set[fx.Node]] = defaultdict(set)  # kind -> nodes inside its records
    tried: set[tuple[fx.Node, str]] = set()

    def candidates(node: fx.Node) -> Sequence[Form]:
        forms_here = anywhere.get(node.target, ())
        around = [nodes for nodes in inside.values() if node in nodes] if forms_here else []
        read = readers(node) if around else []
        return [] if any(nodes.issuperset(read) for nodes in around) else forms_here

    def first(candidates: Sequence[Form], node: fx.Node) -> Record | None:
        try:
            record = _first(matcher, candidates, node)
            if record is None and is_quantising_cast(node):
                called = f"{format_of(dtype(node)).name}_quant"
                found.unknown.append((node, called, Refusal(Reason.UNKNOWN, _why(node, candidates)[0])))
            return record if record is None or record.listed else None
        except Exception as error:
            # A defect concerns this value alone: nothing has been changed, and the report says what happened.
            if strict:
                raise
            logger.warning("aiter_fusion: matching %s failed", node.name, exc_info=True)
            refusal = Refusal(Reason.ERROR, f"{type(error).__name__}: {error}")
            found.unknown.append((node, candidates[0].kind, refusal))
            return None

    def keep(record: Record) -> None:
        """Keep a record, and look at once for one that serves it: what lies inside that is found later."""
        records[record.root] = record
        inside[record.kind] |= record.nodes
        helpers = serving.get(record.kind, ())
        root = behind(record.inputs["x"]) if helpers else None
        if root is None or root in records or is_quantising_cast(root) or (root, record.kind) in tried:
            return
        tried.add((root, record.kind))
        if (others := candidates(root)) and first(others, root) is not None:
            return  # a record of its own, which is kept in its turn
        helper = first(helpers, root)
        if helper is not None:
            keep(helper)
        elif (failed := _failed(Matcher(), helpers, root)) is not None:
            found.unserved[root] = f"{failed[0].kind}: {failed[1]}"

    for node in reversed(graph.nodes):
        if node not in records and (forms_here := candidates(node)):
            record = first(forms_here, node)
            if record is not None:
                keep(record)
    found.records = _numbered(sorted(records.values(), key=lambda record: record.root))
    return found


def same(record: Record) -> Any:
    """What records have in common that compute the same, apart from inputs of which there may be several."""
    literals = tuple(sorted((name, str(value)) for name, value in record.attributes.items()))
    several = tuple(name for name in record.inputs if name.rstrip("0123456789") in record.several)
    inputs = sorted(((name, node) for name, node in record.inputs.items() if name not in several), key=str)
    return record.kind, tuple(inputs), literals, record.features


def _numbered(records: list[Record]) -> list[Record]:
    """The records, those of several on one value told apart as ``Form.several`` says."""
    together: dict[Any, list[list[fx.Node]]] = defaultdict(list)
    for record in records:
        given = [record.inputs[name] for name in record.several if name in record.inputs]
        if given and given not in together[same(record)]:
            together[same(record)].append(given)

    def numbered(record: Record) -> Record:
        several = together.get(same(record), [])
        if len(several) < 2:
            return record
        index = several.index([record.inputs[name] for name in record.several])
        number = str(index + 1) if index else ""
        return replace(
            record,
            inputs={f"{name}{number}" if name in record.several else name: n for name, n in record.inputs.items()},
            outputs={f"{name}{number}": node for name, node in record.outputs.items()},
            features=frozenset(f"{feature}{len(several)}" for feature in record.features),
        )

    return [numbered(record) for record in records]


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
                several=form.several,
                serves=form.serves,
                alone=form.alone,
                listed=form.listed,
                called=completion.called or form.kind,
                exact=completion.exact,
                refusal=completion.refusal,
            )
            for branch in form.branches:
                end = follow(matcher, branch, found, node)
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
        return failed[1:]
    culprit = matcher.misfit if matcher.misfit is not None else node
    return f"{culprit.name} ({culprit.target}) fits none", matcher.depth


def _failed(matcher: Matcher, forms: Iterable[Form], node: fx.Node) -> tuple[Form, str, int] | None:
    """The form of which a complete match failed a condition, that condition, and its number of nodes; None if no
    pattern matches."""
    for form in forms:
        for found in matcher.match(form.pattern, node):
            completion = form.complete(node, found)
            if isinstance(completion, str):
                return form, completion, len(found.nodes)
    return None
