"""The configuration of a result: runtime, device, batch and threads, as key and text."""

from __future__ import annotations

from compress.report.schema import Report, Result

Setting = tuple[str, str, int, int | None]  # runtime, device, batch, threads


def settings(report: Report) -> list[Setting]:
    """Return every setting that has results, in order of appearance."""
    results = [result for variant in report.variants for result in variant.results]
    return list(dict.fromkeys(map(setting_of, results)))


def setting_of(result: Result) -> Setting:
    """Return what two results must share to be compared in speed."""
    return (result.runtime, result.device, result.batch, result.threads)


def setting_name(setting: Setting) -> str:
    """Return a setting in words: "onnxruntime cpu, 2 threads, batch 1"."""
    return f"{place_name(setting)}, batch {setting[2]}"


def place_name(setting: Setting) -> str:
    """Return a setting but for its batch: "onnxruntime cpu, 2 threads"."""
    runtime, device, _, threads = setting
    many = "" if threads is None else f", {threads} thread{'s' if threads > 1 else ''}"
    return f"{runtime} {device}{many}"
