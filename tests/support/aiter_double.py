"""A recording double of AITER, made from ``data/aiter_api.json``: real signatures, and what its kernels are documented
to compute, in plain PyTorch.

The data are signatures of ROCm/aiter's functions by version, extracted from its syntax tree: facts, no code. What each
function computes, mutates, returns and silently gets wrong is written here from its documentation, and shares nothing
with this project's references, so that both can be compared. It knows the traps: what AITER exports is a wrapper that
hides its arguments; HIP kernels take tensors as dense and as of one dtype, whatever they are; transposed scales lie
about their strides; a custom operator of the same name marks every tensor as written to; a communicator disables
itself, answers None to what does not fit, and zeros while a graph is to be captured.

Its all-reduces go over the group that they are given, so several processes can run through it.
"""

from __future__ import annotations

import ast
import enum
import importlib.machinery
import inspect
import json
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from aiter_fusion import machine
from aiter_fusion.providers.aiter import all_reduce, entry_points, hipblaslt, installation, releases
from aiter_fusion.providers.aiter import provider as adapter
from aiter_fusion.providers.architectures import ARCHITECTURES, SUPPORTED

DATA = json.loads((Path(__file__).parent / "data" / "aiter_api.json").read_text())
VERSIONS: list[str] = DATA["tags"]
NEWEST = VERSIONS[-1]

F32 = torch.float32


class ActivationType(enum.Enum):
    Silu, Gelu, Swiglu = range(3)


QuantType = enum.Enum("QuantType", "No per_Tensor per_Token per_1x32 per_1x128 per_128x128", start=0)


class GateMode(enum.Enum):
    SEPARATED = "separated"
    INTERLEAVE = "interleave"


class MlaVersion(enum.Enum):
    V32 = 0


def at(name: str, version: str) -> tuple[str, str, bool] | None:
    """(file, signature, whether it is wrapped) of a function in a version; None if that has none."""
    position = VERSIONS.index(version)
    for first, last, file, signature, wrapped in DATA["functions"][name]["versions"]:
        if VERSIONS.index(first) <= position <= VERSIONS.index(last):
            return (file, signature, wrapped) if signature else None
    raise AssertionError(f"{name} says nothing of {version}")


def homes(name: str, file: str) -> list[str]:
    """The modules in which a function is found: its own, and the package if that exports it."""
    module = file.removesuffix(".py").replace("/", ".")
    return [module, *(["aiter"] if DATA["functions"][name]["exported"] else [])]


def parameters(signature: str) -> dict[str, bool]:
    """Parameter -> whether it has a default."""
    arguments = ast.parse(f"def f{signature}: ...").body[0].args  # type: ignore[attr-defined]
    required = len(arguments.args) - len(arguments.defaults)
    return {argument.arg: position >= required for position, argument in enumerate(arguments.args)}


# The head of the file of what hipBLASLt has tuned.
TUNED = "preshuffle, use_rowwise, trans_a, trans_b, m, n, k, A_data_type, lda, stride_a, B_data_type, ldb, stride_b, "
TUNED += "C_data_type, ldc, stride_c, compute_type, batch_count, algo_index, kernel_name\n"

Computation = Callable[["Double", SimpleNamespace], Any]
COMPUTES: dict[str, Computation] = {}


def computes(function: Computation) -> Computation:
    """What the function of AITER's that is called so does; ``Class__method`` for a method."""
    COMPUTES[function.__name__.replace("__", ".")] = function
    return function


