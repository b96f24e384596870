"""Measurements as tables for the terminal: units in the headers; what is absent is said so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table

from compress.report import numbers
from compress.tasks import Kind, Primary
from compress.terminal import table

if TYPE_CHECKING:
    from compress.evaluate.comparison import Bisection, Comparison
    from compress.measure.benchmark import Benched
    from compress.measure.compare import Compared, JudgedForm

SHOWN = 5  # flips, classes and tensors listed; --json holds all


def bench_table(benched: Benched) -> Table:
    """Return one row for each artifact, runtime and batch size."""
    headers = ["batch", "p50 ms", "p99 ms", "images/s", "speed-up (95 %)", "file MiB", "peak MiB"]
    has_accuracy = any("top1_pct" in row for row in benched.rows)
    has_outputs = any("outputs" in row for row in benched.rows)
    headers += ["top-1 % (95 %)", "agreement %"] if has_accuracy else []
    headers += ["SQNR dB, worst output"] if has_outputs else []
    rows = []
    for row in benched.rows:
        cells = [
            row["artifact"],
            str(row["batch"]),
            _number(row, "latency_ms_p50"),
            _number(row, "latency_ms_p99"),
            _number(row, "throughput_ips"),
            _speedup(row),
            _number(row, "file_mib"),
            _number(row, "peak_memory_mib"),
        ]
        if has_accuracy:
            cells += [_with_interval(row, "top1_pct", "top1_ci95"), _number(row, "agreement_pct")]
        if has_outputs:
            cells.append(_worst_output(row))
        rows.append(cells)
    return table(("artifact", *headers), rows, caption=_caption(benched), numbers=headers)


def comparison_tables(compared: Compared) -> RenderableType:
    """Return the facts, the chain, the classes and images that lost, and the first divergence."""
    parts: list[RenderableType] = []
    if compared.judged:
        parts += [_metrics(compared), _judged_chain(compared.judged)]
    elif compared.answers is None:
        parts.append(_outputs(compared))
    else:
        parts += [_facts(compared.answers, compared.reference, compared.candidate)]
        parts += [_chain(compared)]
        if compared.answers.flips:
            parts += [_classes(compared.answers), _flips(compared.answers, compared.classes)]
        if compared.outputs:
            parts.append(_outputs(compared))
    if compared.bisection is not None:
        parts.append(_bisection(compared.bisection))
    return Group(*parts)


def _facts(answers: Comparison, reference: str, candidate: str) -> Table:
    row = answers.row()
    low, high = answers.top1_change_ci95
    change = f"{answers.top1_change_pct:+.2f} points (95 % {low:+.2f} to {high:+.2f})"
    largest, mean = answers.logits.max_abs_diff, answers.logits.mean_abs_diff
    rows = [
        ("top-1", f"{change}: {answers.verdict}, p = {answers.top1_p_value:.3g}"),
        ("same answer", f"{_with_interval(row, 'agreement_pct', 'agreement_ci95')} %"),
        ("was right, now wrong", f"{answers.flip_pct:.2f} %"),
        ("was wrong, now right", f"{answers.won_pct:.2f} %"),
        ("logits, SQNR", f"{row['sqnr_db']:.1f} dB" if "sqnr_db" in row else "equal"),
        ("logits, difference", f"{largest:.3g} at most, {mean:.3g} on average"),
        ("calibration error", f"{answers.ece_change_pct:+.2f} points"),
    ]
    title = f"{candidate} against {reference}, {answers.images} images"
    return table(("", "value"), rows, title=title)


def _chain(compared: Compared) -> Table:
    headers = ("top-1 %", "SQNR dB", "agreement %", "SQNR dB so far")
    rows = []
    for link in compared.links:
        added, total = (c.row() if c is not None else {} for c in (link.added, link.total))
        top1, agreement = f"{link.top1_pct:.2f}", _number(added, "agreement_pct")
        rows.append(
            (link.name, link.error or "reference", top1, _sqnr(added), agreement, _sqnr(total))
        )
    return table(("step", "error", *headers), rows, title="What each step adds", numbers=headers)


def _classes(answers: Comparison) -> Table:
    rows = []
    for drop in answers.class_drops[:SHOWN]:
        low, high = drop.drop_ci95
        rows.append((drop.name, str(drop.images), f"{drop.drop_pct:.2f} ({low:.2f} to {high:.2f})"))
    headers = ("images", "recall lost, points (95 %)")
    return table(("class", *headers), rows, title="Classes that lost most", numbers=headers)


def _flips(answers: Comparison, names: Sequence[str]) -> Table:
    flips = answers.flips
    rows = [
        (
            str(flip.index),
            names[flip.label],
            f"{names[flip.before]} ({flip.before_confidence_pct:.0f} %)",
            f"{names[flip.after]} ({flip.after_confidence_pct:.0f} %)",
            flip.kind,
        )
        for flip in flips[:SHOWN]
    ]
    more = f"{SHOWN} of {len(flips)}; --json FILE holds all" if len(flips) > SHOWN else ""
    headers = ("image", "label", "before", "after", "outcome")
    return table(headers, rows, title="Images answered differently", caption=more)


def _metrics(compared: Compared) -> Table:
    """Return each metric of both and its change, or outputs where the images have no labels."""
    first, last = compared.judged[0].evaluation, compared.judged[-1]
    title = f"{compared.candidate} against {compared.reference}, {first.images} images"
    if not first.metrics:
        return _drifts(last.change["outputs"], title, f"no accuracy: {first.unmeasured}")
    rows = []
    for name, before in first.metrics.items():
        change = last.change["changes"][name]
        moved = f"{_value(change['value'], change['ci95'], '+')}: {change['verdict']}"
        after = last.evaluation.metrics[name]
        values = (_value(each.value, each.ci95) for each in (before, after))
        rows.append((Primary(name, Kind(before.unit, title=before.title)).title, *values, moved))
    return table(("", "reference (95 %)", "candidate (95 %)", "change (95 %)"), rows, title=title)


def _judged_chain(forms: Sequence[JudgedForm]) -> Table:
    """Return the primary metric of each form, and how alike the first it predicts."""
    name = forms[0].evaluation.primary
    metric = forms[0].evaluation.metrics.get(name)
    headers = ["agreement"]
    if metric is not None:
        headers.insert(0, Primary(name, Kind(metric.unit, title=metric.title)).title)
    rows = []
    for form in forms:
        own = form.evaluation.metrics.get(name)
        value = [] if own is None else [_value(own.value, own.ci95)]
        rows.append((form.name, form.error or "reference", *value, _alike(form.change)))
    return table(
        ("step", "error", *headers), rows, title="Each step against the reference", numbers=headers
    )


def _alike(change: Mapping[str, Any]) -> str:
    if "agreement_pct" in change:
        return f"{_with_interval(change, 'agreement_pct', 'agreement_ci95')} %"
    if "agreement" in change:
        found = change["agreement"]
        return f"{_value(found['value'], found.get('ci95'))} {found['unit']}".rstrip()
    return numbers.ABSENT


def _value(value: float, ci95: Sequence[float] | None, sign: str = "") -> str:
    bounds = "" if ci95 is None else f" ({ci95[0]:{sign}.2f}..{ci95[1]:{sign}.2f})"
    return f"{value:{sign}.2f}{bounds}"


def _outputs(compared: Compared) -> Table:
    found = compared.outputs
    title = "Outputs"
    if "images" in found:
        title = f"{compared.candidate} against {compared.reference}, {found['images']} images"
    alike = ""
    if "agreement_pct" in found:
        share = _with_interval(found, "agreement_pct", "agreement_ci95")
        alike = f"same answer: {share} % of images"
    return _drifts(found["outputs"], title, alike)


def _drifts(outputs: Mapping[str, Mapping[str, Any]], title: str, caption: str) -> Table:
    rows = [(name, _sqnr(drift), f"{drift['max_abs_diff']:.3g}") for name, drift in outputs.items()]
    headers = ("SQNR dB", "largest difference")
    return table(("output", *headers), rows, title=title, caption=caption, numbers=headers)


def _bisection(found: Bisection) -> Table:
    first = found.first
    title = (
        f"No tensor falls below {found.threshold_db:g} dB"
        if first is None
        else f"First tensor below {found.threshold_db:g} dB: {first.name} ({first.op})"
    )
    rows = [
        (
            tensor.name,
            tensor.op,
            _sqnr(tensor.drift.to_json()),
            f"{tensor.drop_db:.1f}",
            f"{tensor.drift.max_abs_diff:.3g}",
        )
        for tensor in sorted(found.tensors, key=lambda tensor: -tensor.drop_db)[:SHOWN]
    ]
    headers = ("SQNR dB", "lost here, dB", "largest difference")
    return table(("tensor", "operator", *headers), rows, title=title, numbers=headers)


def _caption(benched: Benched) -> str:
    lines = [f"not measured: {name}: {why}" for name, why in benched.skipped.items()]
    for where, state in benched.conditions.items():
        hot = [name for name in ("cpu_throttled", "gpu_throttled") if state.get(name)]
        lines += [
            f"{where}: {name.replace('_', ' ')}; measure again when it is cool" for name in hot
        ]
        if "busy" in state:
            lines.append(f"{where}: busy machine: {state['busy']}; measure again when it is idle")
    unstable = [row["artifact"] for row in benched.rows if not row["warmup_stable"]]
    lines += [f"{name}: its latency had not settled after the warm-up" for name in unstable]
    return "\n".join(lines)


def _speedup(row: Mapping[str, Any]) -> str:
    if row["verdict"] in {"reference", "not compared"}:
        return str(row["verdict"])
    same = ", no difference" if row["verdict"] == "no difference" else ""
    return f"{numbers.factor(row['speedup'])} ({numbers.interval(row['speedup_ci95'])}){same}"


def _with_interval(row: Mapping[str, Any], key: str, bounds: str) -> str:
    if key not in row:
        return numbers.ABSENT
    return f"{numbers.percent(row[key])} ({numbers.interval(row[bounds], 'percent')})"


def _worst_output(row: Mapping[str, Any]) -> str:
    """Return the smallest ratio among the outputs; "reference" for the first artifact."""
    if "outputs" not in row:
        return "reference" if row["verdict"] == "reference" else numbers.ABSENT
    known = [each["sqnr_db"] for each in row["outputs"].values() if "sqnr_db" in each]
    return f"{min(known):.1f}" if known else _sqnr(next(iter(row["outputs"].values())))


def _number(row: Mapping[str, Any], key: str) -> str:
    return numbers.number(row.get(key))


def _sqnr(row: Mapping[str, Any]) -> str:
    """Return the ratio, or why there is none."""
    if "sqnr_db" in row:
        return f"{row['sqnr_db']:.1f}"
    if row.get("not_finite"):
        return f"{row['not_finite']} not finite"
    if row.get("max_abs_diff") == 0:
        return "both zero" if row.get("zero_reference") else "equal"
    return numbers.ABSENT
