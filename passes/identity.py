"""Identity: everything that a rewritten graph depends on besides the graph, for Inductor's cache key."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .. import config, machine
from ..config import Options
from ..providers import PROVIDERS
from ..providers.aiter import installation


def canonical(options: Options) -> dict[str, Any]:
    """The options that decide what becomes of a graph, in an order that does not depend on the process's hash seed."""
    return {
        "level": options.level,
        "provider": options.provider,
        "numerics": options.numerics,
        "strict": options.strict,
        "verify": options.verify,
        "disable": sorted(options.disable),
        "enable": sorted(options.enable),
    }


@lru_cache(maxsize=1)
def source_hash() -> str:
    """A hash of the sources of all three packages (``passes`` and ``patterns`` may be links, which rglob skips)."""
    import aiter_fusion.passes
    import aiter_fusion.patterns

    digest = hashlib.sha256()
    for package in (aiter_fusion, aiter_fusion.passes, aiter_fusion.patterns):
        folder = Path(next(iter(package.__path__))).resolve()
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{package.__name__}/{path.relative_to(folder)}".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def in_group() -> bool:
    """Whether this is one of the processes of a distributed job."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def environment() -> dict[str, Any]:
    """Versions, architecture, process group and preferences, by a name for messages: what decides which provider a site
    gets, and how that runs. Neither rank nor path."""
    import torch.distributed as dist

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else "cpu"
    return {
        "torch": torch.__version__,
        "AITER": installation.aiter_version(),
        "triton": machine.triton_version(),
        **{f"what {name} depends on": provider.state() for name, provider in PROVIDERS.items()},
        "the architecture": machine.architecture() or capability,
        "the process group": (dist.get_world_size(), dist.get_backend()) if in_group() else None,
        "the preferences": tuple(map(config.preference, config.PREFERENCES)),
    }
