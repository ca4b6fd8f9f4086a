"""The fused ops, one declaration each. Importing this package registers them with PyTorch."""

from . import act_mul_quant, all_reduce_rms_norm, rms_norm_quant  # noqa: F401
