"""``compress bench``: artifacts timed in the same rounds, with their size, memory and accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import environment, evaluate, measure
from compress.errors import CompressError, EngineError, UsageError
from compress.evaluate import comparison
from compress.evaluate.predictions import Predictions
from compress.measure import Timing
from compress.measure.artifacts import (
    Candidate,
    candidates_of,
    names_classes,
    outputs_of,
    test_answers,
    time_together,
)
from compress.runtimes import unavailable
from compress.tasks import Prediction

if TYPE_CHECKING:
    from rich.table import Table

    from compress.data import Dataset


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
        """Return the rows as a table for the terminal."""
        from compress.measure.tables import bench_table

        return bench_table(self)


def bench_artifacts(
    paths: Sequence[Path],
    *,
    runtimes: Sequence[str | Mapping[str, Any]] = (),
    batches: Sequence[int] = (1,),
    threads: int | None = None,
    dataset: Dataset | None = None,
    timing: Timing | None = None,
) -> Benched:
    """Measure artifacts side by side; the first is what the others are compared with.

    Args:
        paths: ONNX files, engines, stage folders.
        runtimes: Where ONNX files run, each on all of them; ONNX Runtime if empty.
        batches: Batch sizes, each timed in rounds of its own.
        threads: CPU threads; all cores if absent.
        dataset: Real images to time with, and to take accuracy and agreement from.
        timing: How long.

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
    answers = {} if dataset is None else _all_answers(candidates, dataset, skipped)
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
        row |= _accuracy(row["artifact"], candidates[0].name, answers, dataset)
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


def _all_answers(
    candidates: Sequence[Candidate], dataset: Dataset, skipped: dict[str, str]
) -> dict[str, Predictions | list[Prediction]]:
    """Return what each candidate predicts for the test images; why not goes into ``skipped``.

    These are all outputs where an image has no class, or a candidate names none.
    """
    answers: dict[str, Predictions | list[Prediction]] = {}
    for candidate in candidates:
        try:
            with candidate.open() as session:
                if names_classes(session, dataset):
                    answers[candidate.name] = test_answers(session, dataset, candidate.name)
                else:
                    answers[candidate.name] = outputs_of(session, dataset)
        except CompressError as error:
            skipped[f"{candidate.name}, accuracy"] = str(error)
    return answers


def _accuracy(
    name: str,
    reference: str,
    answers: dict[str, Predictions | list[Prediction]],
    dataset: Dataset | None,
) -> dict[str, Any]:
    """Return accuracy, and agreement with the first artifact, as entries of a row."""
    if name not in answers or dataset is None:
        return {}
    own, first = answers[name], answers.get(reference)
    if isinstance(own, list):
        is_other = own is not first
        return comparison.outputs_row(first, own) if isinstance(first, list) and is_other else {}
    found = evaluate.accuracy(own, dataset.classes).row()
    if isinstance(first, Predictions) and own is not first:
        found |= comparison.against(first, own, dataset.classes)
    return found
