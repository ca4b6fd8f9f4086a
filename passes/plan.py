"""Decide, site by site, what becomes a fused op: read-only, and complete before the graph is touched."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from ..config import Options
from ..op import FusedOp, dense, is_contiguous
from ..patterns.language import VIEWS, Fusion, readers, same_shape, same_size, shape
from ..providers import PROVIDERS, Provider, candidates
from ..record import where
from ..registry import REGISTRY
from ..report import BARE, REPLACED, SKIPPED, Site
from . import join as joining
from .matcher import arguments as arguments_of
from .recognise import Recognised, Record, behind, selects_rows

logger = logging.getLogger("aiter_fusion")

# Higher-order operators that write to their arguments; all others are functional in a post-grad graph.
WRITING = frozenset({"triton_kernel_wrapper_mutation"})


# What a provider must pass to be chosen, in this order; each has its reason code.
HURDLES = ("numerics", "preference", "provider", "unmeasured", "slower")


class Refused(Exception):  # noqa: N818 (not an error: the normal way for a site to stay as it is)
    """A site stays as it is; the message is a reason code, a colon, and the particulars."""


@dataclass(frozen=True)
class Size:
    """In the target of a reshape: the size of dimension ``dim`` of the tensor that is reshaped."""

    dim: int


@dataclass(frozen=True)
class Fit:
    """How an output takes the place of a node: reshaped to ``shape`` (``sizes`` are how to spell that in a graph, a
    node being a size that the graph has; None if it has this shape), then permuted by ``dims`` (None if not)."""

    shape: torch.Size
    sizes: tuple[int | Size | fx.Node, ...] | None
    dims: tuple[int, ...] | None


@dataclass(frozen=True)
class View:
    """A call that gives a view of its first argument; ``others`` are those after it, nodes where they are sizes of the
    graph."""

    target: Any
    others: tuple[Any, ...]

    def of(self, x: Tensor, size: Callable[[Any], Any] = lambda value: value) -> Tensor:
        """The view of ``x``; ``size`` is applied to what the tracer recorded for a size."""
        return self.target(x, *fx.map_arg(self.others, lambda node: size(node.meta["val"])))


@dataclass(frozen=True, eq=False)
class Plan:
    """One fused op to insert.

    arguments: the op's arguments in order; nodes where they are values of the graph.
    selected:  for each argument of which the op gets some rows, the views that select them.
    permuted:  for each argument to permute, the order of its dimensions.
    fakes:     its outputs by name, as fake tensors.
    replaced:  for each node that the op replaces, the output that takes its place, and how.
    nodes:     all nodes of the records; those without users are erased afterwards.
    after:     the node after which the op goes; inputs that come later are views, which are made anew. None: after its
               last input.
    equal:     for other inputs of the records those that are equal to them and that the op reads.
    exact:     whether the op's reference computes what the nodes do bit by bit.
    """

    op: FusedOp
    provider: Provider
    arguments: Mapping[str, Any]
    selected: Mapping[str, tuple[View, ...]]
    permuted: Mapping[str, tuple[int, ...]]
    fakes: Mapping[str, Tensor]
    replaced: Mapping[fx.Node, tuple[str, Fit]]
    nodes: frozenset[fx.Node]
    after: fx.Node | None = None
    equal: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    exact: bool = True


@dataclass
class Planned:
    """The sites of a graph and the plans of those to replace, both in graph order; ``plans[i]`` is for ``taken[i]``,
    ``drafts[i]`` is what ``sites[i]`` was decided from."""

    sites: list[Site] = field(default_factory=list)
    drafts: list[_Draft] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    taken: list[Site] = field(default_factory=list)


@dataclass
class _Draft:
    """A site while it is being decided; ``at`` is the node that says where it is."""

    records: list[Record]
    family: str
    variant: str
    status: str
    reason: str
    at: fx.Node
    plan: Plan | None = None
    without: list[Record] = field(default_factory=list)  # what a larger fusion, which was refused, would have included
    products: int = 0

    def site(self) -> Site:
        op, provider = (self.plan.op.name, self.plan.provider.name) if self.plan else ("", "")
        records = len(self.records) or 1  # a value that no form explains counts as one
        said = self.family, self.variant, op, provider, self.status, self.reason
        return Site(*said, where(self.at), records, self.products)

    def nodes(self) -> frozenset[fx.Node]:
        """The original nodes of the site."""
        planned = self.plan.nodes if self.plan else ()
        return frozenset([self.at]).union(planned, *(record.nodes for record in self.records))


def plan(
    graph: fx.Graph,
    recognised: Recognised,
    fusions: Sequence[Fusion],
    options: Options,
    training: bool,
    unlike: Callable[[], str | None] = lambda: None,
) -> Planned:
    """Sites for all records, with a plan for each that a provider accepts.

    ``unlike`` is asked before the first fusion that all processes must take jointly: why they do not compile alike, or
    None if they do.
    """
    planner = _Planner(graph, recognised, fusions, options, training, unlike)
    accounted: dict[Record, _Draft] = {}
    drafts: list[_Draft] = []

    def account(draft: _Draft) -> None:
        if draft.status == REPLACED:  # what a refused site had before goes to it
            for record in filter(accounted.__contains__, draft.records):
                accounted.pop(record).records.remove(record)
        draft.records = [record for record in draft.records if record not in accounted]
        accounted.update(dict.fromkeys(draft.records, draft))
        drafts.append(draft)

    joined = {fusion.chain[-1] for fusion in fusions if fusion.join is not None}
    ends = {fusion.chain[-1] for fusion in fusions} - joined
    inner = {kind for fusion in fusions for kind in fusion.chain[:-1]}
    for group in _groups(recognised.records, ends - inner):
        account(planner.decide(group))
    for group in _groups(recognised.records, ends & inner):  # what is left of them, without what might have followed
        group = [record for record in group if record not in planner.claimed]
        draft = planner.decide(group) if group else None
        if draft is not None and (
            draft.status == REPLACED or (draft.status == SKIPPED and accounted.keys().isdisjoint(group))
        ):
            account(draft)
    for draft in planner.join(_groups(recognised.records, joined)):
        account(draft)
    for draft in drafts:
        for record in draft.without:
            if record not in accounted:
                draft.records.append(record)
                accounted[record] = draft
    for record in recognised.records:
        if record not in accounted and record.serves is None:
            account(_Draft([record], record.kind, record.variant, BARE, record.alone, record.root))
    for record in recognised.records:
        if record not in accounted:  # it serves a record that is not fused with it
            served = next(
                r for r in recognised.records if r.kind == record.serves and behind(r.inputs["x"]) is record.root
            )
            accounted[served].records.append(record)
    for node, kind, reason in recognised.unknown:
        drafts.append(_Draft([], kind, "unknown", BARE, reason, node))

    planned = Planned()
    for draft in sorted(drafts, key=lambda draft: draft.at):
        site = draft.site()
        planned.sites.append(site)
        planned.drafts.append(draft)
        if draft.plan is not None:
            planned.plans.append(draft.plan)
            planned.taken.append(site)
    return planned


class _Planner:
    """Decides groups of equal records one after another; what one has taken, no later one can."""

    def __init__(
        self,
        graph: fx.Graph,
        recognised: Recognised,
        fusions: Sequence[Fusion],
        options: Options,
        training: bool,
        unlike: Callable[[], str | None],
    ) -> None:
        self._unlike = unlike
        self._one: dict[str, dict[str, Any]] = {}  # family -> what is the same at all of its sites
        self._fusions = sorted(fusions, key=lambda fusion: -len(fusion.chain))
        self._value_of = {record.root: record for record in recognised.records}
        self._options, self._training = options, training
        self._near_miss, self._unserved = recognised.near_miss, recognised.unserved
        self._graph, self._writes = graph, list(_writes(graph))
        self._shared: dict[tuple[fx.Node, str, str], set[fx.Node]] = defaultdict(set)
        for record in recognised.records:
            for name in record.shared:
                self._shared[behind(record.inputs["x"]), record.kind, name].add(record.inputs[name])
        self.claimed: set[Record] = set()

    def decide(self, group: list[Record]) -> _Draft:
        """The largest fusion that is possible, else the first that was refused, else a bare site."""
        tail, refused, misfit = group[0], None, None
        for fusion in self._fusions:
            chain = _chain(tail, fusion, self._value_of) if fusion.join is None else None
            if chain is None:
                continue
            # the value that the fused op computes; a chain of one kind has no records before its tail
            value = tail.outputs.get("value", (chain or [tail])[-1].root)
            misfit = fusion.fits(tail.attributes, value)
            if misfit is not None:
                continue
            records = [*chain, *group]
            features = frozenset().union(*(record.features for record in records))
            try:
                self._share(tail)
                taken = next((record for record in reversed(chain) if record in self.claimed), None)
                if taken is not None:
                    raise Refused(f"starved: {taken.root.name} is already part of another site")
                made, features = _attempt(
                    fusion, chain, group, features, self._options, self._training, self._writes, self._agree
                )
            except Refused as refusal:
                reason = str(refusal)
            except Exception as error:
                # A defect concerns this site alone: nothing has been changed yet, and the report says what happened.
                if self._options.strict:
                    raise
                logger.warning("aiter_fusion: planning %s failed", tail.root.name, exc_info=True)
                reason = f"error: {type(error).__name__}: {error}"
            else:
                self.claimed.update(records)
                self._one.setdefault(fusion.family, {name: made.arguments[name] for name in fusion.one})
                variant = fusion.variant(features, tail.attributes, value)
                without = self._without(records, refused)
                more = [record for record in refused.records if record not in records] if refused is not None else []
                return _Draft(records, fusion.family, variant, REPLACED, without, value, made, more)
            variant = fusion.variant(features, tail.attributes, value)
            refused = refused or _Draft(records, fusion.family, variant, SKIPPED, reason, value)
        if refused is not None:
            return refused
        reason = f"producer: {misfit}" if misfit is not None else self._where_from(tail.inputs["x"])
        return _Draft(list(group), tail.kind, tail.variant, BARE, reason, tail.root)

    def join(self, groups: Sequence[list[Record]]) -> list[_Draft]:
        """Sites of the kinds of which one op computes several records; fusions that compute one are tried before."""
        if not groups:
            return []
        drafts: list[_Draft] = []
        equal = joining.Equal(self._graph, self._is_written)
        bundles: dict[Any, tuple[Fusion, FusedOp, list[Record], list[str]]] = {}
        for group in groups:
            first = group[0]
            several, others = [], []
            for fusion in self._fusions:
                if fusion.chain == (first.kind,):
                    (others if fusion.join is None else several).append(fusion)
            draft = self.decide(group) if others else None
            if draft is not None and (draft.status == REPLACED or not several):
                drafts.append(draft)
                continue
            fusion = several[0]
            assert fusion.join is not None
            op = REGISTRY.overload(fusion.op, first.features)
            assert op is not None, "its registration has seen to that"
            known = {**first.attributes, **first.inputs}
            common = [known.get(name) for name in op.arguments if name not in fusion.join.lists]
            key = (fusion.family, fusion.op, id(fusion.join), first.features, equal.key(common))
            _, _, members, refusals = bundles.setdefault(key, (fusion, op, [], []))
            members += group
            refusals += [draft.reason] if draft is not None and draft.status == SKIPPED else []
        for fusion, op, members, refusals in bundles.values():
            assert fusion.join is not None
            first_choice = f"first choice refused: {refusals[0]}" if refusals else ""
            for parts, apart in joining.groups(fusion.join, op, members, equal, self._written_between):
                drafts += self._joined(fusion, op, parts, equal, apart or first_choice)
        return drafts

    def _joined(
        self, fusion: Fusion, op: FusedOp, parts: Sequence[joining.Part], equal: joining.Equal, reason: str
    ) -> list[_Draft]:
        """One site of these parts; where only some of them can be taken, one of these and one each of the others."""

        def draft(parts: Sequence[joining.Part], made: Plan | str) -> _Draft:
            records = [record for part in parts for record in part.records]
            first = records[0]
            variant, is_plan = fusion.variant(first.features, first.attributes, first.root), isinstance(made, Plan)
            status, why = (REPLACED, reason) if is_plan else (SKIPPED, made)
            plan = made if is_plan else None
            return _Draft(records, fusion.family, variant, status, why, first.root, plan, [], len(parts))  # type: ignore[arg-type]

        made = self._together(fusion, op, parts, equal)
        if isinstance(made, Plan) or len(parts) == 1:
            return [draft(parts, made)]
        alone = [(part, self._together(fusion, op, [part], equal)) for part in parts]
        taken = [part for part, single in alone if isinstance(single, Plan)]
        if not taken:
            return [draft(parts, made)]
        if len(taken) == len(parts):
            return [draft([part], single) for part, single in alone]
        left = [draft([part], single) for part, single in alone if not isinstance(single, Plan)]
        return [*self._joined(fusion, op, taken, equal, reason), *left]

    def _together(self, fusion: Fusion, op: FusedOp, parts: Sequence[joining.Part], equal: joining.Equal) -> Plan | str:
        """The plan for one op that computes these parts, or why there is none."""
        try:
            return _attempt_joined(
                fusion, op, parts, equal, self._options, self._training, self._written_between, self._agree
            )
        except (Refused, joining.Misplaced) as refusal:
            return str(refusal)
        except Exception as error:
            # A defect concerns this site alone: nothing has been changed yet, and the report says what happened.
            if self._options.strict:
                raise
            logger.warning("aiter_fusion: planning %s failed", parts[0].records[0].root.name, exc_info=True)
            return f"error: {type(error).__name__}: {error}"

    def _is_written(self, node: fx.Node) -> bool:
        """Whether something in the graph writes to the memory of a node."""
        storage = _storage(node)
        return any(storages is None or storage in storages for _, storages in self._writes)

    def _written_between(self, nodes: Iterable[fx.Node], a: fx.Node, b: fx.Node) -> fx.Node | None:
        """A node between two others, in either order, that writes to the memory of one of ``nodes``."""
        if not self._writes:
            return None
        touched = {_storage(node) for node in nodes} - {0}
        return next(
            (
                writer
                for writer, storages in self._writes
                if min(a, b) < writer < max(a, b) and (storages is None or storages & touched)
            ),
            None,
        )

    def _share(self, record: Record) -> None:
        """Refuse what differs from other records of its kind in an input that all that read one value must share."""
        for name in record.shared:
            source = behind(record.inputs["x"])
            found = len(self._shared[source, record.kind, name])
            if found > 1:
                raise Refused(
                    f"overload: {source.name} is the input of {record.kind} with {found} different {name}s, of which a "
                    "fused op takes one"
                )

    def _agree(self, fusion: Fusion, arguments: Mapping[str, Any]) -> None:
        """Refuse what other sites of the graph, or other processes, do not go along with."""
        mine = {name: arguments[name] for name in fusion.one}
        theirs = self._one.get(fusion.family, mine)
        for name in fusion.one:
            if mine[name] != theirs[name]:
                raise Refused(f"collective: its {name} is {mine[name]}, that of the sites before it {theirs[name]}")
        why = self._unlike() if fusion.jointly else None
        if why is not None:
            raise Refused(f"collective: {why}")

    def _without(self, records: list[Record], refused: _Draft | None) -> str:
        """What a larger fusion of these records would have included, and why it does not."""
        if refused is not None:
            kinds = ", ".join(record.kind for record in refused.records if record not in records)
            return f"without {kinds}: {refused.reason}" if kinds else f"first choice refused: {refused.reason}"
        first = records[0].inputs.get("x")
        unserved = self._unserved.get(behind(first)) if first is not None else None
        return f"without {unserved}" if unserved is not None else ""

    def _where_from(self, source: fx.Node) -> str:
        """Why nothing before a value can be fused with what reads it."""
        given: fx.Node = source
        while given.target in VIEWS:
            given = given.args[0]  # type: ignore[assignment]
        if given.op == "placeholder":
            return (
                f"boundary: it is {given.name}, an input of this graph; if a graph break cut the graph there, "
                "torch.compile(..., fullgraph=True) says where and why"
            )
        reason = f"producer: its input is {source.target if source.op == 'call_function' else source.op}"
        near = self._near_miss(source)
        return reason if near is None else f"{reason}, almost one of the forms, but {near}"


def _groups(records: Iterable[Record], kinds: set[str]) -> list[list[Record]]:
    """Records that end a chain, those that compute the same thing from the same value together."""
    groups: dict[Any, list[list[Record]]] = {}
    for record in records:
        if record.kind not in kinds:
            continue
        literals = tuple(sorted((name, str(value)) for name, value in record.attributes.items()))
        key = (record.kind, tuple(sorted(record.inputs.items(), key=str)), literals, record.features)
        same = groups.setdefault(key, [])
        for group in same:
            branches = [member.branches for member in group if member.branches]
            if not record.branches or not branches or branches[0] == record.branches:
                group.append(record)
                break
        else:
            same.append([record])
    return sorted((group for same in groups.values() for group in same), key=lambda group: group[0].root)


def _chain(tail: Record, fusion: Fusion, value_of: Mapping[fx.Node, Record]) -> list[Record] | None:
    """The records before ``tail``, each the input ``x`` of the next, if their kinds are those of the fusion."""
    chain, last = [], tail
    for kind in reversed(fusion.chain[:-1]):
        source = value_of.get(behind(last.inputs["x"])) if "x" in last.inputs else None
        if source is None or source.kind != kind:
            return None
        chain.insert(0, source)
        last = source
    return chain if tail.kind == fusion.chain[-1] else None


def _attempt(
    fusion: Fusion,
    chain: list[Record],
    group: list[Record],
    features: frozenset[str],
    options: Options,
    training: bool,
    writes: list[tuple[fx.Node, set[int] | None]],
    agree: Callable[[Fusion, Mapping[str, Any]], None],
) -> tuple[Plan, frozenset[str]]:
    """The plan for one site and its features, with the outputs that it needs besides the base overload's."""
    records = [*chain, *group]
    ways = [_way(record) for record in [*chain, group[0]][1:]]
    selections = _selections(chain, ways)
    nodes = frozenset().union(*(record.nodes for record in records), *ways)
    outputs = {n: name for record in records if record not in selections for name, n in record.outputs.items()}
    base = REGISTRY.overload(fusion.op, features)
    if base is None:
        raise Refused(f"overload: {fusion.op} has none for {', '.join(sorted(features))}")
    dead = _dead(nodes, {node for node, name in outputs.items() if name in base.outputs})
    for position, record in enumerate(chain):
        if record.rooted is not None and record.root not in dead:
            chain = [*chain[:position], record.rooted, *chain[position + 1 :]]
            return _attempt(fusion, chain, group, features, options, training, writes, agree)
    for record, way in selections.items():
        if not record.rows:
            raise Refused(f"rows: {way[-1].name} takes some of {record.root.name}, which {record.kind} gives whole")
        left = next((node for node in record.outputs.values() if node not in dead), None)
        if left is not None:
            raise Refused(f"rows: {left.name}, of which {way[-1].name} takes some, is read elsewhere too")
    extra = frozenset(name for node, name in outputs.items() if node not in dead)
    features = features | extra
    op = REGISTRY.overload(fusion.op, features)
    replaced = {node: name for node, name in outputs.items() if op is not None and name in op.outputs}
    if op is None or extra - set(op.outputs):
        raise Refused(f"overload: no overload of {fusion.op} also returns {', '.join(sorted(extra))}")

    _check_wanted(fusion, op, records, features, options, training)
    arguments = _arguments(op, records)
    selected = _selected(arguments, selections)
    inputs = {value for value in arguments.values() if isinstance(value, fx.Node)}
    inputs = inputs.union(*(_sizes_in(view) for views in selected.values() for view in views))
    _check_order(inputs, replaced, dead)
    known = {name: v.meta["val"] if isinstance(v, fx.Node) else v for name, v in arguments.items()}
    known |= {name: _rows_of(arguments[name], views) for name, views in selected.items()}
    laid = _laid_out(op, known, replaced, dead, _known_sizes(nodes, max(inputs)))
    nodes = nodes.union(laid.fitted, laid.between)
    _check_writes(inputs, nodes, writes)
    agree(fusion, arguments)
    provider = _provider(op, laid.given, options, fusion.only)
    arguments |= laid.layout
    return Plan(op, provider, arguments, selected, laid.permuted, laid.fakes, laid.fitted, nodes), features


