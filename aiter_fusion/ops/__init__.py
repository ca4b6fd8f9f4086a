"""The ops of the bridge, one typed reference each (``bridge.py``). Importing this package registers them with
PyTorch."""

from . import gemm, mla, moe, norm, routing  # noqa: F401
