"""The ops that are not made of stages: those of the bridge, one typed reference each (``bridge.py``), and the fused ops
of FP8 linear layers (``linear.py``) and of a decode step's attention (``attention.py``). Importing this package
registers them with PyTorch."""

from . import attention, attention_flash, attention_paged, gemm, linear, mla, moe, norm, routing  # noqa: F401
