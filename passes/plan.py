"""Decide, site by site, what becomes a fused op: read-only, and complete before the graph is touched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ..config import Options
from ..graph_text import where
from ..op import FusedOp
from ..patterns.form import Fusion
from ..patterns.fx_facts import GROUPED, VIEWS, behind, called, origin, reading
from ..reasons import Reason, Refusal, Refused
from ..registry import REGISTRY
from ..report import BARE, REPLACED, SKIPPED, Site
from .effects import writes_of
from .join import Joiner
from .recognise import Recognised, Record
from .sites import Plan, attempt, chain_before, groups_of

logger = logging.getLogger("aiter_fusion")


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
    for group in groups_of(recognised.records, ends - inner):
        account(planner.decide(group))
    for group in groups_of(recognised.records, ends & inner):  # what is left of them, without what might have followed
        group = [record for record in group if record not in planner.claimed]
        draft = planner.decide(group) if group else None
        if draft is not None and (
            draft.status == REPLACED or (draft.status == SKIPPED and accounted.keys().isdisjoint(group))
        ):
            account(draft)
    for draft in planner.join(groups_of(recognised.records, joined)):
        account(draft)
    for draft in drafts:
        for record in draft.without:
            if record not in accounted:
                draft.records.append(record)
                accounted[record] = draft
    for record in recognised.records:
        if record not in accounted and not record.serves:
            account(_Draft([record], record.called, record.variant, BARE, str(_alone(record)), record.root))
    for record in reversed(recognised.records):
        if record not in accounted:  # it serves a record after it that is not fused with it
            served = next(
                r for r in recognised.records if r.kind in record.serves and behind(r.inputs["x"]) is record.root
            )
            accounted[served].records.append(record)
    for node, kind, reason in recognised.unknown:
        drafts.append(_Draft([], kind, "unknown", BARE, str(reason), node))

    planned = Planned()
    for draft in sorted(drafts, key=lambda draft: draft.at):
        site = draft.site()
        planned.sites.append(site)
        planned.drafts.append(draft)
        if draft.plan is not None:
            planned.plans.append(draft.plan)
            planned.taken.append(site)
    return planned


def _alone(record: Record) -> Refusal:
    """Why a record that begins and ends no fusion is left alone."""
    grouped = next((reader for reader in reading(record.root) if called(reader) == GROUPED), None)
    return record.alone if grouped is None else Refusal(Reason.GROUPED, f"{grouped.target} reads it")


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
        self._graph, self._writes = graph, list(writes_of(graph))
        self.claimed: set[Record] = set()

    def decide(self, group: list[Record]) -> _Draft:
        """The largest fusion that is possible, else the first that was refused, else a bare site."""
        tail, refused, misfit = group[0], None, None
        for fusion in self._fusions:
            chain = chain_before(tail, fusion, self._value_of) if fusion.join is None else None
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
                taken = next((record for record in reversed(chain) if record in self.claimed), None)
                if taken is not None:
                    raise Refused(Reason.STARVED, f"{taken.root.name} is already part of another site")
                made, features = attempt(
                    fusion, chain, group, features, self._options, self._training, self._writes, self._agree
                )
            except Refused as refused_here:
                reason = str(refused_here.refusal)
            except Exception as error:
                # A defect concerns this site alone: nothing has been changed yet, and the report says what happened.
                if self._options.strict:
                    raise
                logger.warning("aiter_fusion: planning %s failed", tail.root.name, exc_info=True)
                reason = str(Refusal(Reason.ERROR, f"{type(error).__name__}: {error}"))
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
        why = Refusal(Reason.PRODUCER, misfit) if misfit is not None else self._where_from(tail.inputs["x"])
        return _Draft(list(group), tail.called, tail.variant, BARE, str(why), tail.root)

    def join(self, groups: Sequence[list[Record]]) -> list[_Draft]:
        """Sites of kinds of which one op can compute several records: by fusions of one record and of several, in
        their order in the table; what one cannot take, the next is asked for."""
        drafts: list[_Draft] = []
        refused: dict[Record, str] = {}  # record -> why the last fusion that was tried does not take it
        for alone, fusions in self._rounds({(group[0].kind,) for group in groups}):
            made = self._each(groups, fusions) if alone else self._several(groups, fusions, refused)
            tried = {record for draft in made for record in draft.records}
            drafts = [draft for draft in drafts if tried.isdisjoint(draft.records)] + made
            refused |= {record: draft.reason for draft in made if draft.status == SKIPPED for record in draft.records}
            groups = [group for group in groups if self.claimed.isdisjoint(group)]
        return drafts

    def _rounds(self, chains: Set[tuple[str, ...]]) -> list[tuple[bool, list[Fusion]]]:
        """The fusions of these chains in their order, those together that can be tried together: of one record each,
        or of several, at most one for a chain."""
        rounds: list[tuple[bool, list[Fusion]]] = []
        for fusion in self._fusions:
            if fusion.chain in chains:
                alone, last = fusion.join is None, rounds[-1] if rounds else (None, [])
                if last[0] is not alone or (not alone and any(fusion.chain == other.chain for other in last[1])):
                    rounds.append((alone, []))
                rounds[-1][1].append(fusion)
        return rounds

    def _each(self, groups: Sequence[list[Record]], fusions: Sequence[Fusion]) -> list[_Draft]:
        """A site for each of the groups that some of the fusions, of one record each, are for."""
        kinds = {fusion.chain for fusion in fusions}
        return [self.decide(group) for group in groups if (group[0].kind,) in kinds]

    def _several(
        self, groups: Sequence[list[Record]], fusions: Sequence[Fusion], refused: Mapping[Record, str]
    ) -> list[_Draft]:
        """Sites of as many of the groups as possible each, by fusions of which each is of its own kind."""
        joiner = Joiner(self._graph, self._writes, self._options, self._training, self._agree)
        by_kind = {fusion.chain: fusion for fusion in fusions}
        bundles: dict[Any, tuple[Fusion, FusedOp, list[Record]]] = {}
        for group in groups:
            fusion = by_kind.get((group[0].kind,))
            if fusion is None:
                continue
            op = REGISTRY.overload(fusion.op, group[0].features)
            assert fusion.join is not None
            assert op is not None
            shared = joiner.shared(fusion.join, op, group[0])
            bundles.setdefault((op.key, id(fusion.join), shared), (fusion, op, []))[-1].extend(group)
        drafts: list[_Draft] = []
        for fusion, op, records in bundles.values():
            before = next((refused[record] for record in records if record in refused), "")
            for some, products, made, apart in joiner.sites(fusion, op, records):
                root, variant = some[0].root, fusion.variant(some[0].features, some[0].attributes, some[0].root)
                if isinstance(made, Plan):
                    self.claimed.update(some)
                    said = apart or (f"first choice refused: {before}" if before else "")
                    draft = _Draft(some, fusion.family, variant, REPLACED, said, root, made, [], products)
                else:
                    draft = _Draft(some, fusion.family, variant, SKIPPED, str(made), root, None, [], products)
                drafts.append(draft)
        return drafts

    def _agree(self, fusion: Fusion, arguments: Mapping[str, Any]) -> None:
        """Refuse what other sites of the graph, or other processes, do not go along with."""
        mine = {name: arguments[name] for name in fusion.one}
        theirs = self._one.get(fusion.family, mine)
        for name in fusion.one:
            if mine[name] != theirs[name]:
                raise Refused(
                    Reason.COLLECTIVE, f"its {name} is {mine[name]}, that of the sites before it {theirs[name]}"
                )
        why = self._unlike() if fusion.jointly else None
        if why is not None:
            raise Refused(Reason.COLLECTIVE, why)

    def _without(self, records: list[Record], refused: _Draft | None) -> str:
        """What a larger fusion of these records would have included, and why it does not."""
        if refused is not None:
            kinds = ", ".join(record.kind for record in refused.records if record not in records)
            return f"without {kinds}: {refused.reason}" if kinds else f"first choice refused: {refused.reason}"
        first = records[0].inputs.get("x")
        unserved = self._unserved.get(behind(first)) if first is not None else None
        return f"without {unserved}" if unserved is not None else ""

    def _where_from(self, source: fx.Node) -> Refusal:
        """Why nothing before a value can be fused with what reads it."""
        given: fx.Node = source
        while given.target in VIEWS:
            given = given.args[0]  # type: ignore[assignment]
        if given.op == "placeholder":
            return Refusal(
                Reason.BOUNDARY,
                f"it is {given.name}, an input of this graph; if a graph break cut the graph there, "
                "torch.compile(..., fullgraph=True) says where and why",
            )
        said = f"its input is {source.target if source.op == 'call_function' else source.op}"
        made = origin(source)
        words = called(made)
        said += f", from {made.target}" if made is not source and made.op == "call_function" else ""
        said += f", {words}" if words is not None else ""
        near = self._near_miss(source)
        return Refusal(
            Reason.GROUPED if words == GROUPED else Reason.PRODUCER,
            said if near is None else f"{said}, almost one of the forms, but {near}",
        )
