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
from aiter_fusion import graph_text
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

    VOID = frozenset({"meta", "col", "input", "br", "link", "img", "hr"})

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


def test_what_was_compiled(tmp_path: Path) -> None:
    """The head says which model, when, how, with what and on what; inputs have the model's own names."""
    made = aiter_fusion.explain(Block().eval(), cases.tensors(("x", "x2"), (4,), torch.bfloat16, "normal"))
    found = page(made, tmp_path)
    head = " ".join(found.words().split("Copy the report")[0].split())
    assert "model Block made 20" in head
    assert f"with aiter_fusion {aiter_fusion.__version__}, torch {torch.__version__}, " in head
    assert " on " in head
    (graph,) = made.recorded
    assert {"norm.weight", "args[0]", "args[1]"} <= {node.name for node in graph.before}
    fused = next(node for node in graph.after if node.code.startswith("aiter_fusion.rms_norm_quant"))
    assert "x=args[0], weight=norm.weight, " in fused.code
    after = found.data()["graphs"][0]["after"]
    module = next(node[3] for node in after if node[0] == fused.name)
    assert found.data()["strings"][module] == "norm", "the module that the table names"


def test_the_names_of_inputs() -> None:
    """Parts of a quantised weight are named after it, and a name that a node has already is not given twice."""

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)])

        def forward(self, mul: Tensor) -> Tensor:
            return self.layers[0](mul * 2 + 1)

    model = Named().eval()
    torch.compile(model, backend="aiter_fusion")
    with recording(), torch.no_grad():
        torch.compile(model, backend="aiter_fusion")(mul=torch.ones(4, 64, dtype=torch.bfloat16))
    (made,) = aiter_fusion.reports()
    names = [node.name for node in made.recorded[0].before]
    assert "layers.0.weight" in names
    assert names.count("mul") == 1
    with recording(), torch.no_grad():
        exported = torch.export.export(model, (torch.ones(4, 64, dtype=torch.bfloat16),))
        torch.compile(exported.module(), backend="aiter_fusion")(torch.ones(4, 64, dtype=torch.bfloat16))
    assert "layers.0.weight" in [node.name for node in aiter_fusion.reports()[-1].recorded[0].before]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self']._modules['layers']._modules['0']._parameters['weight']", "layers.0.weight"),
        ("L['self'].__dict__['_modules']['blocks'].0.norm", "blocks.0.norm"),
        ("L['kwargs']['x']", "x"),
        ("G['model'].norm", "model.norm"),
    ],
)
def test_paths_are_those_of_the_model(path: str, name: str) -> None:
    """Dynamo goes by ``__dict__`` where a module has a ``__getattr__`` of its own, as those of diffusers have."""
    assert graph_text._top(path) == name


def test_bytes_are_counted() -> None:
    """By hand: a bf16 value [4, 256] has 2,048 bytes, its FP8 codes 1,024 and the scales of its rows 16."""
    made = recorded()
    (graph,) = made.recorded
    moved = {node.name: node.moved for node in (*graph.before, *graph.after)}
    codes = {node.name: node.code for node in (*graph.before, *graph.after)}
    packed = next(name for name, code in codes.items() if code.startswith("aiter_fusion.act_mul_quant"))
    assert moved[packed] == 4 * 512 * 2 + 4 * 256 + 4 * 4
    assert all(
        moved[name] == 0 for name, code in codes.items() if code.startswith(("aten.view", "aten.split", "place"))
    )
    square = next(name for name, code in codes.items() if code.startswith("aten.pow"))
    assert moved[square] == 2 * 4 * 256 * 4


