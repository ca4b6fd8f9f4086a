"""The provider ``aiter`` through a double of the library: every path binds, and computes what the op promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from aiter_fusion import Backend
from aiter_fusion.op import FusedOp
from aiter_fusion.passes.verify import difference
from aiter_fusion.providers.aiter import entry_points, fused, installation, releases
from aiter_fusion.providers.aiter import provider as adapter
from aiter_fusion.providers.aiter.quantiser import scale_of
from aiter_fusion.registry import REGISTRY
from aiter_fusion.scale_program import is_of_bytes
from support import aiter_double, cases
from support.aiter_double import Double
from support.aiter_drives import ACT, AITER, BF16, BYTES, DRIVES, F16, F32, F32_WEIGHT, NORM, Drive, compare
from support.checked import checked
from support.op_contract import call, sampled, strided


@pytest.fixture
def double(make: Callable[..., Double]) -> Double:
    return make()


EVERY_DRIVE = [
    pytest.param(entry, drive, id=f"{entry}-{i}") for entry, ds in DRIVES.items() for i, drive in enumerate(ds)
]


@pytest.mark.parametrize("architecture", ["gfx942", "gfx950"])
@pytest.mark.parametrize(("entry", "drive"), EVERY_DRIVE)
def test_path(entry: str, drive: Drive, architecture: str, make: Callable[..., Double]) -> None:
    """The right entry point, bound by keyword; the op's result within its tolerance; no input written to."""
    double = make(arch=architecture)
    op, arguments = drive.arguments(double.fp8)
    arguments = {
        name: value.replace("240", f"{torch.finfo(double.fp8).max:g}") if isinstance(value, str) else value
        for name, value in arguments.items()
    }
    given = [value for value in arguments.values() if isinstance(value, Tensor)]
    before = [tensor.clone() for tensor in given]
    assert AITER.refuse(op, arguments) is None
    assert compare(op, arguments, call(op, "aiter", arguments)) is None
    assert double.called == [entry]
    assert all(map(torch.equal, before, given)), "an input was written to"


def test_every_path_is_driven() -> None:
    assert set(DRIVES) == {path.entry.name for path in fused.PATHS}


@pytest.mark.parametrize(("entry", "drive"), EVERY_DRIVE)
def test_no_rows(entry: str, drive: Drive, double: Double) -> None:
    """Nothing is launched, and the fake tells the truth."""
    op, arguments = replace(drive, sizes=(*drive.sizes[:-1][:-1], 0, drive.sizes[-1])).arguments(double.fp8)
    assert compare(op, arguments, call(op, "aiter", arguments)) is None
    assert double.called == []


# Those of all-reduces take several processes: tests/providers/aiter/test_aiter_all_reduce.py.
ALONE = [op for op in REGISTRY.ops.values() if "group" not in op.arguments]


@pytest.mark.parametrize("op", ALONE, ids=lambda op: op.name.split("::")[1])
def test_samples(op: FusedOp, make: Callable[..., Double]) -> None:
    """Every sample of every op that is not refused, with gaps between rows too: finite rows are as promised, zero rows
    quantise to zeros with a finite scale, and rows with a NaN do not pass for numbers."""
    double = make(arch="gfx950")
    for given in sampled(op, "reference"):
        if given.get("quant_dtype") != double.fp8 or AITER.why_not(op, given) is not None:
            continue
        for arguments in (
            given,
            {k: strided(v) if isinstance(v, Tensor) and v.dim() > 1 else v for k, v in given.items()},
        ):
            if AITER.why_not(op, arguments) is not None:
                continue
            want, have = op.reference(**arguments), call(op, "aiter", arguments)
            value = want["value"].to(F32)
            ordinary = (value.isfinite().all(-1) & (value.abs().amax(-1) > 1e-3)).reshape(-1)
            zero = (value == 0).all(-1).reshape(-1)
            for name in op.outputs:
                a, b = (t.reshape(-1, t.shape[-1]) for t in (want[name], have[name]))
                assert (want[name].shape, want[name].stride()) == (have[name].shape, have[name].stride())
                doubles = is_of_bytes(given["factor_steps"])
                assert difference(op, AITER, name, a[ordinary], b[ordinary], doubles=doubles) is None, name
                assert b[zero].to(F32).isfinite().all(), name
                if (
                    name == "q" and "scale" in have and not doubles
                ):  # what is zero in the graph's dtype may be more in float32
                    least = max(torch.finfo(want["value"].dtype).smallest_normal * 2**-10, 1e-10)
                    scales = have["scale"].reshape(-1, have["scale"].shape[-1]).repeat_interleave(given["block"], -1)
                    assert ((b.to(F32) * scales)[zero].abs() <= least).all()


