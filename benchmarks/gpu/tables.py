"""Markdown tables of what the GPU kit found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def markdown(content: dict[str, Any]) -> str:
    """Return all tables: the machine, tests, carried engines, latency, accuracy."""
    units = content["units"]
    lines = ["# What one GPU shows", ""]
    if content.get("rehearsal"):
        lines += ["A rehearsal on the CPU, with tiny sizes: no figure here says anything.", ""]
    lines += [f"`benchmarks/gpu/all.sh`, {content.get('date', 'no date')}.", ""]
    for prefix, section in (
        ("device", _device),
        ("tests", _tests),
        ("engines", _engines),
        ("latency", _latency),
        ("accuracy", _accuracy),
    ):
        own = {name: unit for name, unit in units.items() if name.startswith(prefix)}
        found = {name: unit["found"] for name, unit in own.items() if "found" in unit}
        if found:
            lines += [*section(found), ""]
        lines += [f"{name}: {unit['failed']}\n" for name, unit in own.items() if "failed" in unit]
    return "\n".join(lines)


def _device(found: dict[str, Any]) -> Iterator[str]:
    machine = found["device"]
    facts = {**machine.get("device", {}), **machine.get("versions", {})}
    facts |= {"commit": machine.get("commit"), "nvidia-smi": "; ".join(machine["nvidia_smi"])}
    yield "## Machine\n\n| what | is |\n|---|---|"
    for key, value in facts.items():
        yield f"| {key} | {_plain(value)} |"


def _plain(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "/").replace("\n", " ")


def _tests(found: dict[str, Any]) -> Iterator[str]:
    ran = found["tests"]
    bad = ran["failures"] + ran["errors"]
    passed = ran["tests"] - bad - ran["skipped"]
    yield f"## `pytest -m gpu`\n\n{passed} passed, {bad} failed, {ran['skipped']} skipped.\n"
    for one in ran["not_passed"]:
        yield f"- {one['test']}: {_plain(one['said'])}"


def _engines(found: dict[str, Any]) -> Iterator[str]:
    result = found["engines"]
    yield "## Engines built on another machine, without a GPU\n"
    if "skipped" in result:
        yield f"Not tried: {result['skipped']}"
        return
    yield "| engine | loads | off, of the largest logit | same class, % | said |"
    yield "|---|---|--:|--:|---|"
    for name, one in result["engines"].items():
        if one["loads"]:
            off, same = f"{one['off_of_largest_logit']:.2g}", f"{one['same_class_pct']:.1f}"
            yield f"| {name} | yes | {off} | {same} | |"
        else:
            yield f"| {name} | no | | | {_plain(one['said'])} |"


def _latency(found: dict[str, Any]) -> Iterator[str]:
    yield "## Latency\n\n| network | batch | session | ms | device ms | x (95 % CI) |"
    yield "|---|--:|---|--:|--:|--:|"
    for one in found.values():
        start = f"| {one['network']} | {one['batch']} |"
        for label, row in one["latencies"].items():
            device = row.get("device_latency_ms_p50")
            told = "" if device is None else f"{device:.3f}"
            speedup = _number(row, "speedup", "speedup_ci95")
            yield f"{start} {label} | {row['latency_ms_p50']:.3f} | {told} | {speedup} |"
        for label, reason in one["skipped"].items():
            yield f"{start} {label} | not measured: {_plain(reason)} | | |"


def _number(row: dict[str, Any], name: str, interval: str) -> str:
    """Return a figure with its interval, as far as they were measured."""
    value, bounds = row.get(name), row.get(interval)
    if value is None:
        return ""
    return f"{value:.2f}" + (f" ({bounds[0]:.2f}..{bounds[1]:.2f})" if bounds else "")


def _accuracy(found: dict[str, Any]) -> Iterator[str]:
    yield "## Accuracy at full length\n"
    rows = []
    for name, one in found.items():
        if "skipped" in one:
            yield f"{name}: not run: {one['skipped']}\n"
            continue
        for variant in one["variants"]:
            for result in variant["results"] or []:
                rows.append(_row(name, variant, result))
    if rows:
        yield "| recipe | variant | runtime | device | top-1 % (95 % CI) | params | MACs | MiB |"
        yield "|---|---|---|---|--:|--:|--:|--:|"
        yield from rows


def _row(name: str, variant: dict[str, Any], result: dict[str, Any]) -> str:
    said = _number(result, "top1_pct", "top1_ci95") or "not measured"
    size = variant.get("size_mib")
    return (
        f"| {name.removeprefix('accuracy-')} | {variant['name']} | {result['runtime']} "
        f"{result['precision']} | {result.get('device', '')} | {said} | {variant['params']:,} | "
        f"{variant['macs']:,} | {'' if size is None else f'{size:.3f}'} |"
    )
