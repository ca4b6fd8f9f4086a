"""Exported programs: the same sites as without ``torch.export``, and the pass alone, as AOTInductor takes it."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

import aiter_fusion
from aiter_fusion import backend
from aiter_fusion.passes.manager import PassManager
from aiter_fusion.passes.oracle import copy_graph
from aiter_fusion.patterns.fx_facts import ASSERTIONS
from support import cases
from support.checked import Checked, checked
from support.rows import Row, Rows

BF16 = torch.bfloat16


def exported(rows: Sequence[Row], **options: object) -> Checked:
    """The rows as an exported program, captured, called and compared."""
    model = Rows(rows)
    given = model.inputs()
    oracle = aiter_fusion.Backend(**options).oracle()  # type: ignore[arg-type]
    with torch.no_grad():
        module = torch.export.export(model, given).module()
        call = oracle(module, given)  # type: ignore[arg-type] # as torch.compile would call it, but for Dynamo's time
        call(*given)
    result = Checked(call, oracle)
    assert oracle.identical
    assert result.report.unaccounted == 0
    (graph,) = oracle.graphs
    assert any(node.target in ASSERTIONS for node in graph.before.graph.nodes)
    return result


def every_part() -> Iterator[Row]:
    """Every norm, activation, fusion and quantiser once."""
    norms = zip(cases.NORM_FUSIONS, cases.NORMS, strict=True)
    acts = zip(itertools.cycle(cases.ACT_FUSIONS), cases.ACTS, strict=False)
    for (case, producer), quant in zip((*norms, *acts), itertools.cycle(cases.QUANTS), strict=False):
        yield case, producer, quant


def test_every_part_exported() -> None:
    rows = list(every_part())
    for position, parts in enumerate((cases.NORM_FUSIONS + cases.ACT_FUSIONS, cases.NORMS + cases.ACTS, cases.QUANTS)):
        assert set(parts) == {row[position] for row in rows}
    result = exported(rows)
    assert sorted(result.variants) == Rows(rows).variants
    assert len(result.report.sites) == len(rows), result.report


GROUPS: dict[str, list[Row]] = {
    **{norm.name: [(cases.FUSION["norm"], norm, quant) for quant in cases.QUANTS] for norm in cases.NORMS},
    **{
        f"activations {name}": [(cases.FUSION["act"], act, cases.QUANT[name]) for act in cases.ACTS]
        for name in ("Q1r", "Q2", "Q3_tensor", "Q7_128")
    },
    **{
        f"fusions {name}": [
            *((case, cases.NORM["R1"], cases.QUANT[name]) for case in cases.NORM_FUSIONS),
            *((case, cases.ACT["S1"], cases.QUANT[name]) for case in cases.ACT_FUSIONS),
        ]
        for name in ("Q1r", "Q1t", "Q1b", "Q2", "Q5")
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_every_row_exported(group: str) -> None:
    """The rows of test_forms.py."""
    result = exported(GROUPS[group])
    assert sorted(result.variants) == Rows(GROUPS[group]).variants
    assert len(result.report.sites) == len(GROUPS[group]), result.report


def test_level_1() -> None:
    """It has no op that returns the value too, which an assertion about it is no reason for."""
    row = (cases.FUSION["norm"], cases.NORM["R1"], cases.QUANT["Q3"])
    assert exported([row], level=1).variants == ["rms_norm_quant:token"]


def test_an_assertion_goes_only_with_what_it_is_about() -> None:
    """Those about an input, and about a value inside a site that something else reads too, stay."""

    class Model(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            value = cases.llama(x, w)
            top = value.abs().amax(-1, keepdim=True)
            scale = top.float().clamp(min=1e-12) / 448.0
            return (value.float() / scale).clamp(-448.0, 448.0).to(cases.FN), scale, top

    given = cases.tensors(("x", "w"), (4,), BF16, "normal")
    oracle = aiter_fusion.Backend().oracle()
    with torch.no_grad():
        oracle(torch.export.export(Model(), tuple(given)).module(), given)(*given)  # type: ignore[arg-type]
    (graph,) = oracle.graphs
    before, after = (
        [str(node.args[0].target).partition(".")[2] for node in g.graph.nodes if node.target in ASSERTIONS]
        for g in (graph.before, graph.after)
    )
    assert before == ["", "mul.Tensor", "amax.default", "mul.Tensor", "clamp_max.default"]
    assert after == ["", "amax.default"]
    assert oracle.identical


def test_a_symbolic_size_is_no_reader() -> None:
    """It is read off the input that brought it, also where the program reads it off a value inside a site."""

    class Model(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
            groups = cases.llama(x, w).reshape(-1, 128)
            scale = groups.abs().float().amax(1, keepdim=True).clamp(min=1e-4) / 448.0
            q = (groups.float() / scale).clamp(-448.0, 448.0).to(cases.FN)
            return q, scale, torch.zeros(groups.shape[0], 3) + scale

    given = tuple(cases.tensors(("x", "w"), (4,), BF16, "normal"))
    rows = {0: torch.export.Dim("rows", min=2, max=64)}
    fusions = aiter_fusion.Backend(strict=True, expect={"rms_norm_quant": 1}).graph_pass()
    with torch.no_grad():
        aot_compile(torch.export.export(Model(), given, dynamic_shapes=(rows, None)), fusions)
    (made,) = aiter_fusion.reports()
    assert [site.variant for site in made.sites] == ["group128"]


# ---- the pass alone ----------------------------------------------------------------------------------------------


class Stopped(Exception):  # noqa: N818 (control flow)
    """The passes are through; no code is to be generated."""


def aot_compile(program: torch.export.ExportedProgram, fusions: CustomGraphPass) -> fx.Graph:
    """AOTInductor up to its post-grad passes: the graph after them."""
    graphs = []

    def stop(graph: fx.Graph) -> None:
        fusions(graph)
        graphs.append(graph)
        raise Stopped

    with pytest.raises(Exception, match="Stopped") as caught:
        torch._inductor.aoti_compile_and_package(program, inductor_configs={backend.SLOT: stop})
    assert caught.value.__class__.__name__ == "InductorError"
    return graphs[0]


@pytest.fixture(scope="module")
def original() -> fx.Graph:
    """A graph with one site."""
    result = checked(lambda x, w: cases.q3(cases.llama(x, w)), level=0)
    with torch.no_grad():
        result.call(*cases.tensors(("x", "w"), (4,), BF16, "normal"))
    return result.oracle.graphs[0].before.graph


def fused(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if "aiter_fusion" in str(node.target)]


def test_several_graphs(original: fx.Graph) -> None:
    """Each gets its own report, in order; what the backend compiles in between goes its own way."""
    site, nothing = copy_graph(original), fx.Graph()
    nothing.output((nothing.placeholder("x"),))
    fusions = aiter_fusion.Backend().graph_pass()
    assert isinstance(fusions, CustomGraphPass)
    for graph in (site, nothing, copy_graph(original)):
        fusions(graph)
    assert fused(site) == ["aiter_fusion.rms_norm_quant.default"]
    assert [made.replaced for made in aiter_fusion.reports()] == [{"rms_norm_quant": 1}, {}, {"rms_norm_quant": 1}]
    assert not any(made.from_cache for made in aiter_fusion.reports())


def test_beside_the_backend() -> None:
    """In Inductor's slot while the backend compiles: two passes, and each reports what it did."""
    fusions = aiter_fusion.Backend(disable="act_mul_quant").graph_pass()

    def fn(x: Tensor, w: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        return (*cases.q3(cases.llama(x, w)), *cases.q3(cases.sliced(x2)))

    with torch.no_grad(), inductor_config.patch({backend.SLOT: fusions}):
        torch.compile(fn, backend="aiter_fusion")(*cases.tensors(("x", "w", "x2"), (4,), BF16, "normal"))
    assert [made.replaced for made in aiter_fusion.reports()] == [{"rms_norm_quant": 1}, {"act_mul_quant": 1}]


def test_strict_and_expect(original: fx.Graph) -> None:
    aiter_fusion.Backend(expect={"rms_norm_quant": 1}, strict=True).graph_pass()(copy_graph(original))
    with pytest.raises(
        aiter_fusion.FusionError, match=r"expected \{'rms_norm_quant': 2}, replaced \{'rms_norm_quant': 1}"
    ):
        aiter_fusion.Backend(expect={"rms_norm_quant": 2}).graph_pass()(copy_graph(original))
    with pytest.raises(aiter_fusion.FusionError, match="strict: 1 sites were skipped"):
        aiter_fusion.Backend(disable="rms_norm_quant", strict=True).graph_pass()(copy_graph(original))
    assert [made.replaced for made in aiter_fusion.reports()] == [{"rms_norm_quant": 1}, {"rms_norm_quant": 1}, {}]


def test_level_0_leaves_graphs_as_they_are(original: fx.Graph) -> None:
    graph = copy_graph(original)
    aiter_fusion.Backend(level=0, strict=True).graph_pass()(graph)
    assert str(graph) == str(original)
    assert [(made.sites, made.note) for made in aiter_fusion.reports()] == [((), "level 0: plain Inductor")]


def test_the_key_of_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph from a cache has satisfied ``expect`` when it was stored; the backend's has a report to restore."""
    some, others = (aiter_fusion.Backend(expect={"rms_norm_quant": count}).graph_pass() for count in (1, 2))
    assert len({repr(made.uuid()) for made in (some, others, PassManager(some.options))}) == 3
    for copied in (pickle.loads(pickle.dumps(some)), copy.deepcopy(some)):
        assert copied == some
        assert copied.uuid() == some.uuid()
    monkeypatch.setattr(backend, "in_group", lambda: True)
    assert some.uuid() is None, "in a group every process has to run the pass"
