"""What a provider declares runs, and what it does not declare is refused before anything is replaced."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import aiter_fusion
from aiter_fusion import providers, scale_program
from aiter_fusion.domains import Activations, Anything, Blocks, Domain, Number, OneOf, Sizes, Steps, Tensors
from aiter_fusion.op import FusedOp
from aiter_fusion.passes import sites
from aiter_fusion.patterns.form import Completion, Form
from aiter_fusion.patterns.fx_facts import aten
from aiter_fusion.patterns.language import Call, Var, mul
from aiter_fusion.providers import PROVIDERS, Provider, Terms
from aiter_fusion.providers.triton import launches
from aiter_fusion.providers.triton import provider as kernels
from aiter_fusion.providers.triton.all_reduce import calls
from aiter_fusion.reasons import Refused
from aiter_fusion.registry import REGISTRY
from aiter_fusion.stages import activation
from support import cases
from support.aiter_double import Double
from support.checked import fused

BF16 = torch.bfloat16
KERNELS = Path(kernels.__file__).parent / "kernels"
# What no provider knows, of every type that an argument has.
FOREIGN = (torch.float64, torch.int16, torch.float8_e5m2, "hardswish", 0.5, -1)


def base(op: FusedOp, fp8: torch.dtype, device: str, width: int = 256) -> dict[str, Any]:
    """A call that is like any other."""
    top = torch.finfo(fp8).max

    def tensor(*sizes: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.ones(sizes, dtype=dtype, device=device)

    rows = {name: tensor(4, width) for name in ("x", "residual", "gate", "up", "z")}
    known = rows | {
        "gate_up": tensor(4, 2 * width),
        "first": tensor(4, width - width // 2),
        "second": tensor(4, width // 2),
        **dict.fromkeys(("weight", "bias"), tensor(width)),
        **dict.fromkeys(("gain", "shift"), tensor(1, width)),
        **{f"{name}{n}": tensor(1, dtype=torch.float32) for name in ("scale", "bound") for n in ("", "2", "3")},
        "other": None,
        "group": "0",
        "eps": 1e-6,
        "eps_tensor": None,
        "offset": None,
        **dict.fromkeys(("act", "second_act"), "silu"),
        "first_act": "",
        "block": width,
        "scale_steps": f"div={top} float32",
        "factor_steps": "" if "scale" in op.arguments else f"div={top} float32",
        "value_steps": f"float32 div_scale clamp_min={-top} clamp_max={top}",
        "quant_dtype": fp8,
        **dict.fromkeys(("cast_first", "gate_first", "plus_one"), True),
        **dict.fromkeys(("interleaved", "column_major"), False),
        **{name: BF16 for name in op.arguments if name.endswith("dtype") and name != "quant_dtype"},
    }
    return {name: known[name] for name in op.arguments}


def inside(domain: Domain, given: Any, width: int) -> Iterator[Any]:
    """Values that a domain declares."""
    match domain:
        case OneOf(values):
            yield from values
        case Number(optional):
            yield from (0.0, 1.0, 1e-6, *((None,) if optional else ()))
        case Tensors(dtypes, optional):
            yield from (torch.ones_like(given, dtype=dtype) for dtype in dtypes if given is not None)
            yield from (None,) if optional else ()
        case Activations(numbers):
            yield from (f"{name}={','.join('1.5' for _ in of)}" if of else name for name, of in numbers.items())
        case Steps(names):
            for name in names:
                yield f"{given} {name}{'=0.5' if name in scale_program.WITH_NUMBER else ''}"
            yield f"{given} div=0.0"
        case Blocks():
            yield from (0, width, width // 2, 32, 1)


def outside(domain: Domain, given: Any, width: int) -> Iterator[tuple[Any, str]]:
    """Values that it does not, each with what of them the refusal must name."""
    match domain:
        case OneOf(values):
            yield from ((value, repr(value)) for value in FOREIGN if type(value) in set(map(type, values)) - {bool})
        case Number(optional):
            yield from (("1e-6", "1e-6"), *(() if optional else ((None, "None"),)))
        case Tensors(_, optional, elements) if given is not None:
            yield from ((torch.ones_like(given, dtype=dtype), str(dtype)) for dtype in (torch.float64, torch.int32))
            yield from () if elements is None else ((torch.ones_like(given.expand(3).clone()), "3 elements, not 1"),)
            yield from () if optional else ((None, "this call has none"),)
        case Activations(numbers):
            for act in ("hardswish", "silu=2.0", "clamped_swiglu=1.0", "clamped_swiglu=a,b", "clamped_swiglu"):
                yield act, repr(act)
            assert "hardswish" not in numbers
        case Steps(names):
            others = {*scale_program.UNARY, *scale_program.WITH_NUMBER, *scale_program.WITH_SCALE, "round"} - set(names)
            for name in others:
                yield f"{given} {name}{'=0.5' if name in scale_program.WITH_NUMBER else ''}", repr(name)
        case Blocks(granularities, largest):
            grouped = "group" in granularities
            yield -1, "-1"
            yield width - 1, f"{width - 1} does not divide the hidden size {width}" if grouped else "'group'"
            yield from ((0, "'tensor'"),) if "tensor" not in granularities else ()
            yield from () if largest is None else ((2 * largest, f"group size {2 * largest}"),)


def judge(
    provider: Provider,
    op: FusedOp,
    call: dict[str, Any],
    terms: Terms,
    run: Callable[[FusedOp, dict[str, Any]], object],
) -> int:
    """Every value of every argument, declared and not; how many calls were accepted, all of which ran."""
    width, accepted = 256, 0
    assert set(terms.arguments) >= set(call)
    for name, given in call.items():
        for value in inside(terms.arguments[name], given, width):
            tried = call | {name: value}
            if name.startswith("eps"):  # one of the two is given
                other = {"eps": "eps_tensor", "eps_tensor": "eps"}[name]
                tried[other] = call[other] if value is None and call[other] is not None else None
                if tried["eps"] is tried["eps_tensor"]:
                    continue
            if provider.why_not(op, tried) is None:
                run(op, tried)
                accepted += 1
        for value, named in outside(terms.arguments[name], given, width):
            why = provider.why_not(op, call | {name: value})
            assert why is not None, f"{name}={value!r} is taken"
            assert named in why
            assert re.search(r"none of|exceeds|below|steps are|does not divide|, not |wants|no number", why), why
    return accepted


# Of overloads that take the same arguments, and only return more, the last: that returns all.
STAGED = [op for op in REGISTRY.ops.values() if op.stages]
TAKING = {(op.family, *op.arguments): op for op in STAGED}
LEAST = {(op.family, *op.arguments): op for op in reversed(STAGED)}
every_op = pytest.mark.parametrize("op", TAKING.values(), ids=lambda op: op.name.split("::")[1])


@every_op
def test_the_reference(op: FusedOp, alone: None) -> None:
    provider, call = PROVIDERS["reference"], base(op, cases.FN, "cpu")
    terms = provider.terms(op)
    assert terms is not None
    accepted = judge(provider, op, call, terms, lambda op, call: op.target(*call.values(), "reference"))
    assert accepted >= 15 or "quant_dtype" not in call


@pytest.mark.parametrize("op", [*LEAST.values(), *TAKING.values()], ids=lambda op: op.name.split("::")[1])
def test_aiter(op: FusedOp, make: Callable[..., Double], alone: None) -> None:
    """Through the double; its all-reduces refuse a group of one, which is what there is here."""
    double = make(arch="gfx950")
    provider = PROVIDERS["aiter"]
    terms = provider.terms(op)
    call = base(op, double.fp8, "cpu")
    if terms is None:
        assert provider.why_not(op, call) == f"it declares no kernel for {op.family}"
        return
    if other := op.features - terms.features:
        assert provider.why_not(op, call) == f"it declares no kernel for {op.family} with {', '.join(sorted(other))}"
        return
    accepted = judge(provider, op, call, terms, lambda op, call: op.target(*call.values(), "aiter"))
    assert bool(accepted) == (provider.why_not(op, call) is None)
    for width in (4, 65536):
        assert f"hidden size {width} " in str(provider.why_not(op, base(op, double.fp8, "cpu", width)))


@cache
def spelled(file: str, variable: str) -> set[str]:
    """The texts that the kernels of a file compare a variable with."""
    found = set()
    for node in ast.walk(ast.parse((KERNELS / file).read_text())):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name) and node.left.id == variable:
            found |= {n.value for n in node.comparators if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return found


def launched(op: FusedOp, call: Mapping[str, Any]) -> None:
    """As ``triton.run`` does, up to the launch: kernels and constants, of which the kernels know every one."""
    if "group" in call:
        constants = [calls._found_constants(op, call, 256, nvidia) for nvidia in (True, False)]
        assert all(calls.launch(of, rows, 132)["num_warps"] for of in constants for rows in (1, 999))
    else:
        plans = [launches.of(op, call, nvidia) for nvidia in (True, False)]
        constants = [launch.arguments for plan in plans for launch in plan.launches]
    op.allocate(**call)
    for given in constants:
        programs = (given["SCALE_STEPS"], given["FACTOR_STEPS"], given["VALUE_STEPS"])
        assert {name for program in programs for name, _ in program} <= spelled("steps.py", "NAME")
        assert given.get("ACT", "") in spelled("act_quant.py", "ACT")
        assert {given["DTYPE"], given["VALUE"]} <= {"float32", "bfloat16", "float16"}


@every_op
def test_triton(op: FusedOp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "native_fp8", lambda device: cases.FN)
    monkeypatch.setattr(calls, "refuse_group", lambda group: None)
    provider = PROVIDERS["triton"]
    terms = provider.terms(op)
    assert terms is not None
    assert terms.hidden is not None
    with FakeTensorMode():
        accepted = judge(provider, op, base(op, cases.FN, "cuda"), terms, launched)
        assert accepted >= 15
        for width in (terms.hidden.least, terms.hidden.most, 2880):
            call = base(op, cases.FN, "cuda", width)
            assert provider.why_not(op, call) is None
            launched(op, call)
        for width, limit in ((terms.hidden.least - 1, "is below"), (70000, f"exceeds {terms.hidden.most}")):
            call = base(op, cases.FN, "cuda", width)
            if "bound" in call and not width:  # for rows alone, and a block of 0 is the tensor: refused before the size
                continue
            assert str(provider.why_not(op, call)).startswith(f"hidden size {width} {limit}")


def test_what_triton_declares_is_what_its_kernels_spell_out() -> None:
    """A division by a number is a product; the kernels also know what programs are translated to."""
    declared = set(kernels.terms.__globals__["STEPS"]) | set(kernels.terms.__globals__["COMBINING"])
    translated = {"div": "mul", "scale_mul": "mul_scale"}
    own = {"shared_div_scale", "nan_from"}
    assert {translated.get(name, name) for name in declared} == spelled("steps.py", "NAME") - own
    acts = set(kernels.terms.__globals__["GATED_ACTIVATIONS"].numbers)
    assert acts == spelled("act_quant.py", "ACT") - {"silu_of_bfloat16", ""}


def test_an_op_that_a_provider_does_not_declare() -> None:
    op = REGISTRY.ops["rms_norm_quant", frozenset()]
    outside_op = replace(op, family="of_somebody")
    call = base(op, cases.FN, "cpu")
    assert PROVIDERS["aiter"].why_not(outside_op, call) == "it declares no kernel for of_somebody"
    assert PROVIDERS["triton"].terms(outside_op) == PROVIDERS["triton"].terms(op)  # kernels are of stages, not of names
    other_order = replace(op, stages=op.stages[::-1])
    assert PROVIDERS["triton"].why_not(other_order, call) == "it declares no kernel for rms_norm_quant"
    nothing = Provider("nothing", missing=lambda: None, refuse=lambda *_: None, run=lambda op: op.reference, exact=True)
    assert nothing.why_not(op, call) == "it declares no kernel for rms_norm_quant"
    some = replace(nothing, terms=lambda op: Terms({"x": Anything()}))
    assert str(some.why_not(op, call)).startswith("it declares no values of weight, and this call has ")
    value = REGISTRY.ops["rms_norm_quant", frozenset({"value"})]
    assert some.why_not(value, call) == "it declares no kernel for rms_norm_quant with value"


def test_sizes() -> None:
    assert Sizes(8, 64, 8).why_not("hidden size", 20, 20) == "hidden size 20 is not a multiple of 8"


@pytest.mark.parametrize("wrong", [{"domains": {}}, {"domains": {"act": Anything(), "activation": Anything()}}])
def test_text_that_could_be_anything_is_no_argument(wrong: dict[str, Any]) -> None:
    op = REGISTRY.ops["act_mul_quant", frozenset({"static"})]
    known = {name: domain for name, domain in op.domains.items() if name != "act"}
    with pytest.raises(ValueError, match=r"argument act is text, which|domains of activation, which"):
        aiter_fusion.fused_op(replace(op, family="of_somebody", domains=known | wrong["domains"]))
    assert not REGISTRY.overloads("of_somebody")


# ---- Through a graph ---------------------------------------------------------------------------------------------


@pytest.fixture
def sine() -> Iterator[None]:
    """A form from outside of a kind that the package knows, with an activation that nothing computes."""
    pattern = mul(Call((aten.sin.default,), (Var("gate"),)), Var("up"))
    attributes = {"act": "sine", "cast_first": True, "dtype": BF16}
    form = Form("act_mul", "sine", pattern, "value", complete=lambda *_: Completion(attributes))
    aiter_fusion.register_form(form)
    yield
    aiter_fusion.unregister(form)


def sine_and_mul(x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    return cases.q3(torch.sin(x * 2) * (r * 2))


def test_an_unknown_activation_is_refused_when_planning(sine: None) -> None:
    inputs = cases.tensors(("x", "r"), (4,), BF16, "normal")
    (site,) = fused(sine_and_mul, *inputs).report.sites
    assert site.status == "skipped"
    known = ", ".join(activation.KNOWN.written())
    assert site.reason == f"provider: reference: activation 'sine' is none of {known}"


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "numerics": ({"exact": False}, "it does not keep the graph's roundings"),
    "preference": ({"unwanted": lambda *_: "it is off"}, "it is off"),
    "provider": ({"refuse": lambda *_: "too long"}, "too long"),
    "unmeasured": ({"unmeasured": lambda *_: "run tune"}, "run tune"),
    "slower": ({"slower": lambda *_: "two kernels"}, "two kernels"),
}


@pytest.mark.parametrize("second", REFUSALS)
@pytest.mark.parametrize("first", REFUSALS)
def test_the_reason_names_every_provider_that_was_asked(
    first: str, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code is that of the one that came furthest."""
    asked = [
        replace(PROVIDERS["reference"], name=name, **REFUSALS[code][0])
        for name, code in (("one", first), ("two", second))
    ]
    monkeypatch.setattr(sites, "candidates", lambda choice, device: asked)
    op = REGISTRY.ops["rms_norm_quant", frozenset()]
    options = aiter_fusion.config.options(numerics="exact")
    fusion = next(fusion for fusion in REGISTRY.fusions.values() if fusion.op == op.family)
    with pytest.raises(Refused) as refused:
        sites.provider_for(op, base(op, cases.FN, "cpu"), options, fusion)
    code = max(first, second, key=list(REFUSALS).index)
    assert str(refused.value.refusal) == f"{code}: one: {REFUSALS[first][1]}; two: {REFUSALS[second][1]}"


def test_the_reference_takes_what_an_op_from_outside_is_defined_for() -> None:
    """By its schema, where it says no more."""
    op = replace(REGISTRY.ops["rms_norm_quant", frozenset()], family="of_somebody", domains={})
    assert providers.as_defined(op).why_not(op, base(op, cases.FN, "cpu")) is None
