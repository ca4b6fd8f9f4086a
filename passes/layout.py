"""Layout: how the outputs of a fused op take the places of the nodes that it replaces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from ..op import FusedOp, dense, is_contiguous
from ..patterns.fx_facts import VIEWS, readers, same_shape, same_size
from ..reasons import Reason, Refusal, Refused


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


def outputs_of(op: FusedOp, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """What ``op.allocate`` gives for fake tensors, made without the dispatcher: that takes a fifth of the pass."""
    first = next(value for value in given.values() if isinstance(value, Tensor))
    if not isinstance(first, FakeTensor):
        return op.allocate(**given)
    specs, empty = op.returned(op.shape(**given)), partial(torch.empty, device="meta")
    return {name: FakeTensor(first.fake_mode, dense(spec, empty), first.device) for name, spec in specs.items()}


@dataclass(frozen=True)
class Laid:
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


def laid_out(
    op: FusedOp, known: dict[str, Any], replaced: Mapping[fx.Node, str], dead: set[fx.Node], sizes: Sequence[fx.Node]
) -> Laid:
    """How the outputs take the places of what is replaced.

    Outputs are contiguous, but a norm of a permuted tensor is itself a permuted tensor. Then the rows are given to the
    op in the order in which the results lie in memory, and the results are permuted back: both are views. Or the op can
    write an output transposed, and the graph only reads transposed copies of it: then it takes the place of these. An
    op that does not compute rows, each for itself, has layouts for what is in graphs.
    """
    if not op.by_rows:
        return _in_layout(op, known, replaced)
    for layout in op.layouts[:-1]:
        laid = _transposed(op, {**known, **layout}, replaced, dead, sizes)
        if laid is not None:
            return laid
    first = next(value for value in known.values() if isinstance(value, Tensor))
    rows = first.shape[:-1]
    apart = any(known[name] is not None for name in op.once)
    orders = [] if apart else [_order(node.meta["val"], rows) for node in replaced]
    refusals: list[Refusal] = []
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
        fakes = outputs_of(op, given)
        fitted: dict[fx.Node, tuple[str, Fit]] = {}
        try:
            for node, name in replaced.items():
                fitted |= {n: (name, fit) for n, fit in fits(node, name, fakes[name], order, dead, sizes)}
        except Refused as refused:
            refusals.append(refused.refusal)
        else:
            return Laid(given, {}, permuted, fakes, fitted, frozenset())
    first_refusal, *others = refusals
    more = [f"; with the rows in that order, {refusal.particulars}" for refusal in others]
    raise Refused(first_refusal.reason, "".join([first_refusal.particulars, *more]))


def _in_layout(op: FusedOp, known: dict[str, Any], replaced: Mapping[fx.Node, str]) -> Laid:
    """The outputs in the first of the op's layouts in which they are as what they take the place of."""
    unlike: list[str] = []
    for layout in op.layouts:
        given = {**known, **layout}
        fakes = outputs_of(op, given)
        reasons = (_unlike(node, fakes[name]) for node, name in replaced.items())
        if (why := next(filter(None, reasons), None)) is None:
            fitted = {node: (name, Fit(fakes[name].shape, None, None)) for node, name in replaced.items()}
            return Laid(given, layout, {}, fakes, fitted, frozenset())
        unlike.append(why)
    raise Refused(Reason.LAYOUT, unlike[-1])


def _unlike(node: fx.Node, have: Tensor) -> str | None:
    """In what an output differs from a node, or None."""
    want = node.meta["val"]
    for what in ("dtype", "device"):
        if getattr(want, what) != getattr(have, what):
            return f"{node.name} has {what} {getattr(want, what)}, not {getattr(have, what)}"
    if not same_shape(want.shape, have.shape):
        return f"{node.name} has shape {list(want.shape)}, not {list(have.shape)}"
    strides = zip(want.shape, want.stride(), have.stride(), strict=True)
    if not all(same_size(size, 1) or same_size(a, b) for size, a, b in strides):
        return f"{node.name} has strides {tuple(want.stride())}, and no output of the op has: {tuple(have.stride())}"
    return None


def _transposed(
    op: FusedOp, given: dict[str, Any], replaced: Mapping[fx.Node, str], dead: set[fx.Node], sizes: Sequence[fx.Node]
) -> Laid | None:
    """The outputs with the columns of some outermost in memory, if the graph reads only such copies of these."""
    orders = {name: tuple(spec[2]) for name, spec in op.shape(**given).items() if len(spec) > 2}
    copies = {node: _transposed_copies(node, dead) for node, name in replaced.items() if name in orders}
    if not copies or not all(copies.values()):
        return None
    fakes = outputs_of(op, given)
    fitted: dict[fx.Node, tuple[str, Fit]] = {}
    between: set[fx.Node] = set()
    try:
        for node, name in replaced.items():
            if node not in copies:
                fitted |= {n: (name, fit) for n, fit in fits(node, name, fakes[name], None, dead, sizes)}
                continue
            for copy, path in copies[node].items():
                fitted[copy] = (name, _fit_transposed(copy, name, fakes[name], sizes))
                between |= {node, *path}
    except Refused:
        return None
    return Laid(given, {name: given[name] for name in op.layouts[-1]}, {}, fakes, fitted, frozenset(between))


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
        raise Refused(Reason.LAYOUT, f"{node.name} is not a contiguous copy of {name}, columns first")
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


def fits(
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
            raise Refused(Reason.LAYOUT, f"{node.name} has {what} {getattr(want, what)}, {name} {getattr(have, what)}")
    dims = None
    if order is not None and have.dim() >= len(order):
        if want.dim() < len(order):
            raise Refused(Reason.LAYOUT, f"{node.name} has shape {list(want.shape)}, {name} {list(have.shape)}")
        outermost = (*order, *range(len(order), want.dim()))
        want = want.permute(outermost)
        dims = tuple(outermost.index(d) for d in range(want.dim()))
    if not is_contiguous(want):
        kind = "contiguous" if dims is None else "not in its order"
        raise Refused(Reason.LAYOUT, f"{node.name} has strides {tuple(node.meta['val'].stride())}; {name} is {kind}")
    if dims is not None and not same_shape(want.shape[: len(order or ())], have.shape[: len(order or ())]):
        raise Refused(Reason.LAYOUT, f"{node.name} has shape {list(want.shape)}, {name} {list(have.shape)}")
    return Fit(want.shape, _sizes(node, name, want, have, sizes), dims)


def known_sizes(nodes: Iterable[fx.Node], last: fx.Node) -> list[fx.Node]:
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
        raise Refused(Reason.LAYOUT, f"{node.name} has shape {list(want.shape)}, {name} {list(have.shape)}")
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
            raise Refused(
                Reason.LAYOUT, f"the sizes {list(want.shape)} of {node.name} cannot be had from {list(have.shape)}"
            )
    return tuple(sizes)
