"""``aiter-fusion info``: what this machine can run, and what the environment variables prefer."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__, config, machine
from ..patterns import fusions  # noqa: F401  (importing it registers the families)
from ..providers import PROVIDERS, candidates
from ..providers.aiter import installation
from ..providers.triton import tuned
from ..providers.triton.jit import native_fp8
from ..reasons import Reason, Refusal
from ..registry import REGISTRY
from .parser import Parser, Run
from .streams import show

if TYPE_CHECKING:
    from rich.text import Text


def fill(parser: Parser) -> Run:
    """Add the arguments."""
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a table")
    return command


def information() -> dict[str, Any]:
    """What ``info --json`` prints.

    Some entries:
        providers: for each provider, why it cannot run here, or None.
        preferences: for each preference, its value and the environment variable that it comes from, or ``default``.
        fusions: for each family, why no site of it can be taken here: by preference, or since no provider that can run
            has a kernel; None if one can.
        fused_by: for each family, the providers that are asked for it here, in their order.
        advice: what to do if all this leaves nothing to fuse, or to gain; else None.
        backend_by_name: whether ``backend="aiter_fusion"`` works, for which the package must be installed.

    Raises:
        ValueError: the environment prefers something that does not exist.
    """
    gpu = torch.cuda.is_available()
    device = torch.cuda.current_device() if gpu else 0
    capability = "".join(map(str, torch.cuda.get_device_capability(device))) if gpu else ""
    native = native_fp8(device) if gpu else None
    chosen = config.options()
    taken = _taken(chosen, "cuda" if gpu else "cpu")
    return {
        "aiter_fusion": __version__,
        "backend_by_name": bool(entry_points(group="torch_dynamo_backends", name="aiter_fusion")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "build": machine.build(),
        "triton": machine.triton_version(),
        "device": torch.cuda.get_device_name(device) if gpu else None,
        "architecture": machine.architecture(device) or (f"sm_{capability}" if gpu else None),
        "native_fp8": str(native).removeprefix("torch.") if native else None,
        "aiter": installation.aiter_version() if installation.is_aiter_found() else None,
        "aiter_supported": installation.is_aiter_found_and_supported(),
        "aiter_reason": installation.why_no_aiter(),
        "providers": {name: provider.missing() for name, provider in PROVIDERS.items()},
        "tuned": {"file": str(tuned.path()), "launches": len(tuned.choices())} if tuned.path() else None,
        "preferences": _preferences(chosen),
        "fusions": {family: str(by) if isinstance(by, Refusal) else None for family, by in taken.items()},
        "fused_by": {family: [] if isinstance(by, Refusal) else by for family, by in taken.items()},
        "advice": _advice(taken),
    }


def _taken(chosen: config.Options, device: str) -> dict[str, list[str] | Refusal]:
    """For each family the providers that would compute it on a device, in the order in which they are asked; or why
    none would."""
    able = [provider for provider in candidates(chosen.provider, device) if provider.missing() is None]
    missing = "; ".join(f"{name}: {why}" for name, provider in PROVIDERS.items() if (why := provider.missing()))
    taken: dict[str, list[str] | Refusal] = {}
    for family in dict.fromkeys(fusion.family for fusion in REGISTRY.fusions.values()):
        rows = [fusion for fusion in REGISTRY.fusions.values() if fusion.family == family]
        possible = {
            (provider.name, row.level)
            for provider in able
            for row in rows
            if (row.only is None or provider.name in row.only)
            and any(map(provider.terms, REGISTRY.overloads(row.op).values()))
        }
        unwanted = chosen.why_not(family, min((level for _, level in possible), default=1))
        wanted = {name for name, level in possible if chosen.why_not(family, level) is None}
        ordered = [provider.name for provider in able if provider.name in wanted]
        taken[family] = unwanted or ordered or Refusal(Reason.NO_KERNEL, missing)
    return taken


def _advice(taken: dict[str, list[str] | Refusal]) -> str | None:
    if all(isinstance(by, Refusal) for by in taken.values()):
        return "nothing is fused here: the lines on fusions say why"
    if any("reference" in by for by in taken.values() if isinstance(by, list)):
        return "plain PyTorch computes the fused ops here, for checking: it is slower than Inductor's own code"
    return None


def _preferences(chosen: config.Options) -> dict[str, dict[str, Any]]:
    effective = {
        "level": chosen.level,
        "provider": chosen.provider,
        "disable": sorted(chosen.disable),
        "log": os.environ.get("AITER_FUSION_LOG", "").upper() or "INFO",
        **{name.lower(): config.preference(name) for name in config.PREFERENCES},
    }
    found = {
        name: {"value": value, "from": variable if os.environ.get(variable) else "default"}
        for name, value in effective.items()
        for variable in [f"AITER_FUSION_{name.upper()}"]
    }
    numerics = "kernel" if chosen.allows_kernel_numerics else "exact"
    return found | {"numerics": {"value": numerics, "from": f"level {chosen.level}"}}


def command(args: argparse.Namespace) -> None:
    """Print the information as a table or as JSON."""
    found = information()
    if args.json:
        show(json.dumps(found, indent=1), sys.stdout)
        return
    from ..tables import table  # here: JSON does without rich

    columns = ("name", "value")
    show(table(columns, rows_of(found), left=columns, folds={"value": None}, header=False), sys.stdout)


def rows_of(found: dict[str, Any]) -> list[list[str | Text]]:
    """Name and value of everything in ``information``, as a person reads it."""
    from rich.text import Text

    nothing = "none: PyTorch sees no GPU"
    can_run = Text.assemble(("can run", "green"))
    rows: list[list[str | Text]] = [
        ["aiter_fusion", found["aiter_fusion"]],
        ["python", found["python"]],
        ["torch", f"{found['torch']}, built for {found['build']}"],
        ["backend='aiter_fusion'", "works" if found["backend_by_name"] else "needs pip install; Backend() works"],
        ["triton", found["triton"] or "not installed"],
        ["device", found["device"] or nothing],
        ["architecture", found["architecture"] or nothing],
        ["native FP8", found["native_fp8"] or ("none" if found["device"] else nothing)],
        ["AITER", found["aiter_reason"] or can_run + f": version {found['aiter'] or 'unknown'}"],
    ]
    for name, why in found["providers"].items():
        rows.append([f"provider {name}", Text.assemble(("cannot run", "yellow"), f": {why}") if why else can_run])
    if found["tuned"]:
        rows.append(["tuned launches", f"{found['tuned']['launches']} in {found['tuned']['file']}"])
    without = found["providers"]["aiter"] is not None
    for name, preference in found["preferences"].items():
        if without and name.upper() in config.PREFERENCES and preference["from"] == "default":
            continue
        value = preference["value"]
        if isinstance(value, bool):
            text = "on" if value else "off"
        else:
            text = (", ".join(value) or "nothing") if isinstance(value, list) else value
        rows.append([f"preferred {name}", f"{text} ({preference['from']})"])
    if without:
        rows.append(["other preferences", "are about AITER, and of no effect without it"])
    for family, why in found["fusions"].items():
        rows.append([f"fusion {family}", f"off: {why}" if why else f"on, by {', '.join(found['fused_by'][family])}"])
    if found["advice"]:
        rows.append(["note", found["advice"]])
    return rows
