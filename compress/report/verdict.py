"""The verdict in one sentence: the last variant against the original, with intervals."""

from __future__ import annotations

from collections.abc import Iterator

from compress.report.numbers import (
    beside_factor,
    factor,
    interval,
    number,
    points,
    signed,
    slowdown,
)
from compress.report.schema import BUSY_RESOLUTION_PCT, SAME, ChangeRecord, Report, Result, Variant
from compress.statistics import excludes

BUDGETS = ("top1_drop_pct", "max_drop_pct", "max_drop", "metric_drop")  # gates of accuracy
PRECISIONS = ("int8", "fp16", "fp32")  # the narrowest first


def verdict(report: Report) -> str:
    """Return one sentence about the first target of the recipe that could be measured.

    It compares the last variant that ran on that runtime with the original on the same runtime,
    batch and threads, and says "no significant difference" where the intervals say so.
    """
    sentences = verdicts(report)
    if sentences:
        return next(iter(sentences.values()))
    if report.original is None:
        return "Nothing was measured: the run has no variants."
    if len(report.variants) == 1:  # and it ran in one precision
        return "Only the original network was measured: there is nothing to compare it with."
    return "Not measured: no runtime has results of both the original and a compressed network."


def verdicts(report: Report) -> dict[str, str]:
    """Return one sentence for each runtime that can be compared, targets of the recipe first."""
    return {
        before.runtime: _sentence(report, variant, before, after)
        for variant, before, after in comparisons(report)
    }


def comparisons(report: Report) -> Iterator[tuple[Variant, Result, Result]]:
    """Yield (last variant, original's result, its result) for each runtime, smallest batch."""
    original = report.original
    if original is None:
        return
    targets = report.recipe.get("targets") or []
    named = [t["runtime"] for t in targets if isinstance(t, dict) and "runtime" in t]
    found = [result.runtime for variant in report.variants for result in variant.results]
    for runtime in (name for name in dict.fromkeys([*named, *found]) if name in found):
        for variant in reversed(report.variants):
            pair = _same_setting(original, variant, runtime)
            if pair:
                yield variant, *pair
                break


def speed_differs(result: Result) -> bool | None:
    """Return whether the speed differs from the original's; None when nothing says.

    The measurement's own verdict counts first: it knows how finely the machine can tell.
    """
    if result.verdict in {"faster", "slower", "no difference"}:
        return result.verdict != "no difference"
    return None if result.speedup_ci95 is None else excludes(result.speedup_ci95, 1.0)


def same_speed(result: Result) -> str:
    """Return in words that the speed does not differ from the original's; empty if it does."""
    if speed_differs(result) is not False:
        return ""
    is_apart = result.speedup_ci95 is not None and excludes(result.speedup_ci95, 1.0)
    return "no difference that this machine can tell" if is_apart else SAME


def matching(variant: Variant, result: Result) -> Result | None:
    """Return the first result of ``variant`` in the setting of ``result``, or None.

    That of the original is fp32, which speed-ups are told against.
    """
    return next(iter(variant.results_beside(result)), None)


def sizes_mib(original: Variant, variant: Variant, result: Result) -> tuple[float, float] | None:
    """Return the sizes of the original and of a variant in the setting of ``result``, MiB.

    They are those of what the runtime opens; where it was not noted, those of the artifacts.
    """
    before = matching(original, result)
    opened = (before.size_mib if before else None, result.size_mib)
    for one, other in (opened, (original.size_mib, variant.size_mib)):
        if one and other:
            return one, other
    return None


def size_ratio(original: Variant, variant: Variant, result: Result) -> float | None:
    """Return the size of what runs of the original over that of ``variant``."""
    sizes = sizes_mib(original, variant, result)
    return sizes[0] / sizes[1] if sizes else None


def accuracy_of(variant: Variant, result: Result) -> Result:
    """Return the result that holds the accuracy of ``variant`` on that runtime.

    Accuracy depends on the runtime, not on the batch: where it was taken at one batch size only,
    that result speaks for the others.
    """
    if result.top1_pct is not None or result.primary is not None or result.outputs:
        return result
    same = [r for r in variant.results if r.runtime == result.runtime and r.figure is not None]
    return next((r for r in same if r.precision == result.precision), result)


def _same_setting(
    original: Variant, variant: Variant, runtime: str
) -> tuple[Result, Result] | None:
    """Return the original's result and the variant's narrowest at the smallest batch."""
    after = sorted(
        (r for r in variant.results if r.runtime == runtime),
        key=lambda r: (r.batch, PRECISIONS.index(r.precision)),
    )
    pairs = ((matching(original, result), result) for result in after)
    return next(((before, r) for before, r in pairs if before and before is not r), None)


def _sentence(report: Report, variant: Variant, before: Result, after: Result) -> str:
    parts = [part for part in (_speed(before, after), _size(report, variant, after)) if part]
    text = " and ".join(parts) or "speed and size not measured"
    half = "in fp16 " if after.precision == "fp16" else ""
    place = f"{half}on {after.runtime} {after.device}, batch {after.batch}"
    place += ", timed on a busy machine" if after.busy else ""
    accuracy = _accuracy(report, variant, before, after)
    if report.untrained is not None:
        return f"{text[0].upper()}{text[1:]} {place}{accuracy}."
    sentence = f"{text} {accuracy} {place}"
    remark = _better(report, variant, after)
    return f"{sentence[0].upper()}{sentence[1:]}{remark}."


