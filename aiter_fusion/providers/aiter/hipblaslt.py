"""hipBLASLt's product by AITER: its one handle, the products that it has no kernel for, its tuning.

Source: ROCm/aiter, gradlib/csrc/hipbsolgemm.cu, v0.1.12 to v0.1.20.post1. A process has one handle with one workspace,
created on the current GPU. hipBLASLt has no kernel for some products, mostly of few rows: then AITER raises before it
launches anything, but if it was to tune such a product, it ends the process. It reads ``HIP_ONLINE_TUNING`` at every
call, and keeps results in the current directory.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor

from ... import config
from ...registry import REGISTRY
from ..known import BRIDGE_PROVIDERS
from ..provider import why_not
from ..tiles import in_rows
from . import installation
from .entry_points import EntryPoint, call, constant

logger = logging.getLogger("aiter_fusion")

CREATE = EntryPoint("hipb_create_extension", ("aiter",))
MULTIPLY = EntryPoint(
    "hipb_mm",
    ("aiter",),
    {
        "mat1": "a",
        "mat2": "b",
        "solution_index": constant(-1),
        "bias": "bias",
        "out_dtype": "dtype",
        "scaleA": lambda a: a["a_scale"].reshape(-1, 1).contiguous(),
        "scaleB": lambda a: a["b_scale"].reshape(1, -1).contiguous(),
        "bpreshuffle": "b_is_shuffled",
    },
)

TUNING, ON = "HIP_ONLINE_TUNING", ("1", "true")
TUNES_FROM = Version("0.1.10.post2")  # releases before do not know the variable
TUNED_ROWS = 512
RESULTS = "hip_online_tuning_res.csv"

# Parts of the errors that AITER raises where the hipBLASLt that it was built with cannot compute a product.
CANNOT = (
    "found 0 valid solutions",
    "Rowwise scaling requires hipBLASLt",
    "Per-row scaling is not supported for this hipBLASLt version",
    "hipblaslt version should be at least",
)


# What a product needs of the hipBLASLt that AITER was built with. Shuffled weights are taken for rows by
# an older one, which prints a warning: no error, and wrong.
SCALES_ROWS_FROM, READS_TILES_FROM = Version("1.0"), Version("0.15")


@functools.cache
def library_version() -> Version | None:
    """The version of ROCm's hipBLASLt, from its headers, with which AITER builds; None if they are not there."""
    header = Path(os.environ.get("ROCM_PATH") or "/opt/rocm") / "include" / "hipblaslt" / "hipblaslt-version.h"
    if not header.is_file():
        return None
    found = dict(
        re.findall(r"#define\s+(?:HIPBLASLT|hipblaslt)_VERSION_(MAJOR|MINOR|PATCH)\s+(\d+)", header.read_text())
    )
    return Version(".".join(found[part] for part in ("MAJOR", "MINOR", "PATCH") if part in found)) if found else None


class Product(NamedTuple):
    """The properties of a product by which hipBLASLt chooses a kernel."""

    device: int
    rows: int
    n: int
    k: int
    dtype: torch.dtype
    has_bias: bool
    is_shuffled: bool

    @classmethod
    def of(cls, a: Mapping[str, Any]) -> Product:
        (rows, k), n = a["a"].shape, a["b"].shape[1]
        return cls(a["a"].device.index or 0, rows, n, k, a["a"].dtype, a["bias"] is not None, a["b_is_shuffled"])

    def __str__(self) -> str:
        weight = f"a {'shuffled ' if self.is_shuffled else ''}weight of {self.n} x {self.k}"
        return f"{self.rows} x {self.k} by {weight} in {self.dtype}{', with a bias' if self.has_bias else ''}"


@dataclass
class Known:
    """What this process has learned about hipBLASLt.

    device:   of the handle; None before it is created.
    solved:   products that were tried and have a kernel.
    unsolved: products that have none -> AITER's error.
    said:     keys of the warnings that the log has already.
    """

    device: int | None = None
    solved: set[Product] = field(default_factory=set)
    unsolved: dict[Product, str] = field(default_factory=dict)
    said: set[Hashable] = field(default_factory=set)


known = Known()
# Guards the handle, the environment and the current directory, which the whole process shares.
_lock = threading.RLock()


