"""The report as Markdown that pastes into a pull request."""

from __future__ import annotations

from collections.abc import Iterable

from compress.report.numbers import fact
from compress.report.schema import Report
from compress.report.tables import Cell, Table, accuracies, compact, sizes, speeds
from compress.report.terminal import gate_sentence, missing
from compress.report.verdict import verdicts

_SPECIAL = str.maketrans({char: f"\\{char}" for char in "\\`*_{}[]<>#|~$&@"})


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
    """Return "value (low..high), remark"."""
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
            ("device", fact(facts.device)),
            ("versions", ", ".join(f"{key} {value}" for key, value in facts.versions.items())),
        )
        if value not in (None, "")
    ]
    return "## Provenance\n\n" + bullets(lines) if lines else ""
