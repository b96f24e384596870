"""Names from files are shown on terminals, in HTML and in Markdown, and never obeyed there."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.table import Table

from compress.artifact import FileProblem
from compress.errors import CompressError, printable
from compress.report import write
from compress.report.schema import Channels, Details, Report, Variant
from compress.terminal import plain_console

sys.path.append(str(Path(__file__).parents[1] / "report"))
ESCAPE, TURN = "\x1b[2J\x1b]8;;http://evil\x07", "\u202e"
NAMES = {
    "escape": f"cat{ESCAPE}",
    "markup": "[red]cat[/red][link=http://evil]x[/link]:cat:",
    "turned": f"cat{TURN}exe.gnp",
    "line": "cat\n0 problems",
    "script": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "markdown": "[x](javascript:alert(1)) | **b** `c`\n# title",
    "half": "cat\ud800",
}
BY_NAME = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())


@BY_NAME
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_table_shows_names_as_they_are(name: str, is_terminal: bool) -> None:
    out = io.StringIO()
    table = Table("rule", title=name)
    table.add_row(name)
    console = plain_console(file=out, force_terminal=is_terminal, width=200, color_system=None)
    console.print(table)
    shown = out.getvalue()
    assert TURN not in shown
    assert "\x1b[2J" not in shown
    assert "\x07" not in shown
    if "[red]" in name:
        assert shown.count(name) == 2


@BY_NAME
def test_errors_and_findings_are_one_sentence(name: str) -> None:
    told = str(CompressError(f"no class {name}", where=name))
    assert "\x1b" not in told
    assert TURN not in told
    assert "\n" not in str(FileProblem(name, "missing", "a file"))


def test_spelling_is_left_alone() -> None:
    persian, joined = "می\u200cخواهم", "👩\u200d🔬"
    assert printable(f"{persian} {joined} é\n\t") == f"{persian} {joined} é\n\t"
    assert printable("a\x00\x9b\u2066\u2028") == "a\\u0000\\u009b\\u2066\\u2028"


@BY_NAME
def test_reports_show_names_as_text(name: str, tmp_path: Path) -> None:
    report = Report(
        name=name,
        recipe={"model": {"name": name}},
        variants=(Variant(name="original", stage="00"), Variant(name=name, stage=name)),
        details=Details(classes=(name, "dog"), channels=(Channels(layer=name, before=4, after=2),)),
        skipped={name: name},
    )
    write(report, tmp_path)
    for file in ("report.html", "report.md"):
        text = (tmp_path / file).read_text("utf-8")
        assert "\x1b" not in text
        assert TURN not in text
        live = text.replace("\\<", "").replace("\\]", "")  # Markdown escapes with backslashes
        assert "<script>alert" not in live
        assert "<img src=x" not in live
    assert "](javascript:" not in live
    assert "\n# title" not in live
