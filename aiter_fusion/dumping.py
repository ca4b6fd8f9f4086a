"""A folder with every graph before and after each pass, made by depyf, and an index that says what is what."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator
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

    Written by depyf, so what it shows of other stages is there too. At the end the calls of fused ops get the names of
    their arguments, and ``index.md`` and ``report.html`` are written. The index lists the files of each compilation in
    order with its report, and marks the two to compare: the graph before and after the fusions.

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


FUNCTION = re.compile(r"__compiled_fn_\d+")


def _write_index(path: Path, known: int) -> None:
    """Describe depyf's files: those named after a compiled function belong to its compilation, in the order of writing.

    A compilation has one report, so the reports and the functions whose graphs the passes saw go together in order.
    """
    made = journal.reports()[known:]
    files = sorted(path.iterdir(), key=lambda file: (file.stat().st_mtime_ns, file.name))
    compiled: dict[str, list[Path]] = {}
    around = []
    for file in files:
        found = FUNCTION.match(file.name)
        if found:
            compiled.setdefault(found[0], []).append(file)
        else:
            around.append(file)
    for file in files:
        _name_arguments(file)
    seen = [name for name, theirs in compiled.items() if any(".AITER_FUSION_" in file.name for file in theirs)]
    told = dict(zip(seen, made, strict=True)) if len(seen) == len(made) else {}
    lines = ["# Graphs before and after each pass", ""]
    if not files:
        lines += ["Nothing was compiled: what was called here was not the compiled model.", ""]
    lines += ["All sites with their nodes, and whole graphs side by side: [report.html](report.html)", ""]
    for name, theirs in compiled.items():
        lines += [f"## {name}{_called(name, around)}", ""]
        lines += [f"{number}. {_entry(file)}" for number, file in enumerate(theirs, 1)] + [""]
        lines += _shown(told[name]) if name in told else []
    if around:
        lines += ["## Python code around the graphs", "", *(f"- {_link(file)}" for file in around), ""]
    for one in made if not told else ():
        lines += _shown(one)
    report.write(path / "index.md", "\n".join(lines))
    report.merge(made).to_html(path / "report.html")


def _link(file: Path) -> str:
    return f"[{file.name}]({quote(file.name)})"


def _entry(file: Path) -> str:
    """A file's line in the index; the two that matter are marked."""
    if ".AITER_FUSION_0_before." in file.name:
        return f"**{_link(file)}: before the fusions**"
    if "_after_fusions." in file.name:
        return f"**{_link(file)}: after the fusions**"
    return _link(file)


def _called(name: str, around: Iterable[Path]) -> str:
    """Which Python function calls a compiled one, by the code that Dynamo made of it."""
    call = re.compile(rf"\b{name}(?:_\w+)?\(")
    for file in around:
        found = re.fullmatch(r"__transformed_code_\d+_for_(.+)\.py", file.name)
        if found and call.search(file.read_text(encoding="utf-8")):
            return f", called by `{found[1]}`"
    return ""


def _shown(made: report.FusionReport) -> list[str]:
    names = dict.fromkeys(graph.name for graph in made.recorded if graph.name)
    return [f"Compilation {', '.join(names)}:" if names else "Report:", "", "```", str(made), "```", ""]


def _name_arguments(file: Path) -> None:
    """Write ``eps=1e-05`` where a file of Python calls a fused op with ``1e-05``: the ops have a dozen arguments."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".py" or "torch.ops.aiter_fusion." not in text:
        return
    lines = text.splitlines(keepends=True)
    inserted = []
    for call in ast.walk(ast.parse(text)):
        if isinstance(call, ast.Call) and (
            found := re.fullmatch(r"torch\.ops\.aiter_fusion\.(\w+)\.(\w+)", _code(call.func))
        ):
            schema = getattr(getattr(torch.ops.aiter_fusion, found[1]), found[2])._schema
            given = zip(schema.arguments, call.args, strict=False)
            inserted += [(value.lineno - 1, value.col_offset, argument.name) for argument, value in given]
    for line, column, name in sorted(inserted, reverse=True):  # from the end, so that positions stay true
        encoded = lines[line].encode()
        lines[line] = (encoded[:column] + f"{name}=".encode() + encoded[column:]).decode()
    file.write_text("".join(lines), encoding="utf-8")


def _code(function: ast.expr) -> str:
    """The dotted name that is called; empty where something else is."""
    return ast.unparse(function) if isinstance(function, ast.Attribute) else ""
