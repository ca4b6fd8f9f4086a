"""What we need of Dynamo beyond ``torch.compile``: to compile without leaving a trace, and to notice its limits."""

from __future__ import annotations

import copy
import logging
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any

import torch
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
from torch._dynamo import config, convert_frame, pgo
from torch._dynamo.eval_frame import OptimizedModule, cached_backends
from torch._dynamo.guards import DeletedGuardManagerWrapper

Compiler = Callable[..., Callable[..., Any]]


def call_once(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], compiler: Compiler) -> str:
    """Call ``model`` with every graph in it compiled by ``compiler``, and leave Dynamo as it was.

    Dynamo keeps what it compiles with the code of the functions that it compiled, at most ``recompile_limit`` times
    for each, and learns from the sizes it sees. Here the outermost function is a new one, into which all of a model
    without graph breaks is inlined; what is compiled with other functions is taken out again. Compilers of models that
    are compiled already are replaced meanwhile.

    Returns a note on functions that were compiled more often than a compiled model's would be, or an empty string.
    """
    fn = model._orig_mod if isinstance(model, OptimizedModule) else model

    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    frames: dict[int, CodeType] = {}  # equal codes are not the same

    def watch(code: CodeType, new_code: CodeType) -> None:
        frames[id(code)] = code

    watching = convert_frame.register_bytecode_hook(watch)
    learned = pgo.get_code_state()
    known = copy.deepcopy(dict(learned))
    limit = config.recompile_limit
    try:
        with (
            torch.compiler.set_stance("default", force_backend=compiler),
            config.patch(
                # at a limit Dynamo would give up the user's functions for good
                recompile_limit=sys.maxsize,
                accumulated_recompile_limit=sys.maxsize,
                error_on_recompile=False,
                # what it learns here goes into no file either
                automatic_dynamic_local_pgo=False,
                automatic_dynamic_remote_pgo=False,
            ),
        ):
            torch.compile(call, backend=compiler)(*args, **kwargs)
    finally:
        watching.remove()
        often = [(code, count) for code in frames.values() if (count := _forget(code, compiler)) > limit]
        learned.clear()
        learned.update(known)
        for key, backend in list(cached_backends.items()):
            if getattr(backend, "compiler_fn", None) is compiler:
                del cached_backends[key]
    return "; ".join(
        f"Dynamo compiled {_name(code)} {count} times for this call, but compiled models stop at its recompile_limit "
        f"({limit}), from where on they run it unfused"
        for code, count in often
    )


def _forget(code: CodeType, compiler: Compiler) -> int:
    """Take out of Dynamo's cache what ``compiler`` compiled; return how much that was."""
    entries = _debug_get_cache_entry_list(code)
    theirs = [entry for entry in entries if entry.backend is compiler]
    if len(theirs) == len(entries):
        reset_code(code)
    for entry in theirs if len(theirs) < len(entries) else ():
        # As Dynamo does with an entry whose guarded object has died. The cache still counts such entries, but not those
        # that guard another object than the frame has; no local variable is called "".
        deleted = DeletedGuardManagerWrapper("it was compiled for aiter_fusion.explain")
        deleted.id_matched_objs = {"": weakref.ref(OptimizedModule)}
        entry.guard_manager.extra_state.invalidate(entry, deleted)  # type: ignore[union-attr]
    return len(theirs)


def _name(code: CodeType) -> str:
    """As Dynamo's messages have it."""
    return f"'{code.co_name}' ({code.co_filename}:{code.co_firstlineno})"


class _Limits(logging.Handler):
    """Says what Dynamo's warning of a limit means for functions that were compiled by one of our backends."""

    def __init__(self, is_ours: Callable[[Any], bool], logger: logging.Logger) -> None:
        super().__init__(logging.WARNING)
        self.is_ours, self.logger = is_ours, logger

    def emit(self, record: logging.LogRecord) -> None:
        if not str(record.msg).startswith("torch._dynamo hit config.") or not isinstance(record.args, tuple):
            return
        limit, value, function = record.args[:3]
        codes = [code for seen in convert_frame.input_codes.seen if (code := seen()) is not None]
        entries = [entry for code in codes if _name(code) == function for entry in _debug_get_cache_entry_list(code)]
        if any(self.is_ours(getattr(entry.backend, "compiler_fn", entry.backend)) for entry in entries):
            self.logger.warning(
                "aiter_fusion: Dynamo has compiled %s as often as torch._dynamo.config.%s (%s) allows: other calls "
                "of it now run without torch.compile, unfused and in no report. Raise the limit, or see with "
                'TORCH_LOGS="recompiles" why it compiles again',
                function,
                limit,
                value,
            )


def notice_limits(is_ours: Callable[[Any], bool], logger: logging.Logger) -> None:
    """From now on, warn when a limit of Dynamo's keeps functions from being compiled by backends that ``is_ours``."""
    watched = logging.getLogger(convert_frame.__name__)
    if not any(isinstance(handler, _Limits) for handler in watched.handlers):
        watched.addHandler(_Limits(is_ours, logger))
