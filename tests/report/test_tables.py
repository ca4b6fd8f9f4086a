"""Tables lose nothing: no cell is cut, and no text is taken for rich's markup."""

from __future__ import annotations

from rich.text import Text

from aiter_fusion.report import BARE, REPLACED, SKIPPED, FusionReport, Site
from aiter_fusion.tables import plain, table

HEADERS = ("name", "value", "us")


def test_a_row_is_a_line() -> None:
    """However long; brackets and colons are themselves, and nothing stands at the ends of lines."""
    long = "[bold]a[/bold] :smile: [0] " * 100
    rows = [["x", Text(long.strip(), "red"), "1.00"], ["much longer", "", "100.00"]]
    assert plain(table(HEADERS, rows, left=HEADERS[:2], folds={"value": None})).splitlines() == [
        f"name         {'value':<{len(long) - 1}}      us",
        f"------------ {'-' * len(long)} ------",
        f"x            {long.strip()}    1.00",
        f"much longer  {'':<{len(long) - 1}}  100.00",
    ]


def test_a_table_without_rows() -> None:
    assert plain(table(HEADERS, [], left=HEADERS)) == "name  value  us\n----- ------ --"


def test_markdown() -> None:
    assert plain(table(HEADERS, [["`abc`", "long " * 40, "1.00"]], left=HEADERS[:2], markdown=True)).splitlines() == [
        f"| name  | {'value':<200} |   us |",
        f"|-------|{'-' * 202}|------|",
        f"| `abc` | {'long ' * 40} | 1.00 |",
    ]


def test_the_text_of_a_report() -> None:
    """Equal sites share a row; places fold at 44 characters and reasons at 60, and nothing is lost."""
    places = [f"model.layers.{number}.input_layernorm" for number in range(3)]
    reason = "boundary: " + " ".join(f"word{number}" for number in range(40))
    report = FusionReport(
        (
            Site("fp8_quant", "token", "", "", BARE, reason, "layers.0"),
            *(Site("rms_norm_quant", "token", "op", "triton", REPLACED, "", place) for place in places),
            Site("rms_norm_quant", "token", "", "", SKIPPED, "level: no", "layers.1"),
        ),
        5,
    )
    summary, header, rule, *rows, last = str(report).splitlines()
    assert summary == report.summary()
    assert header.split() == ["status", "sites", "family", "variant", "provider", "where", "reason"]
    assert rule.strip("- ") == ""
    assert rows[0].split() == ["replaced", "3", "rms_norm_quant", "token", "triton", places[0], "..."]
    assert rows[1].split() == [places[2]]
    assert rows[2].split() == ["skipped", "1", "rms_norm_quant", "token", "layers.1", "level:", "no"]
    folded = " ".join(row[header.index("reason") :] for row in rows[3:])
    assert " ".join(folded.split()) == reason
    assert max(map(len, rows)) <= header.index("reason") + 60
    assert last == "5 records, 0 unaccounted for"
    (line,) = (line for line in plain(report).splitlines() if line.startswith("bare"))
    assert line.endswith(reason)
