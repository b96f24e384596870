"""The details of a report: layers, classes, images, charts; nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress import measure, models
from compress.evaluate import Accuracy, Predictions, comparison
from compress.groups.plan import PrunePlan
from compress.pipeline.context import JudgedPredictions, RunContext, RunVariant, StageResult
from compress.pipeline.measure import Measured, no_sensitivity
from compress.qdq.plan import QuantPlan
from compress.qdq.writer import RULES
from compress.report import schema
from compress.report.charts import learning_curves
from compress.report.pictures import thumbnail
from compress.runtimes import runtime_class

MOST_FLIPS = 24  # images shown
BITS = 8
LARGEST_CODE = 127  # of a weight


@dataclass(frozen=True)
class _Answered:
    """What a variant answers to the test images, and how right that is."""

    variant: str
    runtime: str
    path: Path  # of its predictions
    accuracy: Accuracy

    @property
    def place(self) -> dict[str, Any]:
        return {"variant": self.variant, "runtime": self.runtime}

    def scores(self) -> schema.ClassScores:
        columns = {
            name: tuple(getattr(each, name) for each in self.accuracy.per_class)
            for name in ("images", "precision_pct", "recall_pct", "f1_pct")
        }
        return schema.ClassScores(**self.place, **columns)

    def confusion(self) -> schema.Confusion:
        matrix = np.array(self.accuracy.confusion)
        cells = tuple((int(i), int(j), int(matrix[i, j])) for i, j in np.argwhere(matrix))
        return schema.Confusion(**self.place, cells=cells)

    def calibration(self) -> schema.Calibration:
        found = self.accuracy
        return schema.Calibration(**self.place, ece_pct=found.ece_pct, **found.calibration)

    def subgroups(self) -> Iterator[schema.Subgroup]:
        for group, row in self.accuracy.per_subgroup.items():
            yield schema.Subgroup(column="group", value=group, variant=self.variant, **row)


def details_of(
    context: RunContext,
    variants: Sequence[RunVariant],
    outcomes: Sequence[StageResult],
    measured: Measured,
    judged: JudgedPredictions,
    rows: Sequence[schema.Variant],
) -> schema.Details:
    """Return everything the report tells beside its tables."""
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
        sparsities=tuple(_sparsities(context, variants, rows)),
        coverage=measured.coverage,
        ranges=tuple(
            found for name, plan in int8_plans(outcomes) for found in tensor_ranges(plan, name)
        ),
        learning=tuple(curve for outcome in outcomes for curve in _learning(context, outcome)),
        sensitivity=measured.sensitivity,
        class_scores=tuple(each.scores() for each in taken),
        confusions=tuple(each.confusion() for each in taken),
        flips=tuple(_flips(context, taken)),
        subgroups=tuple(group for each in taken for group in each.subgroups()),
        calibration=tuple(each.calibration() for each in taken),
        attributions=measured.attributions,
        similarities=measured.similarities,
        artifacts=tuple(
            schema.ArtifactRecord(**each, bytes=(context.run.root / each["path"]).stat().st_size)
            for each in context.run.description()["artifacts"]
        ),
        methods=measure.methods_of(tells_classes=context.task.tells_classes),
        skipped=_skipped(context, plan, variants),
    )


def int8_plans(outcomes: Sequence[StageResult]) -> list[tuple[str, QuantPlan]]:
    """Return the plan of each int8 variant, with the variant's name."""
    return [
        (f"int8-{form}", QuantPlan.from_json(plan))
        for outcome in outcomes
        for form, plan in outcome.facts.get("plans", {}).items()
    ]


def _learning(context: RunContext, outcome: StageResult) -> Iterator[schema.Curve]:
    history = outcome.facts.get("training", {}).get("history", ())
    called = {
        name: ", ".join(filter(None, (kind.title or name, kind.unit.replace("pct", "%"))))
        for name, kind in context.task.kinds.items()
    }
    for variant in outcome.variants[:1]:
        yield from learning_curves(variant.stage, history, called)


def _skipped(
    context: RunContext, plan: PrunePlan | None, variants: Sequence[RunVariant]
) -> dict[str, str]:
    """Return why a part of the details is absent, for those that a recipe has to ask for."""
    verbs = {stage.verb for stage in context.recipe.stages}
    reasons = {}
    if (reason := no_sensitivity(context, variants[0])) is not None:
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
    if len(variants) == 1:
        reasons["flips"] = "there is no other network to compare with"
    if not context.task.tells_classes:
        parts = ("class_scores", "confusions", "flips", "calibration")
        reasons |= dict.fromkeys(parts, "the network is not for one class an image")
        reasons["drawn"] = "predictions of this task are no pictures, or nothing was compared"
    if context.dataset.test_groups is None:
        reasons["subgroups"] = "the data names no subgroups"
    return reasons


