"""The documents are right where a program can tell: links, lengths, commands, names, options and codes."""

from __future__ import annotations

import ast
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import aiter_fusion
from aiter_fusion import cli, config
from support import cases

ROOT = Path(__file__).parent.parent.parent
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ELSEWHERE = re.compile(r"^(?:https?:|mailto:)")
# Not ours: what Git does not hold.
HIDDEN = {"build", "dist", "dump", "node_modules"}


def documents() -> list[str]:
    found = [path.relative_to(ROOT) for path in ROOT.rglob("*.md")]
    return sorted(str(path) for path in found if not any(map(_is_hidden, path.parts)))


def _is_hidden(part: str) -> bool:
    return (part[0] == "." and part != ".github") or part in HIDDEN


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def blocks(document: str, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(text_of(document)) if name == language]


def anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_there_is_one_for_every_room() -> None:
    rooms = ("", "passes/", "patterns/", "examples/", "tests/", "aiter_fusion/providers/")
    assert {f"{room}README.md" for room in rooms} <= set(documents())


@pytest.mark.parametrize("document", documents())
def test_links(document: str) -> None:
    for target in LINK.findall(FENCE.sub("", text_of(document))):
        if ELSEWHERE.match(target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), f"{document} links to {target}"
        assert not anchor or anchor in anchors(file), f"{document} links to {target}"


@pytest.mark.parametrize("document", documents())
def test_lines_are_short(document: str) -> None:
    """Tables have rows that cannot be broken, and what programs print is as they print it."""
    prose = [line for line in FENCE.sub("", text_of(document)).splitlines() if not line.startswith("|")]
    code = [line for language in ("python", "sh") for block in blocks(document, language) for line in block.split("\n")]
    assert not [line for line in (*prose, *code) if len(line) > 120]


def test_the_readme_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 150


def commands() -> list[tuple[str, list[str]]]:
    """(document, words) of every command in a block of shell; ``&&`` and comments part them."""
    found = []
    for document in documents():
        for line in "\n".join(blocks(document, "sh")).splitlines():
            words, command = [*shlex.split(line, comments=True), "&&"], []
            for word in words:
                if word == "&&":
                    found += [(document, command)] if command else []
                    command = []
                else:
                    command.append(word)
    return found


@pytest.mark.parametrize(("document", "words"), commands(), ids=lambda value: " ".join(value)[:60])
def test_a_command_is_one(document: str, words: list[str]) -> None:
    """Its files exist, and aiter-fusion has the command and the options that it names."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if "aiter_fusion" in words:  # python -m aiter_fusion, torchrun -m aiter_fusion
        words = ["aiter-fusion", *words[words.index("aiter_fusion") + 1 :]]
    if words[0] == "aiter-fusion":
        args = cli._parser().parse_args(words[1:])
        assert callable(args.run), words
    elif words[0] == "python":
        files = [word for word in words[1:] if re.match(r"(examples|tests)/", word)]
        for file in files:
            assert (ROOT / file).exists() or "<" in file, f"{document}: {file}"
        assert files or words[1] == "-m", words
    else:
        assert words[0] in ("pip", "cd", "torchrun", "git", "pre-commit"), f"{document}: {words}"


PYTHON = [(document, code) for document in documents() for code in blocks(document, "python")]


@pytest.mark.parametrize(("document", "code"), PYTHON, ids=[document for document, _ in PYTHON])
def test_python_names_what_there_is(document: str, code: str) -> None:
    """It parses, and what it takes from aiter_fusion exists."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "aiter_fusion":
            assert hasattr(aiter_fusion, node.attr), f"{document}: aiter_fusion.{node.attr}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aiter_fusion"):
            module = import_module(node.module or "")
            assert all(hasattr(module, alias.name) for alias in node.names), f"{document}: {ast.unparse(node)}"


def test_the_readme_names_every_option_and_level() -> None:
    readme = text_of("README.md")
    table = readme.partition("| option |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", re.sub(r"^\| ([^|]*)\|.*$", r"\1", table, flags=re.MULTILINE))) == set(
        config.NAMES
    )
    (levels,) = re.findall(r"^\| `level` \|.*$", table, re.MULTILINE)
    assert re.findall(r"(\d):", levels) == [str(level) for level in config.LEVELS]


def test_issues_ask_for_the_report_of_doctor() -> None:
    """In every form, and on the page of contributions."""
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    if not folder.exists():
        pytest.skip("a source distribution has no .github")
    asking = [path for path in sorted(folder.glob("*.yml")) if path.name != "config.yml"]
    assert len(asking) == 2
    for path in (*asking, folder.parent / "CONTRIBUTING.md"):
        assert "aiter-fusion doctor --output report.md" in path.read_text(), path


def test_there_is_one_version() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "aiter_fusion.__version__" }' in text
    assert not re.search(r'^version = "', text, re.MULTILINE)
    assert f"## {aiter_fusion.__version__} " in text_of("CHANGELOG.md")


def test_the_legend_has_every_code() -> None:
    """``Q7_128`` is a variant of ``Q7``."""
    legend = set(re.findall(r"^\| `([A-Z]\d[\w']*)` \|", text_of("patterns/README.md"), re.MULTILINE))
    used = {row.name.partition("_")[0] for row in (*cases.NORMS, *cases.ACTS, *cases.PRODUCERS, *cases.QUANTS)}
    assert used == legend


def test_every_module_is_on_a_map() -> None:
    for room in ("passes", "patterns", "aiter_fusion/providers"):
        readme = text_of(f"{room}/README.md")
        for path in (ROOT / room).glob("*.py"):
            assert path.name == "__init__.py" or f"`{path.name}`" in readme, path
