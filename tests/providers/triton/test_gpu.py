"""On a GPU the reference agrees with the oracle, and the Triton kernels agree with the reference."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

import aiter_fusion
from aiter_fusion.backend import SLOT
from aiter_fusion.op import FusedOp
from aiter_fusion.passes.verify import differing_codes, same_bits
from aiter_fusion.providers import PROVIDERS
from aiter_fusion.registry import REGISTRY
from support import cases, models
from support.checked import checked
from support.rows import Rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


@pytest.mark.parametrize("quant", cases.QUANTS, ids=lambda q: q.name)
@pytest.mark.parametrize("norm", [n for n in cases.NORMS if n.name in ("R1", "R3", "R4")], ids=lambda n: n.name)
def test_reference_on_the_gpu(norm: cases.NormForm, quant: cases.QuantForm) -> None:
    case = cases.FUSION["add_norm"]
    names = (*case.inputs, *(("scale",) if quant.static else ()))
    result = checked(case.call(norm.call, quant.call), provider="reference")
    with torch.no_grad():
        for rows in cases.ROWS:
            result.call(*(t.cuda() for t in cases.tensors(names, (2, 3), torch.bfloat16, rows)))
            assert result.oracle.identical, rows
    assert len(result.variants) == 1


@pytest.mark.parametrize("act", cases.ACTS, ids=lambda a: a.name)
def test_activations_on_the_gpu(act: cases.ActForm) -> None:
    result = checked(cases.FUSION["act"].call(act.call, cases.q3), provider="reference")
    with torch.no_grad():
        for rows in cases.ROWS:
            result.call(*(t.cuda() for t in cases.tensors(("x2",), (2, 3), torch.bfloat16, rows)))
            assert result.oracle.identical, rows
    assert len(result.variants) == 1


def test_torchaos_blocks_on_the_gpu() -> None:
    """Their product is a Triton kernel, which the CPU's tests replace."""
    model = models.build("Llama").cuda()
    models.QUANTISATIONS["PerBlock"](model)
    tokens = models.tokens(2).cuda()
    replaced, _ = models.expected(model, "PerBlock", tokens)
    del replaced["fp8_linear"]
    result = checked(model, provider="reference", disable=["fp8_linear"])
    with torch.no_grad():
        result.call(tokens, use_cache=False)
    assert result.oracle.identical
    assert result.report.replaced == dict(replaced)
    assert any("ao.blockwise_fp8_gemm" in target for target in result.targets)


def test_auto_leaves_to_inductor_what_it_does_faster() -> None:
    result = checked(cases.FUSION["norm"].call(cases.llama, cases.q3_tensor))
    with torch.no_grad():
        result.call(*(t.cuda() for t in cases.tensors(("x", "w"), (4,), torch.bfloat16, "normal")))
    assert [site.reason.split(":")[0] for site in result.report.skipped] == ["slower"]


def test_auto_never_means_the_reference() -> None:
    result = checked(cases.FUSION["norm"].call(cases.llama, cases.q3))
    with torch.no_grad():
        result.call(*(t.cuda() for t in cases.tensors(("x", "w"), (4,), torch.bfloat16, "normal")))
    assert result.report.replaced == {"rms_norm_quant": 1}
    assert result.report.sites[0].provider in ("aiter", "triton")


# ---- The Triton kernels ---------------------------------------------------------------------------------------