def _check_wanted(
    fusion: Fusion,
    op: FusedOp,
    records: Iterable[Record],
    features: frozenset[str],
    options: Options,
    training: bool,
) -> None:
    """Refuse what no op can compute, and what nobody wants."""
    for record in records:
        if record.refusal is not None:
            raise Refused(record.refusal)
    needed = max([fusion.level, *(fusion.levels.get(feature, 1) for feature in features)])
    reason = options.why_not(fusion.family, needed)
    if reason is not None:
        raise Refused(reason)
    if objections := fusion.against():
        raise Refused(f"preference: {op.family}: {'; '.join(objections)}")
    if training:
        raise Refused("training: fused ops have no gradient; compile under torch.no_grad() or inference_mode()")


def _attempt_joined(
    fusion: Fusion,
    op: FusedOp,
    parts: Sequence[joining.Part],
    equal: joining.Equal,
    options: Options,
    training: bool,
    written: Callable[[Iterable[fx.Node], fx.Node, fx.Node], fx.Node | None],
    agree: Callable[[Fusion, Mapping[str, Any]], None],
) -> Plan:
    """The plan for one op that computes all parts, with an output for each."""
    assert fusion.join is not None
    records = [record for part in parts for record in part.records]
    _check_wanted(fusion, op, records, records[0].features, options, training)
    after = joining.place(fusion.join, op, parts, written)
    arguments = joining.gathered(fusion.join, op, parts)
    known = fx.map_arg(arguments, lambda node: node.meta["val"])
    permuted, selected, given = fusion.join.permuted, {}, dict(known)
    given |= {name: permute(known[name], dims) for name, dims in permuted.items()}
    for name, sizes in fusion.join.reshaped.items():
        view = View(torch.ops.aten.reshape.default, (sizes(records[0].inputs),))
        given[name] = view.of(known[name])
        if not same_shape(given[name].shape, known[name].shape):
            selected[name] = (view,)
    fakes = _outputs(op, given)
    fitted: dict[fx.Node, tuple[str, Fit]] = {}
    for part, (name, fake) in zip(parts, fakes.items(), strict=True):
        for root in part.roots:
            fitted |= {node: (name, fit) for node, fit in _fits(root, name, fake, None, set(), ())}
    agree(fusion, arguments)
    provider = _provider(op, given, options, fusion.only, fusion.exact)
    same = joining.same(fusion.join, op, parts)
    nodes = frozenset().union(*(record.nodes for record in records), equal.copies(same))
    return Plan(op, provider, arguments, selected, permuted, fakes, fitted, nodes, after, same, fusion.exact)


