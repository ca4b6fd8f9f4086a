"""The oracle: the original post-grad graph, interpreted node by node.

Plain Inductor is not an oracle for roundings: it drops the intermediate ones and so moves about 3 % of FP8 codes.
``check`` compares one planned site; ``Oracle`` (oracle.py) is a backend that compares whole graphs on real calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import no_python_dispatcher

from ..formats import DTYPES
from ..op import FusedOp
from ..providers import Provider, implementation
from ..scale_program import is_of_bytes
from .join import permute
from .sites import Plan

EXPONENT = 8  # codes of e4m3 from a number to its double


class MismatchError(AssertionError):
    """A fused op does not compute what the nodes that it replaces compute."""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and values; NaN equals NaN, and -0 does not equal 0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return bool(torch.equal(a, b))
    nan_a, nan_b = _is_nan(a), _is_nan(b)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    bits_a, bits_b = a.contiguous().view(integer), b.contiguous().view(integer)
    return bool(torch.equal(nan_a, nan_b)) and bool(((bits_a == bits_b) | nan_a).all())


def _is_nan(x: Tensor) -> Tensor:
    return (x.float() if x.element_size() == 1 else x).isnan()


def differing_codes(a: Tensor, b: Tensor) -> int:
    """The largest distance between two quantised tensors, in codes; NaN against a number counts as 255."""
    if not a.is_floating_point():
        return int((a.to(torch.int16) - b.to(torch.int16)).abs().max()) if a.numel() else 0
    ordered = []
    for x in (a, b):
        bits = x.view(torch.uint8).to(torch.int16)
        ordered.append(torch.where(bits < 128, bits, 128 - bits))
    distance = (ordered[0] - ordered[1]).abs()
    nan_a, nan_b = _is_nan(a), _is_nan(b)
    distance = torch.where(nan_a & nan_b, 0, torch.where(nan_a ^ nan_b, 255, distance))
    return int(distance.max()) if distance.numel() else 0


def check(plan: Plan, site: str) -> str | None:
    """Run the original nodes of a site and its fused op on random data of the real shapes.

    Uses no global random state; ``difference`` says what is allowed. Returns why the site could not be checked, or None
    if it was.

    Raises:
        MismatchError: they differ; the message names site, output and difference.
    """
    inputs: list[fx.Node] = []
    fx.map_arg(list(plan.arguments.values()), inputs.append)
    generator = torch.Generator(inputs[0].meta["val"].device).manual_seed(0)
    if any(_hint(size) is None for node in inputs for size in node.meta["val"].shape):
        return f"{site} was not verified: its sizes are known only at run time"
    known: dict[fx.Node, Any] = {node: _random_like(node.meta["val"], generator) for node in inputs}
    for node in {plan.arguments[name] for name in plan.op.order_free}.intersection(known):
        known[node] = known[node].to(torch.float8_e4m3fn).to(known[node].dtype)  # the sum of 16 fits in bfloat16
    for name, greatest in plan.op.greatest.items():
        if (node := plan.arguments[name]) is not None:
            most = max(greatest(fx.map_arg(dict(plan.arguments), known.__getitem__)), 0)
            least = min(most, 1)  # 0 is the one integer that says little
            drawn = torch.randint(least, most + 1, known[node].shape, generator=generator, device=generator.device)
            known[node] = drawn.to(known[node])
    known |= {node: known[read] for node, read in plan.equal.items()}
    # Compilation has the Python dispatcher on, by which PyTorch 2.13 waits for a collective without giving up the
    # interpreter's lock. A thread of gloo that wants it, to let go of a tensor, then never comes to the collective.
    with no_python_dispatcher():
        return _compare(plan, site, known)


def _compare(plan: Plan, site: str, known: dict[fx.Node, Any]) -> None:
    original = {node: _evaluate(node, known) for node in plan.replaced}
    arguments = {name: fx.map_arg(value, known.__getitem__) for name, value in plan.arguments.items()}
    for name, views in plan.selected.items():
        for view in views:
            arguments[name] = view.of(arguments[name], _hint)
    arguments |= {name: permute(arguments[name], dims) for name, dims in plan.permuted.items()}
    fused = implementation(plan.op, plan.provider.name)(**arguments)
    for node, (name, fit) in plan.replaced.items():
        have = fused[name].reshape([_hint(size) for size in fit.shape])
        have = have if fit.dims is None else have.permute(fit.dims)
        doubles = is_of_bytes(str(plan.arguments.get("factor_steps", "")))
        problem = difference(plan.op, plan.provider, name, original[node], have, plan.exact, doubles)
        if problem:
            raise MismatchError(
                f"{site}: {plan.op.name} by {plan.provider.name}: {name} differs from {node.name}: {problem}"
            )


def difference(
    op: FusedOp, provider: Provider, name: str, want: Tensor, have: Tensor, exact: bool = True, doubles: bool = False
) -> str | None:
    """How an output differs from the original's by more than the provider may, or None; ``exact``: as in ``Plan``.

    A provider that keeps the graph's roundings and the order of its sums: not at all. One that sums in another order:
    one code in a share of the elements, or in a few. One with roundings of its own: one code, and where scales are
    powers of two (``doubles``), one exponent in a share of the blocks, those whose maximum is next to a power. Where
    summands may cancel (``FusedOp.cancels``), more codes are allowed if that is no more than two codes of bf16 of the
    largest in their row.
    """
    tolerance = op.tolerance
    if same_bits(want, have):
        return None
    exact = exact and provider.keeps_roundings(op)
    if exact and not provider.reorders:
        return "not bit-identical"
    doubles = doubles and not exact
    if doubles and want.dtype is torch.uint8:
        apart = (want.to(torch.int16) - have.to(torch.int16)).abs()
        far = int(apart.max()) > 1 or int(apart.sum()) > max(1, tolerance.doubled * want.numel())
        said = f"{int(apart.count_nonzero())} of {want.numel()} exponents differ, by up to {int(apart.max())}"
        return said if far else None
    if name == "q" or want.dtype in DTYPES:
        if op.cancels:
            top = torch.finfo(want.dtype).max if want.is_floating_point() else torch.iinfo(want.dtype).max
            far = ~((want.float() - have.float()).abs() <= tolerance.sums * top)
            codes = differing_codes(want[far], have[far])
        else:
            codes = differing_codes(want, have)
        if codes > tolerance.codes + (EXPONENT if doubles else 0):
            return f"{codes} codes apart"
        count = int((want.view(torch.uint8) != have.view(torch.uint8)).sum()) if exact else 0
        return (
            f"{count} of {want.numel()} codes differ"
            if count > max(tolerance.few, tolerance.share * want.numel())
            else None
        )
    if op.products or op.cancels:
        largest = want.float().abs().amax(-1, keepdim=True) if want.numel() else want.float()
        near = ((want.float() - have.float()).abs() <= tolerance.sums * largest) | (want.isnan() & have.isnan())
        return None if bool(near.all()) else f"more than {tolerance.sums:.0e} of the row's largest value apart"
    allowed = tolerance.scale if exact else tolerance.kernel
    close = torch.allclose(want.float(), have.float(), rtol=allowed, atol=0.0, equal_nan=True)
    return None if close else f"more than {allowed:.0e} apart"


def _hint(value: Any) -> Any:
    """The example of a symbolic number, None if it has none; other values as they are."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value
    return value.node.hint if value.node.has_hint() else None


