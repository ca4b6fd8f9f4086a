"""The torch.compile backend: Inductor with one more pass, and a report of what that pass did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import fx
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.utils import counters
from torch._inductor import list_mode_options, list_options
from torch._inductor.compile_fx import compile_fx

from . import config, dynamo, families, graph_text, journal, machine, ops, report  # noqa: F401  (importing them registers ops)
from .passes.manager import PassManager, compose, in_group
from .passes.oracle import Oracle, graphs_anew
from .patterns import fusions  # noqa: F401  (importing it registers forms and fusions)
from .providers import PROVIDERS
from .registry import REGISTRY

SLOT = "post_grad_custom_pre_pass"


class FusionError(ShortenTraceback):
    """``strict`` or ``expect`` was not satisfied; the message has the report. A ``RuntimeError``.

    Its base is what Dynamo hands on to the caller of the compiled model as it is; all else that a backend raises
    arrives as the ``inner_exception`` of a ``BackendCompilerFailed``.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class Backend:
    """An object for ``torch.compile(backend=...)``.

    Objects with equal options are equal, so that what Dynamo compiled by one of them serves the others.

    Args:
        level: 0 to 3, see ``aiter_fusion.config.LEVELS``; None: ``AITER_FUSION_LEVEL``, else 3.
        provider: ``auto``, ``aiter``, ``triton`` or ``reference``; None: ``AITER_FUSION_PROVIDER``, else ``auto``,
            which is ``aiter`` then ``triton`` on an accelerator and ``reference`` on a CPU.
        numerics: ``exact`` demands the graph's sequence of roundings, ``kernel`` allows a kernel's own; None
            follows the level.
        strict: raise if a site is skipped, except as ``slower`` or ``unmeasured``, or if matching raises.
        expect: counts of replaced sites by family in every compiled graph; raise on any other count.
        verify: at compile time, compare every fused op with the nodes it replaces, on random data.
        disable, enable: names of families; these win over the level.

    Raises:
        ValueError: an option has no such value.
        RuntimeError: PyTorch is too old, or the provider asked for by name cannot run here (with the reason).
    """

    def __init__(
        self,
        level: int | None = None,
        provider: str | None = None,
        numerics: str | None = None,
        strict: bool = False,
        expect: Mapping[str, int] | None = None,
        verify: bool = False,
        disable: str | Iterable[str] = (),
        enable: str | Iterable[str] = (),
    ) -> None:
        machine.require_torch(torch.__version__)
        untested = machine.why_untested(torch.__version__)
        if untested is not None:
            journal.configure_logging()
            _warn_once(untested)
        self.options = config.options(
            level=level,
            provider=provider,
            numerics=numerics,
            strict=strict,
            expect=expect,
            verify=verify,
            disable=disable,
            enable=enable,
        )
        if self.options.provider != "auto":
            missing = PROVIDERS[self.options.provider].missing()
            if missing is not None:
                raise RuntimeError(f"provider={self.options.provider!r} cannot run here: {missing}")
        self.__name__ = "aiter_fusion"

    def __eq__(self, other: object) -> bool:
        return self.options == other.options if isinstance(other, Backend) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.options)

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile a graph as Inductor does; ``mode`` and ``options`` are Inductor's."""
        if options:
            ours, inductor, option_mode = config.split(options, list_options())
            if ours:
                raise ValueError(f"give {', '.join(ours)} to aiter_fusion.Backend(...), not to options=")
            return self._compile(gm, example_inputs, option_mode or mode, inductor)
        return self._compile(gm, example_inputs, mode, {})

    def oracle(self) -> Oracle:
        """A backend with these options that interprets the original and the rewritten graphs and compares the bits."""
        return Oracle(self.options)

    def graph_pass(self) -> GraphPass:
        """The pass alone, with these options, for what compiles with Inductor but takes no backend.

        ::

            fusions = aiter_fusion.Backend(expect={"rms_norm_quant": 9}).graph_pass()
            torch._inductor.aoti_compile_and_package(exported, inductor_configs={"post_grad_custom_pre_pass": fusions})
            print(aiter_fusion.reports()[-1])

        Each graph that it is called on gets a report, and has to satisfy ``strict`` and ``expect``: the graph of the
        model, and before it those inside of it, such as the branches of ``torch.cond``. Where the host takes a compiled
        graph from a cache (AOTInductor never does) no pass runs and no report is made.

        Raises, when it is called:
            FusionError: ``strict`` or ``expect`` was not satisfied. Inductor raises an error of its own from it.
        """
        return GraphPass(self.options)

    def _compile(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, inductor: dict[str, Any]
    ) -> Callable[..., Any]:
        journal.configure_logging()
        dynamo.notice_limits(_is_ours, journal.logger)
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a graph would be compiled while a CUDA graph is captured: call aiter_fusion.warmup(model, inputs) "
                "before, with inputs of the same shapes and dtypes, in the same grad mode"
            )
        patches: dict[str, Any] = {**(list_mode_options(mode) if mode else {}), **inductor}
        existing = patches.get(SLOT, getattr(inductor_config, SLOT))
        manager = compose(existing, self.options)
        manager.publish()
        if self.options.does_nothing:
            compiled = compile_fx(gm, example_inputs, config_patches=patches or None)
            check(self.options, journal.keep(report.FusionReport(note=LEVEL_0)))
            return compiled  # type: ignore[return-value]
        journal.begin(counters["inductor"])
        with _recorded(gm) if journal.is_recording() else nullcontext():
            compiled = compile_fx(gm, example_inputs, config_patches={**patches, SLOT: manager})
        made = journal.collect(counters["inductor"])
        jointly = frozenset(fusion.family for fusion in REGISTRY.fusions.values() if fusion.jointly)
        if made is not None and jointly & made.replaced.keys() and manager.why_unlike():
            # It came from the cache, where it was put when all processes compiled alike; no pass has asked again.
            journal.discard(made)
            without = replace(
                self.options, disable=self.options.disable | jointly, enable=self.options.enable - jointly
            )
            patches[SLOT] = compose(existing, without)
            journal.begin(counters["inductor"])
            compiled = compile_fx(gm, example_inputs, config_patches=patches)
            made = journal.collect(counters["inductor"])
        if made is not None:
            check(self.options, made)
        return compiled  # type: ignore[return-value]


