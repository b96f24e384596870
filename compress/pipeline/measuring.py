"""Build every engine a recipe asks for and measure it: accuracy, latency and memory of variants.

Accuracy is that of the artifact that ships, taken through the runtime that runs it; all variants of
a target are timed side by side in one sitting.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress import compare, evaluate, insights, measure, plugins, progress
from compress.artifact import sha256
from compress.errors import CompressError, EngineError, MissingPackageError, UsageError
from compress.evaluate import Evaluation, Predictions
from compress.feeding import Fed, arrays
from compress.fusion import check_fusion
from compress.measure import Timing
from compress.pipeline.bearing import sensitivity
from compress.pipeline.explaining import explain_variants
from compress.pipeline.job import INT8_FORM, Job, Variant, answers_path
from compress.runtimes import build_engine, build_record, open_session, unavailable
from compress.settings import Target


@dataclass(frozen=True)
class Rival:
    """One variant on one target: the file that the runtime opens."""

    variant: Variant
    precision: str
    path: Path
    target: Target


@dataclass(frozen=True)
class Measured:
    """All results of a run, by variant, and why others are missing."""

    results: dict[str, list[dict[str, Any]]]
    skipped: dict[str, str]
    engines: dict[Path, Path]  # what was built, and the graph it was built from
    conditions: dict[str, Any]
    coverage: list[dict[str, Any]]  # how much of each int8 graph each runtime runs in int8
    explanations: dict[str, list[dict[str, Any]]]  # what variants look at; what each group bears

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able data."""
        return {
            "results": self.results,
            "skipped": self.skipped,
            "conditions": self.conditions,
            "coverage": self.coverage,
            **self.explanations,
        }


def measure_targets(job: Job, variants: Sequence[Variant], stage: Path) -> Measured:
    """Build and measure every variant on every target of the recipe.

    Args:
        job: The run.
        variants: All variants, the original first.
        stage: Folder where the answers of each variant to the test images are kept.

    Returns:
        Results by variant; targets that cannot be built or run here are under "skipped".
    """
    results: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in variants}
    skipped: dict[str, str] = {}
    engines: dict[Path, Path] = {}
    conditions: dict[str, Any] = {}
    coverage: list[dict[str, Any]] = []
    for target in places(job.recipe.targets):
        label = f"{target.runtime}, batch {target.batch}"
        try:
            rivals = rivals_on(job, variants, target)
        except MissingPackageError as error:
            if not target.when_installed:
                raise
            skipped[label] = str(error)
            continue
        sources = ((rival.path, job.path(rival.variant)) for rival in rivals)
        engines |= {path: source for path, source in sources if path.is_file() and path != source}
        coverage += _coverage(job, rivals)
        reason = unavailable(target.runtime)
        if reason is not None:
            skipped[label] = f"the engines are built; they cannot run here: {reason}"
            continue
        rows, conditions[label] = measure_rivals(job, rivals, stage)
        for rival, row in zip(rivals, rows, strict=True):
            results[rival.variant.name].append(row | _memory(job, rival, row["skipped"]))
    explanations = explain_variants(job, variants, stage)
    explanations["sensitivity"] = sensitivity(job, variants[0])
    return Measured(results, skipped, engines, conditions, coverage, explanations)


def places(targets: Sequence[Target]) -> list[Target]:
    """Return ``targets``, one for each place: a float and an int8 target of one place are one."""
    places: dict[tuple[Any, ...], Target] = {}
    for target in targets:
        key = (target.runtime, target.batch, target.threads, target.precision == "fp16")
        places.setdefault(key, target)
    return list(places.values())


def rivals_on(job: Job, variants: Sequence[Variant], target: Target) -> list[Rival]:
    """Return the variants that can run on ``target``, with the engines they need there built."""
    form = INT8_FORM.get(target.runtime, target.runtime)
    chosen = [variant for variant in variants if variant.target in {None, form}]
    if target.runtime == "pytorch":
        chosen = [variant for variant in chosen if variant.target is None]
    rivals = []
    for variant in progress.track(chosen, f"build {target.runtime}"):
        precision = variant.precision
        half = target.precision == "fp16" and variant is not chosen[0]
        if half and precision == "fp32":
            precision = "fp16"
        rivals.append(Rival(variant, precision, _engine(job, variant, target, precision), target))
    return rivals


def _engine(job: Job, variant: Variant, target: Target, precision: str) -> Path:
    source = job.path(variant)
    extension = plugins.load("runtimes", target.runtime).extension
    if target.runtime == "pytorch":
        return job.run.root / variant.stage
    if extension == source.suffix and precision != "fp16":
        return source
    form = "" if precision == "fp32" else f".{precision}"
    out = source.with_name(f"{source.stem}{form}.{target.runtime}-b{target.batch}{extension}")
    if out.is_file() and build_record(out).get("source_sha256") == sha256(source):
        return out
    largest = max(target.batch, evaluate.BATCH)
    return build_engine(
        source,
        out,
        runtime=target.runtime,
        batch=(1, target.batch, largest),
        precision=precision if precision == "fp16" else None,
    )


