"""Measurements -> report.json, report.md, report.html and a summary; measures nothing itself."""

from __future__ import annotations

from pathlib import Path

from compress.artifact import write_json, write_text
from compress.errors import printable
from compress.report.reading import read_run
from compress.report.runs import compare_runs
from compress.report.schema import Report
from compress.report.text import markdown, summary
from compress.report.verdict import verdict

__all__ = ["Report", "compare_runs", "read_run", "summary", "verdict", "write"]


def write(report: Report, folder: Path | str) -> Report:
    """Write report.json, report.md and report.html to ``folder``; return what was written.

    Args:
        report: Everything that is known about the run. An empty verdict is filled in.
        folder: The run folder; made if absent. Each file is replaced in one step, JSON last.

    Raises:
        RunError: the folder cannot be written.
    """
    from compress.report.html import html

    folder = Path(folder)
    if not report.verdict:
        report = report.model_copy(update={"verdict": verdict(report)})
    write_text(folder / "report.html", printable(html(report)))
    write_text(folder / "report.md", printable(markdown(report)))
    write_json(folder / "report.json", report.to_json())
    return report