@contextmanager
def _recorded(gm: fx.GraphModule) -> Iterator[None]:
    """Within, the graph is compiled whatever is in the cache, and shown with the names of the model."""
    with graphs_anew(), graph_text.compiling(gm):
        yield


class GraphPass(PassManager):
    """What ``Backend.graph_pass`` returns: the pass without a backend around it, so it does what that does besides."""

    def __call__(self, graph: fx.Graph) -> None:
        journal.configure_logging()
        self.publish()
        super().__call__(graph)

    def run(self, graph: fx.Graph, is_inference: bool) -> report.FusionReport:
        if self.options.does_nothing:
            return report.FusionReport(note=LEVEL_0)
        return super().run(graph, is_inference)

    def deliver(self, made: report.FusionReport) -> None:
        check(self.options, journal.keep(made))

    def uuid(self) -> Any | None:
        """As the manager's, and ``expect``, since nobody checks it where a graph comes from a cache. None (no caching)
        in a group of processes, which find out that they compile alike by all running the pass."""
        known = super().uuid()
        return None if known is None or in_group() else (*known, "alone", self.options.expect)


def check(options: config.Options, made: report.FusionReport) -> None:
    """Raise FusionError if ``strict`` or ``expect`` was not satisfied; warn once that the reference is slow."""
    if any(site.provider == "reference" for site in made.sites) and options.provider == "auto":
        _warn_once(SLOW)
    lost = [site for site in made.sites if site.is_lost]
    if options.strict and lost:
        raise FusionError(f"strict: {len(lost)} sites were skipped\n{made}")
    if options.expect is not None:
        wrong = {f: n for f, n in options.expect if made.replaced.get(f, 0) != n}
        if wrong:
            raise FusionError(f"expected {wrong}, replaced {made.replaced}\n{made}")


LEVEL_0 = "level 0: plain Inductor"
SLOW = "on a CPU plain PyTorch computes the fused ops: good for checking, but slower than Inductor's own code"

_warned: set[str] = set()


def _warn_once(message: str) -> None:
    """One line a process."""
    if message not in _warned:
        _warned.add(message)
        journal.logger.warning("aiter_fusion: %s", message)


