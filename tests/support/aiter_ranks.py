"""Two processes, each with a double of AITER, on a CPU: run by tests/providers/aiter/test_aiter_all_reduce.py."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from aiter_fusion import Backend, agreement, machine
from aiter_fusion.passes.verify import differing_codes, same_bits
from aiter_fusion.providers.aiter import all_reduce, entry_points
from support import cases
from support.aiter_double import Double, column_major_bytes
from support.aiter_drives import AITER, Drive, compare
from support.checked import checked
from support.op_contract import call

F16, F32 = torch.float16, torch.float32
PLAIN, QUANT = "all_reduce_rms_norm", "all_reduce_rms_norm_quant"
OFFSET = (("offset", 1.0), ("cast_first", False))
METHOD = "CustomAllreduce.custom_fused_ar_rms"


@dataclass(frozen=True)
class Case:
    """A call, the method that it must go to, and in how many stages; 0: by PyTorch, and what AITER does after it."""

    drive: Drive
    method: str
    stages: int


def _case(method: str, stages: int, features: str, sizes: tuple[int, ...], block: int = 0, **more: Any) -> Case:
    family = PLAIN if method in ("", "rmsnorm2d_fwd_with_add") else QUANT
    name = method if stages == 0 else METHOD + method
    return Case(Drive(family, features, sizes, block, **more), name, stages)


CASES = {
    "one stage": _case("", 1, "add", (5, 256)),
    "one stage, 2880": _case("", 1, "add", (2, 3, 2880), dtype=F16),
    "one stage, the most": _case("", 1, "add", (56, 8192)),
    "two stages, too many bytes": _case("", 2, "add", (57, 8192)),
    "two stages, too many rows": _case("", 2, "add", (81, 512)),
    "two stages, too wide": _case("", 2, "add", (3, 8208)),
    "two stages, the widest": _case("", 2, "add", (2, 16384)),
    "offset": _case("", 1, "add", (5, 256), changes=OFFSET),
    "offset, two stages": _case("", 2, "add", (81, 512), changes=OFFSET),
    "token": _case("_quant", 1, "add", (2, 3, 256)),
    "token, 2880": _case("_quant", 1, "add", (22, 2880)),
    "token, two stages": _case("_quant", 2, "add", (40, 2048)),
    "token, offset": _case("_quant", 1, "add", (5, 256), changes=OFFSET),
    "token, value": _case("_quant", 1, "add value", (5, 256), dtype=F16),
    "token, offset, value": _case("_quant", 2, "add value", (17, 4096), changes=(*OFFSET, ("sum_dtype", F32))),
    "group": _case("_per_group_quant", 1, "add", (5, 256), 64),
    "group, value": _case("_per_group_quant", 1, "add value", (2, 3, 2880), 32),
    "group, two stages": _case("_per_group_quant", 2, "add value", (9, 8192), 128),
    "group, in columns": _case("_per_group_quant", 1, "add", (5, 256), 64, changes=(("column_major", True),)),
    "plainly, a part of a wave": _case("add_rmsnorm_quant", 0, "add", (23, 2880)),
    "plainly, too large": _case("add_rmsnorm_quant", 0, "add", (1025, 2048)),
    "plainly, too narrow": _case("rmsnorm2d_fwd_with_add", 0, "add", (81, 256)),
    "plainly, offset": _case("add_rmsnorm_quant", 0, "add", (23, 2880), changes=OFFSET),
    "plainly, value": _case("fused_rms_fp8_group_quant", 0, "add value", (23, 2880)),
}


def given(case: Case, double: Double) -> tuple[Any, dict[str, Any]]:
    """The op and its arguments; x differs between the ranks."""
    op, arguments = case.drive.arguments(double.fp8)
    arguments["x"] = arguments["x"].roll(dist.get_rank(), -1)
    return op, arguments


def problem_of(case: Case, double: Double) -> str | None:
    """What a call of this case does not do as it should, or None: which method is asked, in how many stages, the op's
    contract, no input written to, the same bits on all ranks."""
    op, arguments = given(case, double)
    if (why := AITER.refuse(op, arguments)) is not None:
        return why
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    double.calls.clear()
    have = call(op, "aiter", arguments)
    problem = compare(op, arguments, have)
    if not all(torch.equal(value, arguments[name]) for name, value in before.items()):
        problem = "an input was written to"
    made = [(name, getattr(a, "use_1stage", None)) for name, a in double.calls if name != "CustomAllreduce"]
    if problem is None and made != [(case.method, {0: None, 1: True, 2: False}[case.stages])]:
        problem = f"called {made}"
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, {name: _bits(value) for name, value in have.items()})
    apart = [name for name in have if any(other[name] != every[0][name] for other in every)]
    return f"{', '.join(apart)} with other bits on other ranks" if problem is None and apart else problem


class Scene:
    """A fresh double of AITER in this process, and patches until it ends."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, **kwargs: Any) -> None:
        self.patch = patch
        self.double = Double(arch="gfx950", **kwargs).install(patch, folder)

    def problem(self, name: str = "token") -> str | None:
        return problem_of(CASES[name], self.double)

    def changed(self, name: str, change: Callable[[Any, Any], Any]) -> None:
        """Have a function of AITER's return ``change(arguments, result)``."""
        real = self.double.computes[name]
        self.double.computes[name] = lambda double, a: change(a, real(double, a))

    def caught(self, name: str) -> str:
        """The case's problem, or the error."""
        try:
            return str(self.problem(name))
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            return f"{type(error).__name__}: {error}"


