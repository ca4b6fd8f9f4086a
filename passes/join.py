"""Several records as one op: which of them go together, and where in the graph.

They read the same values but for some inputs, of which the op takes lists (``form.Join``): linear layers of one
quantised value. "The same" is what computes the same, for torchao quantises a value anew for each layer that reads it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from ..config import Options
from ..op import FusedOp
from ..patterns.form import Fusion, Join
from ..patterns.fx_facts import readers, same_shape
from ..reasons import Reason, Refusal, Refused
from .effects import storage_of, written_between
from .layout import Fit, fits, outputs_of
from .recognise import Record
from .selection import View
from .sites import Plan, check_wanted, provider_for

logger = logging.getLogger("aiter_fusion")

# Libraries whose operators compute the same from the same, unless their tags or schemas say otherwise.
PURE = ("aten", "prims")

Writes = Sequence[tuple[fx.Node, set[int] | None]]


@dataclass(frozen=True, eq=False)
class Part:
    """What one entry of the op's lists computes: a record, and those that compute the same; the first says how."""

    records: tuple[Record, ...]

    @property
    def first(self) -> Record:
        """The record whose inputs the op reads."""
        return self.records[0]


class Equal:
    """Which nodes of a graph compute the same: equal calls of equal values, the first of which stands for all.

    What is written to anywhere in the graph, what is random and what is of no library in ``PURE`` is equal to nothing
    else. The graph must not change meanwhile.
    """

    def __init__(self, graph: fx.Graph, writes: Writes) -> None:
        self._writes = writes
        self._first: dict[fx.Node, fx.Node] = {}
        calls: dict[Any, fx.Node] = {}
        for node in graph.nodes:
            comparable = node.op == "call_function" and _is_pure(node.target)
            if comparable and writes:
                comparable = not any(map(self.is_written, [node, *node.all_input_nodes]))
            key = (node.target, self.key(node.args), self.key(node.kwargs)) if comparable else node
            self._first[node] = calls.setdefault(key, node)

    def is_written(self, node: fx.Node) -> bool:
        """Whether something writes to the memory of a node."""
        return any(storages is None or storage_of(node) in storages for _, storages in self._writes)

    def key(self, value: Any) -> Any:
        """Something that is equal for values that are: of nodes, literals, and lists of them."""
        match value:
            case fx.Node():
                return self._first[value]
            case list() | tuple():
                return tuple(map(self.key, value))
            case dict():
                return tuple((name, self.key(entry)) for name, entry in value.items())
            case int() | str() | None:
                return type(value), value  # True is not 1
            case _:
                return type(value), repr(value)  # -0.0 is not 0.0

    def copies(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """Those of the nodes, and of what they are computed from, that an earlier node stands for."""
        found: set[fx.Node] = set()
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node not in found and self._first[node] is not node:
                found.add(node)
                pending += node.all_input_nodes
        return found


@cache
def _is_pure(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return target is getitem
    is_random = torch.Tag.nondeterministic_seeded in target.tags
    return target.namespace in PURE and not target._schema.is_mutable and not is_random


class Joiner:
    """Decides which records of a graph become one op."""

    def __init__(
        self,
        graph: fx.Graph,
        writes: Writes,
        options: Options,
        training: bool,
        agree: Callable[[Fusion, Mapping[str, Any]], None],
    ) -> None:
        self.equal = Equal(graph, writes)
        self._writes, self._options, self._training, self._agree = writes, options, training, agree

    def shared(self, join: Join, op: FusedOp, record: Record) -> Any:
        """What records that could be one op agree in: the features, and the arguments that are not lists."""
        known = {**record.attributes, **record.inputs}
        return record.features, self.equal.key([known.get(name) for name in op.arguments if name not in join.lists])

    def sites(
        self, fusion: Fusion, op: FusedOp, records: Iterable[Record]
    ) -> Iterator[tuple[list[Record], int, Plan | Refusal, str]]:
        """Sites of records that agree in what is ``shared``: the records, how many parts they make, the plan or why
        there is none, and why it has none of the records of an earlier site."""
        assert fusion.join is not None
        for parts, apart in self._groups(fusion.join, op, records):
            for some, made in self._taken(fusion, op, parts):
                yield [record for part in some for record in part.records], len(some), made, apart

    def _groups(self, join: Join, op: FusedOp, records: Iterable[Record]) -> list[tuple[list[Part], str]]:
        """Parts that have a place in common, as many as possible in each group."""
        made: list[tuple[list[Part], str]] = []
        for part in self._parts(join, records):
            why = ""
            for members, _ in made:
                if len(members) == join.most:
                    continue
                try:
                    self._place(join, op, [*members, part])
                except Refused as refused:
                    why = why or f"without {members[0].first.root.name}: {refused.refusal}"
                else:
                    members.append(part)
                    break
            else:
                made.append(([part], why))
        return made

    def _parts(self, join: Join, records: Iterable[Record]) -> list[Part]:
        """Records that compute the same together, in the order of the graph."""
        found: dict[Any, list[Record]] = {}
        for record in sorted(records, key=lambda record: record.root):
            own = [record.inputs.get(name) for name in join.lists.values()]
            unlike = any(map(self.equal.is_written, record.inputs.values()))
            found.setdefault((self.equal.key(own), record if unlike else None), []).append(record)
        return [Part(tuple(same)) for same in found.values()]

    def _place(self, join: Join, op: FusedOp, parts: Sequence[Part]) -> fx.Node:
        """The node after which one op can compute all parts: what it reads exists there, nothing has read its outputs
        before, and no write to what a record reads or computes lies between there and the record. A part alone can
        always take the place of its record.

        Raises:
            Refused: there is no such node.
        """
        records = [record for part in parts for record in part.records]
        shared: list[fx.Node] = []
        own: list[fx.Node] = []
        for name, value in _arguments(join, op, parts).items():
            fx.map_arg(value, (own if name in join.lists else shared).append)
        needed = max([*shared, *(_origin(node) or node for node in own)])
        found: Refused | None = None
        for at in [needed, *sorted(record.root for record in records if needed < record.root)]:
            for record in records:
                early = next((reader for reader in readers(record.root) if not at < reader), None)
                if early is not None:
                    particulars = f"{early.name} reads {record.root.name} before {at.name} exists"
                    raise found or Refused(Reason.ORDER, particulars)
            touched = {record: [*record.inputs.values(), *shared, record.root] for record in records}
            writers = (written_between(touched[record], at, record.root, self._writes) for record in records)
            writer = next(filter(None, writers), None)
            if writer is None:
                return at
            particulars = f"{writer.name} ({writer.target}) writes to a tensor of this site"
            found = found or Refused(Reason.MUTATION, particulars)
        raise found or AssertionError("the first place has been tried")

    def _taken(
        self, fusion: Fusion, op: FusedOp, parts: Sequence[Part]
    ) -> Iterator[tuple[Sequence[Part], Plan | Refusal]]:
        """One site of these parts; where only some of them can be taken, one of these, and one each of the others."""
        made = self._attempt(fusion, op, parts)
        alone = [(part, self._attempt(fusion, op, [part])) for part in parts if not isinstance(made, Plan)]
        taken = [part for part, single in alone if isinstance(single, Plan)]
        if not taken or len(parts) == 1:
            yield parts, made
        elif len(taken) == len(parts):
            yield from (([part], single) for part, single in alone)
        else:
            yield from self._taken(fusion, op, taken)
            yield from (([part], single) for part, single in alone if isinstance(single, Refusal))

    def _attempt(self, fusion: Fusion, op: FusedOp, parts: Sequence[Part]) -> Plan | Refusal:
        """The plan for one op that computes all parts, with an output for each, or why there is none."""
        join, records = fusion.join, [record for part in parts for record in part.records]
        assert join is not None
        try:
            check_wanted(fusion, op, records, records[0].features, self._options, self._training)
            after = self._place(join, op, parts)
            arguments = _arguments(join, op, parts)
            given = dict(fx.map_arg(arguments, lambda node: node.meta["val"]))
            given |= {name: permute(given[name], dims) for name, dims in join.permuted.items()}
            selected: dict[str, tuple[View, ...]] = {}
            for name, shape_of in join.reshaped.items():
                view = View(torch.ops.aten.reshape.default, (shape_of(records[0].inputs),))
                whole, given[name] = given[name], view.of(given[name])
                selected |= {} if same_shape(given[name].shape, whole.shape) else {name: (view,)}
            fakes = outputs_of(op, given)
            fitted: dict[fx.Node, tuple[str, Fit]] = {}
            for part, (name, fake) in zip(parts, fakes.items(), strict=True):
                for record in part.records:
                    fitted |= {node: (name, fit) for node, fit in fits(record.root, name, fake, None, set(), ())}
            self._agree(fusion, arguments)
            provider = provider_for(op, given, self._options, fusion, fusion.exact)
        except Refused as refused:
            return refused.refusal
        except Exception as error:
            # A defect concerns this site alone: nothing has been changed yet, and the report says what happened.
            if self._options.strict:
                raise
            logger.warning("aiter_fusion: planning %s failed", records[0].root.name, exc_info=True)
            return Refusal(Reason.ERROR, f"{type(error).__name__}: {error}")
        stood_for = _stood_for(join, op, parts)
        nodes = frozenset().union(*(record.nodes for record in records), self.equal.copies(stood_for))
        return Plan(
            op, provider, arguments, selected, join.permuted, fakes, fitted, nodes, after, stood_for, fusion.exact
        )


def permute(value: Any, dims: Sequence[int]) -> Any:
    """A tensor, or each of a list of tensors, permuted."""
    return value.permute(*dims) if isinstance(value, Tensor) else [tensor.permute(*dims) for tensor in value]


def _origin(node: fx.Node) -> fx.Node | None:
    """The input or constant of the graph of which a node is a view, by views that can be made anew anywhere after it;
    None if it is none."""
    while node.op == "call_function":
        target = node.target
        if not (isinstance(target, torch._ops.OpOverload) and target.is_view and len(node.all_input_nodes) == 1):
            return None
        node = node.all_input_nodes[0]
    return node if node.op in ("placeholder", "get_attr") else None


def _arguments(join: Join, op: FusedOp, parts: Sequence[Part]) -> dict[str, Any]:
    """The op's arguments by name: what the first record has, and for the lists what the first of each part has."""
    known = {**parts[0].first.attributes, **parts[0].first.inputs}
    missing = [name for name in op.arguments if name not in join.lists and name not in known]
    if missing:
        raise TypeError(f"no record gives {op.name} its arguments {', '.join(missing)}")
    return {
        name: [part.first.inputs.get(join.lists[name]) for part in parts] if name in join.lists else known[name]
        for name in op.arguments
    }


def _stood_for(join: Join, op: FusedOp, parts: Sequence[Part]) -> dict[fx.Node, fx.Node]:
    """For the records' inputs that the op does not read those that are equal to them and that it reads."""
    shared = [name for name in op.arguments if name not in join.lists]
    found: dict[fx.Node, fx.Node] = {}
    for part in parts:
        for record in part.records:
            for names, source in ((shared, parts[0].first.inputs), (join.lists.values(), part.first.inputs)):
                found |= {record.inputs[name]: source[name] for name in names if name in record.inputs}
    return {node: read for node, read in found.items() if node is not read}
