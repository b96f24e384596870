"""Several runs in one comparison: same scales, joint Pareto front, history of one recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from compress.artifact import write_json, write_text
from compress.errors import RunError
from compress.report import numbers
from compress.report.charts import pareto_charts
from compress.report.reading import read_run
from compress.report.schema import SCHEMA, Figure, Interval, Report, Result, Variant
from compress.report.tables import (
    Cell,
    Column,
    Table,
    accuracies,
    compact,
    place_name,
    setting_of,
    sizes,
    speeds,
)
from compress.report.text import bullets, escaped_line, section
from compress.report.verdict import accuracy_of, comparisons, title

SIZE_MARGIN = 1.01  # a file that grew by less is no regression
SPEED_MARGIN = 1.02  # nor a speed-up that fell by less: the bench calls it no difference
WORSE = "worse than before"


def compare_runs(
    folders: Sequence[Path | str], out: Path | str, *, force: bool = False
) -> RenderableType:
    """Write one comparison of several runs to ``out`` and return it for the terminal.

    Args:
        folders: Run folders, finished or not.
        out: Where report.html, report.md and report.json are written.
        force: Compare what is not comparable; the report then says so at its head.

    Raises:
        RunError: a folder is no run, or the runs used different data or devices.
    """
    reports = named_reports([(Path(folder), read_run(folder)) for folder in folders])
    problems = incomparable(reports)
    if problems and not force:
        raise RunError(
            f"the runs cannot be compared: {'; '.join(problems)}",
            expected="runs on the same data and device",
            fix="Run them again on one machine, or give --force: the report will be marked",
        )
    out = Path(out)
    write_text(out / "report.html", comparison_html(reports, problems))
    write_text(out / "report.md", comparison_markdown(reports, problems))
    write_json(out / "report.json", comparison_json(reports, problems))
    return _terminal(reports, problems, out)


def named_reports(runs: Sequence[tuple[Path, Report]]) -> list[Report]:
    """Return the reports in order of time, each with a name of its own."""
    ordered = sorted(runs, key=lambda run: run[1].provenance.created or "")
    names = [report.name for _, report in ordered]
    if len(set(names)) < len(names):
        names = [folder.resolve().name for folder, _ in ordered]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return [
        report.model_copy(update={"name": name})
        for name, (_, report) in zip(names, ordered, strict=True)
    ]


def incomparable(reports: Sequence[Report]) -> list[str]:
    """Return one line for each reason why figures of two runs do not belong side by side."""
    found = [line for pair in combinations(reports, 2) for line in _differences(*pair)]
    return list(dict.fromkeys(found))


def _differences(one: Report, other: Report) -> list[str]:
    both = f"{one.name} and {other.name}"
    lines = []
    data = [report.provenance.data for report in (one, other)]
    if data[0] and data[1] and data[0].fingerprint != data[1].fingerprint:
        lines.append(f"{both} used different data ({data[0].name}, {data[1].name})")
    elif not (data[0] and data[1]):
        lines.append(f"{both}: the data of at least one is not recorded")
    devices = [report.provenance.device for report in (one, other)]
    for key in devices[0].keys() & devices[1].keys():
        values = devices[0][key], devices[1][key]
        if all(isinstance(value, str | int) for value in values) and values[0] != values[1]:
            lines.append(f"{both} ran on different devices ({key}: {values[0]}, {values[1]})")
    figures = [
        next((r.figure.name for v in report.variants for r in v.results if r.figure), None)
        for report in (one, other)
    ]
    if all(figures) and figures[0] != figures[1]:
        lines.append(f"{both} were judged by different metrics ({figures[0]}, {figures[1]})")
    if one.details.classes != other.details.classes:
        lines.append(f"{both} have different classes")
    return sorted(lines)


def joint(tables: Sequence[tuple[str, Table]]) -> Table:
    """Return tables of one kind from several runs as one, with the run in the first column."""
    columns: dict[Column, None] = {}
    for _, table in tables:
        columns |= dict.fromkeys(table.columns)
    rows = []
    for run, table in tables:
        for row in table.rows:
            cells = dict(zip(table.columns, row, strict=True))
            absent = Cell(numbers.ABSENT, reason=f"{run} does not have it")
            rows.append((Cell(run), *(cells.get(column, absent) for column in columns)))
    first = Column("Run", is_number=False)
    return replace(tables[0][1], columns=(first, *columns), rows=tuple(rows))


def joint_tables(reports: Sequence[Report]) -> list[Table]:
    """Return accuracy, speed and size of all variants of all runs."""
    return [
        compact(joint([(report.name, kind(report)) for report in reports]))
        for kind in (accuracies, speeds, sizes)
    ]


@dataclass(frozen=True)
class HistoryEntry:
    """The outcome of one run on one runtime, for the history of a recipe."""

    report: Report
    variant: Variant
    result: Result

    @property
    def size_mib(self) -> float | None:
        """Size of what ran; of the artifact where that was not noted."""
        return self.result.size_mib or self.variant.size_mib

    @property
    def figure(self) -> Figure | None:
        """How good the result is."""
        return accuracy_of(self.variant, self.result).figure


def histories(reports: Sequence[Report]) -> list[Table]:
    """Return a table over time for each recipe that was run more than once.

    **Method:** a figure is marked as worse than before when its 95 % interval lies wholly on the
    worse side of the one of the run before: two such intervals that do not touch differ at well
    below the 5 % level, so what is marked is no noise, and small losses can stay unmarked. Speed is
    judged by the speed-up, not by milliseconds: each run timed its original beside its result, so
    that a machine that is slower today slows both. A file is marked when it grew by more than 1 %.
    Without intervals nothing is marked.
    """
    found = []
    recipes: dict[str, list[Report]] = {}
    for report in reports:
        recipes.setdefault(recipe_key(report), []).append(report)
    for same in recipes.values():
        moments: dict[tuple[Any, ...], list[HistoryEntry]] = {}
        for report in same:
            for variant, _, result in comparisons(report):
                moments.setdefault(setting_of(result), []).append(
                    HistoryEntry(report, variant, result)
                )
        for setting, row in moments.items():
            if len(row) > 1:
                found.append(_history(same[-1].name, place_name(setting), setting[2], row))
    return found


def recipe_key(report: Report) -> str:
    """Return what two runs of one recipe share: everything but name and seed."""
    kept = {key: value for key, value in report.recipe.items() if key not in {"name", "seed"}}
    return json.dumps(kept, sort_keys=True)


def _history(name: str, place: str, batch: int, moments: Sequence[HistoryEntry]) -> Table:
    figure = next((moment.figure for moment in reversed(moments) if moment.figure), None)
    accuracy = Column("Accuracy")
    if figure is not None:
        accuracy = Column(figure.name[:1].upper() + figure.name[1:], figure.unit)
    columns = (
        Column("Run", is_number=False),
        Column("Created", is_number=False),
        Column("Variant", is_number=False),
        accuracy,
        Column("p50", "ms"),
        Column("Speed-up"),
        Column("File", "MiB"),
    )
    rows = [_moment(moments[0], None)]
    rows += [_moment(now, before) for before, now in pairwise(moments)]
    key = f"history-{name}-{place}-{batch}".replace(" ", "-")
    return Table(key, f"{place}, batch {batch}", columns, tuple(rows))


def _moment(now: HistoryEntry, before: HistoryEntry | None) -> tuple[Cell, ...]:
    slower = before is not None and _is_below(
        now.result.speedup_ci95, before.result.speedup_ci95, SPEED_MARGIN
    )
    return (
        Cell(now.report.name),
        Cell(now.report.provenance.created or numbers.ABSENT),
        Cell(title(now.variant, now.result)),
        _figure_cell(now.figure, before.figure if before else None),
        Cell.of(now.result.latency_ms_p50, bounds=now.result.latency_ms_p50_ci95),
        Cell.of(now.result.speedup, "factor", now.result.speedup_ci95, WORSE * slower),
        Cell.of(now.size_mib, remark=WORSE if before and _grew(before, now) else ""),
    )


def _figure_cell(figure: Figure | None, old: Figure | None) -> Cell:
    if figure is None:
        return Cell(numbers.ABSENT, reason="not measured")
    form = "percent" if figure.unit == "%" else "number"
    one, other = figure.ci95, old.ci95 if old and old.name == figure.name else None
    if not figure.higher_is_better:
        one, other = other, one
    remark = WORSE if _is_below(one, other) else ""
    return Cell.of(figure.value, form, figure.ci95, remark)


def regressions(tables: Sequence[Table]) -> list[str]:
    """Return one line for each figure that a history marks as worse than before."""
    lines = []
    for table in tables:
        for row in table.rows:
            for column, cell in zip(table.columns, row, strict=True):
                if cell.remark == WORSE:
                    figure = f"{cell.text} {column.unit}".rstrip()
                    lines.append(
                        f"{row[0].text}: {column.name} on {table.title} is {WORSE} ({figure})"
                    )
    return lines


def _is_below(one: Interval | None, other: Interval | None, margin: float = 1.0) -> bool:
    return one is not None and other is not None and one[1] * margin < other[0]


def _grew(before: HistoryEntry, now: HistoryEntry) -> bool:
    """Return whether what runs became larger; sizes of engines and of artifacts are not mixed."""
    pairs = (
        (before.result.size_mib, now.result.size_mib),
        (before.variant.size_mib, now.variant.size_mib),
    )
    old, new = next((pair for pair in pairs if None not in pair), (None, None))
    return old is not None and new is not None and new > old * SIZE_MARGIN


def comparison_html(reports: Sequence[Report], problems: Sequence[str]) -> str:
    """Return the page about several runs."""
    from compress.report.html import render

    tables = histories(reports)
    return render(
        "several.html.j2",
        title=f"{len(reports)} runs compared",
        reports=reports,
        problems=problems,
        charts=pareto_charts(reports),
        histories=tables,
        regressions=regressions(tables),
        tables=joint_tables(reports),
    )


def comparison_markdown(reports: Sequence[Report], problems: Sequence[str]) -> str:
    """Return the same as Markdown."""
    tables = histories(reports)
    parts = [
        f"# {len(reports)} runs compared",
        bullets(f"⚠ not comparable: {escaped_line(line)}" for line in problems),
        bullets(
            f"⚠ {escaped_line(report.name)}: {escaped_line(x)}"
            for report in reports
            for x in report.incomplete
        ),
        bullets(
            f"**{escaped_line(report.name)}**: {escaped_line(report.verdict)}" for report in reports
        ),
        bullets(f"❌ {escaped_line(line)}" for line in regressions(tables)),
        *(section(replace(table, title=f"History on {table.title}")) for table in tables),
        *(section(table) for table in joint_tables(reports)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def comparison_json(reports: Sequence[Report], problems: Sequence[str]) -> dict[str, Any]:
    """Return the same for scripts: each run's report without its pictures and tables inside."""
    return {
        "schema": SCHEMA,
        "comparable": not problems,
        "problems": list(problems),
        "regressions": regressions(histories(reports)),
        "runs": [
            {key: value for key, value in report.to_json().items() if key != "details"}
            for report in reports
        ],
    }


def _terminal(reports: Sequence[Report], problems: Sequence[str], out: Path) -> RenderableType:
    lines = [Text(f"! not comparable: {line}", style="red") for line in problems]
    for report in reports:
        lines.append(Text.assemble((report.name, "bold"), ": ", report.verdict))
        lines += [Text(f"  ! {line}", style="yellow") for line in report.incomplete]
    lines += [Text(f"✗ {line}", style="red") for line in regressions(histories(reports))]
    return Group(*lines, Text(f"Comparison: {out / 'report.html'}  (.md, .json beside it)"))
