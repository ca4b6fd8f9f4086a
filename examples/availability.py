"""What AITER can do on this machine, without importing it, and what would be done about it.

    python examples/availability.py

Prints which of the four answers holds (not installed; an unrelated library of that name; import failed; ready), whether
this machine can run AITER's kernels, and what the environment prefers. Exit status 0 in every case.
"""

from __future__ import annotations

import aiter_fusion
from aiter_fusion import config, machine
from aiter_fusion.providers.aiter import installation


@aiter_fusion.if_aiter_supported
def only_with_aiter() -> str:
    """Called only where AITER's kernels can run."""
    return "called"


def main() -> None:
    found = installation.aiter()
    print(f"AITER:         {found.answer}" + (f" (version {found.version or 'unknown'})" if not found.detail else ""))
    if found.detail:
        print(f"               {found.detail}")
    print(f"architecture:  {machine.architecture() or 'no AMD GPU'}")
    print(f"can run here:  {installation.why_no_aiter() or installation.why_experimental() or 'yes'}")
    print(f"is_aiter_found():               {aiter_fusion.is_aiter_found()}")
    print(f"is_aiter_found_and_supported(): {aiter_fusion.is_aiter_found_and_supported()}")
    print(f"a function under if_aiter_supported returned {only_with_aiter()!r}")
    wanted = [f"{name}={'on' if config.preference(name) else 'off'}" for name in config.PREFERENCES]
    print(f"preferences (AITER_FUSION_<name>): {', '.join(wanted)}")


if __name__ == "__main__":
    main()
