"""Run a script as ``python script.py`` does, with every ``torch.compile`` in it going through this backend."""

from __future__ import annotations

import functools
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch


@contextmanager
def default_backend(backend: Callable[..., Any]) -> Iterator[None]:
    """Within, ``torch.compile`` (also as a decorator and as ``nn.Module.compile``) uses ``backend`` unless a backend is
    named; ``mode=`` and ``options=`` go on to Inductor."""
    original: Callable[..., Any] = torch.compile

    @functools.wraps(original)
    def compile(*args: Any, **given: Any) -> Any:
        return original(*args, **{"backend": backend, **given})

    torch.compile = compile
    try:
        yield
    finally:
        torch.compile = original


def run_script(script: str, arguments: Sequence[str], whole_traceback: bool = False) -> int:
    """Run ``script`` in this process, as ``__main__`` with its own ``sys.argv`` and ``sys.path[0]``.

    Returns the status that Python would exit with. An exception of the script is shown as Python shows it, without the
    frames before the script's first unless ``whole_traceback``.

    Raises:
        FileNotFoundError: there is no such script.
    """
    if not os.path.exists(script):
        raise FileNotFoundError(f"there is no script {script}")
    argv, path = sys.argv, sys.path[:]
    sys.argv = [script, *arguments]
    if not getattr(sys.flags, "safe_path", False):  # there sys.path[0] is no folder of Python's own choice
        sys.path[0] = os.path.dirname(os.path.realpath(script))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit:
        return _status(exit.code)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:  # noqa: BLE001 (the script's, and shown as Python would)
        trace = error.__traceback__ if whole_traceback else _from_script(error.__traceback__)
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return 1
    finally:
        sys.argv, sys.path[:] = argv, path
    return 0


def _status(code: Any) -> int:
    """What Python makes of ``sys.exit(code)``."""
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1


def _from_script(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of this module and of runpy, which come first."""
    ours = {__file__, runpy.__file__, "<frozen runpy>"}
    while trace is not None and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    return trace