# ---- faults, seeded: each must be caught ----------------------------------------------------------------------------


def _given(**changes: Callable[[dict[str, Any]], Any]) -> Callable[[Scene], None]:
    """An adapter that gives AITER's methods these arguments instead."""
    real = entry_points.call

    def seed(scene: Scene) -> None:
        def change(entry: entry_points.EntryPoint, **given: Any) -> Any:
            if entry is all_reduce.COMMUNICATOR:
                return real(entry, **given)
            return real(entry, **given | {name: make(given) for name, make in changes.items()})

        scene.patch.setattr(all_reduce, "call", change)

    return seed


def _lost(name: str) -> Callable[[Scene], None]:
    real = entry_points.call

    def seed(scene: Scene) -> None:
        def change(entry: entry_points.EntryPoint, **given: Any) -> Any:
            return real(entry, **{key: value for key, value in given.items() if key != name})

        scene.patch.setattr(all_reduce, "call", change)

    return seed


def _paths(**changes: Any) -> Callable[[Scene], None]:
    return lambda scene: scene.patch.setattr(
        all_reduce, "PATHS", tuple(replace(path, **changes) for path in all_reduce.PATHS)
    )


def _returned(method: str, change: Callable[[Any, Any], Any]) -> Callable[[Scene], None]:
    return lambda scene: scene.changed(METHOD + method, change)


def _unguarded(scene: Scene) -> None:
    """An adapter that calls inside ``capture()``, and has not looked."""
    real = entry_points.call

    def change(entry: entry_points.EntryPoint, **given: Any) -> Any:
        with given["self"].capture():
            return real(entry, **given)

    scene.patch.setattr(all_reduce, "call", change)


def _none_taken_for_a_result(scene: Scene) -> None:
    scene.changed(METHOD + "_quant", lambda a, result: None)
    scene.patch.setattr(
        all_reduce, "_fallback", lambda op, arguments: {n: t.zero_() for n, t in op.allocate(**arguments).items()}
    )


EVERYTHING_FITS = all_reduce.TwoStages(least=1, most=4096, multiple=1, nbytes=1 << 40)
# What is wrong, and a case that shows it.
FAULTS: dict[str, tuple[str, Callable[[Scene], None]]] = {
    "use_1stage lost": ("token", _lost("use_1stage")),
    "always one stage": ("token, two stages", _given(use_1stage=lambda g: True)),
    "never one stage": ("token, 2880", _given(use_1stage=lambda g: False)),
    "group_size lost": ("group", _given(group_size=lambda g: 128)),
    "gemma_norm lost": ("token, offset", _given(gemma_norm=lambda g: False)),
    "emit_bf16 lost": ("token, value", _given(emit_bf16=lambda g: False)),
    "eps lost": ("one stage", _given(eps=lambda g: 1.0)),
    "the residual lost": ("one stage", _given(residual_inp=lambda g: torch.zeros_like(g["input"]))),
    "inputs swapped": ("one stage", _given(input=lambda g: g["residual_inp"], residual_inp=lambda g: g["input"])),
    "outputs swapped": ("one stage", _paths(returns=("residual_out", "value"))),
    "outputs of another order": ("token", _paths(returns=("q", "scale", "residual_out", "value"))),
    "two stages of a part of a wave": ("plainly, a part of a wave", _paths(two_stages=EVERYTHING_FITS)),
    "two stages of narrow rows": ("plainly, too narrow", _paths(two_stages=EVERYTHING_FITS)),
    "a transposed scale that lies": (
        "group",
        _returned("_per_group_quant", lambda a, r: (*r[:2], column_major_bytes(r[2]))),
    ),
    "zeros of a warm-up": ("token", _unguarded),
    "None taken for a result": ("token", _none_taken_for_a_result),
    "the weight of another dtype": ("one stage", _given(weight=lambda g: g["weight"].float())),
}


