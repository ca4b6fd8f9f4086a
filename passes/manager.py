"""The pass that Inductor calls: recognise, plan, verify, rewrite; timed, reported, and known to the cache."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.logging_utils import get_aot_compilation_context
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._logging._internal import getArtifactLogger, trace_structured
from torch.fx._utils import lazy_format_graph_code

from .. import agreement, graph_text, journal, report
from ..config import Options
from ..patterns.fusions import forms_of
from ..providers import can_be_asked
from ..registry import REGISTRY
from . import verify
from .identity import canonical, environment, in_group, source_hash
from .plan import Planned, plan
from .recognise import Recognised, recognise
from .rewrite import rewrite

logger = logging.getLogger("aiter_fusion")

# Inductor's log of its graphs: what TORCH_LOGS=post_grad_graphs shows, and depyf dumps.
graphs_log = getArtifactLogger("torch._inductor.compile_fx", "post_grad_graphs")

# Passes that take is_inference too; torch 2.11 has none.
INFERENCE_AWARE = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", ())

UserPass = CustomGraphPass | Callable[[fx.Graph], None]


def compiling() -> str:
    """What AOTAutograd compiles: ``inference`` (also outside it), ``joint`` (forward) or ``backward``."""
    names, _, _ = get_aot_compilation_context()  # such as ["0_inference"]
    return names[-1].rpartition("_")[2] if names else "inference"


@dataclass(frozen=True)
class PassManager(CustomGraphPass):
    """The one pass in ``post_grad_custom_pre_pass``: the user's own passes that were there, then the fusions.

    A graph in which nothing is replaced is left exactly as it was.
    """

    options: Options
    before: tuple[UserPass, ...] = ()

    def __call__(self, graph: fx.Graph) -> None:
        phase = compiling()
        show(graph, "0 before")
        for position, user_pass in enumerate(self.before, 1):
            if isinstance(user_pass, INFERENCE_AWARE):
                user_pass(graph, phase == "inference")  # type: ignore[call-arg]
            else:
                user_pass(graph)
            show(graph, f"{position} after {_name_of(user_pass)}")
        if phase != "backward":
            self.deliver(self.run(graph, phase == "inference"))
            show(graph, f"{len(self.before) + 1} after fusions")

    def deliver(self, made: report.FusionReport) -> None:
        """Send a report through Inductor's counters to the backend, which also finds it there on a cache hit."""
        journal.passed(made, counters["inductor"])

    def run(self, graph: fx.Graph, is_inference: bool) -> report.FusionReport:
        """Rewrite a graph and say what was done.

        Raises:
            Exception: with ``strict``, whatever matching raised; with ``verify``, ``verify.MismatchError``.
        """
        before = graph_text.nodes(graph) if journal.is_recording() else None
        start = time.perf_counter()
        notes = [] if is_inference else ["training graph, left alone"]
        try:
            fusions = [f for f in REGISTRY.fusions.values() if can_be_asked(self.options.provider, f.only)]
            recognised = recognise(graph, forms_of(fusions), self.options.strict)
            planned = plan(graph, recognised, fusions, self.options, not is_inference, self.why_unlike)
        except Exception as error:
            # A defect outside any one site: nothing has been changed yet, and the report says what happened.
            if self.options.strict:
                raise
            logger.warning("aiter_fusion: planning failed; the graph is left as it was", exc_info=True)
            recognised, planned = Recognised(), Planned()
            notes.append(f"the graph is left as it was: {type(error).__name__}: {error}")
        if self.options.verify:
            for made, site in zip(planned.plans, planned.taken, strict=True):
                place = f"{site.family} {site.variant} at {site.where or 'the top level'}"
                notes += filter(None, [verify.check(made, place)])
        inserted: list[list[fx.Node]] = []
        if planned.plans:
            for provider in {made.provider.name: made.provider for made in planned.plans}.values():
                provider.prepare()
            inserted = rewrite(graph, planned.plans)
        made = report.FusionReport(
            sites=tuple(planned.sites),
            records=len(recognised.records) + len(recognised.unknown),
            milliseconds=(time.perf_counter() - start) * 1e3,
            note="; ".join(notes),
        )
        if before is not None:
            fused = iter(inserted)
            places = [
                (graph_text.names(draft.nodes()), graph_text.names(next(fused) if draft.plan else ()))
                for draft in planned.drafts
            ]
            recorded = graph_text.Recorded(graph_text.compile_id(), before, graph_text.nodes(graph), tuple(places))
            made = replace(made, recorded=(recorded,))
        return made

    def publish(self) -> None:
        """Tell the other processes of a distributed job what this one compiles with."""
        agreement.publish(self._facts())

    def why_unlike(self) -> str | None:
        """Why the processes of a distributed job do not compile alike, or None if they do."""
        return agreement.why_unlike(self._facts())

    def _facts(self) -> dict[str, str]:
        """All that the rewritten graph depends on besides the graph, by a name for messages."""
        facts = {**canonical(self.options), "the source of aiter_fusion": source_hash()[:12], **environment()}
        return {name: repr(value) for name, value in facts.items()}

    def uuid(self) -> Any | None:
        """Everything that the result depends on besides the graph; None (no caching) if something of the user's, a pass
        or a form, has none, or if sites are to be verified, which several processes can only do together."""
        theirs = [user_pass.uuid() if isinstance(user_pass, CustomGraphPass) else None for user_pass in self.before]
        registered = REGISTRY.identity()
        if not all(theirs) or registered is None or (self.options.verify and in_group()):
            return None
        options = repr(canonical(self.options))
        return ("aiter_fusion", source_hash(), registered, options, repr(environment()), tuple(theirs))


def show(graph: fx.Graph, stage: str) -> None:
    """Offer a graph to those who look at graphs: ``TORCH_LOGS``, depyf, ``TORCH_TRACE``. Only they make it text.

    ``stage`` starts with its position, e.g. ``1 after fusions``.
    """
    module = graph.owning_module
    if module is None:
        return
    name = f"AITER_FUSION {stage}"
    graphs_log.debug("%s", lazy_format_graph_code(name, module, include_stride=True, include_device=True, colored=True))
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name.lower().replace(" ", "_"), "encoding": "string"},
        payload_fn=lambda: module.print_readable(print_output=False, include_stride=True, include_device=True),
    )


def _name_of(user_pass: UserPass) -> str:
    return getattr(user_pass, "__name__", type(user_pass).__name__)


def compose(existing: UserPass | Sequence[UserPass] | None, options: Options) -> PassManager:
    """The pass for a slot that may already hold the user's own (one, or a list from torch 2.13 on)."""
    if existing is None:
        before: tuple[UserPass, ...] = ()
    elif isinstance(existing, (list, tuple)):
        before = tuple(existing)
    else:
        before = (existing,)  # type: ignore[assignment]
    return PassManager(options, before)
