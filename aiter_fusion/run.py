"""Run a script or a module as Python does, with every ``torch.compile`` in it going through this backend."""

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

from . import config


@contextmanager
def default_backend(backend: Callable[..., Any]) -> Iterator[None]:
    """Within, ``torch.compile`` (also as a decorator and as ``nn.Module.compile``) uses ``backend`` unless another is
    named, or this one with options of its own; ``mode=`` and Inductor's ``options=`` go on to Inductor."""
    original: Callable[..., Any] = torch.compile

    @functools.wraps(original)
    def compile(*args: Any, **given: Any) -> Any:
        chosen = given.get("backend", "aiter_fusion") != "aiter_fusion" or {*config.NAMES} & {
            *(given.get("options") or ())
        }
        return original(*args, **(given if chosen else {**given, "backend": backend}))

    torch.compile = compile
    try:
        yield
    finally:
        torch.compile = original


def run_script(script: str, arguments: Sequence[str], whole_traceback: bool = False, *, as_module: bool = False) -> int:
    """Run ``script`` in this process, as ``__main__`` with its own ``sys.argv`` and ``sys.path[0]``.

    Returns the status that Python would exit with. An exception of the script is shown as Python shows it, without the
    frames before the script's first unless ``whole_traceback``. With ``as_module`` it is a module's name, and found
    and run as ``python -m`` does.

    Raises:
        FileNotFoundError: there is no such script.
        ImportError: there is no such module, or it cannot be run.
    """
    if not as_module and not os.path.exists(script):
        raise FileNotFoundError(f"there is no script {script}")
    argv, path = sys.argv, sys.path[:]
    sys.argv = [script, *arguments]
    if not getattr(sys.flags, "safe_path", False):  # there sys.path[0] is no folder of Python's own choice
        sys.path[0] = os.getcwd() if as_module else os.path.dirname(os.path.realpath(script))
    try:
        if as_module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as exit:
        return _status(exit.code)
    except (Exception, KeyboardInterrupt) as error:
        of_script = _from_script(error.__traceback__)
        if isinstance(error, ImportError) and of_script is None:  # nothing of the script's has run
            raise
        trace = error.__traceback__ if whole_traceback else of_script
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    finally:
        sys.argv, sys.path[:] = argv, path
    return 0


def _status(code: Any) -> int:
    """What Python makes of ``sys.exit(code)``."""
    if code is None or isinstance(code, int):
        return code or 0
    if sys.stderr is not None:  # closed; print would take standard output
        print(code, file=sys.stderr)
    return 1


def _from_script(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of this module and of runpy, which come first."""
    ours = {__file__, runpy.__file__, "<frozen runpy>"}
    while trace is not None and trace.tb_frame.f_code.co_filename in ours:
        trace = trace.tb_next
    return trace
