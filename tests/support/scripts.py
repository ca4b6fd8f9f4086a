"""A plain script that compiles one site, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

TESTS = Path(__file__).parent.parent


def run_script(body: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A plain ``python script.py`` in a process of its own, with a cache of the test's own."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(body))
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": path, **environment}
    return subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=env, check=True, cwd=tmp_path
    )


SCRIPT = """
    import torch, aiter_fusion
    from support import cases
    x, w = cases.tensors(("x", "w"), (4,), torch.bfloat16, "normal")
    def fn(x, w):
        y = cases.llama(x, w)
        return (*cases.q3(y), y + 1)
    with torch.no_grad():
        torch.compile(fn, backend="aiter_fusion")(x, w)
    (report,) = aiter_fusion.reports()
    print(report.to_json())
"""
