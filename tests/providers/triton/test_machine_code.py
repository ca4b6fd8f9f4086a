"""The machine code for AMD's GPUs is no worse than what is recorded beside the launch rules, without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aiter_fusion.bench.ops import VARIANTS, Case
from support.compiling import TARGETS, needs_triton
from support.machine_code import AMD, MACHINES, MachineCode, bound, cases, measured, recorded, release

# What the hardware has: vector registers of a thread (with accumulators), scalar registers of a wave.
VGPRS, SGPRS = 512, 112
SOME = (
    Case("rms_norm_quant", "add+group128", 8192, 16384),
    Case("rms_norm_quant", "token", 2880, 1),
    Case("act_mul_quant", "group128", 8192, 16384),
    Case("act_mul_quant", "packed+token", 8192, 1),
)


def check(case: Case, target: str) -> None:
    known = recorded().get(release())
    if known is None:
        pytest.skip(f"machine_code.json has no entries for Triton {release()}: python tests/support/machine_code.py")
    for name, code in measured(case, target):
        assert code.threads <= 1024
        assert code.lds <= TARGETS[target][3]
        assert code.vgprs <= VGPRS
        assert code.sgprs <= SGPRS
        assert code.spilled == 0, name
        worse = code.worse(MachineCode(**known[target][name]))
        assert not worse, f"{name} on {target}, Triton {release()}: {worse} (recorded, now)"


@needs_triton
@pytest.mark.parametrize("target", AMD)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_some_code_is_no_worse(case: Case, target: str) -> None:
    check(case, target)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", AMD)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_code_is_no_worse(case: Case, target: str) -> None:
    check(case, target)


GROUPS = [Case(*variant, 8192, 16384) for variant in VARIANTS if variant[1].endswith(("group128", "token"))]


@pytest.mark.parametrize("case", GROUPS, ids=str)
def test_the_model(case: Case, record_property: Callable[[str, object], None]) -> None:
    """Instructions and bytes of many rows, by each GPU's published figures; the rows are what README.md has."""
    content = recorded()
    ratios = {
        f"{name}, Triton {triton}": round(bound(case, targets[target][str(case)]["valu"], machine), 2)
        for triton, targets in content.items()
        for name, (target, machine) in MACHINES.items()
    }
    record_property("row", f"{case}: {ratios}")
    assert all(ratio < 1.7 for ratio in ratios.values())


def test_everything_is_recorded() -> None:
    """For every release of Triton alike: what fits, and converts to FP8 by an instruction."""
    content = recorded()
    names = {name for release in content.values() for target in release.values() for name in target}
    for triton, targets in content.items():
        assert set(targets) == set(AMD)
        for target, entries in targets.items():
            assert set(entries) == names
            for name, entry in entries.items():
                code = MachineCode(**entry)
                assert code.threads <= 1024
                assert code.spilled == 0
                quantises = not name.endswith("launch 1")
                assert bool(code.conversions) == quantises, (triton, target, name)
