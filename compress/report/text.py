"""The report as text: tables, gates and verdict in a terminal; Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from rich import box
from rich import table as rich_table
from rich.console import Group, RenderableType
from rich.text import Text

from compress.report import numbers
from compress.report.schema import Gate, Report, Result, Variant
from compress.report.tables import (
    Cell,
    Setting,
    Table,
    accuracies,
    compact,
    setting_name,
    setting_of,
    settings,
    sizes,
    speeds,
)
from compress.report.verdict import accuracy_of, speed_differs, verdicts

SHOWN = frozenset({"size_mib", "peak_memory_mib"})  # sizes that the table has a column for
_SPECIAL = str.maketrans({char: f"\\{char}" for char in "\\`*_{}[]<>#|~$&@"})


def summary(
    report: Report,
    folder: Path | str | None = None,
    *,
    verbose: bool = False,
    run: Path | str | None = None,
) -> RenderableType:
    """Return what the command line prints after a run, for ``rich.print``.

    Args:
        report: The report; its verdict is printed as it is.
        folder: Where the report files are; named in the last line.
        verbose: Tell what was tried, and why figures that no column shows were not measured.
        run: Where the files of the run are; ``folder`` if absent.
    """
    parts: list[RenderableType] = [*_tables(report)]
    details = (*report.trials, *missing(report)) if verbose else missing(report, SHOWN)
    parts += [Text(line, style="dim") for line in (*report.notes, *details)]
    for gate in report.gates:
        sign, color = ("✓", "green") if gate.passed else ("✗", "red")
        parts.append(Text(f"{sign} {gate_sentence(gate)}", style=color))
    parts += [Text(f"! {line}", style="yellow") for line in (*report.incomplete, *report.cautions)]
    if report.verdict:
        parts.append(Text(report.verdict, style="bold"))
    if folder is not None:
        int8 = [v.artifact for v in report.variants if v.artifact and v.name.startswith("int8-")]
        parts += [Text(f"Int8: {Path(run or folder) / path}") for path in int8]
        parts.append(Text(f"Report: {Path(folder) / 'report.html'}  (.md, .json beside it)"))
    return Group(*parts)


def missing(report: Report, shown: Collection[str] | None = None) -> list[str]:
    """Return one line for each thing that was not measured, with the reason.

    What is missing for one reason in several results is one line that says of how many. ``shown``
    are the figures of results that count; all if None.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for name, why in report.skipped.items():
        found.setdefault((name, why), [])
    for variant in report.variants:
        for name, why in variant.skipped.items():
            found.setdefault((name, why), []).append(variant.name)
        for result in variant.results:
            for name, why in result.skipped.items():
                if name == "peak_device_mib" and result.device == "cpu":
                    continue  # nobody looks for it there
                if shown is not None and name.endswith("_mib") and name not in shown:
                    continue
                place = f"{_row_name(variant, result)} on {result.runtime} batch {result.batch}"
                found.setdefault((name, why), []).append(place)
    every = sum(len(variant.results) for variant in report.variants)
    return [
        f"not measured: {numbers.in_words(name)}{_of(places, every)}: {why}"
        for (name, why), places in found.items()
    ]


def _of(places: list[str], every: int) -> str:
    if len(places) == every:
        return ""
    if len(places) > 2:
        return f" of {len(places)} results"
    return f" of {' and '.join(places)}" if places else ""


def _tables(report: Report) -> Iterator[RenderableType]:
    for setting in settings(report):
        yield Text(setting_name(setting), style="dim")
        yield _table(report, setting)
    if any(not variant.results for variant in report.variants):
        yield Text("not run", style="dim")
        yield _table(report, None)


def _table(report: Report, setting: Setting | None) -> rich_table.Table:
    """Return the rows of one setting; None: the variants without results."""
    table = rich_table.Table(
        box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, padding=(0, 1)
    )
    longest = max(
        len(_row_name(variant, result))
        for variant in report.variants
        for result in variant.results or (None,)
    )
    table.add_column("variant", overflow="fold", min_width=min(longest, 16))
    figures = (result.figure for variant in report.variants for result in variant.results)
    accuracy = "top-1 %" if report.details.tells_classes else "accuracy"
    if first := next(filter(None, figures), None):
        accuracy = f"{first.name} {first.unit}".strip()
    for name in (accuracy, "params", "MACs", "file MiB", "peak MiB", "p50 ms", "speed-up"):
        table.add_column(name, justify="right", no_wrap=True, min_width=6)
    for variant in report.variants:
        chosen: list[Result | None] = [r for r in variant.results if setting_of(r) == setting]
        if setting is None and not variant.results:
            chosen = [None]
        for result in chosen:
            table.add_row(Text(_row_name(variant, result)), *_numbers(variant, result))
    return table


def _row_name(variant: Variant, result: Result | None) -> str:
    """Return "pruned fp32"; a name that says its precision itself is left as it is."""
    if result is None or variant.name.startswith(result.precision):
        return variant.name
    return f"{variant.name} {result.precision}"


