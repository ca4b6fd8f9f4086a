"""Compiles kernels for sm_90, gfx942 and gfx950 without a GPU; prints registers, spills, shared memory, instructions."""

import os, re, subprocess, sys, tempfile, time
import torch, triton
from triton.compiler import ASTSource
from triton.backends.compiler import GPUTarget
from linear_kernels import Config, mocked

NV = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin")
T = {
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e4m3fnuz: "*fp8e4b8",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
}


def source(step):
    fn = step.kernel
    sig, const, attrs = {}, {}, {}
    for i, p in enumerate(fn.params):
        v = step.arguments[p.name]
        if p.is_constexpr:
            sig[p.name] = "constexpr"
            const[p.name] = v
        elif isinstance(v, torch.dtype):
            sig[p.name] = T[v]
            attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            if v == 1 and not p.do_not_specialize:
                sig[p.name] = "constexpr"
                const[p.name] = v
                continue
            sig[p.name] = "i32"
            if v % 16 == 0 and not p.do_not_specialize:
                attrs[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=fn, signature=sig, constexprs=const, attrs=attrs)


def nv(step, dump=None):
    t = time.time()
    k = triton.compile(source(step), target=GPUTarget("cuda", 90, 32), options=dict(step.options))
    t = time.time() - t
    ptx = k.asm["ptx"]
    with tempfile.TemporaryDirectory() as d:
        open(d + "/a.ptx", "w").write(ptx)
        arch = re.search(r"\.target (\S+)", ptx).group(1)
        log = subprocess.run(
            [NV + "/ptxas", "-v", f"-arch={arch}", d + "/a.ptx", "-o", d + "/a.cubin"], capture_output=True, text=True
        ).stderr
        sass = subprocess.run([NV + "/nvdisasm", d + "/a.cubin"], capture_output=True, text=True).stdout
    if dump:
        open(dump + ".ptx", "w").write(ptx)
        open(dump + ".ttgir", "w").write(k.asm["ttgir"])
        open(dump + ".sass", "w").write(sass)
    regs = int(re.search(r"Used (\d+) registers", log).group(1))
    sp = re.search(r"(\d+) bytes spill stores", log).group(1)
    ops = {
        o: len(re.findall(r"\b" + o, sass))
        for o in (
            "LDGSTS",
            "LDG.E.128",
            "LDG",
            "QGMMA",
            "HGMMA",
            "HMMA",
            "LDSM",
            "LDS",
            "STS",
            "F2FP",
            "FFMA",
            "FADD",
            "WARPGROUP",
            "SHFL",
            "STG",
        )
    }
    return f"regs {regs} spills {sp} smem {k.metadata.shared / 1024:.0f}K t {t:.1f}s " + " ".join(
        f"{a}:{b}" for a, b in ops.items() if b
    )


def amd(step, arch):
    if "PDL" in step.arguments:
        step.arguments["PDL"] = False
    opt = {k: v for k, v in step.options.items() if k != "launch_pdl"}
    opt["num_warps"] = max(1, opt["num_warps"] // 2)
    k = triton.compile(source(step), target=GPUTarget("hip", arch, 64), options=opt)
    a = k.asm["amdgcn"]
    g = lambda n: re.search(rf"\.{n}:\s+(\d+)", a).group(1)
    return f"{arch} vgpr {g('vgpr_count')} vspill {g('vgpr_spill_count')} sspill {g('sgpr_spill_count')} lds {k.metadata.shared} mfma {len(re.findall('v_mfma', a))}"
