"""The details of the report: cut channels, ranges, per-class scores, flips, learning curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress import measure, models
from compress.evaluate import Accuracy, comparison
from compress.evaluate.predictions import Predictions
from compress.groups.plan import PrunePlan
from compress.pipeline import records
from compress.pipeline.context import JudgedPredictions, RunContext, RunVariant, StageResult
from compress.pipeline.measure import Measured
from compress.pipeline.sensitivity_chart import unmeasured
from compress.pipeline.stages.sparsify import sparsities
from compress.report import schema
from compress.report.charts import learning_curves
from compress.report.pictures import thumbnail

MOST_FLIPS = 24  # images shown


@dataclass(frozen=True)
class Answered:
    """What a variant answers to the test images, and how right that is."""

    variant: str
    runtime: str
    path: Path  # of its predictions
    accuracy: Accuracy


def details(
    context: RunContext,
    variants: Sequence[RunVariant],
    outcomes: Sequence[StageResult],
    measured: Measured,
    rows: Sequence[schema.Variant],
    judged: JudgedPredictions,
) -> schema.Details:
    """Return everything the report tells beside its tables.

    Args:
        context: The run.
        variants: All variants, the original first.
        outcomes: What each stage recorded.
        measured: What ``measure_targets`` recorded.
        rows: The variants of the report.
        judged: Predictions of each variant on the test images.
    """
    taken = _answers(rows, judged) if context.task.tells_classes else []
    plan = _last_plan(context, variants)
    return schema.Details(
        classes=context.dataset.classes,
        tells_classes=context.task.tells_classes,
        class_metrics=measured.class_metrics,
        drawn=measured.drawn,
        drawn_legend=(context.task.legend or None) if measured.drawn else None,
        channels=tuple(_channels(plan)) if plan is not None else (),
        frozen=dict(plan.frozen) if plan is not None else {},
        sparsities=tuple(sparsities(context, variants, rows)),
        ranges=tuple(_ranges(outcomes)),
        coverage=measured.coverage,
        learning=tuple(_learning_curves(outcomes)),
        sensitivity=measured.sensitivity,
        class_scores=tuple(_class_scores(taken)),
        confusions=tuple(_confusions(taken)),
        flips=tuple(_flips(context, taken)),
        subgroups=tuple(_subgroups(taken)),
        calibration=tuple(
            records.calibration(each.accuracy, each.variant, each.runtime) for each in taken
        ),
        attributions=measured.attributions,
        similarities=measured.similarities,
        artifacts=tuple(_artifacts(context)),
        methods=measure.methods_of(tells_classes=context.task.tells_classes),
        skipped=_skipped(context, plan, variants[0]),
    )


def _skipped(context: RunContext, plan: PrunePlan | None, original: RunVariant) -> dict[str, str]:
    """Return why a part of the details is absent, for those that a recipe has to ask for."""
    verbs = {stage.verb for stage in context.recipe.stages}
    reasons = {}
    if (reason := unmeasured(context, original)) is not None:
        reasons["sensitivity"] = reason
    if not context.recipe.measure.explain_images:
        for part in ("attributions", "similarities"):
            reasons[part] = "the recipe does not ask for it: measure.explain_images"
    if plan is None:
        reasons |= dict.fromkeys(("channels", "frozen"), "nothing was pruned")
    if "quantize" not in verbs:
        reasons |= dict.fromkeys(("ranges", "coverage"), "nothing was quantized")
    if not verbs & {"train", "finetune", "distill"}:
        reasons["learning"] = "nothing was trained"
    if not context.task.tells_classes:
        parts = ("class_scores", "confusions", "flips", "calibration")
        reasons |= dict.fromkeys(parts, "the network is not for one class an image")
        reasons["drawn"] = "predictions of this task are no pictures, or nothing was compared"
    if context.dataset.test_groups is None:
        reasons["subgroups"] = "the data names no subgroups"
    return reasons


def _answers(rows: Sequence[schema.Variant], judged: JudgedPredictions) -> list[Answered]:
    """Return the answers of each variant on the first runtime that ran it.

    The original is first, and last is the variant that the verdict of the report is about: the last
    one on the runtime of the first target.
    """
    found = []
    for row in rows:
        for result in row.results[:1]:
            path = judged.path(row.name, result.runtime, result.precision)
            found.append(Answered(row.name, result.runtime, path, judged.accuracy(path)))
    return [*found[:1], *sorted(found[1:], key=lambda each: each.runtime == found[0].runtime)]


def _last_plan(context: RunContext, variants: Sequence[RunVariant]) -> PrunePlan | None:
    for variant in reversed(variants):
        path = context.run.root / variant.stage / models.PLAN_FILE
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


def _learning_curves(outcomes: Sequence[StageResult]) -> Iterator[schema.Curve]:
    for outcome in outcomes:
        if outcome.variants:
            yield from learning_curves(outcome.variants[0].stage, outcome.history)


def _class_scores(taken: Sequence[Answered]) -> Iterator[schema.ClassScores]:
    for answered in taken:
        per_class = answered.accuracy.per_class
        yield schema.ClassScores(
            variant=answered.variant,
            runtime=answered.runtime,
            images=tuple(each.images for each in per_class),
            precision_pct=tuple(each.precision_pct for each in per_class),
            recall_pct=tuple(each.recall_pct for each in per_class),
            f1_pct=tuple(each.f1_pct for each in per_class),
        )


def _confusions(taken: Sequence[Answered]) -> Iterator[schema.Confusion]:
    for answered in taken:
        matrix = np.array(answered.accuracy.confusion)
        cells = tuple((int(i), int(j), int(matrix[i, j])) for i, j in np.argwhere(matrix))
        yield schema.Confusion(variant=answered.variant, runtime=answered.runtime, cells=cells)


def _flips(context: RunContext, taken: Sequence[Answered]) -> Iterator[schema.Flip]:
    if len(taken) < 2:
        return
    candidate = taken[-1]
    before, after = Predictions.load(taken[0].path), Predictions.load(candidate.path)
    compared = comparison.compare_predictions(before, after)
    lost = [flip for flip in compared.flips if flip.kind == "lost"]
    for flip in lost[:MOST_FLIPS]:
        image = context.dataset.splits["test"].take([flip.index])[0]
        yield schema.Flip(
            index=flip.index,
            label=flip.label,
            before=flip.before,
            after=flip.after,
            before_confidence_pct=flip.before_confidence_pct,
            after_confidence_pct=flip.after_confidence_pct,
            variant=candidate.variant,
            runtime=candidate.runtime,
            thumbnail=thumbnail(image.permute(1, 2, 0).numpy()),
        )


def _subgroups(taken: Sequence[Answered]) -> Iterator[schema.Subgroup]:
    """Yield the accuracy of each variant on each subgroup, where the data names them."""
    for each in taken:
        for group, numbers in each.accuracy.per_subgroup.items():
            yield schema.Subgroup(column="group", value=group, variant=each.variant, **numbers)


def _ranges(outcomes: Sequence[StageResult]) -> Iterator[schema.TensorRange]:
    """Yield the range of every tensor that a plan of the run quantizes."""
    for outcome in outcomes:
        for form, plan in outcome.plans.items():
            yield from records.ranges(plan, f"int8-{form}")


def _artifacts(context: RunContext) -> Iterator[schema.ArtifactRecord]:
    for each in context.run.description()["artifacts"]:
        size = (context.run.root / each["path"]).stat().st_size
        yield schema.ArtifactRecord(**each, bytes=size)
