"""The ops of the bridge, one declaration each. Importing this package registers them with PyTorch."""

from . import gemm, mla, moe, norm  # noqa: F401