def permute(value: Any, dims: Sequence[int]) -> Any:
    """A tensor, or each of a list of tensors, permuted."""
    return value.permute(*dims) if isinstance(value, Tensor) else [tensor.permute(*dims) for tensor in value]


def _way(record: Record) -> tuple[fx.Node, ...]:
    """The views through which a record reads another's value, from that on."""
    node: fx.Node = record.inputs["x"]
    source, way = behind(node), []
    while node is not source:
        way.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return tuple(reversed(way))


def _selections(chain: Sequence[Record], ways: Sequence[tuple[fx.Node, ...]]) -> dict[Record, tuple[fx.Node, ...]]:
    """For each record of which only some rows are read at the end of the chain, the first one last, the views up to the
    last that leaves rows out; ``ways[i]`` leads from ``chain[i]`` to what follows it."""
    found: dict[Record, tuple[fx.Node, ...]] = {}
    way: tuple[fx.Node, ...] = ()
    for record, following in zip(reversed(chain), reversed(ways), strict=True):
        way = (*following, *way)
        while way and not selects_rows(way[-1]):
            way = way[:-1]
        if way:
            found[record] = way
    return found


def _selected(
    arguments: Mapping[str, Any], selections: Mapping[Record, tuple[fx.Node, ...]]
) -> dict[str, tuple[View, ...]]:
    """The views that give the op the rows that it is to compute, by the argument whose rows they are."""
    selected: dict[str, tuple[View, ...]] = {}
    for record, way in selections.items():
        for name in record.rows:
            node = record.inputs.get(name)
            if node is None or arguments.get(name) is not node:  # another record's input of this name, or inside the op
                continue
            if not same_shape(shape(node)[:-1], shape(record.root)[:-1]):
                raise Refused(f"layout: {node.name} has other rows than {record.root.name}, of which some are read")
            selected[name] = tuple(filter(None, (_replayed(view, shape(node)[-1]) for view in way)))
    return selected