def _fault(scene: Scene, fault: str) -> str:
    name, seed = FAULTS[fault]
    assert scene.problem(name) is None
    seed(scene)
    return scene.caught(name)


# ---- scenes ---------------------------------------------------------------------------------------------------------


def _transposed(scene: Scene) -> Any:
    """A scale in columns whose strides say so is no lie."""
    scene.changed(METHOD + "_per_group_quant", lambda a, r: (*r[:2], r[2].t().contiguous().t()))
    return scene.problem("group")


def _gaps(scene: Scene) -> Any:
    """Rows with gaps, and ones that begin between multiples of 16 bytes."""
    op, arguments = given(CASES["one stage"], scene.double)
    wide = {name: torch.nn.functional.pad(arguments[name], (1, 8)) for name in ("x", "residual")}
    shifted = arguments | {name: value[:, 1 : 1 + arguments[name].shape[1]] for name, value in wide.items()}
    problem = compare(op, shifted, call(op, "aiter", shifted))
    (made,) = (a for name, a in scene.double.calls if name == METHOD)
    aligned = all(t.data_ptr() % 16 == 0 and t.is_contiguous() for t in (made.input, made.residual_inp, made.weight))
    return problem, aligned


def _no_rows(scene: Scene) -> Any:
    case = replace(CASES["token"], drive=replace(CASES["token"].drive, sizes=(0, 256)))
    op, arguments = given(case, scene.double)
    return compare(op, arguments, call(op, "aiter", arguments)), scene.double.called


def _hostile(scene: Scene) -> Any:
    """A row of zeros; one with a NaN on rank 0; an ordinary one."""
    drive = replace(CASES["token"].drive, sizes=(3, 256))
    op, arguments = given(replace(CASES["token"], drive=drive), scene.double)
    arguments["x"][0] = arguments["residual"][0] = 0
    if dist.get_rank() == 0:
        arguments["x"][1, 7] = float("nan")
    have = call(op, "aiter", arguments)
    nan = have["residual_out"].isnan().any(-1) | have["scale"].isnan().any(-1) | have["q"].float().isnan().any(-1)
    zero = [have["scale"][0].item(), not have["q"][0].float().any()]
    return zero, [bool(nan[1]), not nan[0], bool(nan[2])]


def _dynamic(scene: Scene) -> Any:
    """Rows that are known when they come."""
    result = checked(_token, provider="aiter")
    apart = []
    for rows in (16, 400, 8200):
        inputs = list(cases.tensors(("x", "r", "w"), (rows,), torch.bfloat16, "normal"))
        inputs[0] = inputs[0].roll(dist.get_rank(), -1)
        for rowed in inputs[:2]:
            torch._dynamo.mark_dynamic(rowed, 0)
        with torch.no_grad():
            apart.append(_apart(_token(*inputs), result.call(*inputs)))
    return result.variants, apart, [name for name in scene.double.called if name != "CustomAllreduce"]


def _none(scene: Scene) -> Any:
    """AITER answers None: its environment allows less than is asked."""
    scene.patch.setenv("AITER_CUSTOM_AR_MAX_SIZE", "64")
    op, arguments = given(CASES["token"], scene.double)
    return compare(op, arguments, call(op, "aiter", arguments)), scene.double.called


