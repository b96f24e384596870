"""Numbers as people read them: significant digits, units, intervals; the same in every format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.report.schema import Interval, Result, Variant

UNRECORDED = "no reason was recorded"
ABSENT = "–"
LOOSE = 1.5  # upper over lower end of a ratio's interval, from which no one number tells it


def number(value: float | None, digits: int = 3) -> str:
    """Return ``value`` with about ``digits`` significant digits and no exponent, or a dash."""
    if value is None:
        return ABSENT
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])
    places = max(0, digits - 1 - exponent)
    return signed(f"{value:,.{places}f}")


def count(value: float | None) -> str:
    """Return a count with a unit prefix: 272,474 is "272 k", 40.6e6 is "40.6 M"."""
    if value is None:
        return ABSENT
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{number(value / size)} {unit}"
    return f"{value:,.0f}"


def points(value: float | None) -> str:
    """Return a difference in percentage points with its sign: "−0.31", "+0.12", "0.00"."""
    if value is None:
        return ABSENT
    places = 2 if abs(value) < 9.995 else 1
    text = f"{value:+.{places}f}"
    return text[1:] if float(text) == 0 else signed(text)


def percent(value: float | None) -> str:
    """Return a percentage with two decimals and no sign for it."""
    return ABSENT if value is None else signed(f"{value + 0.0:.2f}")  # -0.0 is 0


def signed(text: str) -> str:
    """Return a number with the minus sign that every number has here."""
    return text.replace("-", "−")


def interval(bounds: Interval | None, form: str = "number") -> str:
    """Return "low..high", or an empty string; ``form`` is number, points or percent."""
    if bounds is None:
        return ""
    write = {"number": number, "points": points, "percent": percent}[form]
    return f"{write(bounds[0])}..{write(bounds[1])}"


def share(row: Mapping[str, Any], key: str) -> str:
    """Return a percentage of a row of results with its interval: "93.20 (91.02..94.88)"."""
    if key not in row:
        return ABSENT
    bounds = row[f"{key.removesuffix('_pct')}_ci95"]
    return f"{percent(row[key])} ({interval(bounds, 'percent')})"


def ratio_db(row: Mapping[str, Any]) -> str:
    """Return the signal-to-noise ratio of a row of differences, or why there is none."""
    if "sqnr_db" in row:
        return signed(f"{row['sqnr_db']:.1f}")
    if row.get("not_finite"):
        return f"{row['not_finite']} not finite"
    if row.get("max_abs_diff") == 0:
        return "both zero" if row.get("zero_reference") else "equal"
    return ABSENT


def fact(value: object) -> str:
    """Return a recorded fact: a plain value, or least, mean and largest of a reading."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, 4)
    if isinstance(value, dict):
        if {"min", "mean", "max"} <= value.keys():
            low, high = number(value["min"], 4), number(value["max"], 4)
            return f"{number(value['mean'], 4)} ({low}..{high})"
        return ", ".join(
            f"{in_words(key).replace('_', ' ')} {fact(item)}" for key, item in value.items()
        )
    if isinstance(value, list | tuple):
        return ", ".join(map(fact, value))
    return str(value)


def factor(value: float | None, bounds: Interval | None = None) -> str:
    """Return a ratio: "3.91x"; the ends of its interval where no one number tells: "1.2..72x".

    On a busy machine some calls take a hundred times as long, and the median is of either kind.
    """
    if value is not None and bounds is not None and is_loose(bounds):
        return f"{number(bounds[0], 2)}..{number(bounds[1], 2)}x"
    return ABSENT if value is None else f"{number(value)}x"


def slowdown(speedup: float, bounds: Interval | None = None) -> str:
    """Return the inverse of a speed-up as ``factor`` writes it: "2.00x"."""
    return factor(1 / speedup, bounds and (1 / bounds[1], 1 / bounds[0]))


def factor_within(value: float | None, bounds: Interval | None) -> str:
    """Return a ratio and its interval: "3.91x (3.50..4.30)", or "1.2..72x"."""
    ends = beside_factor(bounds)
    return f"{factor(value, bounds)} ({ends})" if ends else factor(value, bounds)


def beside_factor(bounds: Interval | None) -> str:
    """Return the interval to write beside ``factor``; nothing where that is the interval."""
    return "" if bounds is not None and is_loose(bounds) else interval(bounds)


def is_loose(bounds: Interval) -> bool:
    """Return whether the interval of a ratio is so wide that no one number tells it."""
    return bounds[1] > LOOSE * bounds[0]


def staying(names: Sequence[str]) -> str:
    """Return "a stays", "a and b stay", "a, b and 14 more stay"."""
    if len(names) == 1:
        return f"{names[0]} stays"
    more = f", {names[1]} and {len(names) - 2} more" if len(names) > 2 else f" and {names[1]}"
    return f"{names[0]}{more} stay"


def in_words(name: str) -> str:
    """Return a figure's name for people: "activations_mib" is "activations (MiB)".

    A name that is none of ours, such as that of a runtime, is left as it is.
    """
    spoken, unit = titled(name)
    return f"{spoken} ({unit})" if unit else spoken


def titled(name: str) -> tuple[str, str]:
    """Return a figure's name for people, and its unit, which may be ""."""
    stem, _, suffix = name.rpartition("_")
    if not stem or suffix not in _UNITS:
        return _TITLES.get(name, name), ""
    return _TITLES.get(stem, stem.replace("_", " ")), _UNITS[suffix]


_UNITS = {
    "db": "dB",
    "gib": "GiB",
    "ips": "images/s",
    "mib": "MiB",
    "mhz": "MHz",
    "ms": "ms",
    "pct": "%",
}

_TITLES = {  # where it is not the name with spaces
    "changes": "changes of metrics",
    "cpu_others": "processors taken by others",
    "cpu_steal": "processors taken by the host",
    "device_latency": "latency on the GPU",
    "ece": "ECE",
    "energy_mj_per_image": "energy (mJ/image)",
    "flip": "flips",
    "latency_ms_ci95": "interval of latency",
    "load_average_1m": "load average of a minute",
    "macs": "MACs",
    "params": "parameters",
    "peak_device": "peak memory of the GPU",
    "peak_rss": "peak memory of the process",
    "sqnr": "SQNR",
    "top1": "top-1",
    "top1_change": "change of top-1",
    "top5": "top-5",
    "worst_class_drop": "loss of the worst class",
}


def reason(field: str, result: Result | None, variant: Variant) -> str:
    """Return why ``field`` is absent: the most specific reason that the report gives."""
    group = next((name for name, fields in _GROUPS.items() if field.startswith(fields)), field)
    places = [result.skipped] if result else []
    for skipped in (*places, variant.skipped):
        for key in (field, f"{field}_mib", group, result.runtime if result else field):
            if key in skipped:
                return skipped[key]
    return UNRECORDED


_GROUPS = {
    "latency": ("latency", "throughput", "speedup"),
    "memory": ("peak_memory", "memory", "peak_rss", "weights", "activations", "load"),
    "accuracy": ("top1", "top5", "agreement", "flip", "ece", "worst_class", "sqnr"),
}
