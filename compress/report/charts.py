"""Charts: accuracy against latency, learning curves; scales, ticks and points for templates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from compress.report import numbers
from compress.report.schema import Curve, Figure, Interval, Line, Report, Result, Variant
from compress.report.tables import Setting, place_name, setting_name, setting_of, settings
from compress.report.verdict import accuracy_of, title

if TYPE_CHECKING:
    from matplotlib.ticker import Locator

WIDE, NARROW = (1000.0, 400.0), (360.0, 320.0)  # pixels; the narrow one is for phones
LETTER = 6.6  # mean width of a letter of the labels, pixels
LINE = 14.0  # height of a label, pixels
LINES_WIDE, LINES_NARROW = (540.0, 300.0), (350.0, 260.0)  # pixels
_ROUND = (1, 2, 5, 10)  # first digits of ticks
FOREMOST = 5  # lines with a label; of more, those that fall the lowest are labelled


@dataclass(frozen=True)
class Scale:
    """Maps values in [low, high] to pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of ``value``; values beyond the ends are put on them."""
        inside = min(max(value, self.low), self.high)
        if self.is_log:
            share = math.log(inside / self.low) / math.log(self.high / self.low)
        else:
            share = (inside - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """Return about ``count`` round values inside the range, as (pixel, text)."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        values = self._within(LogLocator(subs=_ROUND[:-1])) if self.is_log else []
        if len(values) < 3:
            values = self._within(MaxNLocator(count, steps=_ROUND))
        return [(self(value), f"{value:,g}".replace("-", "−")) for value in values]

    def _within(self, locator: Locator) -> list[float]:
        found = (round(float(value), 10) for value in locator.tick_values(self.low, self.high))
        return [value for value in found if self.low <= value <= self.high]


def scale(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    is_log: bool = False,
    margin: float = 0.08,
    most: float = math.inf,
) -> Scale:
    """Return a scale that holds ``values`` with some margin; logarithmic only if all are > 0.

    No value can be above ``most``: the scale ends there, but for the margin.
    """
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if low == high == 0:  # an mAP of a network that finds nothing: never below
        high = 1.0
    if is_log and low > 0:
        room = (high / low) ** margin if high > low else 1.5
        return Scale(low / room, high * room, start, end, is_log=True)
    room = (high - low) * margin if high > low else abs(high) * 0.1
    low -= room
    return Scale(low, min(high + room, max(high, most + (most - low) * margin)), start, end)


@dataclass(frozen=True)
class Dot:
    """One measured network in the chart of accuracy against latency."""

    name: str
    label: str  # drawn beside it
    x: float  # latency, ms
    y: float  # top-1, or the task's metric
    x_ci: Interval | None = None
    y_ci: Interval | None = None
    facts: tuple[str, ...] = ()
    series: int | None = None  # the run it belongs to, where there are several
    is_original: bool = False
    y_label: str = "top-1, %"
    higher_is_better: bool = True

    @property
    def worth(self) -> float:
        """``y``, or its negative where less is better."""
        return self.y if self.higher_is_better else -self.y


@dataclass(frozen=True)
class Placed:
    """A dot in pixels, with its label beside it and its interval bars."""

    dot: Dot
    x: float
    y: float
    label: tuple[float, float, str] | None  # x, y, text-anchor
    across: tuple[float, float] | None
    upright: tuple[float, float] | None
    is_best: bool  # on the Pareto front


@dataclass(frozen=True)
class Scatter:
    """The chart of accuracy against latency at one size."""

    size: tuple[float, float]
    frame: tuple[float, float, float, float]  # left, top, right, bottom
    dots: tuple[Placed, ...]
    front: str  # of the SVG path through the Pareto-optimal dots, or ""
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def pareto(dots: Sequence[Dot]) -> list[Dot]:
    """Return the dots that no other beats in both latency and accuracy, fastest first."""
    best: list[Dot] = []
    for dot in sorted(dots, key=lambda dot: (dot.x, -dot.worth)):
        if not best or dot.worth > best[-1].worth:
            best.append(dot)
    return best


def scatter(dots: Sequence[Dot], size: tuple[float, float] = WIDE) -> Scatter:
    """Place dots, at least one, their intervals and labels, and the Pareto front, in pixels."""
    left, top, right, bottom = 52.0, 24.0, size[0] - 14, size[1] - 42
    wide = max(d.x for d in dots) > 6 * min(d.x for d in dots) > 0
    across = scale((v for d in dots for v in (d.x, *(d.x_ci or ()))), left, right, is_log=wide)
    most = 100.0 if dots[0].y_label.endswith("%") else math.inf
    upright = scale((v for d in dots for v in (d.y, *(d.y_ci or ()))), bottom, top, most=most)
    best = pareto(dots)
    placed = _labelled(
        [
            Placed(
                dot,
                across(dot.x),
                upright(dot.y),
                None,
                _ends(dot.x_ci, across),
                _ends(dot.y_ci, upright),
                dot in best,
            )
            for dot in dots
        ],
        (left, top, right, bottom),
    )
    steps = [f"{across(dot.x)} {upright(dot.y)}" for dot in best]
    return Scatter(
        size,
        (left, top, right, bottom),
        tuple(placed),
        f"M{'L'.join(steps)}" if len(steps) > 1 else "",
        tuple(across.ticks(8 if size[0] > 500 else 4)),
        tuple(upright.ticks()),
    )