def test_equal_sites_are_one_row(tmp_path: Path) -> None:
    """Those of all layers, whose map shows each; what differs in more than its numbers stays apart."""

    def site(where: str, status: str = REPLACED, reason: str = "") -> Site:
        op = "aiter_fusion::rms_norm_quant" if status == REPLACED else ""
        return Site("rms_norm_quant", "token", op, "", status, reason, where)

    layers = [site(f"model.layers.{n}.norm") for n in (0, 1, 2, 5)]
    refused = [site(f"model.layers.{n}.mlp", SKIPPED, f"layout: add_{n} has other strides") for n in (0, 1)]
    found = page(FusionReport((*layers, *refused, site("model.norm")), 7), tmp_path)
    words = " ".join(found.words().split())
    assert "\u00d7 4 replaced rms_norm_quant token model.layers.{0..2, 5}.norm" in words
    assert "\u00d7 2 skipped rms_norm_quant token model.layers.{0..1}.mlp" in words
    assert ": add_0 has other strides (others differ in its numbers)" in words
    assert len(found.rows()) == 7
    cells = [attributes for tag, attributes in found.elements if tag == "a" and "title" in attributes]
    assert [cell["class"] for cell in cells] == [REPLACED] * 4 + [SKIPPED] * 2
    assert cells[3]["title"] == "layer 5, norm rms_norm_quant: 1 replaced"
    assert cells[3]["href"] == "#site-4"


def test_names_are_not_markup(tmp_path: Path) -> None:
    wicked = '</script><script>alert(1)</script>"&'
    site = Site("rms_norm_quant", wicked, "", "", SKIPPED, f"error: {wicked}", wicked)
    node = NodeText("x", wicked, "f32[1]", wicked, wicked)
    found = page(FusionReport((site,), 1, recorded=(Recorded("0/0", (node,), (node,), ((("x",), ()),)),)), tmp_path)
    assert [tag for tag, _ in found.elements].count("script") == 2
    assert found.data()["graphs"][0]["before"][0][1] == wicked
    assert found.rows()[0]["data-where"] == wicked
    assert [tag for tag, attributes in found.elements if attributes.get("data-tip") == "error"] == ["span"]


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
            f"mul_{i}",
            f"aten.mul.Tensor(mul_{i - 1}, arg{i % 300}_1)",
            "bf16[8192, 4096]",
            f"layers.{i // 100}",
            "",
            1 << 26,
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
    tab.keyboard.press("/")
    tab.keyboard.type("NORM_quant")
    assert tab.input_value("input[name=text]") == "NORM_quant"
    assert count.inner_text() == "1 of 4"
    tab.fill("input[name=text]", "nowhere")
    assert count.inner_text() == "0 of 4"
    assert tab.get_by_text("No site matches.").is_visible()
    tab.click("#clear")
    assert count.inner_text() == "4 of 4"
    assert not tab.get_by_text("No site matches.").is_visible()
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

    tab.locator(".graph summary").focus()
    tab.keyboard.press("Enter")
    whole = tab.locator(".whole")
    (graph,) = report.recorded
    gone = {node.name for node in graph.before} - {node.name for node in graph.after}
    assert whole.locator(".gone").count() == len(gone) > 30
    assert whole.locator(".new", has_text="aiter_fusion.").count() == 2
    tab.select_option("select[name=status]", "bare")
    assert not tab.locator("#site-1").is_visible()
    whole.locator("a[href='#site-1']").first.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#detail-1")
    assert tab.locator("#site-1").is_visible()
    assert tab.evaluate("document.activeElement.closest('tr').id") == "site-1"


