"""The ops of the bridge by AITER's functions: one table an op, in the modules that are called as those of ``ops``."""

from collections.abc import Mapping

from . import attention, gemm, mla, moe, norm, routing
from .adapter import Adapter, Routes

ADAPTERS: Mapping[str, Adapter | Routes] = {
    **attention.ADAPTERS,
    **gemm.ADAPTERS,
    **mla.ADAPTERS,
    **moe.ADAPTERS,
    **norm.ADAPTERS,
    **routing.ADAPTERS,
}
