"""``compress bench``: artifacts timed in the same rounds, with their size, memory and accuracy."""

from __future__ import annotations

import contextlib
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
    Rival,
    answers_of,
    inputs_of,
    names_classes,
    outputs_of,
    rivals_of,
    shape_of,
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
    rivals = []
    for rival in rivals_of(paths, runtimes):
        reason = unavailable(rival.runtime)
        if reason is None:
            rivals.append(rival)
        else:
            skipped[rival.name] = reason
    answers: dict[str, Predictions | list[Prediction]] = {}
    if dataset is not None:
        answers = _all_answers(rivals, dataset, threads, skipped)
    rows: list[dict[str, Any]] = []
    conditions: dict[str, Any] = {}
    for batch in batches:
        timed = _time(rivals, batch, threads, dataset, timing)
        conditions[f"batch {batch}"] = timed.conditions
        skipped |= {f"{name}, batch {batch}": why for name, why in timed.skipped.items()}
        rows += [
            _row(rival, batch, threads, timed[rival.name], dataset)
            for rival in rivals
            if rival.name in timed
        ]
    if not rows:
        raise EngineError("; ".join(f"{name}: {why}" for name, why in skipped.items()))
    for row in rows:
        row |= _accuracy(row["artifact"], rivals, answers, dataset)
    return Benched(tuple(rows), skipped, conditions, environment.describe())


def _time(
    rivals: Sequence[Rival],
    batch: int,
    threads: int | None,
    dataset: Dataset | None,
    timing: Timing | None,
) -> measure.Bench:
    """Time all rivals in the same rounds; those that do not take this batch are skipped."""
    skipped: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        sessions, inputs = {}, {}
        for rival in rivals:
            try:
                session = stack.enter_context(rival.open(threads=threads, batch=batch))
                arrays = inputs_of(session, batch, dataset)
                if len(arrays[0]) != batch:
                    raise EngineError(f"takes batches of {len(arrays[0])} only")
                session.run(*arrays)
            except CompressError as error:
                skipped[rival.name] = str(error)
                continue
            sessions[rival.name], inputs[rival.name] = session, arrays
        if not sessions:
            return measure.Bench({}, skipped, {}, {})
        timed = measure.bench(sessions, inputs, timing=timing)
    return measure.Bench(timed.latencies, skipped | timed.skipped, timed.conditions, timed.method)


def _row(
    rival: Rival,
    batch: int,
    threads: int | None,
    latency: measure.Latency,
    dataset: Dataset | None,
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "artifact": rival.name,
        "path": str(rival.path),
        "runtime": rival.runtime,
        "options": dict(rival.options) or None,
        "threads": threads,
        **latency.to_json(),
        "batch": batch,
    }
    try:
        memory = measure.memory(
            rival.path,
            rival.reference,
            batch=batch,
            shapes=shape_of(dataset, batch),
            threads=threads,
        ).to_json()
    except CompressError as error:
        memory = {"skipped": {"memory": str(error)}}
    return {key: value for key, value in (row | memory).items() if value is not None}


def _all_answers(
    rivals: Sequence[Rival], dataset: Dataset, threads: int | None, skipped: dict[str, str]
) -> dict[str, Predictions | list[Prediction]]:
    """Return the answers of each rival to the test images; why not goes into ``skipped``.

    They are all outputs where an image has no class, or a rival names none.
    """
    answers: dict[str, Predictions | list[Prediction]] = {}
    for rival in rivals:
        try:
            with rival.open(threads=threads) as session:
                if names_classes(session, dataset):
                    answers[rival.name] = answers_of(session, dataset, rival.name)
                else:
                    answers[rival.name] = outputs_of(session, dataset)
        except CompressError as error:
            skipped[f"{rival.name}, accuracy"] = str(error)
    return answers


def _accuracy(
    name: str,
    rivals: Sequence[Rival],
    answers: dict[str, Predictions | list[Prediction]],
    dataset: Dataset | None,
) -> dict[str, Any]:
    """Return accuracy, and agreement with the first artifact, as entries of a row."""
    if name not in answers or dataset is None:
        return {}
    own, first = answers[name], answers.get(rivals[0].name)
    if isinstance(own, list):
        is_rival = isinstance(first, list) and own is not first
        return comparison.outputs_row(first, own) if is_rival and isinstance(first, list) else {}
    found = evaluate.accuracy(own, dataset.classes).row()
    if isinstance(first, Predictions) and own is not first:
        found |= comparison.against(first, own, dataset.classes)
    return found