def compute(a: Mapping[str, Any]) -> dict[str, Tensor]:
    """A call of ``hipb_mm_fp8``, by ``gemm_a8w8`` where hipBLASLt cannot compute it."""
    found = _product(a)
    return {"y": found} if isinstance(found, Tensor) else _fallback(a, found)


def why_unsolved(a: Mapping[str, Any]) -> str | None:
    """Why hipBLASLt cannot compute a call of ``hipb_mm_fp8``, or None. A product that this process has not seen is
    tried, without tuning."""
    product = Product.of(a)
    if product not in known.solved:
        with _tuning("0"):
            found = _tried(a, product)
        if isinstance(found, str):
            return found
        known.solved.add(product)
    return None


def _product(a: Mapping[str, Any]) -> Tensor | str:
    """The product, or why hipBLASLt cannot compute it."""
    product, folder = Product.of(a), config.tuning()
    if product.rows > TUNED_ROWS or (folder is None and os.environ.get(TUNING) not in ON):
        return _tried(a, product)
    if (why := why_unsolved(a)) is not None:
        return why
    with _tuning("1", folder):
        y = _called(a)
    if folder is not None and not (folder / RESULTS).is_file():
        version = installation.aiter_version() or "of unknown version"
        _say_once(
            TUNING,
            f"AITER {version} has tuned nothing, there is no {folder / RESULTS}: it tunes from v{TUNES_FROM} on, with "
            "more than 128 MiB of the GPU's memory free",
        )
    return y


def _tried(a: Mapping[str, Any], product: Product) -> Tensor | str:
    if product in known.unsolved:
        return known.unsolved[product]
    with _lock:
        if known.device is None:
            with torch.cuda.device_of(a["a"]):
                call(CREATE)
            known.device = product.device
    if known.device != product.device:
        return f"AITER has one handle of hipBLASLt in a process, and it is of device {known.device}"
    try:
        return _called(a)
    except RuntimeError as error:
        if not any(part in str(error) for part in CANNOT):
            raise
        known.unsolved[product] = str(error).strip().partition("\n")[0]
        return known.unsolved[product]


def _called(a: Mapping[str, Any]) -> Tensor:
    return call(MULTIPLY, **MULTIPLY.arguments(a))


@contextmanager
def _tuning(value: str, folder: Path | None = None) -> Iterator[None]:
    """Set whether calls tune, and where they keep the results.

    Args:
        value: of ``HIP_ONLINE_TUNING``, ``"1"`` or ``"0"``.
        folder: the current directory of the calls; None: as it is.
    """
    with _lock:
        variable, here = os.environ.get(TUNING), None if folder is None else Path.cwd()
        os.environ[TUNING] = value
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                os.chdir(folder)
            yield
        finally:
            if here is not None:
                os.chdir(here)
            if variable is None:
                del os.environ[TUNING]
            else:
                os.environ[TUNING] = variable


def _fallback(a: Mapping[str, Any], why: str) -> dict[str, Tensor]:
    """The same product by the first provider that computes ``gemm_a8w8``. A shuffled weight is copied back into rows
    for this call alone, because calls with other numbers of rows, and CUDA graphs, read its tiles."""
    op, product = REGISTRY.bridge["gemm_a8w8", frozenset()], Product.of(a)
    arguments = {
        "x": a["a"],
        "w": in_rows(a["b"], a["b_is_shuffled"]),
        "x_scale": a["a_scale"],
        "w_scale": a["b_scale"],
        "bias": a["bias"],
        "dtype": a["dtype"],
    }
    provider = next(provider for provider in BRIDGE_PROVIDERS.values() if why_not(provider, op, arguments) is None)
    copied = ", from a copy of the weight in rows that every such call makes" if product.is_shuffled else ""
    _say_once(
        product._replace(rows=0),
        f"hipBLASLt cannot compute {product} ({why}): computed by {op.name} of provider {provider.name} instead"
        f"{copied}; said once for weights of this size, whatever the rows",
    )
    return provider.run(op)(**arguments)


def _say_once(what: Hashable, message: str) -> None:
    if what not in known.said:
        known.said.add(what)
        logger.warning(message)