def _speed(before: Result, after: Result) -> str:
    speedup = after.speedup
    if speedup is None and before.latency_ms_p50 and after.latency_ms_p50:
        speedup = before.latency_ms_p50 / after.latency_ms_p50
    if speedup is None:
        return ""
    bounds = after.speedup_ci95
    if speed_differs(after) is False:
        same = same_speed(after).replace("difference", "difference in speed")
        ends = beside_factor(bounds)
        return f"{same} ({factor(speedup, bounds)}{f', 95 % CI {ends}' if ends else ''})"
    if speedup >= 1:
        return f"{factor(speedup, bounds)} faster"
    return f"{slowdown(speedup, bounds)} slower"


def _size(report: Report, variant: Variant, result: Result) -> str:
    original = report.original
    ratio = None if original is None else size_ratio(original, variant, result)
    if ratio is None:
        return ""
    if factor(ratio) == factor(1.0):
        return "of the same size"
    return f"{factor(ratio)} smaller" if ratio >= 1 else f"{factor(1 / ratio)} larger"


def _accuracy(report: Report, variant: Variant, before: Result, after: Result) -> str:
    if report.untrained is not None:
        return (
            "; its accuracy says nothing, because the original is no fair reference "
            f"({report.untrained})"
        )
    measured = accuracy_of(variant, after)
    change, name = measured.change, measured.title_of(measured.primary or "top-1")
    if change is None and before.top1_pct is not None and measured.top1_pct is not None:
        value = measured.top1_pct - before.top1_pct
        change = ChangeRecord(value=value, unit="pct", drop=-value, verdict="worse")
    if change is None:
        return _likeness(measured) if measured.outputs else "with accuracy not measured"
    unit = "points" if change.unit == "pct" else change.unit
    moved = f"{points(change.value)} {unit}"
    bounds = f"95 % CI {interval(change.ci95, 'points')}" if change.ci95 else ""
    if change.differs:
        return f"at {moved} of {name} ({bounds or 'no interval measured'})"
    if change.verdict != SAME:  # it says what so few images cannot tell
        return f"at {moved} of {name}, where {change.verdict} ({bounds})"
    return f"with {SAME} in {name} ({', '.join(filter(None, (moved, bounds)))})"


def _likeness(result: Result) -> str:
    """Return how near the outputs are to the original's, where images have no labels."""
    noise = result.worst_sqnr_db
    parts = []
    if noise is not None:
        off = 100 * 10 ** (-noise / 20)  # root of the mean squared error against that of the values
        parts = [f"outputs {number(off)} % off the original's ({number(noise)} dB)"]
    if result.agreement_pct is not None:
        parts.append(f"the same answer for {number(result.agreement_pct)} % of images")
    if all(each.get("zero_reference") for each in (result.outputs or {}).values()):
        parts = ["outputs that are zero for every image, which tells nothing"]
    return f"with {' and '.join(parts) or 'equal outputs'} (accuracy not measured)"


def _better(report: Report, variant: Variant, after: Result) -> str:
    """Name the fastest variant within the accuracy gate where the last variant is not it."""
    budgets = [g for g in report.gates if g.name in BUDGETS]
    limit = min((g.limit for g in budgets), default=None)
    missed = {g.variant for g in budgets if not g.passed and g.variant}
    candidates = []
    for variant, result in ((v, r) for v in report.variants for r in v.results_beside(after)):
        if result.latency_ms_p50 is None or variant.name in missed:
            continue
        change = accuracy_of(variant, result).change
        drop = 0.0 if variant is report.original or change is None else change.drop
        if limit is None or drop <= limit:
            candidates.append((result.latency_ms_p50, title(variant, result), result))
    if not candidates:
        return ""
    milliseconds, name, result = min(candidates, key=lambda each: each[0])
    is_good = any(each is after for *_, each in candidates)
    if result is after or (is_good and not _is_faster(result, after)):
        return ""
    unit = next((g.unit for g in budgets if g.metric), "pct")
    spoken = f"point{'s' * (limit != 1)}" if unit == "pct" else unit
    most = "" if limit is None else f" that loses at most {limit:g} {spoken}".rstrip()
    return f"; the fastest variant{signed(most)} is {name} ({number(milliseconds)} ms)"


def _is_faster(one: Result, other: Result) -> bool:
    if one.busy or other.busy:  # which moves both by more than their intervals say
        share = 1 - BUSY_RESOLUTION_PCT / 100
        return (one.latency_ms_p50 or 0) < share * (other.latency_ms_p50 or 0)
    if one.latency_ms_p50_ci95 is None or other.latency_ms_p50_ci95 is None:
        return True
    return one.latency_ms_p50_ci95[1] < other.latency_ms_p50_ci95[0]


def title(variant: Variant, result: Result) -> str:
    """Return the name of a variant, with its precision where that is half."""
    return f"{variant.name} in fp16" if result.precision == "fp16" else variant.name