def _ends(bounds: Interval | None, along: Scale) -> tuple[float, float] | None:
    return None if bounds is None else (along(bounds[0]), along(bounds[1]))


Box = tuple[float, float, float, float]


def _labelled(placed: Sequence[Placed], frame: Box) -> list[Placed]:
    """Give each dot a label beside it where there is room; crowded ones go without.

    A label never lies on a mark or on another label, and on a line only if it must.
    """
    taken: list[Box] = [(p.x - 7, p.y - 7, p.x + 7, p.y + 7) for p in placed]
    drawn: list[Box] = []
    for place in placed:
        drawn += [(place.across[0], place.y, place.across[1], place.y)] if place.across else []
        if place.upright:
            drawn.append((place.x, min(place.upright), place.x, max(place.upright)))
    front = sorted((place for place in placed if place.is_best), key=lambda place: place.x)
    drawn += [box for ends in pairwise(front) for box in _along(*ends)]
    labelled = []
    for place in sorted(placed, key=lambda p: (not p.dot.is_original, not p.is_best)):
        width = LETTER * len(place.dot.label)
        free = [
            (label, box)
            for label in _beside(place.x, place.y, width, frame)
            if _inside(box := _box(label, width), frame) and not _overlaps(box, taken)
        ]
        clear = [each for each in free if not _overlaps(each[1], drawn)]
        for (x, y, anchor), box in (clear or free)[:1]:
            taken.append(box)
            place = replace(place, label=(round(x, 1), round(y, 1), anchor))
        labelled.append(place)
    return labelled


def _box(label: tuple[float, float, str], width: float) -> Box:
    x, y, anchor = label
    start = x if anchor == "start" else x - width if anchor == "end" else x - width / 2
    return (start, y - LINE + 3, start + width, y + 3)


def _inside(box: Box, frame: Box) -> bool:
    return frame[0] < box[0] and box[2] < frame[2] and frame[1] < box[1] < frame[3] - LINE


def _along(one: Placed, other: Placed) -> Iterator[Box]:
    """Yield boxes that cover the line between two marks."""
    steps = max(1, round(max(abs(other.x - one.x), abs(other.y - one.y)) / 4))
    points = [
        (one.x + (other.x - one.x) * i / steps, one.y + (other.y - one.y) * i / steps)
        for i in range(steps + 1)
    ]
    for (x0, y0), (x1, y1) in pairwise(points):
        yield (x0, min(y0, y1), x1, max(y0, y1))


def _beside(x: float, y: float, width: float, frame: Box) -> list[tuple[float, float, str]]:
    """Return where a label of that width may start, the best place first."""
    within = min(max(x - width / 2, frame[0] + 3), frame[2] - width - 3)
    return [
        (x + 11, y - 8, "start"),
        (x - 11, y - 8, "end"),
        (x + 11, y + 17, "start"),
        (x - 11, y + 17, "end"),
        (x, y - 16, "middle"),
        (x, y + 26, "middle"),
        (x + 14, y - 24, "start"),
        (x - 14, y + 34, "end"),
        (within, y - 16, "start"),
        (within, y + 26, "start"),
    ]


def _overlaps(box: Box, others: Iterable[Box]) -> bool:
    return any(
        box[0] <= other[2] and other[0] <= box[2] and box[1] <= other[3] and other[1] <= box[3]
        for other in others
    )


@dataclass(frozen=True)
class ParetoChart:
    """The chart of one setting, at both sizes, and in words for those who cannot see it."""

    setting: Setting
    wide: Scatter
    narrow: Scatter
    description: str

    @property
    def place(self) -> str:
        """The setting but for the batch: "onnxruntime cpu, 2 threads"."""
        return place_name(self.setting)


