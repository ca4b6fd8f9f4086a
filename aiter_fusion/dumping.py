"""A folder with every graph before and after each pass, made by depyf, and an index that says what is what."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import torch
from torch._inductor import config as inductor_config

from . import journal, report


@contextlib.contextmanager
def dump(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Within, everything that is compiled leaves its graphs in ``folder``, before and after each pass.

    ::

        with aiter_fusion.dump("graphs"):
            torch.compile(model, backend="aiter_fusion")(x)

    Written by depyf, so what it shows of other stages is there too. At the end come ``index.md``, which lists the files
    of each compilation in order with its report, and ``report.html``.

    What was compiled before is compiled again: Dynamo forgets it, and Inductor's caches are not used. Several processes
    need a folder each.

    Raises:
        FileExistsError: the folder is not empty, and its files would be taken for those of this dump.
        NotADirectoryError: it is no folder.
    """
    import depyf

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise FileExistsError(f"{path} is not empty: name a new folder")
    torch._dynamo.reset()
    known = len(journal.reports())
    with contextlib.ExitStack() as stack:
        stack.callback(_write_index, path, known)
        stack.enter_context(inductor_config.patch(force_disable_caches=True))
        stack.enter_context(journal.recording())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*trying to debug `torch.compile`", UserWarning)
            stack.enter_context(depyf.prepare_debug(str(path)))
        yield


def _write_index(path: Path, known: int) -> None:
    """List depyf's files: those named after a compiled function belong to its compilation, in the order of writing."""
    made = journal.reports()[known:]
    compilations: dict[str, list[str]] = {}
    for file in sorted(path.iterdir(), key=lambda file: (file.stat().st_mtime_ns, file.name)):
        function = file.name.partition(".")[0]
        title = function if function.startswith("__compiled_fn_") else "Python code around the graphs"
        compilations.setdefault(title, []).append(f"[{file.name}]({quote(file.name)})")
    lines = ["# Graphs before and after each pass", ""]
    if not compilations:
        lines += ["Nothing was compiled: what was called here was not the compiled model.", ""]
    for title, files in compilations.items():
        lines += [f"## {title}", "", *(f"{number}. {file}" for number, file in enumerate(files, 1)), ""]
    lines += ["## Reports", "", "With the nodes of every site: [report.html](report.html)", ""]
    for one in made:
        lines += [*(f"Compilation {graph.name}:" for graph in one.recorded), "", "```", str(one), "```", ""]
    report.write(path / "index.md", "\n".join(lines))
    report.merge(made).to_html(path / "report.html")
