"""Several records as one op: which of them may go together, and where in the graph.

They read the same values but for some inputs, of which the op takes lists (``Fusion.join``): linear layers of one
quantised value. "The same" is what computes the same, for torchao quantises a value anew for each layer that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from ..op import FusedOp
from ..patterns.language import Join, readers
from .recognise import Record

# (nodes, a, b) -> a node between two others, in either order, that writes to the memory of one of ``nodes``, or None.
Written = Callable[[Iterable[fx.Node], fx.Node, fx.Node], fx.Node | None]

# Libraries whose operators compute the same from the same, unless their tags or schemas say otherwise.
PURE = ("aten", "prims")


class Misplaced(Exception):  # noqa: N818 (not an error: the normal way for records to stay apart)
    """Records cannot be one op; the message is a reason code, a colon, and the particulars."""


@dataclass(frozen=True, eq=False)
class Part:
    """What one entry of the op's lists computes: a record, and those that compute the same."""

    records: tuple[Record, ...]

    @property
    def roots(self) -> list[fx.Node]:
        """The nodes that the entry's output takes the place of."""
        return [record.root for record in self.records]


class Equal:
    """Which nodes of a graph compute the same: equal calls of equal values.

    ``equal[node]`` is the first of those that are equal to a node. What is written to somewhere in the graph, and what
    is random or of no library in ``PURE``, is equal to nothing else. The graph must not change meanwhile.
    """

    def __init__(self, graph: fx.Graph, written: Callable[[fx.Node], bool]) -> None:
        self.written = written
        self._first: dict[fx.Node, fx.Node] = {}
        calls: dict[Any, fx.Node] = {}
        for node in graph.nodes:
            comparable = _is_pure(node) and not any(map(written, [node, *node.all_input_nodes]))
            key = (node.target, self._key(node.args), self._key(node.kwargs)) if comparable else node
            self._first[node] = calls.setdefault(key, node)

    def __getitem__(self, node: fx.Node) -> fx.Node:
        return self._first[node]

    def key(self, value: Any) -> Any:
        """Something that is equal for values that are: of nodes, literals, and lists of them."""
        return self._key(value)

    def _key(self, value: Any) -> Any:
        match value:
            case fx.Node():
                return self._first[value]
            case list() | tuple():
                return tuple(map(self._key, value))
            case dict():
                return tuple((name, self._key(entry)) for name, entry in value.items())
            case _:
                return type(value), repr(value)  # -0.0 is not 0.0, nor True 1

    def copies(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """Those of the nodes, and of what they are computed from, that an earlier node is equal to."""
        found: set[fx.Node] = set()
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node not in found and self._first[node] is not node:
                found.add(node)
                pending += node.all_input_nodes
        return found


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is getitem
    target = node.target
    return (
        target.namespace in PURE
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def groups(
    join: Join, op: FusedOp, records: Iterable[Record], equal: Equal, written: Written
) -> Iterator[tuple[list[Part], str]]:
    """What of these records, of one value, can be one op, as much as possible in each; and why it is not part of the
    first before it."""
    made: list[tuple[list[Part], str]] = []
    for part in _parts(join, records, equal):
        why = ""
        for members, _ in made:
            if len(members) == join.most:
                continue
            try:
                place(join, op, [*members, part], written)
            except Misplaced as refusal:
                why = why or f"without {members[0].records[0].root.name}: {refusal}"
            else:
                members.append(part)
                break
        else:
            made.append(([part], why))
    yield from made


def _parts(join: Join, records: Iterable[Record], equal: Equal) -> list[Part]:
    """Records that compute the same together, in the order of the graph."""
    found: dict[Any, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.root):
        own = [record.inputs.get(name) for name in join.lists.values()]
        alone = any(map(equal.written, record.inputs.values()))
        found.setdefault((equal.key(own), record if alone else None), []).append(record)
    return [Part(tuple(same)) for same in found.values()]


def place(join: Join, op: FusedOp, parts: Sequence[Part], written: Written) -> fx.Node:
    """The node after which one op can compute all parts: what it reads exists there, nobody has asked for its results
    before, and no write to what a record reads or computes lies between there and the record.

    Raises:
        Misplaced: there is no such node.
    """
    records = [record for part in parts for record in part.records]
    arguments = gathered(join, op, parts)
    shared: list[fx.Node] = []
    own: list[fx.Node] = []
    for name, value in arguments.items():
        fx.map_arg(value, (own if name in join.lists else shared).append)
    needed = max([*shared, *(origin(node) or node for node in own)])
    refusal = ""
    for at in [needed, *sorted(record.root for record in records if needed < record.root)]:
        for record in records:
            early = next((reader for reader in readers(record.root) if not at < reader), None)
            if early is not None:
                raise Misplaced(refusal or f"order: {early.name} reads {record.root.name} before {at.name} exists")
        writers = (written([*record.inputs.values(), *shared, record.root], at, record.root) for record in records)
        writer = next(filter(None, writers), None)
        if writer is None:
            return at
        refusal = refusal or f"mutation: {writer.name} ({writer.target}) writes to a tensor of this site"
    raise Misplaced(refusal)


def origin(node: fx.Node) -> fx.Node | None:
    """The input or constant of the graph of which a node is a view, by views that can be made anew anywhere after it;
    None if it is none."""
    while node.op == "call_function":
        target = node.target
        if not (isinstance(target, torch._ops.OpOverload) and target.is_view and len(node.all_input_nodes) == 1):
            return None
        node = node.all_input_nodes[0]
    return node if node.op in ("placeholder", "get_attr") else None


def gathered(join: Join, op: FusedOp, parts: Sequence[Part]) -> dict[str, Any]:
    """The op's arguments by name: what the first record has, and for the lists what the first of each part has."""
    first = parts[0].records[0]
    known = {**first.attributes, **first.inputs}
    missing = [name for name in op.arguments if name not in join.lists and name not in known]
    if missing:
        raise TypeError(f"no record gives {op.name} its arguments {', '.join(missing)}")
    return {
        name: [part.records[0].inputs.get(join.lists[name]) for part in parts] if name in join.lists else known[name]
        for name in op.arguments
    }


def same(join: Join, op: FusedOp, parts: Sequence[Part]) -> dict[fx.Node, fx.Node]:
    """For the records' inputs that the op does not read those that are equal to them and that it reads."""
    first, own = parts[0].records[0].inputs, set(join.lists.values())
    read = own.union(name for name in op.arguments if name not in join.lists)
    return {
        node: known[name]
        for part in parts
        for record in part.records
        for name, node in record.inputs.items()
        if name in read
        for known in [part.records[0].inputs if name in own else first]
        if node is not known[name]
    }