def _one_communicator(scene: Scene) -> Any:
    """One for all calls of a group; another of another group."""
    problems = [scene.problem(name) for name in ("one stage", "token", "group", "one stage")]
    first = list(all_reduce._communicators.values())
    again: Any = dist.new_group([0, 1], backend="gloo")
    op, arguments = given(CASES["one stage"], scene.double)
    call(op, "aiter", arguments | {"group": again.group_name})
    handles = [known.handle for known in all_reduce._communicators.values()]
    groups = [handle.group for handle in handles]
    beside = all(handle.thread != threading.get_ident() for handle in handles)
    pools = {handle.pool for handle in handles}
    return problems, len(first), len(handles), groups == [dist.group.WORLD, again], beside, pools


def _on_rank_1(scene: Scene, computation: Callable[[Double, Any], Any]) -> Any:
    """AITER's communicator is not to be had on one of the ranks: none takes it, and each says so once."""
    if dist.get_rank() == 1:
        scene.double.computes["CustomAllreduce"] = computation
    warnings: list[str] = []
    scene.patch.setattr(all_reduce.logger, "warning", lambda text, *args: warnings.append(text % args))
    op, arguments = given(CASES["token"], scene.double)
    problems = [compare(op, arguments, call(op, "aiter", arguments)) for _ in range(2)]
    return problems, scene.double.called, warnings


def _disabled(scene: Scene) -> Any:
    real = scene.double.computes["CustomAllreduce"]
    return _on_rank_1(scene, lambda double, a: real(double, a) | {"disabled": True})


def _failing(scene: Scene) -> Any:
    def fail(double: Double, a: Any) -> Any:
        raise RuntimeError("no memory\nand more")

    return _on_rank_1(scene, fail)


def _silent(scene: Scene) -> Any:
    """A version that no longer says when it returns zeros."""
    real = scene.double.computes["CustomAllreduce"]
    return _on_rank_1(
        scene, lambda double, a: {name: value for name, value in real(double, a).items() if name != "_IS_CAPTURING"}
    )


def _of_nccl(scene: Scene) -> Any:
    """AITER refuses a group of NCCL's: it gets one of gloo's, of the same ranks."""
    real, world = dist.get_backend, dist.group.WORLD
    scene.patch.setattr(dist, "get_backend", lambda group=None: "nccl" if group in (None, world) else real(group))
    problem = scene.problem()
    (known,) = all_reduce._communicators.values()
    group = known.handle.group
    return problem, group is not world, real(group), dist.get_process_group_ranks(group)


def _captured(scene: Scene) -> Any:
    """While a graph is captured none is made, and one that was made goes on."""
    capturing = [True]
    scene.patch.setattr(machine, "is_capturing", lambda: capturing[0])
    op, arguments = given(CASES["token"], scene.double)
    said = scene.caught("token")
    capturing[0] = False
    first = compare(op, arguments, call(op, "aiter", arguments))
    capturing[0] = True
    return said, first, scene.problem()


def _warming_up(scene: Scene) -> Any:
    """Somebody has put the communicator into its capture()."""
    assert scene.problem() is None
    (known,) = all_reduce._communicators.values()
    with known.handle.capture():
        said = scene.caught("token")
    return said, scene.problem()


def _other_results(scene: Scene) -> Any:
    """AITER returns another number of tensors, or another dtype."""
    assert scene.problem() is None
    scene.changed(METHOD + "_quant", lambda a, result: result[:2])
    fewer = scene.caught("token")
    scene.changed(METHOD, lambda a, result: tuple(value.float() for value in result))
    return fewer, scene.caught("one stage")


def _preferred(scene: Scene) -> Any:
    """By name whatever is preferred."""
    scene.patch.setenv("AITER_FUSION_ALLREDUCE", "0")
    op, arguments = given(CASES["token"], scene.double)
    return AITER.unwanted(op, arguments), scene.problem()


def _q3(value: Tensor) -> tuple[Tensor, ...]:
    return cases.q3(value)


def _reduce(x: Tensor) -> Tensor:
    return funcol.all_reduce(x, "sum", dist.group.WORLD)  # type: ignore[arg-type]


