"""docs/results.md and its charts are what the command makes of benchmarks/results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import results_page  # noqa: E402

RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
AGAIN = "run python benchmarks/results_page.py"


def test_the_page_is_what_the_command_makes() -> None:
    assert (DOCS / "results.md").read_text() == results_page.page(RESULTS), AGAIN


@pytest.mark.parametrize("name", results_page.CHARTS)
def test_every_chart_shows_the_data_that_is_there(name: str) -> None:
    data = results_page.digest(RESULTS / f"{name}.json")
    assert data in (DOCS / "charts" / f"{name}.svg").read_text(), AGAIN


def test_charts_do_not_stay_when_their_data_go() -> None:
    assert {file.stem for file in (DOCS / "charts").iterdir()} == set(results_page.CHARTS)


def test_every_result_has_its_command_and_date() -> None:
    made = json.loads((RESULTS / "made.json").read_text())
    assert {file.stem for file in RESULTS.glob("*.json")} - {"made"} == set(made)
    for name, about in made.items():
        script = about["command"].split()[1]
        assert (ROOT / script).is_file(), f"{name}: there is no {script}"


def test_a_changed_figure_changes_page_and_chart(tmp_path: Path) -> None:
    content = json.loads((RESULTS / "kd_losses.json").read_text())
    content["rows"][0]["top1_pct"][0] += 1
    (tmp_path / "kd_losses.json").write_text(json.dumps(content))
    (tmp_path / "kd_losses.md").write_text("# Title\n\n| loss |\n|---|\n| 12.34 |\n")
    about = {"title": "A title", "command": "python benchmarks/kd_losses.py", "date": "2026-01-02"}
    (tmp_path / "made.json").write_text(json.dumps({"kd_losses": about}))
    page = results_page.page(tmp_path)
    assert all(word in page for word in ("## A title", "2026-01-02", "AMD EPYC", "| 12.34 |"))
    assert "# Title" not in page
    changed = results_page.charts(tmp_path)["kd_losses.svg"]
    assert changed != (DOCS / "charts" / "kd_losses.svg").read_bytes()
