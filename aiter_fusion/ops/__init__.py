"""The ops that are not made of stages: those of the bridge, one typed reference each (``bridge.py``), and the fused op
of FP8 linear layers (``linear.py``). Importing this package registers them with PyTorch."""

from . import attention_flash, attention_paged, gemm, linear, mla, moe, norm, routing  # noqa: F401
