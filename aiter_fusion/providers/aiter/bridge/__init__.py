"""The ops of the bridge by AITER's functions: one table an op, in the modules that are called as those of ``ops``."""

from . import gemm, mla, moe, norm, routing

ADAPTERS = gemm.ADAPTERS | mla.ADAPTERS | moe.ADAPTERS | norm.ADAPTERS | routing.ADAPTERS