class Double:
    """AITER of one version, on a GPU of one architecture. ``calls`` are (function, arguments bound) in order."""

    def __init__(
        self, version: str = NEWEST, arch: str = "gfx942", signatures: Mapping[str, str] | None = None
    ) -> None:
        self.version, self.arch = version, arch
        known = ARCHITECTURES[arch].fp8 if arch in SUPPORTED else None
        self.fp8: torch.dtype = known or torch.float8_e4m3fn  # of no use to gfx90a
        self.calls: list[tuple[str, SimpleNamespace]] = []
        self.computes = dict(COMPUTES)
        self.extensions = 0
        self.has_kernel: Callable[[int, int, int], bool] = lambda rows, n, k: True  # hipBLASLt, for a shape
        self.tuned: list[tuple[int, int, int]] = []
        self._signatures = signatures or {}
        self._libraries: list[torch.library.Library] = []
        self._modules: dict[str, ModuleType] = {}

    @property
    def called(self) -> list[str]:
        return [name for name, _ in self.calls]

    def install(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Double:
        """Make it the AITER of this process, on a CPU that passes for its GPU."""
        for path in ("aiter/jit/core.py", "aiter/ops/__init__.py"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).touch()
        (folder / "aiter" / "_version.py").write_text(f"__version__ = {self.version!r}\n")
        root = self._module("aiter", folder)
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": F32, "i8": torch.int8, "i32": torch.int32}
        kinds |= {"fp4x2": torch.float4_e2m1fn_x2, "fp8_e8m0": torch.float8_e8m0fnu}
        root.dtypes = SimpleNamespace(fp8=self.fp8, **kinds)  # type: ignore[attr-defined]
        root.ActivationType, root.QuantType = ActivationType, QuantType  # type: ignore[attr-defined]
        for name in (name for name in DATA["functions"] if name in self.computes):  # nobody calls the others
            found = at(name, self.version)
            if found is not None:
                self._add(name, *found)
        for name, module in self._modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(installation, "_failure", {})
        monkeypatch.setattr(installation, "why_no_aiter", lambda: None)
        monkeypatch.setattr(machine, "architecture", lambda device=0: self.arch)
        monkeypatch.setattr(adapter, "DEVICE", "cpu")
        monkeypatch.setattr(hipblaslt, "known", hipblaslt.Known())
        monkeypatch.setattr(all_reduce, "_communicators", {})
        self._forget_answers()
        return self

    @staticmethod
    def _forget_answers() -> None:
        adapter.missing.cache_clear()
        entry_points.probe.cache_clear()
        releases.installed.cache_clear()

    def forget(self) -> None:
        """Take its operators back."""
        self._forget_answers()
        while self._libraries:
            self._libraries.pop()._destroy()

    def _module(self, name: str, folder: Path | None = None) -> ModuleType:
        if name not in self._modules:
            module = ModuleType(name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
            module.__path__ = [str(folder / name)] if folder else []
            module.__spec__.submodule_search_locations = module.__path__
            self._modules[name] = module
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(self._module(parent), child, module)
        return self._modules[name]

    def _add(self, name: str, file: str, signature: str, wrapped: bool) -> None:
        signature = self._signatures.get(name, signature)
        known = {"torch": torch, "dtypes": self._modules["aiter"].dtypes, "fp8_dtype": self.fp8}  # type: ignore[attr-defined]
        known |= {"ActivationType": ActivationType, "QuantType": QuantType, "GateMode": GateMode}
        known |= {"MlaVersion": MlaVersion}
        scope: dict[str, Any] = {}
        exec(f"def f{signature}: ...", known, scope)
        declared = inspect.signature(scope["f"])

        def plain(*args: Any, **kwargs: Any) -> Any:
            bound = declared.bind(*args, **kwargs)
            bound.apply_defaults()
            given = SimpleNamespace(**bound.arguments)
            self.calls.append((name, given))
            return self.computes[name](self, given)

        if name in CLASSES:

            def made(this: Any, *args: Any, **kwargs: Any) -> None:
                this.__dict__.update(plain(*args, **kwargs))

            members = {"__init__": made, "__signature__": declared, **CLASSES[name]}
            for home in homes(name, file):
                setattr(self._module(home), name, type(name, (), members))
            return

        def wrapper_custom(*args: Any, **kwargs: Any) -> Any:
            return plain(*args, **kwargs)

        if wrapped:
            self._register(name, declared)
        else:
            plain.__signature__ = declared  # type: ignore[attr-defined]
        for home in homes(name, file):
            owner, _, method = name.rpartition(".")
            place = getattr(self._module(home), owner) if owner else self._module(home)
            setattr(place, method, wrapper_custom if wrapped else plain)

    def _register(self, name: str, declared: inspect.Signature) -> None:
        """The custom operator that tells a wrapper's arguments. It marks every tensor as written to."""
        types = DATA["functions"][name]["types"]
        arguments, tensors = [], 0
        for parameter in declared.parameters.values():
            given = type(parameter.default).__name__  # of an argument that newer versions do not have
            known = given if given in ("bool", "int", "float", "str") else "Tensor"
            kind = types.get(parameter.name, known).replace("torch.", "")
            optional = "?" if "None" in kind else ""
            kind = {"Tensor": "Tensor", "dtype": "ScalarType"}.get(kind.split(" ")[0], kind.split(" ")[0])
            if kind == "Tensor":
                kind, tensors = f"Tensor(a{tensors}!)", tensors + 1
            default = "" if parameter.default is parameter.empty else f"={_literal(parameter.default)}"
            arguments.append(f"{kind}{optional} {parameter.name}{default}")
        if not tensors or not arguments[0].startswith("Tensor"):
            arguments.insert(0, "Tensor dummy")
        self._libraries.append(torch.library.Library("aiter", "FRAGMENT"))
        self._libraries[-1].define(f"{name}({', '.join(arguments)}) -> ()")


def _literal(value: Any) -> str:
    return {torch.bfloat16: "15"}.get(value) or (f'"{value}"' if isinstance(value, str) else str(value))


# ---- what its kernels compute --------------------------------------------------------------------------------------


def dense(x: Tensor) -> Tensor:
    """What a kernel reads that takes rows to follow each other, whatever the strides say."""
    return x.as_strided((x.shape[0], x.shape[1]), (x.shape[1], 1))


def supported(double: Double, *tensors: Tensor) -> None:
    """HIP's table of dtypes has the native FP8 only."""
    for tensor in tensors:
        if tensor.dtype not in (torch.bfloat16, torch.float16, F32, torch.int8, torch.int32, double.fp8):
            raise AssertionError(f"Unsupported dtype: {tensor.dtype}")


def normalised(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + epsilon) * weight


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    top = torch.finfo(dtype).max
    return x.clamp(-top, top).to(dtype)


def quantised(x: Tensor, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values and row-major scales ``[M, cdiv(N, group)]``; the last group may be a part."""
    rows, width = x.shape
    groups = -(-width // group)
    padded = torch.nn.functional.pad(x, (0, groups * group - width)).reshape(rows, groups, group)
    scale = padded.abs().amax(-1).clamp_min(1e-10) / torch.finfo(dtype).max
    q = saturated(padded * (1.0 / scale)[..., None], dtype)
    return q.reshape(rows, -1)[:, :width].contiguous(), scale


def column_major_bytes(scale: Tensor) -> Tensor:
    """The bytes of the transpose under a contiguous shape: wrong, if indexed."""
    return scale.t().contiguous().view(scale.shape)


def check_groups(width: int, group: int) -> bool:
    each = 8 if width <= 2048 else 16 if width <= 4096 else 24 if width <= 6144 else 32
    threads = group // each
    return group % each == 0 and group <= 64 * each and threads & (threads - 1) == 0


def _hip_rmsnorm_quant(double: Double, a: SimpleNamespace, residual: bool) -> None:
    supported(double, a.out, a.input, a.weight)
    by_byte = a.scale.element_size() == 1
    assert not by_byte or VERSIONS.index(double.version) >= VERSIONS.index("v0.1.18"), "float32 written into bytes"
    x = dense(a.input).to(F32)
    width = x.shape[-1]
    if width > 8192 or (a.group_size and not check_groups(width, a.group_size)):
        raise RuntimeError(f"AITER_CHECK: group_size not support: {a.group_size}")
    weight = a.weight.view(a.input.dtype)[:width].to(F32)  # reinterpreted, not converted
    if residual:
        x = x + dense(a.residual_in.view(a.input.dtype)).to(F32)
        a.residual_out.copy_(x.to(a.input.dtype))
    y = normalised(x, weight + 1 if getattr(a, "gemma_norm", False) else weight, a.epsilon)
    q, scale = quantised(y, a.group_size or width, a.out.dtype)
    if by_byte:
        assert a.group_size, "e8m0 byte scale requires group_size != 0"
        power = torch.exp2(torch.ceil(torch.log2(scale)))
        q = saturated((y.unflatten(-1, (-1, a.group_size)) / power[..., None]).flatten(-2), a.out.dtype)
        scale = (torch.log2(power) + 127).to(torch.uint8)
    a.out.copy_(q)
    a.scale.view(-1)[:] = (column_major_bytes(scale) if a.shuffle_scale else scale).view(-1)


@computes
def rmsnorm_quant(double: Double, a: SimpleNamespace) -> None:
    _hip_rmsnorm_quant(double, a, residual=False)


@computes
def add_rmsnorm_quant(double: Double, a: SimpleNamespace) -> None:
    _hip_rmsnorm_quant(double, a, residual=True)


@computes
def silu_and_mul_quant(double: Double, a: SimpleNamespace) -> None:
    supported(double, a.out, a.input, a.scale)
    gate, up = dense(a.input).to(F32).chunk(2, -1)
    width = gate.shape[-1]
    y = gate * torch.sigmoid(gate) * up
    q, scale = quantised(y, a.group_size, a.out.dtype)
    if not check_groups(width, a.group_size):
        scale = scale.roll(1, -1)  # no check: the group's number of threads is truncated
    a.out.copy_(q)
    a.scale.copy_(column_major_bytes(scale) if a.shuffle_scale else scale)


@computes
def fused_rms_fp8_group_quant(double: Double, a: SimpleNamespace) -> Any:
    assert a.group_size & (a.group_size - 1) == 0, "tl.arange wants a power of two"
    x = a.inp1.to(F32) if a.res1 is None else a.inp1.to(F32) + a.res1.to(F32)
    y = normalised(x, a.inp1_weight.to(F32), a.inp1_epsilon)
    q, scale = quantised(y, a.group_size, a.dtype_quant)
    if a.transpose_scale:
        strided = getattr(a, "is_x_scale_strided", False)
        scale = scale.t().contiguous().t() if strided else column_major_bytes(scale)
    value = y.to(a.inp1.dtype) if a.output_unquantized_inp1 else None
    return (q, scale), value, None, None if a.res1 is None else x.to(a.inp1.dtype)


@computes
def fused_rms_fp8_per_tensor_static_quant(double: Double, a: SimpleNamespace) -> Any:
    assert a.inp1_scale.numel() == 1
    assert a.inp1_scale.dtype == F32
    x = a.inp1.to(F32) if a.res1 is None else a.inp1.to(F32) + a.res1.to(F32)
    y = normalised(x, a.inp1_weight.to(F32), a.inp1_epsilon)
    value = y.to(a.inp1.dtype) if a.output_unquantized_inp1 else None
    if getattr(a, "rmsnorm_convert_to_inp1_type", False):
        y = y.to(a.inp1.dtype).to(F32)
    q = saturated(y * (1.0 / a.inp1_scale.reshape(())), a.dtype_quant)
    return q, value, None, None if a.res1 is None else x.to(a.inp1.dtype)


@computes
def act_mul_and_fp8_group_quant(double: Double, a: SimpleNamespace) -> Any:
    assert a.group_size & (a.group_size - 1) == 0, "tl.arange wants a power of two"
    gate, up = a.x.to(F32).chunk(2, -1)
    act = {
        "silu": lambda x: x * torch.sigmoid(x),
        "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
        "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "relu": torch.relu,
    }.get(a.activation, lambda x: x)  # an unknown name is the identity
    return quantised(act(gate) * up, a.group_size, a.dtype_quant)


@computes
def fused_silu_mul_fp8_per_tensor_static_quant(double: Double, a: SimpleNamespace) -> Any:
    gate, up = a.inp.to(F32).chunk(2, -1)
    silu = gate / (1 + torch.exp(-gate))
    if a.silu_convert_to_inp_type:
        silu = silu.to(a.inp.dtype).to(F32)
    return saturated(silu * up * (1.0 / a.inp_scale.reshape(())), a.dtype_quant)


@computes
def rms_norm(double: Double, a: SimpleNamespace) -> Tensor:
    supported(double, a.input, a.weight)
    x = dense(a.input).to(F32)
    return normalised(x, a.weight.view(a.input.dtype)[: x.shape[1]].to(F32), a.epsilon).to(a.input.dtype)


@computes
def rmsnorm2d_fwd_with_add(double: Double, a: SimpleNamespace) -> None:
    supported(double, a.out, a.input, a.residual_in, a.residual_out, a.weight)
    x = dense(a.input).to(F32) + dense(a.residual_in).to(F32)
    weight = a.weight.view(a.input.dtype)[: x.shape[1]].to(F32)
    a.residual_out.copy_(x)
    a.out.copy_(normalised(x, weight + 1 if getattr(a, "gemma_norm", False) else weight, a.epsilon))


def product(x: Tensor, w: Tensor) -> Tensor:
    return (x.double() @ w.double().t()).to(F32)


@computes
def gemm_a8w8(double: Double, a: SimpleNamespace) -> Tensor:
    supported(double, a.XQ, a.WQ)
    assert a.x_scale.shape == (a.XQ.shape[0], 1)
    assert a.w_scale.numel() == a.WQ.shape[0]
    assert a.x_scale.dtype == a.w_scale.dtype
    y = product(dense(a.XQ), dense(a.WQ)) * a.x_scale * a.w_scale.reshape(1, -1)
    return (y if a.bias is None else y + a.bias.to(F32)).to(a.dtype)


@computes
def gemm_a8w8_blockscale(double: Double, a: SimpleNamespace) -> Tensor:
    supported(double, a.XQ, a.WQ)
    assert not getattr(a, "isBpreshuffled", False), "reaches an undefined name"
    (m, k), n = a.XQ.shape, a.WQ.shape[0]
    x_scale = dense(a.x_scale)  # by rows, whatever its strides
    y = torch.zeros(m, n, dtype=torch.float64)
    for block in range(k // 128):
        columns = slice(block * 128, block * 128 + 128)
        part = a.XQ[:, columns].double() @ a.WQ[:, columns].double().t()
        y += part * x_scale[:, block, None] * a.w_scale[:, block].repeat_interleave(128)[None]
    return y.to(a.dtype)


@computes
def hipb_create_extension(double: Double, a: SimpleNamespace) -> None:
    """Makes the process's one handle anew, and forgets the one before."""
    double.extensions += 1


@computes
def hipb_mm(double: Double, a: SimpleNamespace) -> Tensor:
    assert double.extensions == 1, "hipb_create_extension comes first, and once"
    supported(double, a.mat1, a.mat2)
    (m, k), n = a.mat1.shape, a.mat2.shape[1]
    since = VERSIONS.index(double.version)
    tuned = os.environ.get("HIP_ONLINE_TUNING") in ("1", "true") and m <= 512
    tuned = tuned and since >= VERSIONS.index("v0.1.10.post2")
    if not double.has_kernel(m, n, k):
        if tuned or since < VERSIONS.index("v0.1.12"):
            raise SystemExit("hipBLAS error: exit(EXIT_FAILURE)")
        raise RuntimeError(
            f"hipblasLtMatmulAlgoGetHeuristic found 0 valid solutions for TN ({n}, {m}, {k}), intype: 1000, "
            f"outtype: 14, use_rowwise: 1, bpreshuffle: {int(bool(a.bpreshuffle))}, request_solutions: 1"
        )
    if tuned:
        double.tuned.append((m, n, k))
        results, said = Path("hip_online_tuning_res.csv"), str(bool(a.bpreshuffle)).lower()  # in the current directory
        known = results.read_text() if results.is_file() else TUNED
        row = f"{said},true,T,N,{n},{m},{k},"  # of hipBLASLt, whose result is the transpose
        if f"\n{row}" not in known:  # a row that is there is read, not tuned again
            known += f"{row}f8_e4m3_fnuz_r,{k},0,f8_e4m3_fnuz_r,{k},0,bf16_r,{n},0,f32_r,1,7,Cijk\n"
        results.write_text(known)
    assert (a.scaleA.shape, a.scaleB.shape) == ((m, 1), (1, n)), "or one element each"
    assert a.out_dtype == torch.bfloat16
    assert n >= 16
    assert n % 16 == k % 16 == 0
    weight = a.mat2.t()
    if a.bpreshuffle:  # tile (i, j) of 16 x 32 is stored whole, its left 16 columns first
        stored, weight = weight.reshape(-1).view(torch.uint8), torch.empty(n, k, dtype=torch.uint8)
        tiles = stored.view(n // 16, k // 32, 512)
        for i in range(n // 16):
            for j in range(k // 32):
                halves = tiles[i, j].view(2, 16, 16)
                weight[i * 16 : i * 16 + 16, j * 32 : j * 32 + 32] = torch.cat([halves[0], halves[1]], 1)
        weight = weight.view(a.mat2.dtype)
    by_rows = since >= VERSIONS.index("v0.1.6.post2")
    y = product(a.mat1, weight) * (a.scaleA * a.scaleB if by_rows else a.scaleA[0] * a.scaleB[:, 0])
    return (y if a.bias is None else y + a.bias.to(F32)).to(a.out_dtype)


@computes
def shuffle_weight(double: Double, a: SimpleNamespace) -> Tensor:
    n, k = a.x.shape
    return a.x.view(n // 16, 16, k // 32, 2, 16).permute(0, 2, 3, 1, 4).contiguous().view(n, k)


def chosen(a: SimpleNamespace, scores: Tensor, ids: Tensor, scaling: float) -> None:
    picked = scores.gather(1, ids)
    a.topk_weights.copy_((picked / picked.sum(-1, keepdim=True) if a.need_renorm else picked) * scaling)


def _in_groups(a: SimpleNamespace, scores: Tensor, best: int, weigh: Tensor) -> None:
    for row in range(scores.shape[0]):
        groups = scores[row].view(a.num_expert_group, -1)
        value = groups.sort(-1, descending=True).values[:, :best].sum(-1)
        keep = value.argsort(descending=True)[: a.topk_group].tolist()
        size = groups.shape[1]
        experts = [e for e in scores[row].argsort(descending=True).tolist() if e // size in keep]
        a.topk_ids[row] = torch.tensor(experts[: a.topk_ids.shape[1]])
    chosen(a, weigh, a.topk_ids.long(), a.routed_scaling_factor)


@computes
def grouped_topk(double: Double, a: SimpleNamespace) -> None:
    gating = a.gating_output.to(F32)
    scores = torch.softmax(gating, -1) if a.is_softmax else torch.sigmoid(gating)
    _in_groups(a, scores, 1, scores)


@computes
def biased_grouped_topk(double: Double, a: SimpleNamespace) -> Any:
    """Of 2 and of 4 groups the scores are wrong where 64 lanes run together."""
    scores = torch.sigmoid(a.gating_output.to(F32))
    _in_groups(a, scores + a.correction_bias.to(F32), 1 if a.num_expert_group in (2, 4) else 2, scores)
    return None if a.gating_output.shape[0] < 5 else (a.topk_weights, a.topk_ids)


# ---- all-reduces ---------------------------------------------------------------------------------------------------


@contextmanager
def _capture(this: Any) -> Iterator[None]:
    this._IS_CAPTURING = True
    yield
    this._IS_CAPTURING = False


CLASSES: dict[str, dict[str, Any]] = {"CustomAllreduce": {"capture": _capture}}


@computes
def CustomAllreduce(double: Double, a: SimpleNamespace) -> dict[str, Any]:  # noqa: N802
    """The state of a communicator."""
    assert dist.get_backend(a.group) != "nccl", "CustomAllreduce should be attached to a non-NCCL group."
    world = dist.get_world_size(a.group)
    most = int(os.environ.get("AITER_CUSTOM_AR_MAX_SIZE", 64 << 20))
    return {
        "_IS_CAPTURING": False,
        "disabled": world not in (2, 4, 6, 8),
        "group": a.group,
        "world": world,
        "least": int(os.environ.get("AITER_CUSTOM_AR_MIN_SIZE", 0)),
        "most": most if most <= a.max_size else 64 << 20,
        "pool": a.max_size,
        "thread": threading.get_ident(),
    }


def _reduced(a: SimpleNamespace, stages: int) -> Tensor:
    """The ranks' sum in float32, rounded. Of two stages each rank sums an equal share, and what remains stays as it
    was."""
    mine = a.input.contiguous()
    assert mine.nbytes <= a.self.pool, "registered buffer is too small to contain the input"
    every = [torch.empty_like(mine.view(torch.uint8)) for _ in range(a.self.world)]
    dist.all_gather(every, mine.view(torch.uint8), group=a.self.group)
    ranks = [other.view(mine.dtype) for other in every]
    total = ranks[0].to(F32)
    for other in ranks[1:]:
        total = total + other.to(F32)
    total = total.to(mine.dtype)
    packs = mine.nbytes // 16
    if stages == 2 and packs % a.self.world:
        total.view(-1)[packs // a.self.world * a.self.world * 8 :] = float("nan")
    return total


def _fused_all_reduce(double: Double, a: SimpleNamespace, group: int | None) -> Any:
    """``group``: how many elements share a scale, 0 those of a row; None without FP8."""
    ca, x = a.self, a.input
    fits = x.nbytes % 16 == 0 and ca.least < x.nbytes <= ca.most and x.untyped_storage().nbytes() >= x.nbytes
    if ca.disabled or not fits or not x.is_contiguous():
        return None
    width = x.shape[-1]
    emit, gemma = getattr(a, "emit_bf16", False), getattr(a, "gemma_norm", False)
    if group:
        threads = group // 8
        if group % 8 or threads & (threads - 1) or threads > 64 or width % group:
            raise ValueError(f"per-group quant requires another group_size than {group}")
    if ca._IS_CAPTURING:  # and nothing is being captured on a CPU: a warm-up
        scale = torch.zeros(*x.shape[:-1], width // group if group else 1)
        q = torch.zeros(x.shape, dtype=double.fp8)
        zeros = (torch.zeros_like(x), torch.zeros_like(x))
        return zeros if group is None else (q, zeros[0], scale, *zeros[1:][: 1 if emit else 0])
    supported(double, x, a.residual_inp, a.weight)
    if ca.world not in (2, 4, 8):
        raise RuntimeError("fused allreduce rmsnorm: unsupported world_size")
    packs = width // 8
    stages = 1 if a.use_1stage and width % 8 == 0 and packs <= 1024 else 2
    if stages == 2 and group is None and not 64 <= packs <= 2048:
        raise RuntimeError("fused allreduce rmsnorm: n too small, or too large")
    if stages == 2 and group is not None and packs > 1024:
        return tuple(torch.full_like(x, float("nan")) for _ in range(4 if emit else 3))  # prints, and writes nothing
    summed = _reduced(a, stages).to(F32) + dense(a.residual_inp.view(x.dtype)).to(F32)
    residual = summed.to(x.dtype)
    if stages == 2 and group is not None:
        summed = residual.to(F32)
    weight = a.weight.view(x.dtype)[:width].to(F32) + (1 if gemma else 0)  # reinterpreted, not converted
    squares = summed * summed
    if stages == 2 and group is not None:
        squares = squares[:, : packs // 32 * 32 * 8]  # of the last wave, if a part, nothing is counted
    y = summed * torch.rsqrt(squares.sum(-1, keepdim=True) / width + a.eps) * weight
    if group is None:
        return y.to(x.dtype), residual
    groups = y.view(x.shape[0], -1, group or width)
    most = groups.abs().amax(-1)
    scale = torch.where(most == 0, 1.0, most / torch.finfo(double.fp8).max)
    q = saturated(groups / scale[..., None], double.fp8).view(x.shape)
    if getattr(a, "transpose_scale", False):
        scale = scale.t().contiguous().t()
    return (q, residual, scale, y.to(x.dtype)) if emit else (q, residual, scale)


@computes
def CustomAllreduce__custom_fused_ar_rms(double: Double, a: SimpleNamespace) -> Any:  # noqa: N802
    return _fused_all_reduce(double, a, None)


@computes
def CustomAllreduce__custom_fused_ar_rms_quant(double: Double, a: SimpleNamespace) -> Any:  # noqa: N802
    return _fused_all_reduce(double, a, 0)


@computes
def CustomAllreduce__custom_fused_ar_rms_per_group_quant(double: Double, a: SimpleNamespace) -> Any:  # noqa: N802
    return _fused_all_reduce(double, a, a.group_size)


def binds(entries: Collection[entry_points.EntryPoint], version: str) -> bool:
    """Whether calls of all these entry points bind in a version, by signatures alone."""
    return all(why_unbound(entry, version) is None for entry in entries)


def why_unbound(entry: entry_points.EntryPoint, version: str) -> str | None:
    found = at(entry.name, version)
    if found is None or not set(homes(entry.name, found[0])) & set(entry.homes):
        return "is not there"
    known = parameters(found[1])
    return entry_points.unbound(known, [name for name, default in known.items() if not default], entry.takes)


# What the functions of further subjects compute; these modules take ``computes`` from this one.
from . import aiter_double_attention, aiter_double_ops  # noqa: E402, F401
