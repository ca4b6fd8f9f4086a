"""The ops of the bridge by AITER's functions: one table an op, in the modules that are called as those of ``ops``."""

from collections.abc import Mapping

from . import (
    attention,
    gemm,
    gemm_narrow,
    gemm_shuffled,
    layer_norm,
    mla,
    moe,
    norm,
    quantisers,
    rotary,
    routing,
    sampling,
)
from .adapter import Adapter, Routes

ADAPTERS: Mapping[str, Adapter | Routes] = {
    **attention.ADAPTERS,
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