def _coverage(job: Job, rivals: Sequence[Rival]) -> list[dict[str, Any]]:
    """Return how much of every int8 graph runs in int8, where the runtime can tell."""
    found = []
    for rival in rivals:
        if rival.precision != "int8":
            continue
        source, runtime = job.path(rival.variant), rival.target.runtime
        engine = rival.path if rival.path != source else None
        with contextlib.suppress(EngineError, UsageError):  # it cannot tell: nothing is claimed
            fusion = check_fusion(source, runtime, engine=engine, threads=rival.target.threads)
            told = insights.coverage(fusion, rival.variant.name)
            found.append(told.model_dump(mode="json", exclude_none=True))
    return found


def measure_rivals(
    job: Job, rivals: Sequence[Rival], stage: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return accuracy and latency of each of ``rivals``, and the state of the machine.

    Answers to the test images that ``stage`` holds are not taken again.
    """
    answers = [_answers(job, rival, stage) for rival in rivals]
    latency = _latency(job, rivals)
    rows = []
    for rival, own in zip(rivals, answers, strict=True):
        row: dict[str, Any] = {
            "runtime": rival.target.runtime,
            "precision": rival.precision,
            "device": device_of(rival.target.runtime),
            "batch": rival.target.batch,
            "threads": rival.target.threads,
            "skipped": {},
        }
        row |= accuracy_row(job, answers[0], own)
        if rival.variant.name in latency:
            row |= latency[rival.variant.name].to_json()
        else:
            row["skipped"]["latency"] = latency.skipped[rival.variant.name]
        rows.append(row)
    return rows, latency.conditions


def device_of(runtime: str) -> str:
    """Return where ``runtime`` runs when it is left to itself: "cpu" or "cuda".

    ONNX Runtime and OpenVINO take the CPU, TensorRT knows GPUs only, PyTorch takes one it finds.
    """
    if runtime.startswith("tensorrt"):
        return "cuda"
    return "cuda" if runtime == "pytorch" and torch.cuda.is_available() else "cpu"


def _answers(job: Job, rival: Rival, stage: Path) -> Predictions | Evaluation:
    """Return the answers to the test images; logits are from disk if they were taken before."""
    path = answers_path(stage, rival.variant.name, rival.target.runtime, rival.precision)
    if path.is_file():
        return Predictions.load(path)
    test = job.dataset.pictures("test", evaluate.BATCH, job.recipe.measure.test_images)
    images = len(job.dataset.splits["test"])
    total = min(images, job.recipe.measure.test_images or images) / evaluate.BATCH
    name = f"{rival.variant.name} on {rival.target.runtime}"
    with open_session(rival.path, rival.target.runtime, threads=rival.target.threads) as session:
        if not job.task.tells_classes:
            limit = job.recipe.measure.test_images
            return evaluate.of_task(session, job.dataset, job.task, limit=limit)
        fed = Fed(session, job.dataset)
        predictions = evaluate.predict(fed, progress.track(test, name, -(-total // 1)))
    predictions.save(path)
    return predictions


def accuracy_row(
    job: Job, reference: Predictions | Evaluation, own: Predictions | Evaluation
) -> dict[str, Any]:
    """Return how good a variant is, and what changed against the original."""
    if isinstance(own, Evaluation) and isinstance(reference, Evaluation):
        if own is reference:
            return own.row()
        if not job.task.kinds:
            return own.row() | compare.outputs_row(reference.predictions, own.predictions)
        return own.row() | evaluate.change_row(job.task, reference, own)
    if isinstance(own, Evaluation) or isinstance(reference, Evaluation):
        raise TypeError("answers of different kinds cannot be compared")
    row = evaluate.accuracy(own, job.dataset.classes).row()
    if own is not reference:
        row |= compare.against(reference, own, job.dataset.classes)
    return row


def _latency(job: Job, rivals: Sequence[Rival]) -> measure.Bench:
    settings = job.recipe.measure
    timing = Timing(
        seconds=settings.rounds * settings.round_ms / 1000,
        block_seconds=settings.round_ms / 1000,
        min_rounds=settings.rounds,
    )
    images = job.dataset.splits["test"]
    batch = images.take(np.arange(rivals[0].target.batch) % len(images))
    with contextlib.ExitStack() as stack:
        sessions = {
            rival.variant.name: stack.enter_context(
                open_session(
                    rival.path,
                    rival.target.runtime,
                    threads=rival.target.threads,
                    batch=rival.target.batch,
                )
            )
            for rival in rivals
        }
        inputs = {
            name: arrays(session.inputs, batch, job.dataset) for name, session in sessions.items()
        }
        return measure.bench(sessions, inputs, timing=timing)


def _memory(job: Job, rival: Rival, skipped: dict[str, str]) -> dict[str, Any]:
    target = rival.target
    try:
        memory = measure.memory(
            rival.path,
            target.runtime,
            batch=target.batch,
            shapes=[(target.batch, *job.dataset.example.shape[1:])],
            threads=target.threads,
        )
    except (EngineError, CompressError) as error:
        skipped["memory"] = str(error)
        return {}
    told = memory.to_json()
    skipped.update(told.pop("skipped", {}))
    return told