@pytest.mark.browser
@pytest.mark.parametrize("options", [{}, PHONE, DARK, PHONE | DARK], ids=["desktop", "phone", "dark", "dark phone"])
def test_how_it_looks(options: dict[str, Any], browser: Any, tmp_path: Path) -> None:
    """Nothing is wider than the window, text stands out from what is behind it, and a picture can be taken."""
    tab = opened(browser, recorded(), tmp_path, **options)
    for button in tab.locator("tr.site button").all():
        button.click()
    for summary in tab.locator("summary").all():
        summary.click()
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
def test_sites_that_are_one_row(browser: Any, tmp_path: Path) -> None:
    """A click on the row shows them, one on the map opens a site among them, and columns stay where they are."""
    tab = opened(browser, large(), tmp_path, viewport={"width": 1280, "height": 800})
    assert tab.locator("tr.site:visible").count() == 0
    widths = "[...document.querySelectorAll('#table th')].map(cell => cell.offsetWidth)"
    before = tab.evaluate(widths)
    many = tab.locator("tr.many").first
    assert "\u00d7 167" in many.inner_text()
    many.locator("td").nth(3).click()
    assert tab.locator("tr.site:visible").count() == 167
    assert tab.evaluate(widths) == before
    many.locator("td").nth(3).click()
    assert tab.locator("tr.site:visible").count() == 0
    tab.locator(".map a").nth(42).click()
    tab.wait_for_selector("tr.detail")
    assert tab.evaluate(widths) == before
    tab.fill("input[name=text]", "layers.42")
    assert "\u00d7 2 of 167" in many.inner_text()


@pytest.mark.browser
def test_words_are_explained(browser: Any, tmp_path: Path) -> None:
    tab = opened(browser, recorded(), tmp_path, **PHONE)
    tip = tab.locator("#tip")
    assert not tip.is_visible()
    tab.locator("[data-tip=bare]").first.hover()
    assert tip.inner_text() == "a form was recognised here, but no fusion applies to it"
    tab.locator("[data-tip=passes]").first.focus()
    assert "while compiling" in tip.inner_text()
    box = tip.bounding_box()
    assert 0 <= box["x"] <= box["x"] + box["width"] <= PHONE["viewport"]["width"]


@pytest.mark.browser
def test_copies(browser: Any, tmp_path: Path) -> None:
    report = recorded()
    tab = opened(browser, report, tmp_path, permissions=["clipboard-read", "clipboard-write"])
    tab.locator("[data-copy]").click()
    tab.get_by_text("Copied").wait_for()
    assert tab.evaluate("navigator.clipboard.readText()") == str(report)
    tab.locator("#site-1 button").click()
    tab.get_by_text("Copy these nodes").click()
    text = tab.evaluate("navigator.clipboard.readText()")
    assert text.startswith("site 1 replaced, rms_norm_quant, ")
    assert "aten.rsqrt(" in text
    assert "aiter_fusion.rms_norm_quant.value(x=" in text


@pytest.mark.browser
def test_print(browser: Any, tmp_path: Path) -> None:
    """500 sites are few pages, since equal ones are one row."""
    tab = opened(browser, large(), tmp_path)
    pages = tab.pdf(path=tmp_path / "page.pdf", format="A4").count(b"/Type /Page\n")
    assert 0 < pages <= 4


@pytest.mark.browser
def test_ten_thousand_nodes(browser: Any, tmp_path: Path, record_property: Any) -> None:
    """What a browser does is what there is in the page: nodes only when they are asked for, and laid out when seen."""
    report = large()
    tab = opened(browser, report, tmp_path)
    start = time.perf_counter()
    tab.reload()
    tab.wait_for_selector("html[data-ready]")
    assert tab.locator("*").count() < 16 * len(report.sites)
    tab.fill("input[name=text]", "LAYERS.99")
    assert tab.locator("output").inner_text() == "5 of 500"
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    tab.locator(".graph summary").click()
    tab.wait_for_selector(".whole .fold")
    assert tab.locator(".whole *").count() < 25_000
    tab.get_by_text("Unfold all").click()
    (graph_of,) = report.recorded
    assert tab.locator(".whole .gone").count() == len(
        {n.name for n in graph_of.before} - {n.name for n in graph_of.after}
    )
    assert tab.locator(".whole .same, .whole .changed").count() == 2 * len(
        {n.name for n in graph_of.before} & {n.name for n in graph_of.after}
    )
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
