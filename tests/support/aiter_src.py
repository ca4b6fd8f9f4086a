"""AITER's own Triton kernels, from a checkout, against this project's references; on a GPU of any make, or interpreted.

    AITER_SRC=/path/to/aiter python tests/support/aiter_src.py

Prints a line for each call: the entry point, ``ok`` or how it differs. Exit status 1 if any differs. Calls of the fused
ops go through the provider, which finds no HIP kernels in such an AITER and so takes the Triton ones.

Triton's interpreter is wrong where it converts to FP8 and to bfloat16; here it converts as PyTorch does. It has no
libdevice: what uses that is said to need a GPU.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
os.environ["AITER_TRITON_ONLY"] = "1"  # its import needs neither ROCm nor a compiler then
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

FN, BF16, F16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32


def load(checkout: Path) -> None:
    """Make AITER importable off AMD: what it would ask of the GPU is answered for it."""
    target: Any = import_module("triton.backends.compiler").GPUTarget("hip", "gfx950", 64)
    if not (checkout / "aiter" / "ops" / "triton").is_dir():
        raise SystemExit(f"AITER_SRC={checkout}: no checkout of https://github.com/ROCm/aiter")
    sys.path.insert(0, str(checkout))
    if not ON_GPU:

        class Pretended:
            def get_current_target(self) -> Any:
                return target

            def get_active_torch_device(self) -> torch.device:
                return torch.device("cpu")

        import_module("triton.runtime").driver.set_active(Pretended())
        mend_the_interpreter()
    elif torch.version.hip is None:
        leave_out_options_of_amd()
    dtypes: Any = ModuleType("aiter.utility.dtypes")
    dtypes.__dict__.update(fp8=FN, bf16=BF16, fp16=F16, fp32=F32, i8=torch.int8, i32=torch.int32, u8=torch.uint8)
    sys.modules["aiter.utility.dtypes"] = dtypes
    chip: Any = ModuleType("aiter.jit.utils.chip_info")  # asks rocminfo
    chip.get_cu_num = lambda: torch.cuda.get_device_properties(0).multi_processor_count if ON_GPU else 4
    chip.get_gfx = chip.get_gfx_runtime = lambda: "gfx950"
    sys.modules["aiter.jit.utils.chip_info"] = chip
    import aiter  # type: ignore[import-not-found]

    aiter.dtypes = dtypes


def leave_out_options_of_amd() -> None:
    """Kernels are launched with options that Triton takes for AMD's GPUs only; they change no result."""
    jit: Any = import_module("triton.runtime.jit").JITFunction
    run = jit.run

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        left_out = {"waves_per_eu", "matrix_instr_nonkdim", "kpack"}.difference(self.arg_names)
        return run(self, *args, **{name: value for name, value in kwargs.items() if name not in left_out})

    jit.run = launch


def mend_the_interpreter() -> None:
    """It cuts bits off where it should round; takes arrays of one element for numbers, which NumPy no longer does; and
    fails where AITER assumes that a stride is positive which it gives as 0, since it is not used."""
    import numpy as np

    interpreter: Any = import_module("triton.runtime.interpreter")
    theirs = interpreter._convert_float
    known = {"fp8e4nv": FN, "bf16": BF16, "fp16": F16, "fp32": F32}
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if str(source) not in known or str(target) not in known:
            return theirs(values, source, target, rounding)
        a, b = known[str(source)], known[str(target)]
        given = torch.from_numpy(np.frombuffer(values.tobytes(), dtype=f"int{8 * a.itemsize}").copy()).view(a)
        made = given.to(F32).to(b).view(bits[b.itemsize]).numpy()
        return made.view(f"uint{8 * b.itemsize}").reshape(values.shape)

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    original = interpreter._patch_lang_tensor
    interpreter._convert_float, interpreter._patch_lang_tensor = convert, patch
    interpreter.InterpreterBuilder.create_assume = lambda self, condition: None


