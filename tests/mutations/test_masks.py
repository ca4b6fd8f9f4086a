"""No mutation of a mask may lead to a wrong proof: the op with a position keeps the bits of the mask that it replaces.

Steps of attention are changed at random, in what decides which keys a query sees; the mutated graph is the oracle, with
an empty, a part-filled and a full cache. ``AITER_FUSION_MUTATIONS=N`` tries N graphs.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from support.mutations.keeps_bits import check, mutate
from support.mutations.masks import MASKS, SOURCES, Attention, base, check_call
from support.mutations.operators import MUTATIONS, Inexecutable, Mutation

pytestmark = pytest.mark.xdist_group("masks")  # every worker would capture the graphs for itself

EXAMPLES = int(os.environ.get("AITER_FUSION_MUTATIONS", "80"))

MUTATED = st.tuples(
    st.sampled_from(SOURCES),
    st.lists(st.tuples(st.sampled_from([*MASKS * 4, *MUTATIONS]), st.integers(0, 10**6)), min_size=1, max_size=3),
)


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_unmutated(source: Attention) -> None:
    """What the mutations start from is replaced, with a position, with a mask as well, or with neither."""
    of = base(source)
    graph, _, known = mutate(of, [])
    (site,) = check(graph, of, known).sites
    variants = {"windowed": "position+window", "padded": "mask+position", "biased": "mask+position", "sliding": "all"}
    assert site.variant == variants.get(source.step.__name__, "position")


def keep_their_bits(examples: int, record_property: Callable[[str, object], None]) -> None:
    """Graphs with a proof, with a mask and without the op must all be frequent, or they are no evidence."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(MUTATED)
    def keeps_its_bits(mutated: tuple[Attention, list[tuple[Mutation, int]]]) -> None:
        source, mutations = mutated
        of, done = base(source), []
        try:
            graph, done, known = mutate(of, mutations)
            check_call(graph)
            report = check(graph, of, known)
        except Inexecutable:
            seen["discarded"] += 1
            reject()
        except AssertionError as error:
            raise AssertionError(f"{source}, {'; '.join(done)}: {error}") from error
        if not done:
            reject()
        variants = [site.variant for site in report.sites if site.op]
        seen["tried"] += 1
        seen["without" if not variants else "proved" if "position" in variants[0] else "not proved"] += 1

    keeps_its_bits()
    counts = f"{seen['tried']} graphs, {seen['proved']} with a position, {seen['not proved']} without one, "
    record_property("row", f"masks: {counts}{seen['without']} left alone, none wrong")
    assert min(seen["proved"], seen["not proved"]) >= seen["tried"] / 10
    assert seen["without"]


def test_mutated_masks_keep_their_bits(record_property: Callable[[str, object], None]) -> None:
    keep_their_bits(EXAMPLES, record_property)


@pytest.mark.slow
def test_many_mutated_masks_keep_their_bits(record_property: Callable[[str, object], None]) -> None:
    keep_their_bits(max(EXAMPLES, 500), record_property)