def _replayed(node: fx.Node, width: Any) -> View | None:
    """A view of rows as one of other rows, of this width; None for a copy, which only changes where elements lie."""
    aten = torch.ops.aten
    (_, *others), _ = arguments_of(node)
    if node.target is aten.clone.default:
        return None
    if node.target in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        (sizes,) = others
        return View(aten.reshape.default, ([*sizes[:-1], width if isinstance(width, int) else sizes[-1]],))
    return View(node.target, tuple(others))


def _rows_of(node: fx.Node, views: Sequence[View]) -> Tensor:
    """What is recorded of the rows that views select, which must not be copied first."""
    whole = rows = node.meta["val"]
    for view in views:
        rows = view.of(rows)
    if rows.untyped_storage()._cdata != whole.untyped_storage()._cdata:
        raise Refused(f"layout: {node.name}, of which some rows are read, would have to be copied to view them")
    return rows


def _sizes_in(view: View) -> list[fx.Node]:
    """The sizes of the graph that a view needs."""
    found: list[fx.Node] = []
    fx.map_arg(view.others, found.append)
    return found


def _dead(nodes: frozenset[fx.Node], replaced: set[fx.Node]) -> set[fx.Node]:
    """The nodes that nothing reads any more once ``replaced`` have been replaced."""
    dead = set(replaced)
    for node in sorted(nodes, reverse=True):
        if all(reader in dead for reader in readers(node)):
            dead.add(node)
    return dead


