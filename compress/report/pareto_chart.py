"""Accuracy against latency: one chart for every runtime, batch and thread count of the runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.report import numbers
from compress.report.charts import NARROW, WIDE, Dot, Scatter, pareto, scatter
from compress.report.schema import Figure, Report, Result, Variant
from compress.report.tables import Setting, place_name, setting_name, setting_of, settings
from compress.report.verdict import accuracy_of, title


@dataclass(frozen=True)
class ParetoChart:
    """The chart of one setting, at both sizes, and in words for those who cannot see it."""

    setting: Setting
    title: str
    wide: Scatter
    narrow: Scatter
    description: str

    @property
    def place(self) -> str:
        """The setting but for the batch: "onnxruntime cpu, 2 threads"."""
        return place_name(self.setting)


def pareto_charts(reports: Sequence[Report]) -> list[ParetoChart]:
    """Return a chart for each setting in which at least one variant was measured."""
    found = dict.fromkeys(setting for report in reports for setting in settings(report))
    drawn = {setting: _dots(reports, setting) for setting in found}
    return [_chart(setting, dots) for setting, dots in drawn.items() if dots]


def _chart(setting: Setting, dots: list[Dot]) -> ParetoChart:
    best = ", ".join(_words(dot) for dot in pareto(dots))
    return ParetoChart(
        setting,
        setting_name(setting),
        scatter(dots, WIDE),
        scatter(dots, NARROW),
        f"{_capital(dots[0].y_label)} against median latency of {len(dots)} networks on "
        f"{setting_name(setting)}. "
        f"Not beaten in both: {best}.",
    )


def _words(dot: Dot) -> str:
    unit = dot.y_label.partition(", ")[2]
    return f"{dot.name} ({numbers.number(dot.x)} ms, {numbers.percent(dot.y)} {unit})"


def _capital(label: str) -> str:
    name = label.partition(",")[0]
    return name[:1].upper() + name[1:]


def _dots(reports: Sequence[Report], setting: Setting) -> list[Dot]:
    return [
        dot
        for series, report in enumerate(reports)
        for variant in report.variants
        for result in variant.results
        if setting_of(result) == setting
        and (dot := _dot(report, variant, result, series if len(reports) > 1 else None))
    ]


def _dot(report: Report, variant: Variant, result: Result, series: int | None) -> Dot | None:
    accuracy = accuracy_of(variant, result)
    figure = accuracy.figure
    if result.latency_ms_p50 is None or figure is None or accuracy.outputs:
        return None  # the noise against the original says nothing of the original itself
    name = title(variant, result)
    return Dot(
        name=name if series is None else f"{report.name}: {name}",
        label=name,
        x=result.latency_ms_p50,
        y=figure.value,
        x_ci=result.latency_ms_p50_ci95,
        y_ci=figure.ci95,
        facts=tuple(_facts(variant, result, figure)),
        series=series,
        is_original=variant is report.original,
        y_label=figure.title,
        higher_is_better=figure.higher_is_better,
    )


def _facts(variant: Variant, result: Result, figure: Figure) -> list[str]:
    named = (
        ("p50", numbers.number(result.latency_ms_p50), "ms", result.latency_ms_p50_ci95, "number"),
        (figure.name, numbers.percent(figure.value), figure.unit, figure.ci95, "percent"),
        ("speed-up", numbers.factor(result.speedup), "", result.speedup_ci95, "number"),
        ("file", numbers.number(result.size_mib or variant.size_mib), "MiB", None, "number"),
        ("peak memory", numbers.number(result.peak_memory_mib), "MiB", None, "number"),
    )
    return [
        f"{name} {value} {unit}".rstrip() + (f" ({numbers.interval(ci, form)})" if ci else "")
        for name, value, unit, ci, form in named
        if value != numbers.ABSENT
    ]
