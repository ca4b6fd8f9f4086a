"""The command ``aiter-fusion``, called in this process."""

from __future__ import annotations

import pytest

from aiter_fusion import cli


def run(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(status, standard output, standard error) of a command."""
    try:
        status = cli.main(argv)
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else 1
    out, err = capsys.readouterr()
    return status, out, err


def fails(*argv: str, capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """The one line on standard error with which a command fails."""
    got, out, err = run(*argv, capsys=capsys)
    assert (got, out) == (status, "")
    (line,) = err.splitlines()
    return line