def _arguments(op: FusedOp, records: Sequence[Record]) -> dict[str, Any]:
    """The op's arguments, by name from the records' inputs and attributes; earlier records win."""
    known: dict[str, Any] = {}
    for record in reversed(records):
        known |= {**record.attributes, **record.branches, **record.inputs}
    known |= op.layouts[-1]
    missing = [name for name, kind in op.arguments.items() if name not in known and not kind.endswith("?")]
    if missing:
        raise TypeError(f"no record gives {op.name} its arguments {', '.join(missing)}")
    return {name: known.get(name) for name in op.arguments}


def _check_order(inputs: set[fx.Node], replaced: Iterable[fx.Node], dead: set[fx.Node]) -> None:
    """The op goes after its last input; nothing may read an output before that."""
    last = max(inputs)
    for node in replaced:
        for reader in readers(node):
            if reader not in dead and not last < reader:
                raise Refused(f"order: {reader.name} reads {node.name} before {last.name} exists")


def _check_writes(
    inputs: set[fx.Node], nodes: frozenset[fx.Node], writes: list[tuple[fx.Node, set[int] | None]]
) -> None:
    """Nothing may write to what the op reads, or to what lies inside it, between where the op goes (after its last
    input) and the last node that it replaces."""
    first, last = min(min(nodes), max(inputs)), max(nodes)
    touched = {_storage(node) for node in inputs | nodes} - {0}
    for writer, storages in writes:
        if first < writer < last and (storages is None or storages & touched):
            raise Refused(f"mutation: {writer.name} ({writer.target}) writes to a tensor of this site")