def moved(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def through_the_provider() -> Iterator[tuple[str, str | None]]:
    """Every path of the fused ops that is a Triton kernel, by the cases that drive the double."""
    from aiter_fusion import machine
    from aiter_fusion.providers.aiter import fused, installation
    from aiter_fusion.providers.aiter import provider as adapter
    from support.aiter_drives import DRIVES, compare

    installation.why_no_aiter = lambda: None  # what the machine is does not matter here
    machine.architecture = lambda device=0: "gfx950"
    adapter.DEVICE = DEVICE
    for drives in DRIVES.values():
        for drive in drives:
            op, arguments = drive.arguments(FN)
            for name, value in arguments.items():
                arguments[name] = value.replace("240", "448") if isinstance(value, str) else value
            arguments = moved(arguments)
            chosen = fused.choose(op, arguments)
            what = (
                f"{op.name.split('::')[1]} {tuple(drive.sizes)} block {arguments.get('block', 'static')} {drive.dtype}"
            )
            if isinstance(chosen, str):
                yield what, f"not run: {chosen}"
                continue
            what = f"{chosen[0].entry.name}: {what}"
            if not ON_GPU and chosen[0].entry.name == "fused_silu_mul_fp8_per_tensor_static_quant":
                yield what, "not run: uses libdevice, so needs a GPU"
                continue
            outputs = fused.compute(op, arguments)
            yield what, compare(op, arguments, outputs)


def norms() -> Iterator[tuple[str, str | None]]:
    from aiter.ops.triton.normalization import rmsnorm  # type: ignore[import-not-found]

    from aiter_fusion import bridge

    for sizes, dtype in (((5, 256), BF16), ((3, 2880), F16), ((1, 200), BF16)):
        generator = torch.Generator().manual_seed(0)
        x, residual = (torch.randn(sizes, generator=generator).to(dtype).to(DEVICE) for _ in range(2))
        weight = torch.randn(sizes[-1], generator=generator).to(dtype).to(DEVICE)
        want = bridge.rms_norm(x, weight, 1e-5, provider="reference")
        yield f"rms_norm: {sizes} {dtype}", far([want], lambda given: [rmsnorm.rms_norm(*given)], (x, weight, 1e-5))

        def added(given: tuple[Any, ...]) -> list[Tensor]:
            out, summed = torch.empty_like(given[0]), torch.empty_like(given[0])
            rmsnorm.rmsnorm2d_fwd_with_add(out, given[0], given[1], summed, *given[2:])
            return [out, summed]

        if not ON_GPU and dtype is BF16:
            yield f"rmsnorm2d_fwd_with_add: {sizes} {dtype}", "not run: the interpreter adds bfloat16 as integers"
            continue
        wanted = bridge.add_rms_norm(x, residual, weight, 1e-5, provider="reference")
        yield f"rmsnorm2d_fwd_with_add: {sizes} {dtype}", far(list(wanted), added, (x, residual, weight, 1e-5))


def products() -> Iterator[tuple[str, str | None]]:
    from aiter.ops.triton.gemm.basic import gemm_a8w8, gemm_a8w8_blockscale  # type: ignore[import-not-found]

    from aiter_fusion.registry import REGISTRY

    # no options of AMD's, which other compilers refuse
    tiles = {"BLOCK_SIZE_M": 32, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1, "NUM_KSPLIT": 1}
    more = {"num_warps": 4, "num_stages": 2, "cache_modifier": None}
    for op, function in (
        (REGISTRY.bridge["gemm_a8w8", frozenset()], gemm_a8w8.gemm_a8w8),
        (REGISTRY.bridge["gemm_a8w8_blockscale", frozenset()], gemm_a8w8_blockscale.gemm_a8w8_blockscale),
    ):
        for arguments in op.samples():
            m, k = arguments["x"].shape
            if m == 0 or arguments["x"].dtype not in (FN, torch.int8) or arguments["w"].shape[0] % 16:
                continue
            given = moved(arguments)
            want = op.reference(**given)["y"]
            if "bias" in given:
                given["w_scale"] = given["w_scale"].reshape(1, -1)
            config = tiles | more | {"SPLITK_BLOCK_SIZE": k}
            what = f"{op.family}: {m} x {want.shape[1]} x {k} {arguments['x'].dtype} {want.dtype}"
            yield what, far([want], lambda call: [call[0](**call[1], config=call[2])], (function, given, config))


def routing() -> Iterator[tuple[str, str | None]]:
    from aiter.ops.triton.moe.moe_routing.topk import grouped_topk  # type: ignore[import-not-found]

    from aiter_fusion.registry import REGISTRY
    from support.bridge_results import same_routing

    for family, mode in (("grouped_topk", "softmax"), ("biased_grouped_topk", "sigmoid")):
        op = REGISTRY.bridge[family, frozenset()]
        for arguments in op.samples():
            given = moved(arguments)
            rows, experts = given["gating"].shape
            if rows == 0 or not given.get("softmax", True):
                continue
            what = f"{family}: {given['topk']} of {experts} in {given['num_expert_group']} groups, {rows} rows"
            try:
                weights, ids, _ = grouped_topk(
                    given["gating"],
                    *(given[name] for name in ("topk", "num_expert_group", "topk_group")),
                    score_mode=mode,
                    bias=given.get("correction_bias"),
                    renorm=given["renormalize"],
                    routed_scaling_factor=given["routed_scaling_factor"],
                )
            except import_module("triton.runtime.errors").InterpreterError as error:
                yield what, f"not run: the interpreter fails, so needs a GPU: {error}"
                continue
            want = op.reference(**given)
            wanted, have = ((w.cpu(), i.cpu()) for w, i in ((want["weights"], want["ids"]), (weights, ids)))
            yield what, None if same_routing(wanted, have) else "other experts or weights"


def attention() -> Iterator[tuple[str, str | None]]:
    """Their Triton namesake wants a table of pages instead of a list; in fp16, since interpreted bfloat16 is wrong."""
    from aiter.ops.triton.attention.mla import mla_decode_fwd  # type: ignore[import-not-found]

    from aiter_fusion.ops import mla
    from aiter_fusion.registry import REGISTRY

    op = REGISTRY.bridge["mla_decode_fwd", frozenset()]
    for lengths, tokens, dtype in (((40, 17), 1, F16), ((21, 9), 2, F16), ((40, 17), 1, BF16)):
        what = f"mla_decode_fwd: sequences of {lengths}, {tokens} queries each, {dtype}"
        if not ON_GPU and dtype is BF16:
            yield what, "not run: the interpreter adds bfloat16 as integers"
            continue
        given = mla.sample(lengths, tokens, 16, 16, 576, 512, dtype, 1)
        starts = given["kv_indptr"].tolist()
        pages = [given["kv_indices"][a:b] for a, b in itertools.pairwise(starts)]
        table = torch.nn.utils.rnn.pad_sequence(pages, batch_first=True).to(DEVICE)
        given = moved(given)

        def run(call: tuple[Any, ...]) -> list[Tensor]:
            given, lengths, table = call
            out = torch.empty(*given["q"].shape[:2], 512, dtype=given["q"].dtype, device=DEVICE)
            lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
            starts = given["qo_indptr"]
            scale = 576**-0.5
            mla_decode_fwd(
                *(
                    given["q"],
                    given["kv_buffer"],
                    out,
                    starts,
                    lens,
                    max(lengths),
                    table,
                    scale,
                    512,
                    64,
                    True,
                    None,
                    None,
                )
            )
            return [out]

        yield what, far([op.reference(**given)["o"]], run, (given, lengths, table))


def further_ops() -> Iterator[tuple[str, str | None]]:
    """In fp16 where they are interpreted, for the most part."""
    from support import aiter_src_ops

    for part in aiter_src_ops.PARTS:
        yield from part(far, moved, (F16, BF16) if ON_GPU else (F16,))


def attention_of_the_bridge() -> Iterator[tuple[str, str | None]]:
    """In fp16 where it is interpreted."""
    from support import aiter_src_attention

    for part in aiter_src_attention.PARTS:
        yield from part(far, moved, (F16, BF16) if ON_GPU else (F16,))


def far(want: list[Tensor], run: Callable[[Any], list[Tensor]], given: tuple[Any, ...]) -> str | None:
    """How results differ, or None. The interpreter fails on some kernels that the compiler takes."""
    from support.bridge_results import alike

    try:
        have = run(given)
    except import_module("triton.runtime.errors").InterpreterError as error:
        return f"not run: the interpreter fails, so needs a GPU: {error}"
    except FileNotFoundError as error:  # of tiles, which there is for AMD's GPUs
        return f"not run: AITER has no configuration for this GPU: {error}"
    for a, b in zip(want, have, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{list(b.shape)} of {b.dtype}"
        if not alike(a, b):
            return f"{(a.float() - b.float()).abs().max():.2e} apart"
    return None


def main() -> int:
    sys.path.insert(0, str(Path(__file__).parent.parent))  # for ``support``
    load(Path(os.environ["AITER_SRC"]).expanduser())
    where = torch.cuda.get_device_name() if ON_GPU else "Triton's interpreter, conversions corrected"
    print(f"AITER's Triton kernels on {where}")
    failed = 0
    for part in (through_the_provider, norms, products, routing, attention, attention_of_the_bridge, further_ops):
        for what, problem in part():
            failed += problem is not None and not problem.startswith("not run")
            print(f"{what}: {problem or 'ok'}", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
