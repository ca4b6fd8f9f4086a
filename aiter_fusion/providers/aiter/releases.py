"""AITER's releases: which one is installed, and which functions are known to be wrong in which releases."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from . import installation


class Fault(NamedTuple):
    """A known fault of a function.

    releases: that have it: a version specifier, which ends before the first release without it.
    what:     the fault, as the end of a sentence that begins with the function.
    change:   the pull request that fixed it.
    """

    releases: SpecifierSet
    what: str
    change: str

    @property
    def fixed(self) -> Version:
        """The first release without the fault."""
        return next(Version(bound.version) for bound in self.releases if bound.operator == "<")

    def is_in(self, version: Version) -> bool:
        """Whether a version has the fault. Development builds of the release that fixed it count as having it, which
        PEP 440's ``<`` would exclude."""
        if version.is_devrelease and Version(version.public.partition(".dev")[0]) == self.fixed:
            return True
        return self.releases.contains(version, prereleases=True)

    def __str__(self) -> str:
        return f"{self.what} ({self.change}, in {self.fixed})"


def _fault(releases: str, what: str, change: int) -> Fault:
    return Fault(SpecifierSet(releases), what, f"ROCm/aiter#{change}")


_UNFENCED = _fault(">=0.1.10.post2, <0.1.19.post1", "lets a rank go on while others read its data", 4346)

KNOWN_BAD: Mapping[str, tuple[Fault, ...]] = {
    "add_rmsnorm_quant": (_fault(">=0.1.10.post1, <0.1.10.post3", "returns inexact sums", 2011),),
    "rmsnorm2d_fwd_with_add": (_fault(">=0.1.10.post1, <0.1.10.post2", "returns inexact sums", 1965),),
    "hipb_mm": (
        _fault(">=0.1.6.post1, <0.1.6.post2", "scales all rows and columns by the first one's scales", 1258),
        _fault(">=0.1.6.post1, <0.1.12", "ends the process where hipBLASLt has no kernel for a shape", 2252),
    ),
    "CustomAllreduce.custom_fused_ar_rms": (_UNFENCED,),
    "CustomAllreduce.custom_fused_ar_rms_quant": (_UNFENCED,),
    "CustomAllreduce.custom_fused_ar_rms_per_group_quant": (_UNFENCED,),
}


def parsed(version: str | None) -> Version | None:
    """A version as AITER writes it, ``v0.1.10.post1`` with or without a local part; None if it is not a version."""
    try:
        return Version(version or "")
    except InvalidVersion:
        return None


@functools.cache
def installed() -> Version | None:
    """The version of the installed AITER, or None if it has none."""
    return parsed(installation.aiter_version())


def known_bad(name: str, version: str | None) -> str | None:
    """The known faults of a function in a version, or None."""
    found = parsed(version)
    faults = [str(fault) for fault in KNOWN_BAD.get(name, ()) if found is not None and fault.is_in(found)]
    return ", and ".join(faults) or None