def pareto_charts(reports: Sequence[Report]) -> list[ParetoChart]:
    """Return a chart for each setting in which at least one variant was measured."""
    charts = []
    for setting in dict.fromkeys(setting for report in reports for setting in settings(report)):
        dots = _dots(reports, setting)
        if not dots:
            continue
        name, _, unit = dots[0].y_label.partition(", ")
        best = (
            f"{dot.name} ({numbers.number(dot.x)} ms, {numbers.percent(dot.y)} {unit})"
            for dot in pareto(dots)
        )
        text = (
            f"{name[:1].upper()}{name[1:]} against median latency of {len(dots)} networks on "
            f"{setting_name(setting)}. Not beaten in both: {', '.join(best)}."
        )
        charts.append(ParetoChart(setting, scatter(dots, WIDE), scatter(dots, NARROW), text))
    return charts


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
        ("speed-up", numbers.factor_within(result.speedup, result.speedup_ci95), "", None, ""),
        ("file", numbers.number(result.size_mib or variant.size_mib), "MiB", None, "number"),
        ("peak memory", numbers.number(result.peak_memory_mib), "MiB", None, "number"),
    )
    return [
        f"{name} {value} {unit}".rstrip() + (f" ({numbers.interval(ci, form)})" if ci else "")
        for name, value, unit, ci, form in named
        if value != numbers.ABSENT
    ]


@dataclass(frozen=True)
class Path:
    """A line of a chart in pixels."""

    name: str
    d: str  # of the SVG path
    end: tuple[float, float]
    style: int  # 0 to 3: drawn in full, the first in the accent colour; -1: in the background
    label_y: float | None


@dataclass(frozen=True)
class Lines:
    """A chart of lines at one size."""

    size: tuple[float, float]
    frame: Box
    paths: tuple[Path, ...]
    x_label: str
    y_label: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def lines(curve: Curve, size: tuple[float, float] = LINES_WIDE) -> Lines | None:
    """Place the lines of ``curve``; None when it holds no point."""
    drawn = [line for line in curve.lines if line.x]
    if not drawn:
        return None
    longest = max(len(line.name) for line in drawn)
    room = min(LETTER * longest + 12, size[0] * 0.34)
    left, top, right, bottom = 52.0, 24.0, size[0] - room, size[1] - 42
    across = scale((x for line in drawn for x in line.x), left, right, margin=0.0)
    most = 100.0 if curve.y_label.endswith("%") else math.inf
    upright = scale((y for line in drawn for y in line.y), bottom, top, most=most)
    if len(drawn) > FOREMOST:
        drawn = sorted(drawn, key=lambda line: min(line.y))
    ends = [(across(line.x[-1]), upright(line.y[-1])) for line in drawn]
    labels = _spread([end[1] for end in ends[:FOREMOST]], top, bottom)
    paths = tuple(
        Path(
            line.name,
            "M"
            + "L".join(f"{across(x)} {upright(y)}" for x, y in zip(line.x, line.y, strict=True)),
            end,
            position if position < FOREMOST and not line.is_reference else -1,
            labels[position] if position < FOREMOST else None,
        )
        for position, (line, end) in enumerate(zip(drawn, ends, strict=True))
    )
    ticks = tuple(across.ticks(5 if size[0] > 500 else 3)), tuple(upright.ticks())
    frame = (left, top, right, bottom)
    return Lines(size, frame, paths, curve.x_label, curve.y_label, *ticks)


def _spread(wanted: Sequence[float], top: float, bottom: float) -> list[float]:
    """Return label heights near those wanted, in the same order, at least a line apart."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    for before, after in pairwise(order):
        placed[after] = max(placed[after], placed[before] + LINE)
    excess = max(0.0, placed[order[-1]] - bottom) if order else 0.0
    for position in reversed(order):
        placed[position] = max(top, placed[position] - excess)
    return [round(height, 1) for height in placed]


def reliability(points: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> Curve:
    """Return confidence against accuracy of several networks as a curve with its diagonal."""
    measured = tuple(Line(name=name, x=tuple(x), y=tuple(y)) for name, x, y in points)
    diagonal = Line(name="perfect", x=(0.0, 100.0), y=(0.0, 100.0), is_reference=True)
    return Curve(
        title="Confidence against accuracy",
        x_label="confidence, %",
        y_label="accuracy, %",
        lines=(*measured, diagonal),
    )


CURVES = (  # key of a row, title, label of the y axis
    ("loss", "Training loss", "loss"),
    ("validation_top1_pct", "Accuracy on validation images", "top-1, %"),
)


def learning_curves(
    stage: str, history: Sequence[Mapping[str, Any]], called: Mapping[str, str] | None = None
) -> Iterator[Curve]:
    """Yield a chart of each figure that ``history``, rows of metrics.jsonl, has two points of.

    ``called`` names metrics of the task: "PSNR, dB" for psnr.
    """
    names = called or {}
    known = {key for key, _, _ in CURVES}
    others = {key for row in history for key in row if key.startswith("validation_")} - known
    own = [
        (key, "Validation images", names.get(name, name.replace("_", " ")))
        for key in sorted(others - {"validation_loss"})
        for name in (key.removeprefix("validation_"),)
    ]
    for key, heading, label in (*CURVES, *own):
        points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
        if len(points) > 1:
            x, y = zip(*points, strict=True)
            lines = (Line(name=stage, x=x, y=y),)
            yield Curve(title=f"{heading}, {stage}", x_label="epoch", y_label=label, lines=lines)