def _writes(graph: fx.Graph) -> Iterable[tuple[fx.Node, set[int] | None]]:
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
                    written |= {_storage(v) for v in values if isinstance(v, fx.Node)}
            yield node, None if 0 in written else written  # 0: something without a storage of its own is written to
        elif isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() in WRITING:
            yield node, {_storage(n) for n in node.all_input_nodes} - {0}


def _storage(node: fx.Node) -> int:
    """The identity of the storage that a node's tensor lives in; 0 where it has none."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else 0


def _provider(
    op: FusedOp, known: Mapping[str, Any], options: Options, only: frozenset[str] | None, exact: bool = True
) -> Provider:
    """The first provider that accepts the call, of those that the fusion is for; ``exact``: as in ``Plan``.

    A refusal says what each of them objects to. Its code is that of the provider that came furthest: one that could
    compute the call, and not faster, before one that cannot, and that before those that were not even asked.
    """
    device = next(value.device for value in known.values() if isinstance(value, Tensor))
    asked = [p for p in candidates(options.provider, device.type) if only is None or p.name in only]
    if not asked:
        why = "; ".join(f"{p.name}: {p.missing()}" for p in PROVIDERS.values() if p.missing())
        raise Refused(f"no_kernel: none for {device.type} ({why})")
    refusals: list[tuple[str, str]] = []
    for provider in asked:
        if not (exact and provider.keeps_roundings(op)) and not options.allows_kernel_numerics:
            refusals.append(("numerics", f"{provider.name}: it does not keep the graph's roundings"))
        elif options.provider == "auto" and (reason := provider.unwanted(op, known)) is not None:
            refusals.append(("preference", f"{provider.name}: {reason}"))
        elif (reason := provider.why_not(op, known)) is not None:
            refusals.append(("provider", f"{provider.name}: {reason}"))
        elif options.provider == "auto" and (reason := provider.unmeasured(op, known)) is not None:
            refusals.append(("unmeasured", f"{provider.name}: {reason}"))
        elif options.provider == "auto" and (reason := provider.slower(op, known)) is not None:
            refusals.append(("slower", f"{provider.name}: {reason}"))
        else:
            return provider
    code = max((code for code, _ in refusals), key=HURDLES.index)
    raise Refused(f"{code}: {'; '.join(why for _, why in refusals)}")


def _outputs(op: FusedOp, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """What ``op.allocate`` gives for fake tensors, made without the dispatcher: that takes a fifth of the pass."""
    first = next(value for value in given.values() if isinstance(value, Tensor))
    if not isinstance(first, FakeTensor):
        return op.allocate(**given)
    specs, empty = op.returned(op.shape(**given)), partial(torch.empty, device="meta")
    return {name: FakeTensor(first.fake_mode, dense(spec, empty), first.device) for name, spec in specs.items()}


@dataclass(frozen=True)
class _Laid:
    """A way for all outputs to take the places of what is replaced.

    given:   the op's arguments as fakes; layout: those of them that it chose; permuted, fakes, fitted: as in ``Plan``.
    between: nodes that are left out besides: views of an output on the way to the copy that it takes the place of.
    """

    given: Mapping[str, Any]
    layout: Mapping[str, Any]
    permuted: Mapping[str, tuple[int, ...]]
    fakes: Mapping[str, Tensor]
    fitted: Mapping[fx.Node, tuple[str, Fit]]
    between: frozenset[fx.Node]


def _laid_out(
    op: FusedOp, known: dict[str, Any], replaced: Mapping[fx.Node, str], dead: set[fx.Node], sizes: Sequence[fx.Node]
) -> _Laid:
    """How the outputs take the places of what is replaced.

    Outputs are contiguous, but a norm of a permuted tensor is itself a permuted tensor. Then the rows are given to the
    op in the order in which the results lie in memory, and the results are permuted back: both are views. Or the op can
    write an output transposed, and the graph only reads transposed copies of it: then it takes the place of these.
    """
    for layout in op.layouts[:-1]:
        laid = _transposed(op, {**known, **layout}, replaced, dead, sizes)
        if laid is not None:
            return laid
    first = next(value for value in known.values() if isinstance(value, Tensor))
    rows = first.shape[:-1]
    orders = [_order(node.meta["val"], rows) for node in replaced]
    refusals: list[str] = []
    for order in dict.fromkeys([None, *orders]):
        permuted = {}
        if order is not None:
            dims = (*order, len(order))
            permuted = {
                name: dims
                for name, value in known.items()
                if isinstance(value, Tensor) and value.dim() == len(dims) and same_shape(value.shape[:-1], rows)
            }
        given = known | {name: known[name].permute(dims) for name, dims in permuted.items()}
        fakes = _outputs(op, given)
        fitted: dict[fx.Node, tuple[str, Fit]] = {}
        try:
            for node, name in replaced.items():
                fitted |= {n: (name, fit) for n, fit in _fits(node, name, fakes[name], order, dead, sizes)}
        except Refused as refusal:
            refusals.append(str(refusal))
        else:
            return _Laid(given, {}, permuted, fakes, fitted, frozenset())
    others = [f"; with the rows in that order, {refusal.removeprefix('layout: ')}" for refusal in refusals[1:]]
    raise Refused("".join([refusals[0], *others]))


def _transposed(
    op: FusedOp, given: dict[str, Any], replaced: Mapping[fx.Node, str], dead: set[fx.Node], sizes: Sequence[fx.Node]
) -> _Laid | None:
    """The outputs with the columns of some outermost in memory, if the graph reads only such copies of these."""
    orders = {name: tuple(spec[2]) for name, spec in op.shape(**given).items() if len(spec) > 2}
    copies = {node: _transposed_copies(node, dead) for node, name in replaced.items() if name in orders}
    if not copies or not all(copies.values()):
        return None
    fakes = _outputs(op, given)
    fitted: dict[fx.Node, tuple[str, Fit]] = {}
    between: set[fx.Node] = set()
    try:
        for node, name in replaced.items():
            if node not in copies:
                fitted |= {n: (name, fit) for n, fit in _fits(node, name, fakes[name], None, dead, sizes)}
                continue
            for copy, path in copies[node].items():
                fitted[copy] = (name, _fit_transposed(copy, name, fakes[name], sizes))
                between |= {node, *path}
    except Refused:
        return None
    return _Laid(given, {name: given[name] for name in op.layouts[-1]}, {}, fakes, fitted, frozenset(between))


def _transposed_copies(node: fx.Node, dead: set[fx.Node]) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """The copies with the last dimension first through which alone a node is read, each with the views before it; empty
    if it is read in any other way."""
    copies: dict[fx.Node, tuple[fx.Node, ...]] = {}
    paths: list[tuple[fx.Node, ...]] = [(node,)]
    while paths:
        *_, last = path = paths.pop()
        for reader in readers(last):
            if reader in dead:
                continue
            if reader.target is torch.ops.aten.permute.default and path[-1].target is not reader.target:
                count = last.meta["val"].dim()
                dims = [d % count for d in reader.args[1]]  # type: ignore[union-attr,operator]
                if dims != [count - 1, *range(count - 1)]:
                    return {}
                paths.append((*path, reader))
            elif last.target is torch.ops.aten.permute.default and reader.target is torch.ops.aten.clone.default:
                copies[reader] = path[1:]
            elif reader.target in VIEWS:
                paths.append((*path, reader))
            else:
                return {}
    return copies


def _fit_transposed(node: fx.Node, name: str, have: Tensor, sizes: Sequence[fx.Node]) -> Fit:
    """How an output whose columns are outermost in memory takes the place of a contiguous copy of it, columns first."""
    want = node.meta["val"]
    whole = same_size(want.shape[0], have.shape[-1]) and is_contiguous(want)
    if not whole or want.dtype != have.dtype or want.device != have.device:
        raise Refused(f"layout: {node.name} is not a contiguous copy of {name}, columns first")
    rows_first = want.permute(*range(1, want.dim()), 0)
    return Fit(rows_first.shape, _sizes(node, name, rows_first, have, sizes), (want.dim() - 1, *range(want.dim() - 1)))


def _order(want: Tensor, rows: Sequence[Any]) -> tuple[int, ...] | None:
    """The dimensions of rows, the outermost in memory first, if ``want`` is those rows densely in another order."""
    count = len(rows)
    if not same_shape(want.shape[:count], rows):
        return None
    left = [d for d in range(count) if not same_size(want.shape[d], 1)]
    ones = [d for d in range(count) if d not in left]
    inner: list[int] = []
    expected: Any = 1
    for size, stride in zip(reversed(want.shape[count:]), reversed(want.stride()[count:]), strict=True):
        if not same_size(size, 1) and not same_size(stride, expected):
            return None
        expected = expected * size
    while left:
        dim = next((d for d in left if same_size(want.stride(d), expected)), None)
        if dim is None:
            return None
        left.remove(dim)
        inner.insert(0, dim)
        expected = expected * want.shape[dim]
    return None if inner == sorted(inner) else (*ones, *inner)


def _fits(
    node: fx.Node,
    name: str,
    have: Tensor,
    order: tuple[int, ...] | None,
    dead: set[fx.Node],
    sizes: Sequence[fx.Node],
) -> list[tuple[fx.Node, Fit]]:
    """How an output takes the place of a node, or of the copies of it, if nothing else reads it."""
    try:
        return [(node, _fit(node, name, have, order, sizes))]
    except Refused:
        copies = [reader for reader in readers(node) if reader not in dead]
        if not copies or any(copy.target is not torch.ops.aten.clone.default for copy in copies):
            raise
        return [(copy, _fit(copy, name, have, order, sizes)) for copy in copies]


def _fit(node: fx.Node, name: str, have: Tensor, order: tuple[int, ...] | None, sizes: Sequence[fx.Node]) -> Fit:
    """How an output, whose rows are in ``order`` (None: as the op's inputs), takes the place of ``node``."""
    want = node.meta["val"]
    for what in ("dtype", "device"):
        if getattr(want, what) != getattr(have, what):
            raise Refused(f"layout: {node.name} has {what} {getattr(want, what)}, {name} {getattr(have, what)}")
    dims = None
    if order is not None and have.dim() >= len(order):
        if want.dim() < len(order):
            raise Refused(f"layout: {node.name} has shape {list(want.shape)}, {name} {list(have.shape)}")
        outermost = (*order, *range(len(order), want.dim()))
        want = want.permute(outermost)
        dims = tuple(outermost.index(d) for d in range(want.dim()))
    if not is_contiguous(want):
        kind = "contiguous" if dims is None else "not in its order"
        raise Refused(f"layout: {node.name} has strides {tuple(node.meta['val'].stride())}; {name} is {kind}")
    if dims is not None and not same_shape(want.shape[: len(order or ())], have.shape[: len(order or ())]):
        raise Refused(f"layout: {node.name} has shape {list(want.shape)}, {name} {list(have.shape)}")
    return Fit(want.shape, _sizes(node, name, want, have, sizes), dims)


def _known_sizes(nodes: Iterable[fx.Node], last: fx.Node) -> list[fx.Node]:
    """The symbolic sizes that views among ``nodes`` are given, where the graph has them when it comes to ``last``."""
    sizes = {size for node in nodes if node.target in VIEWS for size in node.all_input_nodes[1:]}
    return [size for size in sorted(sizes) if size.op == "placeholder" or not last < size]


def _sizes(
    node: fx.Node, name: str, want: Tensor, have: Tensor, known: Sequence[fx.Node]
) -> tuple[int | Size | fx.Node, ...] | None:
    """How to spell the shape of ``want`` in a reshape of ``have``; None if it has that shape."""
    if same_shape(want.shape, have.shape):
        return None
    if not same_size(want.numel(), have.numel()):
        raise Refused(f"layout: {node.name} has shape {list(want.shape)}, {name} {list(have.shape)}")
    sizes: list[int | Size | fx.Node] = []
    for size in want.shape:
        same = next((d for d, s in enumerate(have.shape) if same_size(s, size)), None)
        given = next((n for n in known if same_size(n.meta["val"], size)), None)
        if isinstance(size, int):
            sizes.append(size)
        elif same is not None:
            sizes.append(Size(same))
        elif given is not None:
            sizes.append(given)
        elif -1 not in sizes:
            sizes.append(-1)
        else:
            raise Refused(f"layout: the sizes {list(want.shape)} of {node.name} cannot be had from {list(have.shape)}")
    return tuple(sizes)