def whole_numbers(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Whole numbers so small that float32 sums of their squares are exact in any order: then so is the statistic."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, sizes, generator=generator).to(dtype).cuda()


QUANTISER = {
    "column_major": False,
    "scale_steps": "div=448.0 float32",
    "factor_steps": "div=448.0 float32",
    "value_steps": "float32 div_scale clamp_min=-448.0 clamp_max=448.0",
    "quant_dtype": cases.FN,
}
PROGRAMS = {
    "torchao": {},
    "unclamped": {"value_steps": "float32 div_scale"},
    "product": {
        "scale_steps": "float32 clamp_min=1e-12 div=448.0",
        "factor_steps": "float32 clamp_min=1e-12 div=448.0 reciprocal",
        "value_steps": "float32 mul_scale clamp_min=-448.0 clamp_max=448.0",
    },
    "bounded": {
        "scale_steps": "float32 clamp_min=0.0001 clamp_max=3.0 bfloat16 div=448.0 float32",
        "factor_steps": "float32 clamp_min=0.0001 clamp_max=3.0 bfloat16 div=448.0 float32",
    },
    "power_of_two": {
        "scale_steps": "float32 clamp_min=0.0001 div=448.0 log2 ceil exp2",
        "factor_steps": "float32 clamp_min=0.0001 div=448.0 log2 ceil exp2",
    },
    "half": {"value_steps": "div_scale clamp_min=-448.0 clamp_max=448.0"},
}
WIDTHS = (1, 32, 33, 96, 128, 1000, 2880, 4096, 7168, 16384, 20000, 40064, 65536)
ROWS = (0, 1, 3, 257)


def same(op: FusedOp, **arguments: object) -> None:
    """Bit by bit what the reference computes on this GPU."""
    given = {name: arguments[name] for name in op.arguments}
    assert PROVIDERS["triton"].why_not(op, given) is None
    want = op.reference(**given)
    result = op.target(*given.values(), "triton")
    for name, have in zip(op.outputs, (result,) if isinstance(result, Tensor) else result, strict=True):
        assert same_bits(want[name], have), f"{name} {differing_codes(want[name], have) if name == 'q' else ''}"


def norm_arguments(width: int, rows: int, dtype: torch.dtype = torch.bfloat16, **changes: object) -> dict[str, object]:
    sum_dtype = torch.float32 if width % 2 else dtype
    return {
        "x": whole_numbers(rows, width, dtype=dtype),
        "residual": whole_numbers(rows, width, seed=1, dtype=dtype),
        "sum_dtype": sum_dtype,
        "residual_dtype": dtype,
        "weight": torch.randn(width, generator=torch.Generator().manual_seed(2)).to(dtype).cuda(),
        "eps": 1e-6,
        "eps_tensor": None,
        "offset": None,
        "cast_first": True,
        "dtype": dtype,
        "scale": torch.tensor(0.02, device="cuda"),
        # a gate of 1 and -1, so that sums stay exact
        "gate": whole_numbers(1, width, seed=3, dtype=dtype).ge(0).to(dtype) * 2 - 1,
        "product_dtype": dtype,
        **dict.fromkeys(("gain", "shift"), whole_numbers(1, width, seed=4, dtype=dtype) / 16),
        "plus_one": True,
        "z": whole_numbers(rows, width, seed=5, dtype=dtype),
        "act": "silu",
        "act_dtype": torch.float32,
        **dict.fromkeys(("modulated_dtype", "gated_dtype"), dtype),
        **QUANTISER,
        **changes,
    }


@pytest.mark.parametrize(
    "features", REGISTRY.overloads("rms_norm_quant"), ids=lambda f: "_".join(sorted(f)) or "default"
)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms_of_every_width(width: int, features: frozenset[str]) -> None:
    op = REGISTRY.ops["rms_norm_quant", features]
    for rows in ROWS:
        for block in {0, width, 32, 128} if "static" not in features else {0}:
            if block and width % block:
                continue
            same(op, **norm_arguments(width, rows, block=block, column_major=rows == 3))


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_norms_with_every_program(dtype: torch.dtype, program: str) -> None:
    op = REGISTRY.ops["rms_norm_quant", frozenset({"add", "value"})]
    for changes in ({}, {"offset": 1.0, "cast_first": False}, {"weight": None}, {"cast_first": False}):
        for block in (0, 64, 512):  # powers of two: the mean of a row of float32 is exact too
            same(op, **norm_arguments(512, 9, dtype, block=block, **changes, **PROGRAMS[program]))


@pytest.mark.parametrize("steps", ["{} unless_positive=1.0 div=448.0 float32", "{} div=448.0 if_zero=1e-07 float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_number_for_zero(dtype: torch.dtype, steps: str) -> None:
    """Rows of zeros and with NaN and infinity, the whole tensor of zeros, or NaN in it; and a given scale of zero."""
    hostile = whole_numbers(9, 512, dtype=dtype)
    hostile[3], hostile[5, 7], hostile[6, 8], hostile[7, 9:11] = 0, float("nan"), float("inf"), float("-inf")
    for converted in ("", "float32"):
        program = steps.format(converted).strip()
        chosen = {"scale_steps": program, "factor_steps": program}
        for x in (hostile, hostile[3:4].expand(2, 512).contiguous(), hostile[3:6]):
            for block in (0, 64, 512):
                changes = {"x": x, "block": block, **chosen}
                same(REGISTRY.ops["rms_norm_quant", frozenset()], **norm_arguments(512, len(x), dtype, **changes))
    for scale in (0.0, -0.0, -1.0, float("nan"), 0.02):
        for step in ("if_zero=0.125", "unless_positive=0.125"):
            given = {"scale": torch.tensor(scale, device="cuda"), "factor_steps": step}
            same(REGISTRY.ops["rms_norm_quant", frozenset({"static"})], **norm_arguments(512, 9, dtype, **given))


ACTIVATIONS = ("silu", "swish", "clamped_swiglu=1.702,7.0")


def act_arguments(width: int, rows: int, dtype: torch.dtype = torch.bfloat16, **changes: object) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    both = (torch.randn(rows, 2 * width, generator=generator) * 4).to(dtype).cuda()
    return {
        "gate_up": both,
        "gate": both[:, :width],
        "up": both[:, width:],
        "gate_first": width % 3 == 0,
        "interleaved": width % 2 == 0,
        "act": "silu",
        "cast_first": True,
        "dtype": dtype,
        "scale": torch.tensor(0.02, device="cuda"),
        **QUANTISER,
        **changes,
    }


@pytest.mark.parametrize(
    "features", REGISTRY.overloads("act_mul_quant"), ids=lambda f: "_".join(sorted(f)) or "default"
)
@pytest.mark.parametrize("width", WIDTHS)
def test_activations_of_every_width(width: int, features: frozenset[str]) -> None:
    op = REGISTRY.ops["act_mul_quant", features]
    for rows in ROWS:
        for block in {0, width, 32, 128} if "static" not in features else {0}:
            if block and width % block:
                continue
            same(op, **act_arguments(width, rows, block=block, column_major=rows == 3))


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_activation(dtype: torch.dtype, act: str) -> None:
    for features in (frozenset[str](), frozenset({"packed", "value"})):
        for cast_first in (True, False):
            for interleaved in (True, False):
                same(
                    REGISTRY.ops["act_mul_quant", features],
                    **act_arguments(384, 9, dtype, block=96, act=act, cast_first=cast_first, interleaved=interleaved),
                )


def every(dtype: torch.dtype) -> Tensor:
    """Every number of a 16-bit format."""
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).cuda()


@pytest.mark.parametrize("act", ["silu", "swish", "gelu", "gelu_tanh", "clamped_swiglu=1.702,7.0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_activations_of_every_number(dtype: torch.dtype, act: str) -> None:
    """The fast silu of bfloat16 is PyTorch's for all of them. Triton's erf and tanh are of another version of CUDA's
    library than PyTorch's, and differ in the last bit for some, which shows where one is added to nearly -1."""
    gate = every(dtype)[:, None].expand(-1, 32).contiguous()
    op = REGISTRY.ops["act_mul_quant", frozenset({"value"})]
    given = act_arguments(32, 1, dtype, gate=gate, up=torch.ones_like(gate), act=act, block=32)
    given = {name: given[name] for name in op.arguments}
    want = op.reference(**given)["value"][:, 0]
    have = op.target(*given.values(), "triton")[2][:, 0]
    if act.startswith("gelu"):
        assert torch.allclose(want.float(), have.float(), rtol=1e-2, atol=1e-6, equal_nan=True)
        assert (want != have).logical_and(~want.isnan()).sum() <= 256
    else:
        wrong = [i for i in range(65536) if not same_bits(want[i], have[i])] if not same_bits(want, have) else []
        assert not wrong, [(gate[i, 0].item(), want[i].item(), have[i].item()) for i in wrong[:8]]


@pytest.mark.parametrize("bits", [8, 11])
def test_divisions_beside_the_middle_of_two_codes(bits: int) -> None:
    """A reciprocal in two parts is enough for half precision. Only quotients within a few last places of the middle of
    two FP8 numbers can be rounded to the wrong one: all of them, for every significand that such an x has."""
    divide = import_module("support.division_kernel").divide_kernel
    significands = torch.arange(2 ** (bits - 1), 2**bits, device="cuda").float()
    normal = [1 + (k + 0.5) / 8 for k in range(8)]
    subnormal = [(k + 0.5) / 8 for k in range(8)]
    middles = torch.tensor(normal + subnormal, device="cuda")
    beside = (significands[:, None] / middles).view(torch.int32)[..., None]
    scales = (beside + torch.arange(-64, 65, device="cuda", dtype=torch.int32)).view(torch.float32)
    x = significands[:, None, None].expand_as(scales).contiguous().to(torch.bfloat16 if bits == 8 else torch.float16)
    for exponent in (0, 3, -6):
        s = scales * 2.0**-exponent
        q = torch.empty(x.shape, dtype=cases.FN, device="cuda")
        divide[(-(-x.numel() // 1024),)](x, s, q, x.numel(), 1024)
        assert same_bits((x.float() / s).to(cases.FN), q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-45, 1e-39, -1e-38, 0.02, -2.0, 3e38, math.inf, -math.inf, math.nan])
def test_divisions_of_every_number(scale: float, dtype: torch.dtype) -> None:
    divide = import_module("support.division_kernel").divide_kernel
    x = every(dtype)
    s = torch.full(x.shape, scale, device="cuda")
    q = torch.empty(x.shape, dtype=cases.FN, device="cuda")
    divide[(-(-x.numel() // 1024),)](x, s, q, x.numel(), 1024)
    assert same_bits((x.float() / s).clamp(-448, 448).to(cases.FN), q)


def test_rare_differences_with_random_rows() -> None:
    """Sums in another order move the statistic's last bits: at most one element in 100,000, by one code."""
    op = REGISTRY.ops["rms_norm_quant", frozenset({"add"})]
    for width in (2880, 4096, 8192):
        generator = torch.Generator("cuda").manual_seed(0)
        given = norm_arguments(width, 0, block=width) | {
            name: torch.randn(8192, width, generator=generator, device="cuda").bfloat16() for name in ("x", "residual")
        }
        given = {name: given[name] for name in op.arguments}
        want = op.reference(**given)
        q, scale, residual = op.target(*given.values(), "triton")
        assert same_bits(want["residual_out"], residual)
        assert differing_codes(want["q"], q) <= 1
        share = (want["q"].view(torch.uint8) != q.view(torch.uint8)).double().mean().item()
        assert share <= op.tolerance.share
        assert torch.allclose(want["scale"], scale, rtol=2**-7, atol=0)


def test_an_op_compiles_nothing_while_a_cuda_graph_is_captured() -> None:
    op = REGISTRY.ops["rms_norm_quant", frozenset()]
    graph = torch.cuda.CUDAGraph()
    given = norm_arguments(1234, 3, block=1234)
    call = [given[name] for name in op.arguments]
    with pytest.raises(RuntimeError, match="would be compiled"), torch.cuda.graph(graph):
        op.target(*call, "triton")
    want = op.target(*call, "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        have = op.target(*call, "triton")
    graph.replay()
    assert all(map(same_bits, want, have))


def test_warmup_before_a_capture() -> None:
    """Then a graph that was compiled for other rows can be captured for all that it was warmed up with."""
    call = torch.compile(block_of_model, backend=aiter_fusion.Backend(provider="triton"), dynamic=False)
    sizes, other = (5, 64), inputs_of_block(3)
    with torch.no_grad(), inductor_config.patch(force_disable_caches=True):
        with pytest.raises(RuntimeError, match=r"aiter_fusion.warmup"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            call(*other)
        aiter_fusion.warmup(call, [inputs_of_block(rows) for rows in sizes])
        for rows in sizes:
            inputs = inputs_of_block(rows)
            want = call(*inputs)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                have = call(*inputs)
            graph.replay()
            assert all(map(same_bits, want, have))


def test_more_elements_than_32_bits_can_count() -> None:
    op = REGISTRY.ops["act_mul_quant", frozenset({"packed"})]
    width, rows = 8192, 2**31 // 8192 + 5
    gate_up = torch.empty(rows, 2 * width, dtype=torch.bfloat16, device="cuda")
    gate_up[-7:] = torch.randn(7, 2 * width, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    last = act_arguments(width, 0, gate_up=gate_up[-7:], gate_first=True, interleaved=False)
    for block in (width, 128):
        given = {name: (last | {"block": block})[name] for name in op.arguments}
        want = op.reference(**given)
        q, scale = op.target(*(given | {"gate_up": gate_up}).values(), "triton")
        assert same_bits(want["q"], q[-7:])
        assert same_bits(want["scale"], scale[-7:])


@pytest.mark.parametrize(
    "quant", [cases.QUANT[name] for name in ("Q1r", "Q3_tensor", "Q7_64", "Q2")], ids=lambda q: q.name
)
@pytest.mark.parametrize("producer", cases.PRODUCERS, ids=lambda p: p.name)
def test_every_producer(producer: cases.Producer, quant: cases.QuantForm) -> None:
    """Compiled; ``verify`` raises where a kernel differs from the graph by more than the order of a sum explains."""
    model = Rows([(cases.PRODUCED, producer, quant)])
    with torch.no_grad(), inductor_config.patch(force_disable_caches=True):
        compiled = torch.compile(model, backend=aiter_fusion.Backend(provider="triton", verify=True, strict=True))
        for sizes in ((3, 70), (1, 1)):
            inputs = [tensor.cuda() for tensor in model.inputs(sizes)]
            for have, want in zip(compiled(*inputs), original(model, *inputs), strict=True):
                assert have.shape == want.shape
                assert torch.allclose(have.float(), want.float(), rtol=0.13, atol=1e-3)  # a code is an eighth
    replaced = {producer.family: 1}
    assert aiter_fusion.reports()[0].replaced == replaced


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("features", [("gated",), ("gated", "value"), ()], ids="-".join)
def test_a_scale_for_several_heads(features: tuple[str, ...], width: int) -> None:
    """Each is normalised by itself: the sums are exact, and so are the bits."""
    op = REGISTRY.ops["rms_norm_quant", frozenset(features)]
    for heads in (2, 3, 32):
        for tokens in (1, 7, 300):
            same(op, **norm_arguments(width, heads * tokens, block=heads * width))


# ---- Compiled graphs ------------------------------------------------------------------------------------------


def block_of_model(x: Tensor, r: Tensor, w: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
    summed = r + x
    value = cases.llama(summed, w)
    act = cases.sliced(x2)
    return (
        *cases.q1_row(value),
        *cases.q7(128)(cases.torch_nn(x, w)),
        *cases.q3_tensor(cases.gemma(r, w)),
        *cases.q1_row(act),
        *cases.q7(128)(cases.F.gelu(x2[..., : cases.H]) * x2[..., cases.H :]),
        summed,
    )


def inputs_of_block(rows: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(rows, 2 * cases.H, generator=generator).bfloat16().cuda()
    x, r = whole_numbers(rows, cases.H, seed=seed), whole_numbers(rows, cases.H, seed=seed + 1)
    return [x, r, torch.randn(cases.H, generator=generator).bfloat16().cuda(), both]


def original(fn: Callable[..., Any], *inputs: Tensor) -> Any:
    """What the graph computes, interpreted."""
    result = checked(fn, provider="reference")
    with torch.no_grad():
        outputs = result.call(*inputs)
    assert result.oracle.identical
    return outputs


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(mode: str | None, dynamic: bool) -> None:
    """Inductor launches the kernels itself: no op is called from the generated code, and the bits are the graph's."""
    wants = [original(block_of_model, *inputs_of_block(rows)) for rows in (5, 64)]
    torch._dynamo.reset()
    with torch.no_grad(), inductor_config.patch(force_disable_caches=True):
        options: Any = {"mode": mode} if mode else {}
        compiled = torch.compile(block_of_model, backend=aiter_fusion.Backend(provider="triton"), options=options)
        for rows, want in zip((5, 64), wants, strict=True):
            inputs = inputs_of_block(rows)
            for tensor in inputs if dynamic else ():
                if tensor.dim() > 1:
                    torch._dynamo.mark_dynamic(tensor, 0)
            code: list[str] = []
            if rows == 5:
                _, code = run_and_get_code(compiled, *inputs)  # which begins by resetting Dynamo
            for _ in range(3):  # with CUDA graphs: warm-up, capture, replay
                have = [t.clone() for t in compiled(*inputs)]
                assert all(map(same_bits, want, have))
            if code:
                text = "\n".join(line for line in "\n".join(code).split("\n") if not line.lstrip().startswith("#"))
                assert "norm_quant_kernel" in text
                assert "act_quant_kernel" in text
                assert "torch.ops.aiter_fusion" not in text
    made = aiter_fusion.reports()
    assert [r.replaced for r in made] == [{"rms_norm_quant": 3, "act_mul_quant": 2}] * (1 if dynamic else 2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_rows_taken_out_of_a_norm(dynamic: bool) -> None:
    """The kernels read the last row of each batch where it lies, also of a sum that Inductor computes."""

    def fn(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        summed = r * 2 + x
        return (
            *cases.q1_row(cases.llama(r + x, w)[:, -1:]),
            *cases.q3_one_for_zero(cases.olmo2(summed, w)[:, -1]),
            summed,
        )

    weight = torch.randn(cases.H, generator=torch.Generator().manual_seed(2)).bfloat16().cuda()
    made = []
    for length in (5, 9):
        inputs = [whole_numbers(3, length, cases.H, seed=seed) for seed in (0, 1)]
        inputs[0][1, -1] = 0
        inputs[1][1, -1] = 0
        made.append([*inputs, weight])
    wants = [original(fn, *inputs) for inputs in made]
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=aiter_fusion.Backend(provider="triton"))
    aiter_fusion.reset()
    with torch.no_grad():
        for inputs, want in zip(made, wants, strict=True):
            for tensor in inputs[:2] if dynamic else ():
                torch._dynamo.mark_dynamic(tensor, 1)
            assert all(map(same_bits, want, compiled(*inputs)))
    assert [r.replaced for r in aiter_fusion.reports()] == [{"rms_norm_quant": 2}] * (1 if dynamic else 2)


PLAIN_PACKAGE = """
import torch
class Add(torch.nn.Module):
    def forward(self, x):
        return x + 1
x = torch.ones(4, device="cuda")
path = torch._inductor.aoti_compile_and_package(torch.export.export(Add(), (x,)), package_path="plain.pt2")
torch._inductor.aoti_load_package(path)(x)
"""


@functools.cache
def why_no_package(folder: Path) -> str | None:
    """Why packages of AOTInductor do not work on this machine at all, or None."""
    plain = subprocess.run([sys.executable, "-c", PLAIN_PACKAGE], cwd=folder, capture_output=True, text=True)
    return None if plain.returncode == 0 else f"one of torch alone ends with status {plain.returncode}"


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_package_of_aot_inductor(dynamic: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The kernels are in the package, which calls no op, and the bits are the graph's."""
    if why := why_no_package(tmp_path_factory.getbasetemp()):
        pytest.skip(f"needs packages of AOTInductor that load: {why}")

    class Block(torch.nn.Module):
        def forward(self, x: Tensor, r: Tensor, w: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
            return block_of_model(x, r, w, x2)

    numbers = (5, 64) if dynamic else (5,)
    wants = [original(block_of_model, *inputs_of_block(number)) for number in numbers]
    rows = {0: torch.export.Dim("rows", min=2, max=4096)} if dynamic else None
    counts = {"rms_norm_quant": 3, "act_mul_quant": 2}
    fusions = aiter_fusion.Backend(provider="triton", strict=True, expect=counts).graph_pass()
    with torch.no_grad():
        program = torch.export.export(Block(), tuple(inputs_of_block(5)), dynamic_shapes=(rows, rows, None, rows))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "block.pt2"), inductor_configs={SLOT: fusions}
        )
        call = torch._inductor.aoti_load_package(path)
        for number, want in zip(numbers, wants, strict=True):
            assert all(map(same_bits, want, call(*inputs_of_block(number))))
    assert [made.replaced for made in aiter_fusion.reports()] == [counts]


def test_one_graph_serves_any_number_of_rows() -> None:
    fn = cases.FUSION["add_norm"].call(cases.llama, cases.q1_row)
    compiled = torch.compile(fn, backend=aiter_fusion.Backend())
    with torch.no_grad():
        for rows in (7, 3, 2048):
            x, r, w, _ = inputs_of_block(rows)
            for tensor in (x, r):
                torch._dynamo.mark_dynamic(tensor, 0)
            want = fn(x, r, w)
            assert all(map(same_bits, want, compiled(x, r, w)))
    assert len(aiter_fusion.reports()) == 1


def test_verify_and_memory() -> None:
    """Nothing of full size is allocated beside what the plain graph needs."""
    peaks = []
    inputs = [t.repeat(256, 1) if t.dim() > 1 else t for t in inputs_of_block(64)]
    for backend in (aiter_fusion.Backend(verify=True), "inductor"):
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(block_of_model, backend=backend)
            compiled(*inputs)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            outputs = compiled(*inputs)
            peaks.append(torch.cuda.max_memory_allocated() - before)
            del outputs
    assert peaks[0] <= peaks[1] + 2**20


# ---- eps as a tensor ------------------------------------------------------------------------------------------


def eps_in_tensors(eps: float) -> list[Tensor]:
    """On the CPU, where the kernels are given the value, and on the GPU, where they load it."""
    return [torch.tensor(eps, dtype=d, device=at) for at in ("cpu", "cuda") for d in (torch.float64, torch.float32)]


@pytest.mark.parametrize(
    "features", REGISTRY.overloads("rms_norm_quant"), ids=lambda f: "_".join(sorted(f)) or "default"
)
def test_eps_in_a_tensor_is_the_number(features: frozenset[str]) -> None:
    """The reference's bits where sums are exact; on random rows those of the kernel that has the number built in."""
    op = REGISTRY.ops["rms_norm_quant", features]
    random_rows = torch.randn(9, 1000, generator=torch.Generator().manual_seed(0)).bfloat16().cuda()
    for eps in (1e-6, 0.3):
        for block in (0, 250, 1000) if "static" not in features else (0,):
            number = norm_arguments(1000, 9, x=random_rows, block=block, eps=eps)
            want = op.target(*(number[name] for name in op.arguments), "triton")
            want = (want,) if isinstance(want, Tensor) else want
            for tensor in eps_in_tensors(eps):
                same(op, **norm_arguments(512, 9, block=block and 128, eps=None, eps_tensor=tensor))
                given = number | {"eps": None, "eps_tensor": tensor}
                have = op.target(*(given[name] for name in op.arguments), "triton")
                assert all(map(same_bits, want, (have,) if isinstance(have, Tensor) else have))


class Normed(torch.nn.Module):
    """A norm whose eps is an attribute, and a quantiser."""

    def __init__(self, eps: float | Tensor, weight: Tensor) -> None:
        super().__init__()
        self.eps, self.weight = eps, torch.nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return cases.q3(cases.llama(x, self.weight, self.eps))  # type: ignore[arg-type]


class NormedByTwice(Normed):
    """What is added is computed in the graph, where the attribute is."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return cases.q3(cases.llama(x, self.weight, self.eps * 2))  # type: ignore[arg-type]


EPSILONS = (1e-6, 0.25, 3.0)


def outputs_by_eps(kind: type[Normed], x: Tensor, weight: Tensor) -> dict[float, Any]:
    wants = {eps: original(kind(eps, weight), x) for eps in EPSILONS}
    assert not same_bits(wants[0.25][1], wants[3.0][1])
    torch._dynamo.reset()
    aiter_fusion.reset()
    return wants


modes = pytest.mark.parametrize("mode", [None, "reduce-overhead"])


@pytest.mark.parametrize("provider", ["triton", "reference"])
@pytest.mark.parametrize("dynamic", [None, True])
@modes
def test_a_module_s_eps(mode: str | None, dynamic: bool | None, provider: str) -> None:
    """Two modules of a class, and one whose eps changes: each call has the bits of its eps, and waits for nothing."""
    x, _, weight, _ = inputs_of_block(64)
    wants = outputs_by_eps(Normed, x, weight)
    options: Any = {"mode": mode} if mode else {}
    backend = aiter_fusion.Backend(provider=provider)
    with torch.no_grad(), inductor_config.patch(force_disable_caches=True):
        modules = [Normed(eps, weight) for eps in EPSILONS[:2]]
        calls = [torch.compile(m, backend=backend, options=options, dynamic=dynamic) for m in modules]
        for eps, call in zip(EPSILONS, calls, strict=False):
            for _ in range(4):  # with CUDA graphs: warm-up, capture, replay
                have = [t.clone() for t in call(x)]
                assert all(map(same_bits, wants[eps], have))
        for eps in EPSILONS[::-1]:
            modules[-1].eps = eps
            torch.cuda.set_sync_debug_mode("error")
            try:
                have = [t.clone() for t in calls[-1](x)]
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert all(map(same_bits, wants[eps], have)), eps
    reports = aiter_fusion.reports()
    assert len(reports) <= 2
    assert [r.replaced for r in reports] == [{"rms_norm_quant": 1}] * len(reports)


@pytest.mark.parametrize("freezing", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", [Normed, NormedByTwice])
@modes
def test_an_eps_in_a_buffer(mode: str | None, kind: type[Normed], device: str, freezing: bool) -> None:
    """Each call has what is in it then, also where CUDA graphs are replayed, or, frozen, what was in it at first."""
    x, _, weight, _ = inputs_of_block(64)
    wants = outputs_by_eps(kind, x, weight)
    buffer = torch.nn.Buffer(torch.full((), EPSILONS[0], dtype=torch.float64, device=device))
    options: Any = {"mode": mode} if mode else {}
    module = kind(buffer, weight).eval()
    compiled = torch.compile(module, backend=aiter_fusion.Backend(provider="triton"), options=options)
    with torch.no_grad(), inductor_config.patch(force_disable_caches=True, freezing=freezing):
        for eps in EPSILONS[:1] * 4 if freezing else EPSILONS * 3:
            buffer.fill_(eps)
            have = [t.clone() for t in compiled(x)]
            assert all(map(same_bits, wants[eps], have)), eps
    assert [r.replaced for r in aiter_fusion.reports()] == [{"rms_norm_quant": 1}]