MICRO = [
    Drive(NORM, "", (64, 256), 32, changes=BYTES),
    Drive(NORM, "", (2, 3, 4096), 32, changes=BYTES, dtype=F16),
    Drive(NORM, "add", (5, 8192), 32, changes=BYTES),
    Drive(NORM, "", (5, 256), 32, changes=(*BYTES, ("offset", 1.0), ("cast_first", False))),
]


@pytest.mark.parametrize("drive", MICRO)
def test_scales_that_are_bytes(drive: Drive, make: Callable[..., Double]) -> None:
    """By gfx950, since they are of e4m3fn: the kernel rounds exponents up, as torchao does; before 0.1.18 it would have
    written float32 into the bytes."""
    double = make(arch="gfx950")
    op, arguments = drive.arguments(double.fp8)
    assert AITER.refuse(op, arguments) is None
    assert compare(op, arguments, call(op, "aiter", arguments)) is None
    assert double.called == ["add_rmsnorm_quant" if "add" in op.features else "rmsnorm_quant"]
    double.forget()
    make("v0.1.17", arch="gfx950")
    assert "writes scales in float32 before 0.1.18" in str(AITER.refuse(op, arguments))


REFUSED = {
    "cut the fraction off where they convert to int8": Drive(
        NORM, "", (3, 256), changes=(("quant_dtype", torch.int8), ("value_steps", "float32 div_scale round"))
    ),
    "its norms need a weight": Drive(NORM, "", (3, 256), changes=(("weight", None),)),
    "its norms take eps as a number, and here eps is a torch.float64 tensor on cpu": Drive(
        NORM, "", (3, 256), changes=(("eps", None), ("eps_tensor", torch.tensor(1e-6, dtype=torch.float64)))
    ),
    "x is torch.float32": Drive(NORM, "", (3, 256), dtype=F32),
    "the quantised value is torch.float32": Drive(NORM, "", (3, 256), changes=(F32_WEIGHT,)),
    "the offset of the weight is 0.5": Drive(NORM, "", (3, 256), changes=(("offset", 0.5), ("cast_first", False))),
    "with a scale per tensor": Drive(NORM, "", (3, 256), changes=(("block", 0),)),
    "residual is torch.float32": Drive(NORM, "add", (3, 256), changes=(("residual", torch.zeros(3, 256)),)),
    "the residual stream is torch.float32": Drive(NORM, "add", (3, 256), changes=(("residual_dtype", F32),)),
    "not the maximum over 240": Drive(
        NORM, "", (3, 256), changes=(("scale_steps", "div=240.0 float32 log2 ceil exp2"),)
    ),
    "the maximum times 0.00223214, not over 240": Drive(
        NORM, "", (3, 256), changes=(("factor_steps", "div=448.0 float32"),)
    ),
    "has a floor of 0.001": Drive(NORM, "", (3, 256), changes=(("factor_steps", "float32 clamp_min=0.001 div=240.0"),)),
    "has a floor of 1.43051e-05": Drive(
        NORM, "", (3, 256), dtype=F16, changes=(("factor_steps", "div=240.0 if_zero=1.0 float32"),)
    ),
    "divide by the scale that is given: 'if_zero=1.0'": Drive(
        NORM, "static", (3, 256), changes=(("factor_steps", "if_zero=1.0"),)
    ),
    "not a dequantisation scale": Drive(NORM, "", (3, 256), changes=(("scale_steps", "div=240.0 reciprocal float32"),)),
    "not clamped to 240": Drive(NORM, "static", (3, 256), changes=(("value_steps", "float32 div_scale"),)),
    "not divided by the scale": Drive(NORM, "", (3, 256), changes=(("value_steps", "float32 mul_scale"),)),
    "does not divide by the scale that is given": Drive(
        NORM, "static", (3, 256), changes=(("factor_steps", "mul=2.0"),)
    ),
    "rmsnorm_quant gives each thread 24 elements of a hidden size of 5120, and groups of 128 are not 24": Drive(
        NORM, "", (3, 5120), 128, changes=(("offset", 1.0), ("cast_first", False))
    ),
    "takes groups of a power of two of elements, not of 96": Drive(NORM, "", (3, 192), 96),
    "has no activation clamped_swiglu": Drive(
        ACT, "packed", (3, 256), 64, changes=(("act", "clamped_swiglu=1.702,7.0"),)
    ),
    "gate in the first half": Drive(ACT, "packed", (3, 256), 64, changes=(("gate_first", False),)),
    "takes groups of a power of two of elements, not of 200": Drive(ACT, "packed", (3, 200)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusal(reason: str, double: Double) -> None:
    op, arguments = REFUSED[reason].arguments(double.fp8)
    assert reason in str(AITER.refuse(op, arguments))
    with pytest.raises(RuntimeError, match="by aiter: "):
        op.target(*arguments.values(), "aiter")
    assert double.called == []


@pytest.mark.parametrize("name", ["x", "residual"])
def test_gaps_between_rows(name: str, double: Double) -> None:
    """HIP's kernels take rows to follow each other; Triton's are told how far apart they are."""
    op, arguments = Drive(NORM, "add", (5, 256)).arguments(double.fp8)
    arguments[name] = strided(arguments[name])
    assert compare(op, arguments, call(op, "aiter", arguments)) is None
    assert double.called == ["fused_rms_fp8_group_quant"]


def test_an_op_that_aiter_is_not_called_for(double: Double) -> None:
    op, arguments = Drive(NORM, "", (5, 256)).arguments(double.fp8)
    outside = replace(op, family="of_somebody")  # a family that no preference is about
    assert AITER.why_not(outside, arguments) == "it declares no kernel for of_somebody"
    assert AITER.unwanted(outside, arguments) is None


def test_what_the_gpu_refuses(make: Callable[..., Double]) -> None:
    double = make(arch="gfx1100")
    op, arguments = Drive(NORM, "", (3, 256)).arguments(torch.float8_e4m3fnuz)
    assert "this GPU's FP8 format is torch.float8_e4m3fn" in str(AITER.refuse(op, arguments))
    op, arguments = Drive(NORM, "", (3, 256)).arguments(double.fp8)
    assert AITER.refuse(op, arguments) is None  # by Triton: HIP's kernels write zeros there
    call(op, "aiter", arguments)
    assert double.called == ["fused_rms_fp8_group_quant"]
    assert "ask for provider='aiter' by name" in str(AITER.unwanted(op, arguments))


def test_aiter_and_this_project_must_agree_on_fp8(make: Callable[..., Double]) -> None:
    double = make()
    assert AITER.missing() is None
    installation.load_aiter().dtypes.fp8 = torch.float8_e4m3fn
    adapter.missing.cache_clear()  # type: ignore[attr-defined]
    assert "AITER takes this GPU's FP8 format for torch.float8_e4m3fn" in str(AITER.missing())
    assert double.called == []


@pytest.mark.parametrize("name", ["AITER", "RMSNORM"])
def test_preferences(name: str, double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    op, arguments = Drive(NORM, "", (3, 256)).arguments(double.fp8)
    assert AITER.unwanted(op, arguments) is None
    monkeypatch.setenv(f"AITER_FUSION_{name}", "0")
    assert AITER.unwanted(op, arguments) == f"AITER_FUSION_{name} is off (set it to 1)"
    assert AITER.refuse(op, arguments) is None
    assert compare(op, arguments, call(op, "aiter", arguments)) is None


# ---- in a graph ----------------------------------------------------------------------------------------------------


def fnuz(y: Tensor) -> tuple[Tensor, Tensor]:
    scale = (y.abs().amax(-1, keepdim=True) / 240.0).float()
    return (y.float() / scale).clamp(-240.0, 240.0).to(torch.float8_e4m3fnuz), scale


def test_a_graph(double: Double) -> None:
    """From the model's code to AITER's kernel, asked for by name whatever is preferred; exact numerics refuse it."""

    def fn(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        summed = r + x
        return (*fnuz(cases.llama(summed, w)), summed)

    inputs = cases.tensors(("x", "r", "w"), (4,), BF16, "normal")
    result = checked(fn, provider="aiter", verify=True)
    with torch.no_grad():
        result.call(*inputs)
    (site,) = result.report.sites
    assert (site.status, site.provider, site.variant) == ("replaced", "aiter", "add+token")
    assert set(double.called) == {"add_rmsnorm_quant"}
    exact = checked(fn, provider="aiter", numerics="exact")
    with torch.no_grad():
        exact.call(*inputs)
    assert exact.report.sites[0].reason == "numerics: aiter: it does not keep the graph's roundings"


def test_named_without_aiter() -> None:
    with pytest.raises(RuntimeError, match="provider='aiter' cannot run here: AITER needs a ROCm build of PyTorch"):
        Backend(provider="aiter")


# ---- versions ------------------------------------------------------------------------------------------------------


def names(path: fused.Path) -> str:
    return path.entry.name + "".join(f"+{feature}" for feature in sorted(path.limits.needs & {"offset"}))


def table() -> dict[str, str]:
    """Path -> the first version with which it binds; it binds with all later ones, or the test says which not."""
    found = {}
    for path in fused.PATHS:
        good = [version for version in aiter_double.VERSIONS if aiter_double.binds([path.entry], version)]
        assert good == aiter_double.VERSIONS[aiter_double.VERSIONS.index(good[0]) :], names(path)
        found[names(path)] = good[0]
    return found


FIRST = {
    "rmsnorm_quant": "v0.1.10.post1",
    "rmsnorm_quant+offset": "v0.1.17",
    "add_rmsnorm_quant": "v0.1.10.post1",
    "add_rmsnorm_quant+offset": "v0.1.17",
    "fused_rms_fp8_group_quant": "v0.1.6.post2",
    "fused_rms_fp8_per_tensor_static_quant": "v0.1.9.post1",
    "silu_and_mul_quant": "v0.1.15",
    "act_mul_and_fp8_group_quant": "v0.1.6.post2",
    "fused_silu_mul_fp8_per_tensor_static_quant": "v0.1.9.post1",
}


def test_binding_table(record_property: Callable[[str, object], None]) -> None:
    assert table() == FIRST
    for path, version in FIRST.items():
        record_property("row", f"binds with AITER from {version:14} on: {path}")


@pytest.mark.parametrize("version", ["v0.1.1", "v0.1.6.post2", "v0.1.9.post1", "v0.1.14", "v0.1.16.post6", "v0.1.18"])
def test_an_older_version(version: str, make: Callable[..., Double]) -> None:
    """The double of that version: each call goes to a path that binds there, or is refused with the version's name."""
    double = make(version)
    position = aiter_double.VERSIONS.index(version)
    for drives in DRIVES.values():
        op, arguments = drives[0].arguments(double.fp8)
        why = AITER.refuse(op, arguments)
        if why is None:
            assert compare(op, arguments, call(op, "aiter", arguments)) is None
            assert aiter_double.VERSIONS.index(FIRST[double.called[-1]]) <= position
        else:
            assert f"AITER {version} has no aiter" in why or "takes no argument" in why
    assert double.called or version == "v0.1.1"


@pytest.mark.parametrize("version", ["v0.1.10.post1", "v0.1.10.post2", "v0.1.10.post3"])
def test_a_release_that_is_known_to_be_wrong(version: str, make: Callable[..., Double]) -> None:
    """It binds, and is not called."""
    double = make(version)
    op, arguments = DRIVES["add_rmsnorm_quant"][0].arguments(double.fp8)
    assert compare(op, arguments, call(op, "aiter", arguments)) is None
    bad = version != "v0.1.10.post3"
    assert double.called == ["fused_rms_fp8_group_quant" if bad else "add_rmsnorm_quant"]
    why = str(entry_points.probe(next(path.entry for path in fused.PATHS if path.entry.name == "add_rmsnorm_quant")))
    assert ("returns inexact sums (ROCm/aiter#2011, in 0.1.10.post3): upgrade AITER" in why) == bad


def test_known_bad_releases() -> None:
    known = {version.removeprefix("v") for version in aiter_double.VERSIONS}
    for name, faults in releases.KNOWN_BAD.items():
        assert name in aiter_double.DATA["functions"]
        assert all({bound.version for bound in fault.releases} <= known for fault in faults)
    for bad in ("0.1.10.post1+rocm7.2.manylinux_2_28", "v0.1.10.post2", "0.1.10.post3.dev7+g1234567"):
        assert releases.known_bad("add_rmsnorm_quant", bad) is not None
    for good in ("0.1.10", "0.1.10.post3+rocm7.2", "0.1.20.post2.dev4", "", "unknown", None):
        assert releases.known_bad("add_rmsnorm_quant", good) is None


# ---- faults, seeded: each must be caught ---------------------------------------------------------------------------


DRIFTED = {
    "a renamed argument": ("rmsnorm_quant", "(out, x, scale, weight, epsilon, group_size=0, shuffle_scale=False)"),
    "a new required argument": (
        "rmsnorm_quant",
        "(ctx, out, input, scale, weight, epsilon, group_size=0, shuffle_scale=False)",
    ),
    "a removed argument": ("act_mul_and_fp8_group_quant", "(x, activation, group_size)"),
}


@pytest.mark.parametrize("drift", DRIFTED)
def test_a_drifted_version_is_refused_before_it_is_called(drift: str, make: Callable[..., Double]) -> None:
    name, signature = DRIFTED[drift]
    double = make(signatures={name: signature})
    entry = next(path.entry for path in fused.PATHS if path.entry.name == name)
    found = entry_points.probe(entry)
    assert isinstance(found, str)
    assert "takes no argument" in found or "also wants" in found
    op, arguments = DRIVES[name][0].arguments(double.fp8)
    if AITER.refuse(op, arguments) is None:  # by another path
        assert compare(op, arguments, call(op, "aiter", arguments)) is None
    assert name not in double.called


def _faulty(fault: str) -> tuple[str, Callable[..., Any]]:
    """An entry point and a changed ``call`` for it, as an adapter with that mistake would make it."""
    real = entry_points.call

    def change(**changes: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
        return lambda entry, **given: real(entry, **given | {n: make(given) for n, make in changes.items()})

    return {
        "arguments swapped": ("add_rmsnorm_quant", change(input=lambda g: g["residual_out"])),
        "residual not given": ("add_rmsnorm_quant", change(residual_in=lambda g: torch.zeros_like(g["input"]))),
        "transposed scales": ("rmsnorm_quant", change(shuffle_scale=lambda g: True)),
        "transposed scales by Triton": ("fused_rms_fp8_group_quant", change(transpose_scale=lambda g: True)),
        "scale for the row, not the group": ("rmsnorm_quant", change(group_size=lambda g: 0)),
        "weight without its offset": ("rmsnorm_quant+offset", change(gemma_norm=lambda g: False)),
        "weight of another dtype": ("rmsnorm_quant", change(weight=lambda g: g["weight"].float())),
        "another eps": ("fused_rms_fp8_group_quant", change(inp1_epsilon=lambda g: 1.0)),
        "another activation": ("act_mul_and_fp8_group_quant", change(activation=lambda g: "swish")),
        "the inverse of the scale": (
            "fused_rms_fp8_per_tensor_static_quant",
            change(inp1_scale=lambda g: g["inp1_scale"].reciprocal()),
        ),
        "groups that HIP silently gets wrong": ("silu_and_mul_quant 5120", change()),
        "another FP8 format": ("fused_rms_fp8_group_quant", change(dtype_quant=lambda g: torch.float8_e4m3fn)),
    }[fault]


FAULTS = (
    "arguments swapped",
    "residual not given",
    "transposed scales",
    "transposed scales by Triton",
    "scale for the row, not the group",
    "weight without its offset",
    "weight of another dtype",
    "another eps",
    "another activation",
    "the inverse of the scale",
    "groups that HIP silently gets wrong",
    "another FP8 format",
)
FAULT_DRIVES = {
    "add_rmsnorm_quant": Drive(NORM, "add", (5, 256), 128),
    "rmsnorm_quant": Drive(NORM, "", (5, 256), 128),
    "rmsnorm_quant+offset": Drive(NORM, "", (5, 256), 128, changes=(("offset", 1.0), ("cast_first", False))),
    "fused_rms_fp8_group_quant": Drive(NORM, "", (3, 5120), 128),
    "act_mul_and_fp8_group_quant": Drive(ACT, "packed", (3, 5120), 128),
    "fused_rms_fp8_per_tensor_static_quant": Drive(NORM, "static", (5, 256)),
    "silu_and_mul_quant 5120": Drive(ACT, "packed", (3, 5120), 128),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_adapter_is_caught(fault: str, double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other tests demand of each path is not met by an adapter with this mistake."""
    where, faulty = _faulty(fault)
    op, arguments = FAULT_DRIVES[where].arguments(double.fp8)
    assert compare(op, arguments, call(op, "aiter", arguments)) is None
    monkeypatch.setattr(fused, "call", faulty)
    if fault.startswith("groups"):
        unlimited = [
            replace(path, limits=replace(path.limits, by_wave=False))
            if path.entry.name == "silu_and_mul_quant"
            else path
            for path in fused.PATHS
        ]
        monkeypatch.setattr(fused, "PATHS", tuple(unlimited))
    try:
        problem = compare(op, arguments, call(op, "aiter", arguments))
    except (RuntimeError, AssertionError) as error:
        problem = str(error)
    assert problem is not None


def test_what_the_double_knows_of_layouts(double: Double) -> None:
    """The three presentations of a transposed scale: only one of them is true."""
    module = installation.load_aiter()
    x, w = torch.randn(6, 256).to(BF16), torch.ones(256, dtype=BF16)
    quant = module.ops.triton.quant.fused_fp8_quant.fused_rms_fp8_group_quant
    rows = quant(x, w, 1e-5, group_size=64)[0][1]
    lying = quant(x, w, 1e-5, group_size=64, transpose_scale=True)[0][1]
    true = quant(x, w, 1e-5, group_size=64, transpose_scale=True, is_x_scale_strided=True)[0][1]
    assert (rows.stride(), lying.stride(), true.stride()) == ((4, 1), (4, 1), (1, 6))
    assert torch.equal(rows, true)
    assert not torch.equal(rows, lying)
    assert torch.equal(lying.flatten(), true.t().flatten())


def test_scale_programs() -> None:
    assert scale_of("div=448.0 float32") == (1 / 448, 0.0, False)
    assert scale_of("float32 reciprocal mul=448.0") == pytest.approx((1 / 448, 0.0, True))
    assert scale_of("float32 clamp_min=1e-12 div=240.0 reciprocal") == pytest.approx((1 / 240, 1e-12, True))
    assert scale_of("float32 div=448.0 clamp_min=0.5 reciprocal") == pytest.approx((1 / 448, 224.0, True))
    assert scale_of("reciprocal mul=448.0 clamp_max=2.0") == pytest.approx((1 / 448, 224.0, True))
    assert scale_of("unless_positive=1.0 div=448.0") == (1 / 448, 2.0**-149, False)
    assert scale_of("float32 div=448.0 if_zero=1.0") == pytest.approx((1 / 448, 448 * 2.0**-149, False))
    # half precision has rows with values that become 0 when they are divided
    assert scale_of("div=448.0 if_zero=1.0 float32", F16) == pytest.approx((1 / 448, 448 * 2.0**-24, False))
    for other in (
        "div=448.0 log2 ceil exp2",
        "clamp_max=3.0 div=448.0",
        "reciprocal clamp_min=2.0",
        "mul=-1.0",
        "reciprocal if_zero=1.0",
    ):
        assert scale_of(other) is None
