"""Selected rows: sites at which only some rows of a value are quantised, and the views that select them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..patterns.fx_facts import arguments as arguments_of
from ..patterns.fx_facts import behind, same_shape, selects_rows, shape
from ..reasons import Reason, Refused
from .recognise import Record


@dataclass(frozen=True)
class View:
    """A call that gives a view of its first argument; ``others`` are those after it, nodes where they are sizes of the
    graph."""

    target: Any
    others: tuple[Any, ...]

    def of(self, x: Tensor, size: Callable[[Any], Any] = lambda value: value) -> Tensor:
        """The view of ``x``; ``size`` is applied to what the tracer recorded for a size."""
        return self.target(x, *fx.map_arg(self.others, lambda node: size(node.meta["val"])))


def way_of(record: Record) -> tuple[fx.Node, ...]:
    """The views through which a record reads another's value, from that on."""
    node: fx.Node = record.inputs["x"]
    source, way = behind(node), []
    while node is not source:
        way.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return tuple(reversed(way))


def selections_of(chain: Sequence[Record], ways: Sequence[tuple[fx.Node, ...]]) -> dict[Record, tuple[fx.Node, ...]]:
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


def selected_rows(
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
                raise Refused(
                    Reason.LAYOUT, f"{node.name} has other rows than {record.root.name}, of which some are read"
                )
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


def rows_of(node: fx.Node, views: Sequence[View]) -> Tensor:
    """What is recorded of the rows that views select, which must not be copied first."""
    whole = rows = node.meta["val"]
    for view in views:
        rows = view.of(rows)
    if rows.untyped_storage()._cdata != whole.untyped_storage()._cdata:
        raise Refused(Reason.LAYOUT, f"{node.name}, of which some rows are read, would have to be copied to view them")
    return rows


def sizes_in(view: View) -> list[fx.Node]:
    """The sizes of the graph that a view needs."""
    found: list[fx.Node] = []
    fx.map_arg(view.others, found.append)
    return found