def _random_like(fake: Tensor, generator: torch.Generator) -> Tensor:
    """Normal values of the fake's shape (its sizes' hints), strides, dtype and device; scales are positive, and most
    conditions hold."""
    sizes, strides = [_hint(s) for s in fake.shape], [_hint(s) for s in fake.stride()]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    values = torch.randn(max(extent, 0), generator=generator, device=generator.device)
    values = values.abs() * 1e-2 if extent == 1 else values
    values = values > -0.5 if fake.dtype is torch.bool else values
    return values.to(fake.dtype).to(fake.device).as_strided(sizes, strides)


def _evaluate(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The value of a node, from the values of the site's inputs; sizes are their hints."""
    pending = [node]
    while pending:
        current = pending[-1]
        missing = [n for n in current.all_input_nodes if n not in known]
        symbolic = [n for n in missing if not isinstance(n.meta.get("val"), (Tensor, list, tuple))]
        for size in symbolic:
            known[size] = _hint(size.meta["val"])
        missing = [n for n in missing if n not in known]
        if missing:
            pending += missing
            continue
        pending.pop()
        if current not in known:
            args, kwargs = fx.map_arg((current.args, current.kwargs), known.__getitem__)
            known[current] = current.target(*args, **kwargs)  # type: ignore[operator]
    return known[node]
