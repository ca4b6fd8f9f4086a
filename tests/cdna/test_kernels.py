"""Kernels executed on an emulator of CDNA, never on hardware: their bits against the reference's.

``python tests/cdna/test_kernels.py`` prints the tables of README.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tinygrad", reason="needs the decoder in tinygrad: pip install '.[test]'")
pytest.importorskip("triton", reason="needs Triton: pip install triton==3.6.0")

from aiter_fusion.bench.ops import Case
from aiter_fusion.formats import FP8
from aiter_fusion.op import FusedOp
from aiter_fusion.registry import REGISTRY
from aiter_fusion.scale_program import is_of_bytes
from cdna.kernels import HOW, Call, Kernel, explained
from cdna.memory import FaultError
from support import machine_code
from support.compiling import TARGETS
from support.machine_code import AMD

pytestmark = pytest.mark.cdna

OPS = [op for op in REGISTRY.ops.values() if op.stages and not op.is_collective]
WIDTHS = ((2880, 3), (4096, 2), (8192, 1))
# What always runs: hostile rows of each dtype, each granularity, every combination of stages, for one of the GPUs.
CHOSEN = [(op, 7 * index % 30, AMD[index % 2]) for index, op in enumerate(OPS[::9])]


def samples(op: FusedOp, target: str) -> list[dict[str, Any]]:
    """The op's, with the GPU's own FP8; gfx942 has not the one of scales that are bytes."""
    own, found = TARGETS[target][1], []
    for given in op.samples():
        known = {name: given[name] for name in op.arguments}
        if known["quant_dtype"] in FP8 and not is_of_bytes(known["factor_steps"]):
            known["quant_dtype"] = own
        if known["quant_dtype"] in (own, torch.int8):
            found.append(known)
    return found


def usual(case: Case, target: str) -> dict[str, Any]:
    torch.manual_seed(0)
    return case.arguments("cpu", TARGETS[target][1])


def cases(target: str) -> list[Case]:
    return [case for hidden, rows in WIDTHS for case in machine_code.cases(target, (hidden,), (rows,))]


@pytest.mark.parametrize(
    ("op", "index", "target"), CHOSEN, ids=[f"{op.name.split('::')[1]}-{target}" for op, _, target in CHOSEN]
)
def test_hostile_rows(op: FusedOp, index: int, target: str) -> None:
    known = samples(op, target)
    explained(Call(op, known[index % len(known)], target))


@pytest.mark.slow
@pytest.mark.parametrize("target", AMD)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name.split("::")[1])
def test_every_sample(op: FusedOp, target: str) -> None:
    for known in samples(op, target):
        explained(Call(op, known, target))


SOME = (
    (Case("rms_norm_quant", "add+group128", 4096, 2), "gfx942"),
    (Case("rms_norm_quant", "token", 2880, 3), "gfx950"),
    (Case("act_mul_quant", "packed+group128", 8192, 1), "gfx942"),
    (Case("layer_norm_quant", "modulate+token", 4096, 2), "gfx950"),
)


@pytest.mark.parametrize(("case", "target"), SOME, ids=str)
def test_rows_of_models(case: Case, target: str) -> None:
    """The reference's bits."""
    found = explained(Call(case.op, usual(case, target), target))
    assert set(found.values()) == {"same bits"}


@pytest.mark.slow
@pytest.mark.parametrize(("target", "case"), [(target, case) for target in AMD for case in cases(target)], ids=str)
def test_every_variant(case: Case, target: str) -> None:
    found = explained(Call(case.op, usual(case, target), target))
    assert set(found.values()) <= {"same bits", "reciprocal"}


def test_arguments_in_registers_or_in_memory() -> None:
    """Hardware with firmware that puts arguments into registers begins behind the code that loads them."""
    case = Case("rms_norm_quant", "token", 4096, 2)
    for preload in (False, True):
        call = Call(case.op, usual(case, "gfx942"), "gfx942", preload=preload)
        assert set(explained(call).values()) == {"same bits"}
        assert bool(call.kernels[0].preloaded[1]) == preload


def test_a_kernel_without_its_barriers_is_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the emulator would say of a kernel that forgets them."""
    case = Case("rms_norm_quant", "token", 4096, 2)
    call = Call(case.op, usual(case, "gfx942"), "gfx942")
    for kernel in call.kernels:
        without_barriers(kernel)
    with pytest.raises(FaultError, match="race: wave"):
        call.run()


def without_barriers(kernel: Kernel) -> None:
    names = kernel.program.names
    names[:] = ["S_NOP" if name == "S_BARRIER" else name for name in names]


def test_a_tensor_that_is_too_small_is_a_fault() -> None:
    case = Case("rms_norm_quant", "token", 4096, 2)
    call = Call(case.op, usual(case, "gfx942"), "gfx942")
    call.known["weight"] = call.known["weight"][:4000]
    with pytest.raises(FaultError, match="out of bounds"):
        call.run()


def variations(call: Call) -> dict[str, Mapping[str, Any]]:
    """How hardware may differ from the emulator."""
    approximate = ("V_RSQ_F32", "V_RCP_F32", "V_EXP_F32", "V_LOG_F32", "V_SQRT_F32")
    used = {name.removesuffix("_E32").removesuffix("_E64") for kernel in call.kernels for name in kernel.program.names}
    found: dict[str, Mapping[str, Any]] = {
        f"{name} {ulps:+d} ulp": {"ulps": {name: ulps}} for name in approximate if name in used for ulps in (-1, 1)
    }
    return found | {"subnormals are zeros there": {"flushes": True}, "infinities convert to NaN": {"infinite": False}}


def differing_bytes(a: Tensor, b: Tensor) -> int:
    return int((a.reshape(-1).view(torch.uint8) != b.reshape(-1).view(torch.uint8)).sum())


def main() -> None:
    import sys
    from importlib import import_module

    triton = import_module("triton")
    torch.set_num_threads(1)
    target, step = sys.argv[1], int(sys.argv[2])
    summary: Counter[tuple[str, str, str]] = Counter()
    for case in cases(target):
        call = Call(case.op, usual(case, target), target)
        found, base = explained(call), call.run()
        moved = {}
        for name, variation in variations(call).items():
            result = call.run(**variation)
            changed = {output: differing_bytes(value, base[output]) for output, value in result.items()}
            if any(changed.values()):
                moved[name] = {output: number for output, number in changed.items() if number}
        print(f"{target} {triton.__version__} | {case} | {found} | {moved}", flush=True)
    for op in OPS:
        for index, known in list(enumerate(samples(op, target)))[::step]:
            try:
                found = explained(Call(op, known, target))
            except (AssertionError, FaultError, NotImplementedError) as problem:
                print(f"PROBLEM {op.name} sample {index}: {type(problem).__name__} {problem}", flush=True)
                summary[op.name, "problem", ""] += 1
                continue
            worst = max(found.values(), key=HOW.index)
            summary[op.family, worst, ""] += 1
            if worst not in ("same bits", "reciprocal"):
                print(f"{op.name} sample {index}: {found}", flush=True)
    print(target, triton.__version__, dict(summary))


if __name__ == "__main__":
    main()
