"""An HTML report is complete and safe, and in a headless Chromium does what a person asks of it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import aiter_fusion
from aiter_fusion.graph_text import NodeText, Recorded
from aiter_fusion.journal import recording
from aiter_fusion.report import BARE, REPLACED, SKIPPED, FusionReport, Site, merge
from support import cases
from support.checked import checked


class Block(torch.nn.Module):
    """Two sites that are replaced, one that is skipped, one bare."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(cases.H, dtype=torch.bfloat16)

    def forward(self, x: Tensor, x2: Tensor) -> tuple[Tensor, ...]:
        value = self.norm(x)
        scale = torch.sqrt(value.abs().amax(-1, keepdim=True).float())
        unknown = (value.float() / scale).to(cases.FN)
        return (*cases.q3(value), *cases.q7(64)(value), *cases.q3(cases.chunked(torch.nn.functional.silu)(x2)), unknown)


def recorded() -> FusionReport:
    with recording(), torch.no_grad():
        result = checked(Block().eval())
        result.call(*cases.tensors(("x", "x2"), (4,), torch.bfloat16, "normal"))
    assert result.oracle.identical
    return result.report


class _Page(HTMLParser):
    """What a page is made of; every element must be closed where it should be."""

    VOID = frozenset({"meta", "input", "br", "link", "img", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append((self.open[-1] if self.open else "", data))

    def data(self) -> dict[str, Any]:
        return json.loads("".join(text for (tag, text) in self.text if tag == "script" and text.startswith('{"')))

    def rows(self) -> list[dict[str, str | None]]:
        return [attrs for tag, attrs in self.elements if tag == "tr" and attrs.get("class") == "site"]

    def words(self) -> str:
        return " ".join(text for tag, text in self.text if tag not in ("script", "style"))


def page(report: FusionReport, tmp_path: Path) -> _Page:
    path = tmp_path / "report.html"
    report.to_html(path)
    return _Page(path.read_text(encoding="utf-8"))


def test_the_graphs_of_a_report() -> None:
    """Every site has its nodes before and after; values, modules and source lines are those of the model."""
    made = recorded()
    (graph,) = made.recorded
    assert len(graph.sites) == len(made.sites) == 4
    before, after = ({node.name: node for node in nodes} for nodes in (graph.before, graph.after))
    for site, (old, new) in zip(made.sites, graph.sites, strict=True):
        assert old
        assert set(old) <= set(before)
        assert set(new) <= set(after)
        assert not set(new) & set(before)
        assert bool(new) == (site.status == REPLACED)
        fused = [name for name in new if after[name].code.startswith("aiter_fusion.")]
        assert len(fused) == bool(new)
    norm = next(node for node in graph.before if node.code.startswith("aten.rsqrt("))
    assert norm.where == "norm"
    assert norm.source.endswith("test_page.py:" + norm.source.split(":", 1)[1])
    assert "value = self.norm(x)" in norm.source
    quantised = next(node for node in graph.after if node.code.startswith("aiter_fusion.rms_norm_quant"))
    assert quantised.value == "f8_e4m3fn[4, 256], f32[4, 1], bf16[4, 256]"
    assert "eps=" in quantised.code
    split = next(node for node in graph.before if node.code.startswith("aten.split"))
    assert split.value == ", ".join(["bf16[4, 256] strides (512, 1)"] * 2)
    assert graph.before[-1].code.startswith("return [")


def test_graphs_are_kept_only_when_asked_for() -> None:
    result = checked(lambda x: x + 1)
    result.call(torch.ones(2))
    assert result.report.recorded == ()
    made = recorded()
    assert "recorded" not in json.loads(made.to_json())
    assert pickle.loads(pickle.dumps(made)).recorded == made.recorded, "it holds no graph"


def test_a_page(tmp_path: Path) -> None:
    made = recorded()
    found = page(merge([FusionReport(sites=(made.sites[0],)), made]), tmp_path)
    assert [row["data-status"] for row in found.rows()] == [made.sites[0].status, *(s.status for s in made.sites)]
    data = found.data()
    assert data["places"] == [None, [0, 0], [0, 1], [0, 2], [0, 3]]
    (graph,) = data["graphs"]
    old, new = graph["sites"][next(i for i, site in enumerate(made.sites) if site.family == "act_mul_quant")]
    assert any("aten.split" in graph["before"][i][1] for i in old)
    assert graph["after"][new[0]][1].startswith("aiter_fusion.act_mul_quant.packed(gate_up=")
    for tag, attributes in found.elements:  # nothing is loaded
        assert tag not in ("link", "img", "iframe")
        assert not {"src", "onclick"} & set(attributes)
        assert not str(attributes.get("href", "#")).startswith(("http", "//"))
    assert "replaced 3 of 4 sites" in found.words()
    assert "rms_norm_quant" in found.words()


def test_names_are_not_markup(tmp_path: Path) -> None:
    wicked = '</script><script>alert(1)</script>"&'
    site = Site("rms_norm_quant", wicked, "", "", SKIPPED, f"error: {wicked}", wicked)
    node = NodeText("x", wicked, "f32[1]", wicked, wicked)
    found = page(FusionReport((site,), 1, recorded=(Recorded("0/0", (node,), (node,), ((("x",), ()),)),)), tmp_path)
    assert [tag for tag, _ in found.elements].count("script") == 2
    assert found.data()["graphs"][0]["before"][0][1] == wicked
    assert found.rows()[0]["data-where"] == wicked


def test_what_a_page_does_not_have(tmp_path: Path) -> None:
    """It says so, and how to have it."""
    site = Site("rms_norm_quant", "token", "aiter_fusion::rms_norm_quant", "reference", REPLACED, "", "norm")
    cached = page(FusionReport((site,), 1, from_cache=True), tmp_path).words()
    assert "came from Inductor's cache and the passes did not run" in cached
    assert "neither nodes nor times" in cached
    assert "not run: cached" in cached
    assert "aiter_fusion.explain(model, args)" in cached
    assert "The graphs were not recorded" in page(FusionReport((site,), 1), tmp_path).words()
    assert "No form was recognised" in page(FusionReport(), tmp_path).words()
    assert "level 0: plain Inductor" in page(FusionReport(note="level 0: plain Inductor"), tmp_path).words()


def test_explain_compiles_anew(tmp_path: Path) -> None:
    """Whatever is in Inductor's cache: there would be no nodes to show."""
    inputs = cases.tensors(("x", "w"), (4,), torch.bfloat16, "normal")

    def fn(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return cases.q3(cases.llama(x, w))

    with torch.no_grad():
        torch.compile(fn, backend=aiter_fusion.Backend())(*inputs)
    made = aiter_fusion.explain(fn, inputs)
    assert not made.from_cache
    assert made.recorded[0].name == "1/0"  # a compilation of its own
    with pytest.raises(FileNotFoundError):
        made.to_html(tmp_path / "no_folder" / "report.html")


# ---- In a browser ------------------------------------------------------------------------------------------------

PHONE = {"viewport": {"width": 390, "height": 844}}
DARK = {"color_scheme": "dark"}


def large(nodes: int = 10_000) -> FusionReport:
    """A report of one graph with so many nodes, a site for every 20 of them."""
    before = [
        NodeText(
            f"mul_{i}", f"aten.mul.Tensor(mul_{i - 1}, arg{i % 300}_1)", "bf16[8192, 4096]", f"layers.{i // 100}", ""
        )
        for i in range(nodes)
    ]
    sites, places, gone, after = [], [], set(), []
    for number, start in enumerate(range(0, nodes, 20)):
        status = (REPLACED, SKIPPED, BARE)[number % 3]
        reason = "" if status == REPLACED else f"{('level', 'producer')[number % 2]}: because of {number}"
        sites.append(Site("rms_norm_quant", "token", "", "triton", status, reason, f"layers.{start // 100}"))
        old = tuple(node.name for node in before[start : start + 15])
        fused = NodeText(f"fused_{number}", "aiter_fusion.rms_norm_quant()", "f8_e4m3fn[8192, 4096]", "", "")
        if status == REPLACED:
            gone |= set(old)
            after.append(fused)
        places.append((old, (fused.name,) if status == REPLACED else ()))
        after += [node for node in before[start : start + 20] if node.name not in gone]
    graph = Recorded("0/0", tuple(before), tuple(after), tuple(places))
    return FusionReport(tuple(sites), len(sites), 100.0, recorded=(graph,))


@cache
def _chromium() -> str | None:
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


@pytest.fixture
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[browser]'")
    if _chromium() is None:
        pytest.skip("needs Chromium: install it, or set CHROMIUM to its path")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=_chromium(), args=["--no-sandbox"])
        yield chromium
        chromium.close()


def opened(browser: Any, report: FusionReport, tmp_path: Path, **options: Any) -> Any:
    """The page of a report, open; an error in its script, or any request but for the file, fails the test."""
    path = tmp_path / "report.html"
    report.to_html(path)
    tab = browser.new_context(**options).new_page()
    tab.on("pageerror", lambda error: pytest.fail(str(error)))
    tab.on("request", lambda request: request.url.startswith("file:") or pytest.fail(request.url))
    tab.goto(path.as_uri())
    tab.wait_for_selector("html[data-ready]")
    return tab


@pytest.mark.browser
def test_filters(browser: Any, tmp_path: Path) -> None:
    tab = opened(browser, recorded(), tmp_path)
    count = tab.locator("output")
    assert count.inner_text() == "4 of 4"
    tab.select_option("select[name=status]", "replaced")
    assert count.inner_text() == "2 of 4"
    tab.select_option("select[name=family]", "act_mul_quant")
    assert count.inner_text() == "1 of 4"
    assert tab.locator("tr.site:visible").count() == 1
    tab.select_option("select[name=family]", "")
    tab.fill("input[name=where]", "norm")
    assert count.inner_text() == "1 of 4"
    tab.fill("input[name=where]", "")
    tab.select_option("select[name=status]", "")
    tab.select_option("select[name=code]", "starved")
    assert count.inner_text() == "1 of 4"


@pytest.mark.browser
def test_a_site_with_the_keyboard(browser: Any, tmp_path: Path) -> None:
    """Open, read, close; from the whole graph back to the site, though it was filtered out."""
    report = recorded()
    tab = opened(browser, report, tmp_path)
    button = tab.locator("#site-1 button")
    button.focus()
    tab.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    detail = tab.locator("#" + str(button.get_attribute("aria-controls")))
    original, fused = detail.locator("section").all()
    assert "aten.rsqrt" in original.inner_text()
    assert "test_page.py" in original.inner_text()
    assert "value = self.norm(x)" in original.inner_text()
    assert "f8_e4m3fn[4, 256]" in fused.inner_text()
    assert "aiter_fusion.rms_norm_quant.value(x=arg" in fused.inner_text()
    tab.keyboard.press("Space")
    assert detail.count() == 0
    assert button.get_attribute("aria-expanded") == "false"

    tab.locator("summary").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector("details section")
    before, after = tab.locator("details section").all()
    (graph,) = report.recorded
    gone = {node.name for node in graph.before} - {node.name for node in graph.after}
    assert before.locator("li.gone").count() == len(gone) > 30
    assert after.locator("li.new", has_text="aiter_fusion.").count() == 2
    tab.select_option("select[name=status]", "bare")
    assert not tab.locator("#site-1").is_visible()
    before.locator("a[href='#site-1']").first.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#detail-1")
    assert tab.locator("#site-1").is_visible()
    assert tab.evaluate("document.activeElement.closest('tr').id") == "site-1"


@pytest.mark.browser
@pytest.mark.parametrize("options", [{}, PHONE, DARK, PHONE | DARK], ids=["desktop", "phone", "dark", "dark phone"])
def test_how_it_looks(options: dict[str, Any], browser: Any, tmp_path: Path) -> None:
    """Nothing is wider than the window, text stands out from what is behind it, and a picture can be taken."""
    tab = opened(browser, recorded(), tmp_path, **options)
    for button in tab.locator("tr button").all():
        button.click()
    tab.locator("summary").click()
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    contrasts = tab.evaluate(CONTRAST)
    assert len(contrasts) > 40
    assert min(contrasts.values()) >= 4.5, min(contrasts, key=contrasts.get)
    assert tab.screenshot(path=tmp_path / "page.png").startswith(b"\x89PNG")


# WCAG 2.1's contrast ratio of every element with text of its own; 4.5 is what level AA asks for.
CONTRAST = """
() => {
  const rgb = color => color.match(/[\\d.]+/g).map(Number);
  const light = color => {
    const [r, g, b] = rgb(color).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (rgb(color)[3] !== 0) return color;
    }
  };
  const found = {};
  document.querySelectorAll("main *").forEach((element, i) => {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !element.offsetParent) return;
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))].sort((x, y) => y - x);
    found[`${i} ${element.tagName}.${element.className}`] = (a + 0.05) / (b + 0.05);
  });
  return found;
}
"""


@pytest.mark.browser
def test_ten_thousand_nodes(browser: Any, tmp_path: Path, record_property: Any) -> None:
    """What a browser does is what there is in the page: nodes only when they are asked for, and laid out when seen."""
    report = large()
    tab = opened(browser, report, tmp_path)
    start = time.perf_counter()
    tab.reload()
    tab.wait_for_selector("html[data-ready]")
    assert tab.locator("*").count() < 11 * len(report.sites)
    tab.fill("input[name=where]", "layers.99")
    assert tab.locator("output").inner_text() == "5 of 500"
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    tab.locator("summary").click()
    tab.wait_for_selector("details section")
    nodes = len(report.recorded[0].before) + len(report.recorded[0].after)
    assert tab.locator("details li:not(.origin)").count() == nodes
    assert tab.locator("details *").count() < 5 * nodes
    assert tab.evaluate("getComputedStyle(document.querySelector('.chunk')).contentVisibility") == "auto"
    graph = time.perf_counter() - start
    record_property("row", f"page of 10,000 nodes: interactive after {seconds:.2f} s, its graph after {graph:.2f} s")


# ---- Files -------------------------------------------------------------------------------------------------------


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    """Half a surrogate pair, as in Python's text of such a name, is shown as its escape sequence."""
    node = NodeText("x", "f(x, '\ud83d')", "f32[1]", "\ud83d.norm", "\ud83d.py:1: x")
    site = Site("rms_norm_quant", "token", "", "", SKIPPED, "level: no", "\ud83d.norm")
    made = FusionReport((site,), 1, recorded=(Recorded("0/0", (node,), (node,), ((("x",), ()),)),))
    found = page(made, tmp_path)
    assert found.rows()[0]["data-where"] == r"\ud83d.norm"
    assert found.data()["graphs"][0]["before"][0][1] == "f(x, '\ud83d')"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, link = tmp_path / "report.html", tmp_path / "link.html"
    link.symlink_to(file)
    FusionReport(note="the first").to_html(link)
    assert link.is_symlink()
    with monkeypatch.context() as patch:

        def full(path: Path, content: bytes) -> int:
            with path.open("wb") as opened:
                opened.write(content[:10])
            raise OSError("no space left on device")

        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="no space left"):
            FusionReport(note="the second").to_html(link)
    assert "the first" in file.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.html", "report.html"]
    FusionReport().to_html(os.devnull)
    assert Path(os.devnull).is_char_device()
