"""Sites: whether a chain of records becomes one fused op, and with which arguments, layout and provider."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from ..config import Options
from ..op import FusedOp
from ..patterns.form import Fusion
from ..patterns.fx_facts import behind
from ..providers import PROVIDERS, Provider, candidates
from ..reasons import Reason, Refused
from ..registry import REGISTRY
from .effects import check_order, check_writes, dead_after
from .layout import Fit, known_sizes, laid_out
from .recognise import Record, same
from .selection import View, rows_of, selected_rows, selections_of, sizes_in, way_of

# What a provider must pass to be chosen, in this order.
HURDLES = (Reason.NUMERICS, Reason.PREFERENCE, Reason.PROVIDER, Reason.UNMEASURED, Reason.SLOWER)


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


def groups_of(records: Iterable[Record], kinds: set[str]) -> list[list[Record]]:
    """Records that end a chain, those that compute the same thing from the same value together (or several that one
    op computes, ``Form.several``)."""
    groups: dict[Any, list[list[Record]]] = {}
    for record in records:
        if record.kind not in kinds:
            continue
        alike = groups.setdefault(same(record), [])
        for group in alike:
            branches = [member.branches for member in group if member.branches]
            if not record.branches or not branches or branches[0] == record.branches:
                group.append(record)
                break
        else:
            alike.append([record])
    return sorted((group for alike in groups.values() for group in alike), key=lambda group: group[0].root)


def chain_before(tail: Record, fusion: Fusion, value_of: Mapping[fx.Node, Record]) -> list[Record] | None:
    """The records before ``tail``, each the input ``x`` of the next, if their kinds are those of the fusion."""
    chain, last = [], tail
    for kind in reversed(fusion.chain[:-1]):
        source = value_of.get(behind(last.inputs["x"])) if "x" in last.inputs else None
        if source is None or source.kind != kind:
            return None
        chain.insert(0, source)
        last = source
    return chain if tail.kind == fusion.chain[-1] else None


def attempt(
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
    if fusion.features is not None and (unknown := features - fusion.features):
        raise Refused(Reason.OVERLOAD, f"{fusion.op} has none with {', '.join(sorted(unknown))}")
    ways = [way_of(record) for record in [*chain, group[0]][1:]]
    selections = selections_of(chain, ways)
    nodes = frozenset().union(*(record.nodes for record in records), *ways)
    outputs = {n: name for record in records if record not in selections for name, n in record.outputs.items()}
    base = REGISTRY.overload(fusion.op, features)
    if base is None:
        raise Refused(Reason.OVERLOAD, f"{fusion.op} has none for {', '.join(sorted(features))}")
    dead = dead_after(nodes, {node for node, name in outputs.items() if name in base.outputs})
    for position, record in enumerate(chain):
        if record.rooted is not None and record.root not in dead:
            chain = [*chain[:position], record.rooted, *chain[position + 1 :]]
            return attempt(fusion, chain, group, features, options, training, writes, agree)
    for record, way in selections.items():
        if not record.rows:
            raise Refused(
                Reason.ROWS, f"{way[-1].name} takes some of {record.root.name}, which {record.kind} gives whole"
            )
        left = next((node for node in record.outputs.values() if node not in dead), None)
        if left is not None and record is not chain[-1]:  # it can be read there; the last is computed again for them
            raise Refused(Reason.ROWS, f"{left.name}, of which {way[-1].name} takes some, is read elsewhere too")
    extra = frozenset(name for node, name in outputs.items() if node not in dead)
    features = features | extra
    op = REGISTRY.overload(fusion.op, features)
    replaced = {node: name for node, name in outputs.items() if op is not None and name in op.outputs}
    if op is None or extra - set(op.outputs):
        raise Refused(Reason.OVERLOAD, f"no overload of {fusion.op} also returns {', '.join(sorted(extra))}")

    check_wanted(fusion, op, records, features, options, training)
    arguments = _arguments(op, records)
    selected = selected_rows(arguments, selections)
    inputs = {value for value in arguments.values() if isinstance(value, fx.Node)}
    inputs = inputs.union(*(sizes_in(view) for views in selected.values() for view in views))
    check_order(inputs, replaced, dead)
    known = {name: v.meta["val"] if isinstance(v, fx.Node) else v for name, v in arguments.items()}
    known |= {name: rows_of(arguments[name], views) for name, views in selected.items()}
    laid = laid_out(op, known, replaced, dead, known_sizes(nodes, max(inputs)))
    nodes = nodes.union(laid.fitted, laid.between)
    check_writes(inputs, nodes, writes)
    agree(fusion, arguments)
    exact = fusion.exact and all(record.exact for record in records)
    provider = provider_for(op, laid.given, options, fusion, exact)
    arguments |= laid.layout
    made = Plan(op, provider, arguments, selected, laid.permuted, laid.fakes, laid.fitted, nodes, exact=exact)
    return made, features


def check_wanted(
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
            raise Refused(*record.refusal)
    needed = max([fusion.level, *(fusion.levels.get(feature, 1) for feature in features)])
    unwanted = options.why_not(fusion.family, needed)
    if unwanted is not None:
        raise Refused(*unwanted)
    if objections := fusion.against():
        raise Refused(Reason.PREFERENCE, f"{op.family}: {'; '.join(objections)}")
    if training:
        raise Refused(Reason.TRAINING, "fused ops have no gradient; compile under torch.no_grad() or inference_mode()")


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


def provider_for(
    op: FusedOp, known: Mapping[str, Any], options: Options, fusion: Fusion, exact: bool = True
) -> Provider:
    """The first provider that accepts the call, of those that the fusion is for.

    A refusal says what each of them objects to. Its code is that of the provider that came furthest: one that could
    compute the call, and not faster, before one that cannot, and that before those that were not even asked.
    """
    device = next(value.device for value in known.values() if isinstance(value, Tensor))
    asked = [p for p in candidates(options.provider, device.type) if fusion.only is None or p.name in fusion.only]
    if not asked:
        why = "; ".join(f"{p.name}: {p.missing()}" for p in PROVIDERS.values() if p.missing())
        raise Refused(Reason.NO_KERNEL, f"none for {device.type} ({why})")
    refusals: list[tuple[Reason, str]] = []
    for provider in asked:
        if not (exact and provider.keeps_roundings(op)) and not options.allows_kernel_numerics:
            refusals.append((Reason.NUMERICS, f"{provider.name}: it does not keep the graph's roundings"))
        elif options.provider == "auto" and (reason := provider.unwanted(op, known)) is not None:
            refusals.append((Reason.PREFERENCE, f"{provider.name}: {reason}"))
        elif (reason := provider.why_not(op, known)) is not None:
            refusals.append((Reason.PROVIDER, f"{provider.name}: {reason}"))
        elif options.provider == "auto" and (reason := provider.unmeasured(op, known)) is not None:
            refusals.append((Reason.UNMEASURED, f"{provider.name}: {reason}"))
        elif options.provider == "auto" and (reason := provider.slower(op, known)) is not None:
            refusals.append((Reason.SLOWER, f"{provider.name}: {reason}"))
        else:
            return provider
    furthest = max((reason for reason, _ in refusals), key=HURDLES.index)
    raise Refused(furthest, "; ".join(why for _, why in refusals))
