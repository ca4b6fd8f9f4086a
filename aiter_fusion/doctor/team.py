"""Processes that do what may kill them: a kernel that reads foreign memory ends a process on an AMD GPU, and leaves one
on NVIDIA's without its GPU."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

# Longer than AITER takes to build a kernel that it has not built before (944 s were seen), in seconds.
PATIENCE = 1800.0
# What a process gets to leave its group and let go of its memory, in seconds.
_FAREWELL = 10.0
# What Triton's errors begin with; the source follows, and the reason comes last.
_PLACE = re.compile(r"at \d+:\d+:")
# The folders of a path, not those of an address of the web.
_FOLDERS = re.compile(r"(?<![\w.:/~])~?/(?:[^\s/:'\"]+/)+")


class Failed(Exception):  # noqa: N818 (what was asked for did not succeed, which is a finding)
    """What a team was asked to do failed; the message is the cause, in one line."""


def cause(error: BaseException) -> str:
    """The error that an error comes from, in one line, and without the machine's folders."""
    inner = getattr(error, "inner_exception", None) or error.__cause__
    if inner is None and type(error).__module__.startswith("torch._dynamo"):
        inner = error.__context__  # Dynamo raises its errors anew, without what they come from
    if inner is not None:
        return cause(inner)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = lines[-1] if _PLACE.fullmatch(lines[0]) else lines[0]
    return public(f"{type(error).__name__}: {said}")


def public(text: str) -> str:
    """A text without folders, which may have a user's name: ``/home/me/lib/x.py`` becomes ``.../x.py``."""
    return _FOLDERS.sub(".../", text)


class Team:
    """``world`` processes, which all do what they are asked, and of which new ones come in the place of any that die.

    Each has a GPU of its number, if there is one, and caches that are empty at first; several are one process group.
    What they print on standard error is kept for the reason of their death.

    Args:
        world: the number of processes.
        folder: for caches and logs.
        patience: seconds until an answer that has not come is given up.
    """

    def __init__(self, world: int, folder: Path, patience: float = PATIENCE) -> None:
        self.world, self._folder, self._patience = world, folder, patience
        self._processes: list[Any] = []
        self._ends: list[Connection] = []

    def ask(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(*args)`` of every process, by number; the function is looked up by its name there.

        Raises:
            Failed: it raised an exception in one, or killed it, or took too long.
        """
        if not self._processes:
            self._start()
        for end in self._ends:
            with suppress(BrokenPipeError):  # nobody is there, as its answer will tell
                end.send((function, args))
        answers: dict[int, Any] = {}
        while len(answers) < self.world:
            due = [end for rank, end in enumerate(self._ends) if rank not in answers]
            ready = wait(due, self._patience)
            if not ready:
                self._kill()
                raise Failed(f"no answer within {self._patience:g} s")
            for end in ready:
                rank = self._ends.index(end)  # type: ignore[arg-type]
                try:
                    problem, usable, answers[rank] = end.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    problem, usable = self._death(rank), False
                if not usable or (problem and self.world > 1):  # others would wait for it
                    self._kill()
                if problem:
                    raise Failed(f"rank {rank}: {problem}" if self.world > 1 else problem)
        return [answers[rank] for rank in range(self.world)]

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.close()  # which ends a process that waits for the next call
        for process in self._processes:
            process.join(_FAREWELL)
            process.kill()
            process.join()
        self._processes, self._ends = [], []

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._at = Path(tempfile.mkdtemp(dir=self._folder))
        for rank in range(self.world):
            end, theirs = context.Pipe()
            process = context.Process(target=_member, args=(rank, self.world, str(self._at), theirs))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._ends.append(end)

    def _death(self, rank: int) -> str:
        process = self._processes[rank]
        process.join()
        status = process.exitcode
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        said = [line.strip() for line in (self._at / f"{rank}.log").read_text(errors="replace").splitlines()]
        last = next((f": {public(line)}" for line in reversed(said) if line), "")
        return f"the process died, {how}{last}"


def _member(rank: int, world: int, folder: str, connection: Connection) -> None:
    """Do what comes through the connection, and send back the problem, whether this process can go on, and the
    result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    path = Path(folder, f"{rank}.log")
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor{rank}", "TRITON_CACHE_DIR": f"{folder}/triton{rank}"}
    import torch._inductor.config as inductor_config

    inductor_config.compile_threads = 1  # errors of Triton's come as they are
    try:
        _join(rank, world, folder)
        problem = ""
    except Exception as error:  # noqa: BLE001 (whatever it is, it is the answer to everything that is asked)
        problem = cause(error)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:  # nobody asks any more
            break
        if problem:
            connection.send((problem, False, None))
            continue
        before = os.fstat(log).st_size
        try:
            connection.send(("", True, function(*args)))
        except Exception as error:  # noqa: BLE001 (the finding)
            connection.send((cause(error) + _diagnostic(path, before), _is_usable(), None))
    if world > 1 and not problem:
        torch.distributed.destroy_process_group()


def _join(rank: int, world: int, folder: str) -> None:
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    if world > 1:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world, init_method=f"file://{folder}/store")


def _diagnostic(log: Path, before: int) -> str:
    """What a compiler has printed, whose exception says only that it has failed."""
    sys.stderr.flush()
    said = log.read_bytes()[before:].decode(errors="replace").splitlines()
    return next((f" ({public(line.strip())})" for line in said if " error: " in line), "")


def _is_usable() -> bool:
    """Whether the GPU still answers this process."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
