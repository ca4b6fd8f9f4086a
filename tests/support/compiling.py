"""Kernels compiled for GPUs that need not be here."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aiter_fusion.providers.triton import jit, launches

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
# What kernels are compiled for, without having it: (Triton's target, its FP8 format, Triton's name of that, the bytes
# of shared memory that a block can have).
TARGETS = {
    "sm_89": (("cuda", 89, 32), FN, "fp8e4nv", 99 << 10),
    "sm_90": (("cuda", 90, 32), FN, "fp8e4nv", 227 << 10),
    "sm_100": (("cuda", 100, 32), FN, "fp8e4nv", 227 << 10),
    "gfx942": (("hip", "gfx942", 64), FNUZ, "fp8e4b8", 64 << 10),
    "gfx950": (("hip", "gfx950", 64), FN, "fp8e4nv", 160 << 10),
}
MOST_THREADS = 1024  # of a block on every one of them

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton==3.6.0"
)


def kinds_of(tensors: Mapping[str, Tensor | None], fp8: str) -> dict[str, str]:
    """Triton's names for pointers to tensors; an eps on the CPU is given by value."""
    names = {
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
        torch.float32: "*fp32",
        torch.float64: "*fp64",
        torch.bool: "*i1",
        torch.int8: "*i8",
        torch.uint8: "*u8",
        torch.int32: "*i32",
        torch.int64: "*i64",
    }
    found = {name: names.get(tensor.dtype, f"*{fp8}") for name, tensor in tensors.items() if tensor is not None}
    return found | ({"eps_tensor": found["eps_tensor"][1:]} if "eps_tensor" in found else {})


def _is_multiple(value: object) -> bool:
    return isinstance(value, launches.Ref) or (isinstance(value, int) and value % 16 == 0)


def spills(code: Mapping[str, str], folder: Path) -> int:
    """Registers that compiled code keeps in memory for want of room: bytes on NVIDIA's GPUs, registers on AMD's.

    There only vector registers count: a scalar one goes to a lane of a vector register, and only if there is none to
    memory, for which a vector register is then counted.
    """
    if "ptx" not in code:
        return sum(map(int, re.findall(r"\.vgpr_spill_count: *(\d+)", code["amdgcn"])))
    ptxas = import_module("triton").knobs.nvidia.ptxas.path
    (target,) = re.findall(r"\.target (\w+)", code["ptx"])
    (folder / "kernel.ptx").write_text(code["ptx"])
    made = subprocess.run(
        [ptxas, "-v", f"-arch={target}", folder / "kernel.ptx", "-o", folder / "kernel.cubin"],
        capture_output=True,
        text=True,
        check=True,
    )
    return sum(map(int, re.findall(r"(\d+) bytes spill", made.stderr)))


@cache
def _amd() -> list[str]:
    """The one AMD GPU that this process has compiled for, once it has."""
    return []


def _first_of_amd(target: str) -> str:
    """That GPU. Triton 3.6 keeps the conversions to FP8 of the first it compiles for, and uses them for others: gfx950
    after gfx942 converts in software, gfx942 after gfx950 fails."""
    if not _amd():
        _amd().append(target)
    return _amd()[0]


@cache
def _process_of(target: str) -> ProcessPoolExecutor:
    """A process that compiles for one AMD GPU."""
    return ProcessPoolExecutor(1, get_context("spawn"))


def compile_there(*call: Any) -> None:
    """Compile what ``compiled_for`` would, into Triton's cache."""
    compiled_for(*call)


def compile_for(
    target: str, launch: launches.Launch, kinds: Mapping[str, str], aligned: bool = False, number: str = "fp32"
) -> Mapping[str, str]:
    """The code by stage of compilation of what ``compiled_for`` compiles."""
    return compiled_for(target, launch, kinds, aligned, near=aligned, number=number).asm


def compiled_for(
    target: str,
    launch: launches.Launch,
    kinds: Mapping[str, str],
    aligned: bool = False,
    near: bool = False,
    number: str = "fp32",
) -> Any:
    """Compile a launch for a GPU that need not be here, and check that this GPU can launch it; ``kinds`` are Triton's
    types of its tensors. Returns Triton's compiled kernel.

    aligned: tell the compiler which numbers are multiples of 16, as all pointers then are: that is what a call does.
    near:    tell it that tensors have less than 2 GiB, as a call on an AMD GPU does of those that have; they are then
        buffers, whose loads and stores need no branch for what is masked.
    number:  the type of floating-point numbers; Inductor's calls give ``fp64``.
    """
    triton = import_module("triton")
    compiler = import_module("triton.compiler")
    machine_of = import_module("triton.backends.compiler").GPUTarget
    machine, _, _, shared = TARGETS[target]
    if machine[0] == "hip" and _first_of_amd(target) != target:  # there it is compiled, here it is read from the cache
        _process_of(target).submit(compile_there, target, launch, dict(kinds), aligned, near, number).result()
    function = jit.kernel(launch.kernel)
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(function.params):
        value = launch.arguments[parameter.name]
        if isinstance(value, launches.Ref):
            signature[parameter.name] = kinds.get(value.name, "*fp32")
        elif value is None or parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        else:
            signature[parameter.name] = number if isinstance(value, float) else "i32"
        if aligned and signature[parameter.name] != "constexpr" and _is_multiple(value):
            attributes[(index,)] = [["tt.divisibility", 16]]
            if near and machine[0] == "hip" and signature[parameter.name].startswith("*"):
                attributes[(index,)].append(["tt.pointer_range", 32])
    source = compiler.ASTSource(function, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=machine_of(*machine), options={"num_warps": launch.warps})
    assert made.metadata.num_warps * machine[2] <= MOST_THREADS
    assert made.metadata.shared <= shared
    if machine[0] == "hip":  # what the hardware holds a launch to
        (workgroup,) = re.findall(r"\.max_flat_workgroup_size: *(\d+)", made.asm["amdgcn"])
        assert made.metadata.num_warps * machine[2] <= int(workgroup) <= MOST_THREADS
    return made


def in_float64(code: Mapping[str, str]) -> list[str]:
    """What compiled code does in float64, apart from taking such arguments and rounding them to float32."""
    lines = [line for line in code["ttgir"].splitlines() if re.search(r"\bf64\b|xf64", line)]
    return [line for line in lines if "tt.func" not in line and not ("arith.truncf" in line and "f64 to f32" in line)]
