"""The ops that are not made of stages: those of the bridge, one typed reference each (``bridge.py``), and the fused ops
of FP8 linear layers (``linear.py``) and of a decode step's attention (``attention.py``). Importing this package
registers them with PyTorch."""

from . import (  # noqa: F401
    attention,
    attention_flash,
    attention_paged,
    gemm,
    gemm_narrow,
    gemm_shuffled,
    layer_norm,
    linear,
    mla,
    moe,
    norm,
    quantisers,
    rotary,
    routing,
    sampling,
)
