"""Wrong rewrites must be impossible: whatever a mutation makes of a matching graph, the pass keeps its bits.

The tests of forms and traps are examples that somebody thought of. Here graphs that do match are changed at random, so
that most are near misses and some still match, and the mutated graph is the oracle: interpreted on ordinary and on
hostile inputs, it and its rewritten copy must agree in every bit. ``AITER_FUSION_MUTATIONS=N`` tries N graphs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from support.mutations.keeps_bits import check, mutate
from support.mutations.operators import MUTATIONS, Inexecutable, Mutation, other_summand, other_weight, wider_groups
from support.mutations.sources import SOURCES, Source, base

pytestmark = pytest.mark.xdist_group("mutations")  # every worker would capture the graphs for itself

EXAMPLES = int(os.environ.get("AITER_FUSION_MUTATIONS", "250"))

MUTATED = st.tuples(
    st.sampled_from(SOURCES),
    st.lists(st.tuples(st.sampled_from(MUTATIONS), st.integers(0, 10**6)), min_size=1, max_size=3),
)


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_unmutated(source: Source) -> None:
    """What the mutations start from is replaced."""
    of = base(source)
    graph, _, known = mutate(of, [])
    assert sum(check(graph, of, known).replaced.values()) == source.sites
    assert not known.guards  # so that a dynamic graph was run with other sizes


@pytest.mark.parametrize("seeds", [2, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("function", [wider_groups, other_weight, other_summand], ids=lambda f: f.__name__)
def test_what_a_pattern_cannot_express(function: Mutation, seeds: int) -> None:
    """These break a condition on the shapes and dtypes of a match that is otherwise complete, on every source."""
    tried = 0
    for source in SOURCES:
        seen = set()
        for seed in range(seeds):
            try:
                graph, done, known = mutate(base(source), [(function, seed)])
                if done and done[0] not in seen:
                    seen.add(done[0])
                    check(graph, base(source), known)
                    tried += 1
            except Inexecutable:
                continue
            except AssertionError as error:
                raise AssertionError(f"{source}, {function.__name__}, {seed}: {error}") from error
    assert tried > 20


@pytest.mark.parametrize("examples", [EXAMPLES, pytest.param(max(EXAMPLES, 1000), marks=pytest.mark.slow)])
def test_mutated_graphs_keep_their_bits(examples: int, record_property: Callable[[str, object], None]) -> None:
    """Both kinds must be frequent: a pass that refuses everything is no evidence, nor are harmless mutations."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(MUTATED)
    def keeps_its_bits(mutated: tuple[Source, list[tuple[Mutation, int]]]) -> None:
        source, mutations = mutated
        of = base(source)
        done: list[str] = []
        try:
            graph, done, known = mutate(of, mutations)
            report = check(graph, of, known)
        except Inexecutable:
            seen["discarded"] += 1
            reject()
        except AssertionError as error:
            raise AssertionError(f"{source}, {'; '.join(done)}: {error}") from error
        if not done:
            reject()
        seen["tried"] += 1
        seen["replaced" if report.replaced else "refused"] += 1
        seen["dynamic"] += source.dynamic

    keeps_its_bits()
    tried, replaced, refused = seen["tried"], seen["replaced"], seen["refused"]
    counts = f"{tried} graphs ({seen['dynamic']} dynamic), {replaced} with a fused op, {refused} refused, none wrong"
    record_property("row", f"mutations: {counts}")
    assert min(replaced, refused) >= tried / 10