def aiter_fusion(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """What ``torch.compile(backend="aiter_fusion", options={...})`` calls.

    Options are those of ``Backend``, those of Inductor's config, and ``mode``.

    Raises:
        ValueError: a key is none of these (the message names the nearest valid one), or has no such value.
    """
    ours, inductor, option_mode = config.split(options or {}, list_options())
    return Backend(**ours)._compile(gm, example_inputs, option_mode or mode, inductor)


def _is_ours(compiler: object) -> bool:
    return isinstance(compiler, Backend) or compiler is aiter_fusion


def explain(
    model: Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
) -> report.FusionReport:
    """Compile ``model``, run it once, and return one report for all graphs that this compiled.

    Runs without gradients, as the fused ops do, unless the model is a module in training mode: then grad mode is the
    caller's, and under it the graphs are training graphs, which are left alone, and the report says so.

    The report has the graphs too (``to_html`` shows them), so they are compiled anew, whatever is in Inductor's cache,
    and whatever of the model is compiled already, by whichever backend. All this leaves Dynamo as it was: neither what
    it has compiled nor how often it may compile changes. If Dynamo compiles nothing, the report's note says so.

    Args:
        model: a module or function; args, kwargs: what to call it with, a tuple or list and a mapping; options: those
            of ``Backend``.

    Raises:
        TypeError: args is neither a tuple nor a list (a tensor would be taken apart), or kwargs no mapping.
        FusionError: ``strict`` or ``expect`` was not satisfied; also if Dynamo compiled nothing.
    """
    _require_arguments("explain(model, (x,))", args, kwargs)
    backend = Backend(**options)
    compiled = 0

    def compiler(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal compiled
        compiled += 1
        return backend(gm, example_inputs)

    compiler.__name__ = backend.__name__
    known = len(journal.reports())
    grad = torch.is_grad_enabled() and getattr(model, "training", False)
    with torch.set_grad_enabled(grad), journal.recording():
        note = dynamo.call_once(model, args, kwargs or {}, compiler)
    if not compiled:
        note = NOTHING
        if backend.options.strict or backend.options.expect is not None:
            raise FusionError(f"strict or expect was asked for, but {note}")
    made = report.merge(journal.reports()[known:])
    return replace(made, note="; ".join(filter(None, [made.note, note])))


NOTHING = (
    "Dynamo compiled nothing, so the model runs without torch.compile: all of it is excluded from that, has no tensor "
    "operations, or was given up after a recompile limit (torch._dynamo.reset() takes that back); "
    'TORCH_LOGS="graph_breaks" says more'
)


def _require_arguments(example: str, args: object, kwargs: object = None) -> None:
    if not isinstance(args, (tuple, list)):
        raise TypeError(
            f"arguments are given as a tuple or list, as in {example}, or by name as a mapping; this is a "
            f"{type(args).__name__}"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"kwargs must map names to arguments; this is a {type(kwargs).__name__}")


# With mode="reduce-overhead" PyTorch warms up in the first call, captures in the second and replays in the third.
WARMUP_CALLS = 3


def warmup(model: Callable[..., Any], inputs: Iterable[Sequence[Any] | Mapping[str, Any]]) -> report.FusionReport:
    """Call a compiled model with every one of ``inputs``, so that whatever such calls compile, load or allocate once is
    there before it is in the way: before a CUDA graph is captured, where nothing can be compiled, or before a server
    takes requests.

    The calls are made in the caller's grad mode, since another would compile other graphs; on a GPU on a stream of
    their own, as a capture is. On return they are finished. Each is made three times, for ``mode="reduce-overhead"``.

    Args:
        model: what ``torch.compile`` returned.
        inputs: for each shape to come, the arguments: a tuple or list of positional ones, or a mapping of keyword
            arguments.

    Returns one report for all graphs that this compiled.

    Raises:
        RuntimeError: a CUDA graph is being captured already.
        TypeError: arguments are neither (a tensor would be taken apart). Nothing has been called then.
    """
    calls = [inputs] if isinstance(inputs, (torch.Tensor, Mapping)) else list(inputs)
    for given in calls:
        if given is inputs or not isinstance(given, Mapping):
            _require_arguments("warmup(model, [(x,)])", given)
    known = len(journal.reports())
    on_gpu = torch.cuda.is_available()
    if on_gpu and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("warmup inside a CUDA-graph capture is too late: call it before")
    stream = torch.cuda.Stream() if on_gpu else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # type: ignore[arg-type]
        for given in calls:
            for _ in range(WARMUP_CALLS):
                model(**given) if isinstance(given, Mapping) else model(*given)  # type: ignore[arg-type]
    if on_gpu:
        torch.cuda.synchronize()
    return report.merge(journal.reports()[known:])


def reports() -> list[report.FusionReport]:
    """One report for each graph compiled in this process, oldest first; also for graphs that came from the cache."""
    return journal.reports()


def reset() -> None:
    """Forget the reports. Compiled code and caches stay (``torch._dynamo.reset()`` is for those)."""
    journal.reset()
