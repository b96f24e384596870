"""The report as Markdown that pastes into a pull request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from compress.report import figures
from compress.report.schema import Report, Result, Variant
from compress.report.terminal import gate_sentence, missing
from compress.report.verdict import accuracy_differs, accuracy_of, speed_differs, verdicts

_SPECIAL = str.maketrans({char: f"\\{char}" for char in "\\`*_{}[]<>#|~$&@"})


def markdown(report: Report) -> str:
    """Return the verdict, the gates, the tables and the provenance as GitHub Markdown."""
    parts = [
        f"# {plain(report.name)}",
        f"**{plain(report.verdict)}**",
        _others(report),
        _bullets(
            f"{'✅' if gate.passed else '❌'} {plain(gate_sentence(gate))}" for gate in report.gates
        ),
        _bullets(f"⚠ {plain(line)}" for line in report.incomplete),
        "## Variants\n\n" + _variants(report),
        "## Results\n\n" + _results(report),
        _bullets(plain(line) for line in missing(report)),
        _provenance(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def plain(text: str) -> str:
    """Return ``text`` on one line with everything escaped that Markdown or HTML would read."""
    return " ".join(text.split()).translate(_SPECIAL)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table; columns after the first ``left`` are numbers, set to the right."""
    rule = [":--" if column < left else "--:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def _others(report: Report) -> str:
    sentences = verdicts(report)
    others = [text for text in sentences.values() if text != report.verdict]
    return _bullets(plain(text) for text in others)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _variants(report: Report) -> str:
    header = ("variant", "stage", "parameters", "MACs", "size, MiB", "file")
    rows = [
        (
            plain(variant.name),
            plain(variant.stage),
            figures.count(variant.params),
            figures.count(variant.macs),
            figures.number(variant.size_mib),
            plain(variant.artifact or figures.ABSENT),
        )
        for variant in report.variants
    ]
    return table(header, rows, left=2)


def _results(report: Report) -> str:
    header = (
        "variant",
        "runtime",
        "batch",
        "top-1, % (95 % CI)",
        "change, points (95 % CI)",
        "agreement, %",
        "p50, ms (95 % CI)",
        "p99, ms",
        "images/s",
        "peak, MiB",
        "speed-up (95 % CI)",
    )
    rows = [_row(variant, result) for variant in report.variants for result in variant.results]
    return table(header, rows, left=2)


def _row(variant: Variant, result: Result) -> tuple[str, ...]:
    accuracy = accuracy_of(variant, result)
    return (
        plain(variant.name),
        plain(f"{result.runtime} {result.precision} {result.device}"),
        str(result.batch),
        with_ci(
            figures.percent(accuracy.top1_pct), figures.interval(accuracy.top1_ci95, "percent")
        ),
        with_ci(
            figures.points(accuracy.top1_change_pct),
            figures.interval(accuracy.top1_change_ci95, "points"),
            same=accuracy_differs(accuracy) is False,
        ),
        figures.percent(accuracy.agreement_pct),
        with_ci(
            figures.number(result.latency_ms_p50), figures.interval(result.latency_ms_p50_ci95)
        ),
        figures.number(result.latency_ms_p99),
        figures.number(result.throughput_ips),
        figures.number(result.peak_memory_mib),
        with_ci(
            figures.factor(result.speedup),
            figures.interval(result.speedup_ci95),
            same=speed_differs(result) is False,
        ),
    )


def with_ci(value: str, bounds: str, *, same: bool = False) -> str:
    """Return "value (low..high)", and that there is no significant difference where so."""
    text = f"{value} ({bounds})" if bounds else value
    return f"{text}, no significant difference" if same else text


def _provenance(report: Report) -> str:
    facts = report.provenance
    lines = [
        f"{name}: {plain(str(value))}"
        for name, value in (
            ("command", facts.command),
            ("created", facts.created),
            ("commit", facts.commit),
            ("seed", facts.seed),
            ("data", facts.data and f"{facts.data.name} {facts.data.fingerprint}"),
            ("device", ", ".join(f"{key} {value}" for key, value in facts.device.items())),
            ("versions", ", ".join(f"{key} {value}" for key, value in facts.versions.items())),
        )
        if value not in (None, "")
    ]
    return "## Provenance\n\n" + _bullets(lines) if lines else ""
