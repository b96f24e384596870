"""Artifacts from anywhere, opened on the runtime they are for and fed with what they take."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress import plugins
from compress.data import Dataset
from compress.errors import CompressError, EngineError, absence
from compress.evaluate import of_task
from compress.evaluate.feeding import arrays_for
from compress.measure.latency import Bench, Timing, bench
from compress.measure.memory import memory
from compress.measure.probe import inputs_for
from compress.report.run_folder import artifacts_in
from compress.runtimes import DEFAULT, Session, kind_of, open_session
from compress.tasks import Prediction


@dataclass(frozen=True)
class Candidate:
    """One artifact on one runtime."""

    name: str  # shown to the user; unique among those side by side
    path: Path
    runtime: str
    options: Mapping[str, Any] = field(default_factory=dict)  # of the runtime
    threads: int | None = None  # of the CPU; all cores if None

    @property
    def reference(self) -> str | dict[str, Mapping[str, Any]]:
        """The runtime with its options."""
        return {self.runtime: self.options} if self.options else self.runtime

    def open(self, batch: int | None = None) -> Session:
        """Load it; with ``batch``, for this size alone where the runtime can make use of that."""
        return open_session(self.path, self.reference, threads=self.threads, batch=batch)

    def memory(self, batch: int, dataset: Dataset | None) -> dict[str, Any]:
        """Return what it takes in a call of ``batch`` images; under "skipped" why it is unknown."""
        shapes = None if dataset is None else [(batch, dataset.channels, *dataset.image_size)]
        try:
            return memory(
                self.path, self.reference, batch=batch, shapes=shapes, threads=self.threads
            ).to_json()
        except CompressError as error:
            return {"skipped": {"memory": str(error)}}


def runtime_of(path: Path) -> str:
    """Return the runtime that ``path`` is for: an engine's own, ONNX Runtime for ONNX files.

    Raises:
        EngineError: it does not exist.
    """
    if not path.exists():
        raise EngineError(
            absence(path, "file or folder"), where=str(path), expected="an ONNX file or an engine"
        )
    return kind_of(path) or DEFAULT


def candidates_of(
    paths: Sequence[Path],
    runtimes: Sequence[str | Mapping[str, Any]] = (),
    threads: int | None = None,
) -> list[Candidate]:
    """Return each artifact on each runtime that opens it, the first artifact first.

    Args:
        paths: ONNX files, engines, stage folders, runs (the files of their last stage).
        runtimes: Where ONNX files run, each on all of them; ONNX Runtime if empty. Engines and
            stage folders run where they belong. One with options: ``{"openvino": {...}}``.
        threads: CPU threads; all cores if absent.

    Raises:
        UnknownNameError: there is no such runtime.
        EngineError: a file does not exist.
    """
    for reference in runtimes:
        plugins.create("runtimes", reference)
    places = []
    for path in (file for each in paths for file in artifacts_in(each)):
        own = runtime_of(path)
        is_onnx = path.suffix == ".onnx"
        chosen = [*runtimes] if is_onnx and runtimes else [own]
        places += [(path, *plugins.parse("runtimes", each)) for each in chosen]
    several = len({repr(place[1:]) for place in places}) > 1
    labels = _labels([path for path, *_ in places])
    seen: Counter[str] = Counter()
    found = []
    for label, (path, runtime, options) in zip(labels, places, strict=True):
        told = ", ".join(f"{key}={value}" for key, value in options.items())
        name = f"{label} on {runtime}{f' ({told})' * bool(told)}" if several else label
        seen[name] += 1  # a number behind those that occur again: one file given twice
        number = f" #{seen[name]}" if seen[name] > 1 else ""
        found.append(Candidate(name + number, path, runtime, options, threads))
    return found


def time_together(
    candidates: Sequence[Candidate], batch: int, dataset: Dataset | None, timing: Timing | None
) -> Bench:
    """Time all candidates in the same rounds; those that do not take this batch are skipped."""
    skipped: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        sessions, inputs = {}, {}
        for candidate in candidates:
            try:
                session = stack.enter_context(candidate.open(batch))
                given = inputs_of(session, batch, dataset)
                if len(given[0]) != batch:
                    raise EngineError(f"takes batches of {len(given[0])} only")
                session.run(*given)
            except CompressError as error:
                skipped[candidate.name] = str(error)
                continue
            sessions[candidate.name], inputs[candidate.name] = session, given
        if not sessions:
            return Bench({}, skipped, {}, {})
        timed = bench(sessions, inputs, timing=timing)
    return replace(timed, skipped=skipped | timed.skipped)


def inputs_of(session: Session, batch: int, dataset: Dataset | None) -> list[NDArray[Any]]:
    """Return arrays for one call: the first test images, or random values without data."""
    if dataset is None:
        return inputs_for(session, batch)
    chosen = np.arange(batch) % len(dataset.splits["test"])
    return arrays_for(session.inputs, dataset.splits["test"].take(chosen), dataset)


def outputs_of(session: Session, dataset: Dataset, limit: int | None = None) -> list[Prediction]:
    """Return every output of ``session`` for test images from all over the set, at most 64."""
    return list(of_task(session, dataset, "fidelity", limit=limit).predictions)


def names_classes(session: Session, dataset: Dataset) -> bool:
    """Say whether the data has classes, and the first output is a row of scores for each image."""
    if dataset.target != "class":
        return False
    first = outputs_of(session, dataset, limit=1)[0]
    return next(iter(first.values())).ndim == 1


def _labels(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of ``paths`` that tell different files apart."""
    for length in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        labels = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(labels)) == len(set(paths)):
            return labels
    return [str(path) for path in paths]