def _answers(rows: Sequence[schema.Variant], judged: JudgedPredictions) -> list[_Answered]:
    """Return the answers of each variant on the first runtime that ran it.

    The original is first, and last is the variant that the verdict of the report is about: the last
    one on the runtime of the first target.
    """
    found = []
    for row in rows:
        for result in row.results[:1]:
            path = judged.path(row.name, result.runtime, result.precision)
            found.append(_Answered(row.name, result.runtime, path, judged.accuracy(path)))
    return [*found[:1], *sorted(found[1:], key=lambda each: each.runtime == found[0].runtime)]


def _last_plan(context: RunContext, variants: Sequence[RunVariant]) -> PrunePlan | None:
    """Return the plan of the last cut; one that the original came with is another run's."""
    for variant in reversed(variants[1:]):
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


def _flips(context: RunContext, taken: Sequence[_Answered]) -> Iterator[schema.Flip]:
    if len(taken) < 2:
        return
    candidate = taken[-1]
    before, after = (Predictions.load(each.path) for each in (taken[0], candidate))
    compared = comparison.compare_predictions(before, after)
    lost = [flip for flip in compared.flips if flip.kind == "lost"]
    for flip in lost[:MOST_FLIPS]:
        image = context.dataset.splits["test"].take([flip.index])[0]
        picture = thumbnail(image.permute(1, 2, 0).numpy())
        yield flip.model_copy(update=candidate.place | {"thumbnail": picture})


def tensor_ranges(plan: QuantPlan, variant: str) -> Iterator[schema.TensorRange]:
    """Yield what part of each tensor's values the codes of ``plan`` cover on its target.

    A weight with a scale of its own for each channel is told with the widest of them.
    """
    for name, found in plan.activations.items():
        low, high = found.low, found.high
        if not RULES[plan.target].asymmetric:
            low, high = -found.limit, found.limit
        yield schema.TensorRange(
            tensor=name, kind="activation", bits=BITS, low=low, high=high, variant=variant
        )
    for name, weight in plan.weights.items():
        limit = LARGEST_CODE * max(weight.scales)
        yield schema.TensorRange(
            tensor=name, kind="weight", bits=BITS, low=-limit, high=limit, variant=variant
        )


def _sparsities(
    context: RunContext, variants: Sequence[RunVariant], rows: Sequence[schema.Variant]
) -> Iterator[schema.Sparsity]:
    """Yield, for each variant with zeroed weights, the share of zeros and what they gain where."""
    named = {variant.name: (variant, row) for variant, row in zip(variants, rows, strict=True)}
    for variant, row in named.values():
        if variant.sparsity is None:
            continue
        yield schema.Sparsity(
            variant=variant.name,
            pattern=variant.sparsity,
            zero_weights_pct=measure.zero_weights_pct(context.path(variant)),
            runtimes={
                result.runtime: _gain(result, _dense(variant, named)) for result in row.results
            },
        )


def _dense(
    variant: RunVariant, named: Mapping[str, tuple[RunVariant, schema.Variant]]
) -> schema.Variant:
    """Return the nearest ancestor without zeroed weights, with its results."""
    while variant.sparsity is not None and variant.parent is not None:
        variant = named[variant.parent][0]
    return named[variant.name][1]


def _gain(result: schema.Result, dense: schema.Variant) -> str:
    """Return what a runtime does with zeros, and what was measured of it here."""
    word = runtime_class(result.runtime).zero_weights
    other = dense.result_like(result)
    if other is None or not result.latency_ms_p50_ci95 or not other.latency_ms_p50_ci95:
        return f"{word} (not measured here against the same precision with dense weights)"
    (low, high), (other_low, other_high) = result.latency_ms_p50_ci95, other.latency_ms_p50_ci95
    verdict = "faster" if high < other_low else "slower" if low > other_high else "as fast"
    return (
        f"{word}; measured here: {verdict} ({low:.3g} to {high:.3g} ms; "
        f"{dense.name}: {other_low:.3g} to {other_high:.3g})"
    )
