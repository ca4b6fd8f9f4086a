"""Run the test suite with several versions of torch, each in a virtual environment of its own, one at a time.

    python tests/torch_matrix.py 2.11.0 2.12.1 2.13.0 2.14.1 2.15.0

Builds with CUDA take about 5 GB each, removed after the run. Prints a row of the table in README.md for each. Not run
by the suite. The counts of the model families are those that the tests derive from the models, so they are the same on
every version if the tests pass.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
WITH = ["transformers==5.23.0", "torchao==0.18.0", "pytest", "pytest-xdist", "hypothesis", "setuptools<82"]
# Formatting and types are checked once, with the pinned torch.
SKIPPED = "not test_clean"


def run(version: str) -> str:
    """Install one version, run the suite, and return its row."""
    with tempfile.TemporaryDirectory(prefix=f"torch-{version}-") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={version}", *WITH, str(ROOT)], check=True)
        command = [python, "-m", "pytest", "-q", "-k", SKIPPED, "--tb=line"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], file=sys.stderr)
    summary = re.findall(r"^(.*\b(?:passed|failed)\b.*) in [\d.]+s", done.stdout, re.MULTILINE)
    replaced = re.findall(r"^[\w.]+ \w+ \w+: replaced (\d+) of (\d+) sites", done.stdout, re.MULTILINE)
    counts = f"{sum(int(n) for n, _ in replaced)} of {sum(int(n) for _, n in replaced)} in {len(replaced)} cases"
    return f"| {version} | {summary[-1] if summary else 'no summary'} | {counts} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+")
    for version in parser.parse_args().versions:
        print(run(version), flush=True)


if __name__ == "__main__":
    main()
