"""The oracle: the original post-grad graph, interpreted node by node.

Plain Inductor is not an oracle for roundings: it drops the intermediate ones and so moves about 3 % of FP8 codes.
``check`` compares one planned site; ``Oracle`` is a backend that compares whole graphs on real calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomInferenceAwareGraphPass
from torch.utils._pytree import tree_leaves, tree_map

from ..op import FusedOp
from ..providers import implementation
from .plan import Plan


class Mismatch(AssertionError):
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
    """The largest distance between two FP8 tensors, in codes; NaN against a number counts as 255."""
    ordered = []
    for x in (a, b):
        bits = x.view(torch.uint8).to(torch.int16)
        ordered.append(torch.where(bits < 128, bits, 128 - bits))
    distance = (ordered[0] - ordered[1]).abs()
    nan_a, nan_b = _is_nan(a), _is_nan(b)
    distance = torch.where(nan_a & nan_b, 0, torch.where(nan_a ^ nan_b, 255, distance))
    return int(distance.max()) if distance.numel() else 0


def check(plan: Plan, site: str) -> None:
    """Run the original nodes of a site and its fused op on random data of the real shapes.

    Uses no global random state. With a provider that keeps the graph's roundings every bit must agree; else the op's
    tolerance decides.

    Raises:
        Mismatch: they differ; the message names site, output and difference.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [value for value in plan.arguments.values() if isinstance(value, fx.Node)]
    known: dict[fx.Node, Any] = {node: _random_like(node.meta["val"], generator) for node in inputs}
    original = {node: _evaluate(node, known) for node in plan.replaced}
    arguments = {name: known.get(v, v) if isinstance(v, fx.Node) else v for name, v in plan.arguments.items()}
    fused = implementation(plan.op, plan.provider.name)(**arguments)
    for node, (name, _) in plan.replaced.items():
        problem = _difference(plan.op, plan.provider.exact, name, original[node], fused[name].reshape(original[node].shape))
        if problem:
            raise Mismatch(f"{site}: {plan.op.name} by {plan.provider.name}: {name} differs from {node.name}: {problem}")


def _difference(op: FusedOp, exact: bool, name: str, want: Tensor, have: Tensor) -> str | None:
    if exact:
        return None if same_bits(want, have) else "not bit-identical"
    if name == "q":
        codes = differing_codes(want, have)
        return f"{codes} FP8 codes apart" if codes > op.tolerance.codes else None
    close = torch.allclose(want.float(), have.float(), rtol=op.tolerance.scale, atol=0.0, equal_nan=True)
    return None if close else f"more than {op.tolerance.scale:.0e} apart"


def _hint(value: Any) -> Any:
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat)) else value


def _random_like(fake: Tensor, generator: torch.Generator) -> Tensor:
    """Normal values of the fake's shape (its sizes' hints), strides, dtype and device; scales are positive."""
    sizes, strides = [_hint(s) for s in fake.shape], [_hint(s) for s in fake.stride()]
    values = torch.randn(sizes, generator=generator)
    values = values.abs() * 1e-2 if fake.numel() == 1 else values
    real = torch.empty_strided(sizes, strides, dtype=fake.dtype, device=fake.device)
    return real.copy_(values)


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


class _Captured(Exception):  # noqa: N818 (control flow: stops Inductor after the pass)
    """The post-grad graph has been captured; no code is to be generated."""


class _Capture(CustomInferenceAwareGraphPass):
    """Runs the pass on a copy and stops the compilation."""

    def __init__(self, rewrite: Callable[[fx.Graph, bool], Any]) -> None:
        self.rewrite = rewrite
        self.before: fx.GraphModule | None = None
        self.after: fx.GraphModule | None = None

    def __call__(self, graph: fx.Graph, is_inference: bool) -> None:
        owner = graph.owning_module
        assert owner is not None
        self.before = fx.GraphModule(owner, _copy(graph))
        self.after = fx.GraphModule(owner, _copy(graph))
        self.rewrite(self.after.graph, is_inference)
        self.after.graph.lint()
        self.after.recompile()
        raise _Captured

    def uuid(self) -> None:
        return None


def _copy(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph()
    copied.set_codegen(graph._codegen)
    copied.output(copied.graph_copy(graph, {}))
    copied.output_node().meta.update(graph.output_node().meta)
    return copied


class Oracle:
    """A backend for ``torch.compile`` that interprets every graph twice, as it was and as rewritten.

    ::

        oracle = Oracle(manager.run)
        torch.compile(model, backend=oracle)(x)
        oracle.graphs[0].identical      # every output, and every input that the graph writes to

    No code is generated, so it takes seconds where Inductor takes minutes. The results are the rewritten graph's.
    """

    def __init__(self, rewrite: Callable[[fx.Graph, bool], Any]) -> None:
        self._rewrite = rewrite
        self.graphs: list[Comparison] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def inner(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
            capture = _Capture(self._rewrite)
            patches = {"post_grad_custom_pre_pass": capture, "fx_graph_cache": False}
            try:
                with torch._inductor.config.patch(patches):
                    compile_fx_inner(gm, example_inputs, **kwargs)
            except Exception as error:  # noqa: BLE001 (Inductor may wrap ours; anything else is raised again)
                if capture.after is None or capture.before is None or not _caused_by(error, _Captured):
                    raise
            assert capture.before is not None
            assert capture.after is not None
            comparison = Comparison(capture.before, capture.after)
            self.graphs.append(comparison)
            return comparison

        return compile_fx(gm, example_inputs, inner_compile=inner)  # type: ignore[arg-type,return-value]

    @property
    def identical(self) -> bool:
        """Whether every call of every graph gave the same bits both ways; False if nothing was called."""
        return bool(self.graphs) and all(g.calls and g.identical for g in self.graphs)


def _caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False


class Comparison:
    """One graph before and after, callable; ``calls`` counts, ``identical`` says whether all agreed so far."""

    def __init__(self, before: fx.GraphModule, after: fx.GraphModule) -> None:
        self._boxed_call = True  # takes its inputs as one list; on the instance, where wrappers copy it from
        self.before, self.after = before, after
        self.calls = 0
        self.identical = True

    def __call__(self, inputs: list[Any]) -> Any:
        given = list(inputs)
        inputs.clear()
        cloned = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, given)
        want = fx.Interpreter(self.before).run(*cloned)
        have = fx.Interpreter(self.after).run(*given)
        self.calls += 1
        for a, b in zip(tree_leaves((want, cloned)), tree_leaves((have, given)), strict=True):
            if isinstance(a, Tensor) and not same_bits(a, b):
                self.identical = False
        return have
