"""A recording double of AITER, made from ``data/aiter_api.json``: real signatures, and what its kernels are documented
to compute, in plain PyTorch.

The data are signatures of ROCm/aiter's functions by version, extracted from its syntax tree: facts, no code. What each
function computes, mutates, returns and silently gets wrong is written here from its documentation, and shares nothing
with this project's references, so that both can be compared. It knows the traps: what AITER exports is a wrapper that
hides its arguments; HIP kernels take tensors as dense and as of one dtype, whatever they are; transposed scales lie
about their strides; a custom operator of the same name marks every tensor as written to.
"""

from __future__ import annotations

import ast
import enum
import importlib.machinery
import inspect
import json
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from aiter_fusion import platform
from aiter_fusion.providers import aiter as adapter
from aiter_fusion.providers.aiter import entry_points

DATA = json.loads((Path(__file__).parent / "data" / "aiter_api.json").read_text())
VERSIONS: list[str] = DATA["tags"]
NEWEST = VERSIONS[-1]

F32 = torch.float32


class ActivationType(enum.Enum):
    Silu, Gelu, Swiglu = range(3)


QuantType = enum.Enum("QuantType", "No per_Tensor per_Token per_1x32 per_1x128 per_128x128", start=0)


class GateMode(enum.Enum):
    SEPARATED = "separated"


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


Computation = Callable[["Double", SimpleNamespace], Any]
COMPUTES: dict[str, Computation] = {}


def computes(function: Computation) -> Computation:
    """What the function of AITER's that is called so does."""
    COMPUTES[function.__name__] = function
    return function


class Double:
    """AITER of one version, on a GPU of one architecture. ``calls`` are (function, arguments bound) in order."""

    def __init__(
        self, version: str = NEWEST, arch: str = "gfx942", signatures: Mapping[str, str] | None = None
    ) -> None:
        self.version, self.arch = version, arch
        self.fp8 = platform.SUPPORTED_ARCHITECTURES.get(arch, torch.float8_e4m3fn)
        self.calls: list[tuple[str, SimpleNamespace]] = []
        self.computes = dict(COMPUTES)
        self.extensions = 0
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
        root.dtypes = SimpleNamespace(fp8=self.fp8, bf16=torch.bfloat16, fp32=F32)  # type: ignore[attr-defined]
        root.ActivationType, root.QuantType = ActivationType, QuantType  # type: ignore[attr-defined]
        for name in DATA["functions"]:
            found = at(name, self.version)
            if found is not None:
                self._add(name, *found)
        for name, module in self._modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(platform, "_failure", {})
        monkeypatch.setattr(platform, "why_no_aiter", lambda: None)
        monkeypatch.setattr(platform, "architecture", lambda device=0: self.arch)
        monkeypatch.setattr(adapter, "DEVICE", "cpu")
        entry_points.probe.cache_clear()
        return self

    def forget(self) -> None:
        """Take its operators back."""
        entry_points.probe.cache_clear()
        for library in self._libraries:
            library._destroy()

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
        scope: dict[str, Any] = {}
        exec(f"def f{signature}: ...", known, scope)
        declared = inspect.signature(scope["f"])

        def plain(*args: Any, **kwargs: Any) -> Any:
            bound = declared.bind(*args, **kwargs)
            bound.apply_defaults()
            given = SimpleNamespace(**bound.arguments)
            self.calls.append((name, given))
            return self.computes[name](self, given)

        def wrapper_custom(*args: Any, **kwargs: Any) -> Any:
            return plain(*args, **kwargs)

        if wrapped:
            self._register(name, declared)
        else:
            plain.__signature__ = declared  # type: ignore[attr-defined]
        for home in homes(name, file):
            setattr(self._module(home), name, wrapper_custom if wrapped else plain)

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
        library = torch.library.Library("aiter", "FRAGMENT")
        library.define(f"{name}({', '.join(arguments)}) -> ()")
        self._libraries.append(library)


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
    supported(double, a.out, a.input, a.weight, a.scale)
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


def binds(entries: Collection[entry_points.EntryPoint], version: str) -> bool:
    """Whether calls of all these entry points bind in a version, by signatures alone."""
    return all(why_unbound(entry, version) is None for entry in entries)


def why_unbound(entry: entry_points.EntryPoint, version: str) -> str | None:
    found = at(entry.name, version)
    if found is None or not set(homes(entry.name, found[0])) & set(entry.homes):
        return "is not there"
    known = parameters(found[1])
    return entry_points.unbound(known, [name for name, default in known.items() if not default], entry.keywords)