Form = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def _token(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    summed = r + _reduce(x)
    return (*_q3(cases.llama(summed, w)), summed)


def _value(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    summed = r + _reduce(x)
    y = cases.llama(summed, w)
    return (*_q3(y), y, summed)


GRAPHS: dict[str, Form] = {
    "unquantised": lambda x, r, w: (cases.llama(summed := r + _reduce(x), w), summed),
    "token": _token,
    "value": _value,
    "group": lambda x, r, w: cases.q7(64)(cases.llama(r + _reduce(x), w)),
    "gemma": lambda x, r, w: _q3(cases.gemma(r + _reduce(x), w)),
    "no residual": lambda x, r, w: _q3(cases.llama(_reduce(x), w)),
}


def _graphs(scene: Scene) -> Any:
    """From the model's code to AITER's method, on both ranks alike, verified while compiling."""
    found = {}
    for name, fn in GRAPHS.items():
        inputs = list(cases.tensors(("x", "r", "w"), (16,), torch.bfloat16, "normal"))
        inputs[0] = inputs[0].roll(dist.get_rank(), -1)
        scene.double.calls.clear()
        with torch.no_grad():
            want = fn(*inputs)
            result = checked(fn, provider="aiter", verify=True)
            have = result.call(*inputs)
        sites = [(site.status, site.family, site.variant, site.provider, site.reason) for site in result.report.sites]
        found[name] = (sites, sorted(set(scene.double.called)), _apart(want, have), [_bits(value) for value in have])
    return found


def _bits(value: Tensor) -> bytes:
    return value.contiguous().view(torch.uint8).numpy().tobytes()


def _apart(want: tuple[Tensor, ...], have: tuple[Tensor, ...]) -> list[float]:
    """By how many FP8 codes, or relatively, outputs differ from the eager model's."""
    apart = []
    for a, b in zip(want, have, strict=True):
        if a.dtype.itemsize == 1:
            apart.append(float(differing_codes(a, b)))
        else:
            apart.append(((a.float() - b.float()).abs().max() / a.float().abs().max()).item())
    return apart


def _compiled(scene: Scene) -> Any:
    """By Inductor's code."""
    inputs = list(cases.tensors(("x", "r", "w"), (16,), torch.bfloat16, "normal"))
    inputs[0] = inputs[0].roll(dist.get_rank(), -1)
    torch._dynamo.reset()
    compiled = torch.compile(_value, backend=Backend(provider="aiter", expect={"all_reduce_rms_norm": 1}))
    with torch.no_grad():
        have = [compiled(*inputs) for _ in range(2)]
        called = list(scene.double.called)
        want = checked(_value, provider="aiter").call(*inputs)
    return [all(map(same_bits, want, each)) for each in have], called


def _unequal(scene: Scene) -> Any:
    """What AITER's communicator takes is another size on rank 1: none takes it."""
    if dist.get_rank() == 1:
        scene.patch.setenv("AITER_CUSTOM_AR_MAX_SIZE", "4096")
    inputs = cases.tensors(("x", "r", "w"), (16,), torch.bfloat16, "normal")
    result = checked(_token, provider="aiter", numerics="kernel")
    with torch.no_grad():
        result.call(*inputs)
    return [(site.status, site.family, site.reason) for site in result.report.sites], scene.double.called


SCENES: dict[str, Callable[[Scene], Any]] = {
    "in columns": _transposed,
    "gaps": _gaps,
    "no rows": _no_rows,
    "hostile": _hostile,
    "dynamic": _dynamic,
    "None": _none,
    "one communicator": _one_communicator,
    "disabled": _disabled,
    "failing": _failing,
    "silent": _silent,
    "NCCL": _of_nccl,
    "captured": _captured,
    "warming up": _warming_up,
    "other results": _other_results,
    "preferred": _preferred,
    "graphs": _graphs,
    "compiled": _compiled,
    "unequal": _unequal,
}


def everything() -> dict[tuple[str, str], Any]:
    """Every case, fault and scene."""
    agreement.why_unlike({})  # as compiling does: now all know that they are on one machine
    found: dict[tuple[str, str], Any] = {}
    parts: list[tuple[str, str, Callable[[Scene], Any]]] = [
        *(("case", name, lambda scene, name=name: scene.problem(name)) for name in CASES),
        *(("fault", name, lambda scene, name=name: _fault(scene, name)) for name in FAULTS),
        *(("scene", name, play) for name, play in SCENES.items()),
    ]
    with tempfile.TemporaryDirectory() as folder:
        for kind, name, play in parts:
            with pytest.MonkeyPatch.context() as patch:
                scene = Scene(patch, Path(folder))
                found[kind, name] = play(scene)
                scene.double.forget()
    assert "AITER_CUSTOM_AR_MAX_SIZE" not in os.environ
    return found
