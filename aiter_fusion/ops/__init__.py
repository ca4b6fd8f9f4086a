"""The fused ops, one declaration each, and those of the bridge. Importing this package registers them with PyTorch."""

from . import act_mul_quant, all_reduce_rms_norm, gemm, mla, moe, norm, rms_norm_quant  # noqa: F401
