"""The ops of the bridge by AITER's functions: one table an op, in the modules that are called as those of ``ops``."""

from . import gemm, gemm_narrow, gemm_shuffled, layer_norm, mla, moe, norm, quantisers, rotary, routing, sampling

ADAPTERS = {
    **gemm.ADAPTERS,
    **gemm_narrow.ADAPTERS,
    **gemm_shuffled.ADAPTERS,
    **layer_norm.ADAPTERS,
    **mla.ADAPTERS,
    **moe.ADAPTERS,
    **norm.ADAPTERS,
    **quantisers.ADAPTERS,
    **rotary.ADAPTERS,
    **routing.ADAPTERS,
    **sampling.ADAPTERS,
}
