"""aiter_fusion: hand-tuned fused FP8 kernels in any PyTorch model, and a true report of what was fused.

::

    torch.compile(model, backend="aiter_fusion")

Importing this package imports neither ``triton`` nor ``aiter`` nor Inductor and touches no GPU; the names below load
what they need when first used.
"""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import Backend, FusionError, explain, reports, reset, warmup
    from .dumping import dump
    from .extend import fused_op, register_family, register_form, register_fusion, register_provider, unregister
    from .prepared import prepare, unprepare
    from .providers.aiter.installation import if_aiter_supported, is_aiter_found, is_aiter_found_and_supported
    from .providers.triton.all_reduce.symmetric import LateRankError, check
    from .report import FusionReport, Site

__version__ = "0.1.0"

_HOME = {
    "Backend": "backend",
    "FusionError": "backend",
    "dump": "dumping",
    "explain": "backend",
    "reports": "backend",
    "reset": "backend",
    "warmup": "backend",
    "fused_op": "extend",
    "register_family": "extend",
    "register_form": "extend",
    "register_fusion": "extend",
    "register_provider": "extend",
    "unregister": "extend",
    "if_aiter_supported": "providers.aiter.installation",
    "is_aiter_found": "providers.aiter.installation",
    "is_aiter_found_and_supported": "providers.aiter.installation",
    "prepare": "prepared",
    "unprepare": "prepared",
    "check": "providers.triton.all_reduce.symmetric",
    "LateRankError": "providers.triton.all_reduce.symmetric",
    "FusionReport": "report",
    "Site": "report",
}
__all__ = [
    "Backend",
    "FusionError",
    "FusionReport",
    "LateRankError",
    "Site",
    "check",
    "dump",
    "explain",
    "fused_op",
    "if_aiter_supported",
    "is_aiter_found",
    "is_aiter_found_and_supported",
    "prepare",
    "unprepare",
    "register_family",
    "register_form",
    "register_fusion",
    "register_provider",
    "reports",
    "reset",
    "unregister",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name == "bridge":
        return import_module(".bridge", __name__)
    if name in _HOME:
        value = getattr(import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if find_spec(".passes", __name__) is None or find_spec(".patterns", __name__) is None:
    raise ImportError(
        "aiter_fusion/passes and aiter_fusion/patterns are symbolic links, which this checkout has as plain files: run "
        "'git config core.symlinks true && git checkout aiter_fusion/passes aiter_fusion/patterns', or pip install it "
        "and import it from another folder"
    )


def _register_ops() -> None:
    """Register the fused ops, so that graphs saved with them load.

    ``TORCH_LOGS=+aiter_fusion`` makes torch import this package while torch itself is being imported; then the ops are
    registered when the backend is first used.
    """
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if getattr(spec, "_initializing", False):
        return
    # What is made here stays: a collection would walk over all of torch, in a third of the time, and free nothing
    enabled = gc.isenabled()
    gc.disable()
    try:
        import_module(".families", __name__)
        import_module(".ops", __name__)
    finally:
        if enabled:
            gc.enable()


_register_ops()
