"""Both graphs of a model, the original and the rewritten one, interpreted on the same calls and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx
from torch._dynamo.utils import count_calls
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils._pytree import tree_leaves, tree_map

from ..config import Options
from ..report import FusionReport, merge
from .manager import PassManager, compiling
from .verify import same_bits


@contextmanager
def graphs_anew() -> Iterator[None]:
    """Within, no cache answers for a graph, so that the passes run. Kernels compiled before are used nevertheless."""
    with (
        inductor_config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        functorch_config.patch(enable_autograd_cache=False, enable_remote_autograd_cache=False),
    ):
        yield


class _Captured(Exception):  # noqa: N818 (control flow: stops Inductor after the pass)
    """The post-grad graph has been captured; no code is to be generated."""


class _Capture(CustomGraphPass):
    """Runs the pass on a copy of the outermost graph and stops the compilation.

    Graphs inside higher-order operators are interpreted as they are.
    """

    def __init__(self, manager: PassManager, outermost: fx.GraphModule) -> None:
        self.manager, self.outermost = manager, outermost
        self.comparison: Comparison | None = None

    def __call__(self, graph: fx.Graph) -> None:
        if graph.owning_module is not self.outermost:
            return
        before = fx.GraphModule(self.outermost, copy_graph(graph))
        after = fx.GraphModule(self.outermost, copy_graph(graph))
        report = self.manager.run(after.graph, compiling() == "inference")
        after.graph.lint()
        after.recompile()
        self.comparison = Comparison(before, after, report)
        raise _Captured

    def uuid(self) -> None:
        return None


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy whose nodes share the metadata (fakes, module stacks) of the original's."""
    copied = fx.Graph()
    copied.set_codegen(graph._codegen)
    copied.output(copied.graph_copy(graph, {}))
    copied.output_node().meta.update(graph.output_node().meta)
    return copied


class Oracle:
    """A backend for ``torch.compile`` that interprets every graph twice, as it was and as rewritten.

    ::

        oracle = aiter_fusion.Backend().oracle()
        torch.compile(model, backend=oracle)(x)
        oracle.identical        # every output, and every input that a graph writes to, bit by bit
        oracle.report           # as the backend would have reported

    No code is generated, so it takes seconds where Inductor takes minutes. The results are the rewritten graphs'.
    What caches hold is not used: code from there has no graphs. A graph that calls nothing, such as one that returns
    its inputs, has nothing to compare: it is not in ``graphs``.
    """

    def __init__(self, options: Options) -> None:
        self._manager = PassManager(options)
        self.graphs: list[Comparison] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self._manager.publish()

        def inner(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
            if not count_calls(gm.graph):  # Inductor runs no pass on it
                return compile_fx_inner(gm, example_inputs, **kwargs)  # type: ignore[return-value]
            capture = _Capture(self._manager, gm)
            try:
                with graphs_anew(), inductor_config.patch(post_grad_custom_pre_pass=capture):
                    compile_fx_inner(gm, example_inputs, **kwargs)
            except Exception as error:
                if not _caused_by(error, _Captured):
                    raise
            if capture.comparison is None:
                raise RuntimeError("Inductor compiled a graph without running its passes: nothing to compare")
            self.graphs.append(capture.comparison)
            return capture.comparison

        with graphs_anew():  # AOTAutograd's cache would answer before ``inner`` is asked
            return compile_fx(gm, example_inputs, inner_compile=inner)  # type: ignore[arg-type,return-value]

    @property
    def report(self) -> FusionReport:
        """One report for all graphs."""
        return merge(graph.report for graph in self.graphs)

    @property
    def identical(self) -> bool:
        """Whether every call of every graph gave the same bits both ways.

        Raises:
            RuntimeError: none of them differed, but a graph was never called, or there is none, so that this says
                nothing.
        """
        if not all(graph.identical for graph in self.graphs):
            return False
        if not self.graphs:
            raise RuntimeError(
                "the oracle has compared nothing: it was given no graph that calls anything. Call what "
                "torch.compile(model, backend=oracle) returned; where Dynamo no longer compiles the model, because it "
                "hit a recompile limit, call torch._dynamo.reset() before"
            )
        if uncalled := sum(not graph.calls for graph in self.graphs):
            raise RuntimeError(
                f"the oracle has not compared {uncalled} of {len(self.graphs)} graphs: they were compiled, but not "
                "called. Call the compiled model once more"
            )
        return True


def _caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False


class Comparison:
    """One graph before and after, callable; ``calls`` counts, ``identical`` says whether all agreed so far."""

    def __init__(self, before: fx.GraphModule, after: fx.GraphModule, report: FusionReport) -> None:
        self._boxed_call = True  # takes its inputs as one list; on the instance, where wrappers copy it from
        self.before, self.after, self.report = before, after, report
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
