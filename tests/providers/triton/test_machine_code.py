"""The machine code for AMD's GPUs is no worse than what is recorded beside the launch rules, without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aiter_fusion.bench.ops import VARIANTS, Case
from support.compiling import TARGETS, needs_triton
from support.machine_code import (
    AMD,
    ATTENTIONS,
    MACHINES,
    PRODUCTS,
    AnyCase,
    MachineCode,
    bound,
    every,
    measured,
    recorded,
    release,
)

# What the hardware has: vector registers of a thread (with accumulators), scalar registers of a wave.
VGPRS, SGPRS = 512, 112
SOME: tuple[tuple[AnyCase, str], ...] = (
    (Case("rms_norm_quant", "add+group128", 8192, 16384), "gfx942"),
    (Case("layer_norm_quant", "modulate+token", 2880, 1), "gfx942"),
    (Case("act_mul_quant", "group128", 8192, 16384), "gfx950"),
    (Case("act_quant", "gelu_tanh+token", 8192, 1), "gfx950"),
    (PRODUCTS[1], "gfx942"),
    (ATTENTIONS[0], "gfx950"),
)


def check(case: AnyCase, target: str) -> None:
    """It fits, and is no worse than recorded: the numbers say in what."""
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
@pytest.mark.parametrize(("case", "target"), SOME, ids=str)
def test_some_code_is_no_worse(case: Case, target: str) -> None:
    check(case, target)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("target", "case"), [(target, case) for target in AMD for case in every(target)], ids=str)
def test_code_is_no_worse(case: AnyCase, target: str) -> None:
    check(case, target)


MANY = [Case(*variant, 8192, 16384) for variant in VARIANTS if not variant[1].endswith("tensor")]
# Of exp, erf and tanh, and of a modulation, whose values are rounded once more: there instructions are the bound.
COMPUTED = ("gelu", "sigmoid", "gated+", "modulate")


@pytest.mark.parametrize("case", MANY, ids=str)
def test_the_model(case: Case, record_property: Callable[[str, object], None]) -> None:
    """Instructions and bytes of many rows, by each GPU's published figures; the rows are what README.md has."""
    content = recorded()
    ratios = {
        f"{name}, Triton {triton}": round(bound(case, targets[target][str(case)]["valu"], machine), 2)
        for triton, targets in content.items()
        for name, (target, machine) in MACHINES.items()
        if str(case) in targets[target]  # gfx942 has no FP8 with scales that are bytes
    }
    record_property("row", f"{case}: {ratios}")
    most = 3.5 if any(word in case.variant for word in COMPUTED) else 1.6
    assert all(ratio < most for ratio in ratios.values())


def test_everything_is_recorded() -> None:
    """For every release of Triton alike: what fits, converts to FP8 and multiplies matrices by an instruction."""
    content = recorded()
    for triton, targets in content.items():
        assert set(targets) == set(AMD)
        for target, entries in targets.items():
            assert set(entries) == {name for release in content.values() for name in release[target]}
            for name, entry in entries.items():
                code = MachineCode(**entry)
                about = (triton, target, name)
                assert code.threads <= 1024, about
                assert code.spilled == 0, about
                of_matrices = name.startswith(("fp8_linear", "decode_attention"))
                converts = not of_matrices and not name.endswith("launch 1") and "int8" not in name
                assert bool(code.conversions) == converts, about
                # not a product of one row, and not what adds parts up
                multiplies = of_matrices and " rows 1 " not in name and not name.endswith("launch 2")
                assert bool(code.matrix) or not multiplies, about
