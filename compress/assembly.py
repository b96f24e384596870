"""From what stages and measurements left behind to the Report; it measures nothing itself."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress import compare, environment, evaluate, measure, models
from compress.artifact import sha256
from compress.evaluate import Predictions
from compress.measuring import answers_path
from compress.report import schema
from compress.report.pictures import thumbnail
from compress.settings import Gates
from compress.steps import Job, Outcome, Variant
from compress.surgery import PrunePlan

LARGEST_FLIPS = 24  # images shown of each variant
OWN_FIELDS = set(schema.Result.model_fields)  # everything else a row holds goes below memory_mib


def assemble(
    job: Job,
    variants: Sequence[Variant],
    outcomes: Sequence[Outcome],
    measured: Mapping[str, Any],
    answers: Path,
) -> schema.Report:
    """Return the report of a run whose stages are finished.

    Args:
        job: The run.
        variants: All variants, the original first.
        outcomes: What each stage recorded.
        measured: What ``measuring.measure_targets`` recorded.
        answers: Folder with the answers of each variant to the test images.
    """
    rows = tuple(_variant(job, variant, measured["results"]) for variant in variants)
    return schema.Report(
        name=job.recipe.name,
        recipe=job.recipe.model_dump(mode="json"),
        provenance=_provenance(job, measured),
        variants=rows,
        gates=tuple(gates(job.recipe.gates, rows)),
        details=_details(job, variants, outcomes, rows, answers),
        skipped=measured["skipped"],
    )


def gates(limits: Gates, rows: Sequence[schema.Variant]) -> Iterator[schema.Gate]:
    """Yield every gate of the recipe: the last variant of each runtime against the original.

    A gate that could not be measured anywhere is not passed, and says why.
    """
    original = rows[0]
    pairs = list(_last_results(rows))
    for name, limit in limits.model_dump(exclude_none=True).items():
        if not pairs:
            reason = "no target with a compressed variant could be run on this machine"
            yield schema.Gate(name=name, limit=limit, passed=False, reason=reason)
        for variant, result in pairs:
            value = _gate_value(name, original, variant, result)
            passed = value is not None and (
                value <= limit if name.endswith("drop_pct") else value >= limit
            )
            yield schema.Gate(
                name=name,
                limit=limit,
                measured=value,
                passed=passed,
                variant=variant.name,
                runtime=result.runtime,
                batch=result.batch,
                reason="it was not measured" if value is None else None,
            )


def _last_results(
    rows: Sequence[schema.Variant],
) -> Iterator[tuple[schema.Variant, schema.Result]]:
    """Yield the result of the most compressed variant in each place, in order of the targets."""
    last: dict[tuple[str, int], tuple[schema.Variant, schema.Result]] = {}
    for variant in rows[1:]:
        for result in variant.results:
            last[result.runtime, result.batch] = (variant, result)
    yield from last.values()


def _gate_value(
    name: str, original: schema.Variant, variant: schema.Variant, result: schema.Result
) -> float | None:
    if name == "top1_drop_pct":
        return None if result.top1_change_pct is None else -result.top1_change_pct
    if name == "size_ratio":
        if not original.size_mib or not variant.size_mib:
            return None
        return original.size_mib / variant.size_mib
    value: float | None = getattr(result, name)
    return value


def _variant(
    job: Job, variant: Variant, results: Mapping[str, Sequence[Mapping[str, Any]]]
) -> schema.Variant:
    path = job.path(variant)
    return schema.Variant(
        name=variant.name,
        stage=variant.stage,
        artifact=variant.path,
        sha256=sha256(path),
        parent=variant.parent,
        params=variant.params,
        macs=variant.macs,
        size_mib=measure.size_mib(path),
        results=tuple(_result(row) for row in results.get(variant.name, ())),
    )


def _result(row: Mapping[str, Any]) -> schema.Result:
    memory = {
        key: value
        for key, value in row.items()
        if key not in OWN_FIELDS and key.endswith("_mib") and value is not None
    }
    return schema.Result(**(dict(row) | {"memory_mib": memory}))


def _provenance(job: Job, measured: Mapping[str, Any]) -> schema.Provenance:
    description = job.run.description()
    found = environment.describe()
    return schema.Provenance(
        created=description.get("created"),
        command=_command(job),
        commit=found.pop("commit", None),
        seed=job.recipe.seed,
        settings=json.loads(job.recipe.model_dump_json()),
        data=schema.DataRecord(
            name=job.dataset.name,
            fingerprint=job.dataset.fingerprint,
            images={name: len(split) for name, split in job.dataset.splits.items()},
        ),
        versions=found.pop("versions", {}),
        device=found.pop("device", {}) | measured.get("conditions", {}),
    )


def _command(job: Job) -> str:
    recipe = (job.run.root / "recipe.yaml").as_posix()
    return shlex.join(["compress", "run", recipe, "--out", f"{job.run.root.as_posix()}-again"])


def _details(
    job: Job,
    variants: Sequence[Variant],
    outcomes: Sequence[Outcome],
    rows: Sequence[schema.Variant],
    answers: Path,
) -> schema.Details:
    taken = _answers(rows, answers)
    plan = _last_plan(job, variants)
    artifacts = job.run.description()["artifacts"]
    return schema.Details(
        classes=job.dataset.classes,
        channels=tuple(_channels(plan)) if plan is not None else (),
        frozen=dict(plan.frozen) if plan is not None else {},
        learning=tuple(_learning_curves(variants, outcomes)),
        class_scores=tuple(_class_scores(job, taken)),
        confusions=tuple(_confusions(taken)),
        flips=tuple(_flips(job, taken)),
        calibration=tuple(_calibration(taken)),
        artifacts=tuple(
            schema.ArtifactRecord(**each, bytes=(job.run.root / each["path"]).stat().st_size)
            for each in artifacts
        ),
        methods=dict(measure.METHODS),
    )


def _answers(rows: Sequence[schema.Variant], folder: Path) -> list[tuple[str, str, Predictions]]:
    """Return (variant, runtime, answers) of each variant on the first runtime that ran it."""
    found = []
    for row in rows:
        for result in row.results[:1]:
            path = answers_path(folder, row.name, result.runtime, result.precision)
            found.append((row.name, result.runtime, Predictions.load(path)))
    return found


def _last_plan(job: Job, variants: Sequence[Variant]) -> PrunePlan | None:
    for variant in reversed(variants):
        path = job.run.root / variant.stage / models.PLAN_FILE
        if path.is_file():
            return PrunePlan.load(path)
    return None


def _channels(plan: PrunePlan) -> Iterator[schema.Channels]:
    """Yield the output channels of each layer that the plan cuts."""
    for tensor, cuts in plan.tensors.items():
        if tensor.endswith(".weight") and len(plan.shapes[tensor]) > 1 and 0 in cuts:
            yield schema.Channels(
                layer=tensor.removesuffix(".weight"),
                before=plan.shapes[tensor][0],
                after=len(cuts[0]),
            )


def _learning_curves(
    variants: Sequence[Variant], outcomes: Sequence[Outcome]
) -> Iterator[schema.Curve]:
    for outcome in outcomes:
        history = outcome.facts.get("training", {}).get("history", [])
        stage = outcome.variants[0].stage if outcome.variants else ""
        for key, title, label in (
            ("loss", "Training loss", "loss"),
            ("validation_top1_pct", "Accuracy on validation images", "top-1, %"),
        ):
            points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
            if len(points) > 1:
                x, y = zip(*points, strict=True)
                line = schema.Line(name=stage, x=x, y=y)
                yield schema.Curve(
                    title=f"{title}, {stage}", x_label="epoch", y_label=label, lines=(line,)
                )


def _class_scores(
    job: Job, taken: Sequence[tuple[str, str, Predictions]]
) -> Iterator[schema.ClassScores]:
    for name, runtime, predictions in taken:
        per_class = evaluate.accuracy(predictions, job.dataset.classes).per_class
        yield schema.ClassScores(
            variant=name,
            runtime=runtime,
            images=tuple(each.images for each in per_class),
            precision_pct=tuple(each.precision_pct for each in per_class),
            recall_pct=tuple(each.recall_pct for each in per_class),
            f1_pct=tuple(each.f1_pct for each in per_class),
        )


def _confusions(taken: Sequence[tuple[str, str, Predictions]]) -> Iterator[schema.Confusion]:
    for name, runtime, predictions in taken:
        matrix = np.array(evaluate.accuracy(predictions).confusion)
        cells = tuple((int(i), int(j), int(matrix[i, j])) for i, j in np.argwhere(matrix))
        yield schema.Confusion(variant=name, runtime=runtime, cells=cells)


def _flips(job: Job, taken: Sequence[tuple[str, str, Predictions]]) -> Iterator[schema.Flip]:
    if len(taken) < 2:
        return
    reference = taken[0][2]
    name, runtime, candidate = taken[-1]
    lost = [flip for flip in compare.compare(reference, candidate).flips if flip.kind == "lost"]
    for flip in lost[:LARGEST_FLIPS]:
        image = job.dataset.splits["test"].take([flip.index])[0]
        yield schema.Flip(
            index=flip.index,
            label=flip.label,
            before=flip.before,
            after=flip.after,
            before_confidence_pct=flip.before_confidence_pct,
            after_confidence_pct=flip.after_confidence_pct,
            variant=name,
            runtime=runtime,
            thumbnail=thumbnail(image.permute(1, 2, 0).numpy()),
        )


def _calibration(
    taken: Sequence[tuple[str, str, Predictions]],
) -> Iterator[schema.Calibration]:
    for name, runtime, predictions in taken:
        found = evaluate.accuracy(predictions)
        yield schema.Calibration(variant=name, runtime=runtime, ece_pct=found.ece_pct)
