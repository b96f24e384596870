"""``compress bench``: artifacts timed in the same rounds, with their size, memory and accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from compress import environment, evaluate, measure
from compress.data import Dataset
from compress.errors import CompressError, EngineError, UsageError
from compress.evaluate import Evaluation
from compress.measure import Timing
from compress.measure.artifacts import Candidate, candidates_of, names_classes, time_together
from compress.report import numbers
from compress.runtimes import unavailable
from compress.terminal import table

SHOWN = {  # figures of a row, and their columns
    "latency_ms_p50": "p50 ms",
    "latency_ms_p99": "p99 ms",
    "throughput_ips": "images/s",
    "speedup": "speed-up (95 %)",
    "file_mib": "file MiB",
    "peak_memory_mib": "peak MiB",
}


@dataclass(frozen=True)
class Benched:
    """Rows of measurements, one for each artifact, runtime and batch size."""

    rows: tuple[dict[str, Any], ...]
    skipped: dict[str, str]  # artifact, or artifact and batch -> why it was not measured
    conditions: dict[str, Any]  # by batch size: clocks, temperature, throttling
    provenance: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON-able data."""
        return {
            "results": list(self.rows),
            "skipped": self.skipped,
            "conditions": self.conditions,
            "methods": measure.METHODS,
            "provenance": self.provenance,
        }

    def table(self) -> Table:
        """Return one row for each artifact, runtime and batch size, for the terminal."""
        headers = ["batch", *SHOWN.values()]
        has_accuracy = any("top1_pct" in row for row in self.rows)
        has_outputs = any("outputs" in row for row in self.rows)
        headers += ["top-1 % (95 %)", "agreement %"] if has_accuracy else []
        headers += ["SQNR dB, worst output"] if has_outputs else []
        rows = []
        for row in self.rows:
            figures = {key: numbers.number(row.get(key)) for key in SHOWN}
            figures["speedup"] = _speedup(row)
            cells = [row["artifact"], str(row["batch"]), *figures.values()]
            if has_accuracy:
                cells += [numbers.share(row, "top1_pct"), numbers.number(row.get("agreement_pct"))]
            if has_outputs:
                cells.append(_worst_output(row))
            rows.append(cells)
        return table(("artifact", *headers), rows, caption=self._caption(), numbers=headers)

    def _caption(self) -> str:
        lines = [f"not measured: {name}: {why}" for name, why in self.skipped.items()]
        for where, state in self.conditions.items():
            hot = [name for name in ("cpu_throttled", "gpu_throttled") if state.get(name)]
            lines += [
                f"{where}: {name.replace('_', ' ')}; measure again when it is cool" for name in hot
            ]
            if "busy" in state:
                lines.append(
                    f"{where}: busy machine: {state['busy']}; measure again when it is idle"
                )
        unstable = [row["artifact"] for row in self.rows if not row["warmup_stable"]]
        lines += [f"{name}: its latency had not settled after the warm-up" for name in unstable]
        return "\n".join(lines)


def bench_artifacts(
    paths: Sequence[Path],
    *,
    runtimes: Sequence[str | Mapping[str, Any]] = (),
    batches: Sequence[int] = (1,),
    threads: int | None = None,
    dataset: Dataset | None = None,
    timing: Timing | None = None,
    judged: bool = True,
) -> Benched:
    """Measure artifacts side by side; the first is what the others are compared with.

    Args:
        paths: ONNX files, engines, stage folders.
        runtimes: Where ONNX files run, each on all of them; ONNX Runtime if empty.
        batches: Batch sizes, each timed in rounds of its own.
        threads: CPU threads; all cores if absent.
        dataset: Images to time with.
        timing: How long.
        judged: Whether accuracy and agreement on the images are taken as well.

    Raises:
        UsageError: nothing to measure, or a batch size below 1.
        EngineError: not one artifact could be measured.
    """
    if not paths or not batches or min(batches) < 1:
        raise UsageError(
            f"{len(paths)} artifacts and batch sizes {list(batches)} are nothing to measure",
            expected="at least one artifact, and batch sizes of 1 or more",
        )
    skipped: dict[str, str] = {}
    candidates = []
    for candidate in candidates_of(paths, runtimes, threads):
        reason = unavailable(candidate.runtime)
        if reason is None:
            candidates.append(candidate)
        else:
            skipped[candidate.name] = reason
    real = dataset if judged else None
    evaluations = {} if real is None else _evaluations(candidates, real, skipped)
    rows: list[dict[str, Any]] = []
    conditions: dict[str, Any] = {}
    for batch in batches:
        timed = time_together(candidates, batch, dataset, timing)
        conditions[f"batch {batch}"] = timed.conditions
        skipped |= {f"{name}, batch {batch}": why for name, why in timed.skipped.items()}
        rows += [
            _row(candidate, batch, timed[candidate.name], dataset)
            for candidate in candidates
            if candidate.name in timed
        ]
    if not rows:
        raise EngineError("; ".join(f"{name}: {why}" for name, why in skipped.items()))
    for row in rows:
        row |= _accuracy(row["artifact"], candidates[0].name, evaluations)
    return Benched(tuple(rows), skipped, conditions, environment.describe_machine())


def _row(
    candidate: Candidate, batch: int, latency: measure.Latency, dataset: Dataset | None
) -> dict[str, Any]:
    row = {
        "artifact": candidate.name,
        "path": str(candidate.path),
        "runtime": candidate.runtime,
        "options": dict(candidate.options) or None,
        "threads": candidate.threads,
        **latency.to_json(),
        "batch": batch,
        **candidate.memory(batch, dataset),
    }
    return {key: value for key, value in row.items() if value is not None}


def _evaluations(
    candidates: Sequence[Candidate], dataset: Dataset, skipped: dict[str, str]
) -> dict[str, Evaluation]:
    """Return how each candidate does on the test images; why not goes into ``skipped``.

    All outputs are compared where an image has no class, or a candidate names none.
    """
    found: dict[str, Evaluation] = {}
    for candidate in candidates:
        try:
            with candidate.open() as session:
                task = "classification" if names_classes(session, dataset) else "fidelity"
                found[candidate.name] = evaluate.of_task(
                    session, dataset, task, title=candidate.name
                )
        except CompressError as error:
            skipped[f"{candidate.name}, accuracy"] = str(error)
    return found


def _accuracy(name: str, reference: str, evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return accuracy, and agreement with the first artifact, as entries of a row."""
    if name not in evaluations:
        return {}
    own, first = evaluations[name], evaluations.get(reference)
    row = {} if own.unmeasured else own.row()
    is_pair = first is not None and own is not first and type(own.task) is type(first.task)
    return row | (own.change_row(first) if is_pair else {})


def _speedup(row: Mapping[str, Any]) -> str:
    if row["verdict"] in {"reference", "not compared"}:
        return str(row["verdict"])
    same = ", no difference" if row["verdict"] == "no difference" else ""
    return numbers.factor_within(row["speedup"], row["speedup_ci95"]) + same


def _worst_output(row: Mapping[str, Any]) -> str:
    """Return the smallest ratio among the outputs; "reference" for the first artifact."""
    if "outputs" not in row:
        return "reference" if row["verdict"] == "reference" else numbers.ABSENT
    known = [each["sqnr_db"] for each in row["outputs"].values() if "sqnr_db" in each]
    return f"{min(known):.1f}" if known else numbers.ratio_db(next(iter(row["outputs"].values())))