def _numbers(variant: Variant, result: Result | None) -> tuple[str, ...]:
    if result is None:
        counts = (numbers.count(variant.params), numbers.count(variant.macs))
        size = numbers.number(variant.size_mib)
        return (numbers.ABSENT, *counts, size, *[numbers.ABSENT] * 3)
    figure = accuracy_of(variant, result).figure
    write = numbers.number if figure is not None and figure.name == "SQNR" else numbers.percent
    same = "=" * (speed_differs(result) is False)  # no significant difference
    return (
        write(None if figure is None else figure.value),
        numbers.count(variant.params),
        numbers.count(variant.macs),
        numbers.number(result.size_mib or variant.size_mib),
        numbers.number(result.peak_memory_mib),
        numbers.number(result.latency_ms_p50),
        f"{same}{numbers.factor(result.speedup, result.speedup_ci95)}",
    )


def gate_sentence(gate: Gate, *, with_outcome: bool = True) -> str:
    """Return a gate in words: "loss of top-1 at most 1 point: measured 0.3, passed".

    Where it failed and has a reason, that follows the figure.
    """
    name, unit = _GATES.get(gate.name, (gate.name.replace("_", " "), ""))
    if gate.metric is not None:
        name = name.replace("the primary metric", gate.title or gate.metric)
        unit = {"pct": " points", "": ""}.get(gate.unit or "", f" {gate.unit}")
    side = "at least" if unit in {"x", " %"} else "at most"
    limit = numbers.signed(f"{gate.limit:.4g}")
    limit += unit.removesuffix("s") if gate.limit == 1 else unit
    if gate.measured is None:
        measured = f"not measured because {gate.reason or 'no reason was recorded'}"
    elif gate.measured < 0 and name.startswith("loss of"):
        measured = f"gained {numbers.number(-gate.measured)}"
    else:
        shown = numbers.number(gate.measured)
        if not gate.passed and shown == numbers.number(gate.limit):
            shown = f"{gate.measured:.6g}"
        measured = f"measured {shown}"
    if gate.measured is not None and gate.reason and not gate.passed:
        measured += f" ({gate.reason})"
    place = " on ".join(str(part) for part in (gate.variant, gate.runtime) if part)
    if gate.name == "speedup" and gate.batch:
        place += f", batch {gate.batch}"
    about = f" ({place})" if place else ""
    outcome = (", passed" if gate.passed else ", failed") if with_outcome else ""
    return f"{name} {side} {limit}{about}: {measured}{outcome}"


_GATES = {  # name -> in words, unit
    "metric_drop": ("loss of the primary metric", ""),
    "top1_drop_pct": ("loss of top-1", " points"),
    "max_drop": ("loss of the primary metric on validation images", ""),
    "max_drop_pct": ("loss of top-1 on validation images", " points"),
    "worst_class_drop_pct": ("loss of any class", " points"),
    "agreement_pct": ("agreement with the original", " %"),
    "speedup": ("speed-up", "x"),
    "size_ratio": ("reduction of size", "x"),
    "latency_ms": ("latency", " ms"),
}


def markdown(report: Report) -> str:
    """Return the verdict, the gates, the tables and the provenance as GitHub Markdown."""
    parts = [
        f"# {escaped_line(report.name)}",
        f"**{escaped_line(report.verdict)}**",
        bullets(escaped_line(text) for text in list(verdicts(report).values())[1:]),
        bullets(
            f"{'✅' if gate.passed else '❌'} {escaped_line(gate_sentence(gate))}"
            for gate in report.gates
        ),
        bullets(f"⚠ {escaped_line(line)}" for line in (*report.incomplete, *report.cautions)),
        *(section(table(report)) for table in (accuracies, speeds, sizes)),
        bullets(escaped_line(line) for line in (*report.notes, *missing(report))),
        "## Tried\n\n" + bullets(map(escaped_line, report.trials)) if report.trials else "",
        _provenance(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped_line(text: str) -> str:
    """Return ``text`` on one line with everything escaped that Markdown or HTML would read."""
    return " ".join(text.split()).translate(_SPECIAL)


def bullets(lines: Iterable[str]) -> str:
    """Return a list of lines that are Markdown already."""
    return "\n".join(f"- {line}" for line in lines)


def section(source: Table) -> str:
    """Return a table below its title, and the notes that belong to it."""
    compacted = compact(source)
    header = [
        escaped_line(f"{column.name}, {column.unit}" if column.unit else column.name)
        for column in compacted.columns
    ]
    rule = ["--:" if column.is_number else ":--" for column in compacted.columns]
    rows = [[_cell(cell) for cell in row] for row in compacted.rows]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]
    notes = [escaped_line(f"not measured: {note}") for note in compacted.notes]
    return f"## {source.title}\n\n" + "\n".join(lines) + ("\n\n" + bullets(notes) if notes else "")


def _cell(cell: Cell) -> str:
    value = f"{cell.text} ({cell.bounds})" if cell.bounds else cell.text
    return escaped_line(", ".join(part for part in (value, cell.remark) if part))


def _provenance(report: Report) -> str:
    facts = report.provenance
    lines = [
        f"{name}: {escaped_line(str(value))}"
        for name, value in (
            ("command", facts.command),
            ("created", facts.created),
            ("commit", facts.commit),
            ("seed", facts.seed),
            ("data", facts.data and f"{facts.data.name} {facts.data.fingerprint}"),
            ("device", numbers.fact(facts.device)),
            ("versions", ", ".join(f"{key} {value}" for key, value in facts.versions.items())),
        )
        if value not in (None, "")
    ]
    return "## Provenance\n\n" + bullets(lines) if lines else ""
