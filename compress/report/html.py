"""The report as one self-contained HTML file: no request, readable with and without scripts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compress.report import figures
from compress.report.markdown import with_ci
from compress.report.schema import Report
from compress.report.terminal import gate_sentence, missing
from compress.report.verdict import accuracy_differs, accuracy_of, speed_differs, verdicts

if TYPE_CHECKING:
    from jinja2 import Environment


def html(report: Report) -> str:
    """Return the whole page; every name that comes from data is escaped."""
    page = _environment().get_template("report.html.j2")
    return page.render(report=report, details=report.details, verdicts=verdicts(report))


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("compress.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        accuracy_differs=accuracy_differs,
        accuracy_of=accuracy_of,
        gate_sentence=gate_sentence,
        missing=missing,
        speed_differs=speed_differs,
        with_ci=with_ci,
    )
    environment.filters.update(
        count=figures.count,
        factor=figures.factor,
        interval=figures.interval,
        number=figures.number,
        percent=figures.percent,
        points=figures.points,
    )
    return environment
