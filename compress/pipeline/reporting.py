"""Assemble the report, its tables and its details, from records; nothing is measured here."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress import environment, measure, models
from compress.artifact import sha256
from compress.evaluate import Accuracy, Predictions, comparison
from compress.groups.plan import PrunePlan
from compress.pipeline import cautions
from compress.pipeline.context import JudgedPredictions, RunContext, RunVariant, StageResult
from compress.pipeline.measure import Measured, no_sensitivity
from compress.qdq.plan import QuantPlan
from compress.qdq.writer import RULES
from compress.quantize.notes import by_reason
from compress.recipe.loading import to_json
from compress.recipe.settings import Gates
from compress.report import numbers, schema
from compress.report.charts import learning_curves
from compress.report.pictures import thumbnail
from compress.report.run_folder import RECIPE_FILE
from compress.report.verdict import size_ratio
from compress.runtimes import runtime_class

AT_LEAST = {"speedup", "size_ratio", "agreement_pct"}  # gates that are lower limits


def assemble(
    context: RunContext,
    variants: Sequence[RunVariant],
    outcomes: Sequence[StageResult],
    measured: Measured,
    judged: JudgedPredictions,
) -> schema.Report:
    """Return the report of a run whose stages are finished."""
    absent = {each.name: out.facts.get("skipped", {}) for out in outcomes for each in out.variants}
    trust = cautions.trust_of(outcomes[0].facts)
    results = measured.results if trust.untrained is None else _undecided(measured.results)
    rows = tuple(
        _variant(context, variant, results, absent.get(variant.name, {})) for variant in variants
    )
    plans = int8_plans(outcomes)
    cuts = [stage.prune for stage in context.recipe.stages if stage.prune is not None]
    return schema.Report(
        name=context.recipe.name,
        recipe=to_json(context.recipe),
        provenance=_provenance(context, outcomes, measured),
        variants=rows,
        gates=(
            *(schema.Gate(**gate) for each in outcomes for gate in each.facts.get("gates", ())),
            *gates(context.recipe.gates, rows, trust.untrained),
        ),
        untrained=trust.untrained,
        cautions=(
            *cautions.of_training(context.recipe, context.dataset),
            *cautions.of_splits(context.dataset),
            *cautions.of_data(context.dataset),
            *cautions.of_size(context.dataset, outcomes[0].facts.get("size_inside")),
            *dict.fromkeys(line for each in outcomes for line in cautions.of_stage(each.facts)),
            *cautions.of_trained(rows),
            *cautions.of_noise(rows),
            *cautions.of_slower(rows, *(cut.round_to for cut in cuts[:1])),
            *cautions.of_timing(measured.conditions),
        ),
        notes=tuple(notes_of((name, plan.notes) for name, plan in plans)),
        trials=tuple(f"{name}: {trial}" for name, plan in plans for trial in plan.trials),
        details=details_of(context, variants, outcomes, measured, judged, rows),
        skipped=measured.skipped,
        refused={k: why for each in outcomes for k, why in each.facts.get("refused", {}).items()},
    )


def notes_of(notes: Iterable[tuple[str, Sequence[str]]]) -> Iterator[str]:
    """Yield each note once, with the names of the int8 forms that it is of."""
    forms: dict[str, dict[str, None]] = {}  # note -> names of forms, in order
    for form, own in notes:
        for note in by_reason(own):
            forms.setdefault(note, {})[form] = None
    for note, names in forms.items():
        yield f"{', '.join(names)}: {note}"


def gates(
    limits: Gates, rows: Sequence[schema.Variant], untrained: str | None = None
) -> Iterator[schema.Gate]:
    """Yield every gate of the recipe: the last variant of each runtime against the original.

    A gate that could not be measured is not passed, and says why; nor is one on the accuracy of a
    network that was never trained, or on a speed-up that the timing leaves open.
    """
    original = rows[0]
    pairs, seen = list(_last_results(rows)), set[tuple[str, ...]]()
    for name, limit in limits.model_dump(exclude_none=True).items():
        if not pairs:
            nowhere = "no target with a compressed variant could be run on this machine"
            yield schema.Gate(name=name, limit=limit, passed=False, reason=nowhere)
        for variant, result in pairs:
            if name != "speedup" and (name, variant.name, result.runtime) in seen:
                continue  # accuracy and size are the same for every batch
            seen.add((name, variant.name, result.runtime))
            value = _gate_value(name, original, variant, result)
            if value is not None and not math.isfinite(value):
                value = None  # nothing was measured
            passed = value is not None and (value >= limit if name in AT_LEAST else value <= limit)
            reason = _unmeasured(name, result, variant) if value is None else None
            if passed and name == "speedup" and (doubt := _doubt(limit, result)):
                passed, reason = False, doubt
            if untrained is not None and name not in {"speedup", "size_ratio"}:
                value, passed, reason = (
                    None,
                    False,
                    f"the original is no fair reference: {untrained}",
                )
            yield schema.Gate(
                name=name,
                limit=limit,
                measured=value,
                passed=passed,
                variant=variant.name,
                runtime=result.runtime,
                batch=result.batch,
                reason=reason,
                **(_metric(result) if name == "metric_drop" else {}),
            )


def _doubt(limit: float, result: schema.Result) -> str | None:
    """Return why a speed-up above the limit may be chance: its wide interval reaches below it."""
    bounds = result.speedup_ci95
    if bounds is None or bounds[0] >= limit or not numbers.is_loose(bounds):
        return None
    told = numbers.factor(result.speedup, bounds)
    return f"it may be anything from {told}: measure again on an idle machine"


def _metric(result: schema.Result) -> dict[str, Any]:
    """Return what a gate tells of the primary metric that it is on."""
    metric = result.main_metric
    told = {"title": metric.title, "unit": metric.unit} if metric else {"unit": "pct"}
    return {"metric": result.primary or "top-1", **told}


def _last_results(rows: Sequence[schema.Variant]) -> Iterator[tuple[schema.Variant, schema.Result]]:
    """Yield the result of the most compressed variant in each place, in order of the targets."""
    last: dict[tuple[str, int], tuple[schema.Variant, schema.Result]] = {}
    for variant in rows:
        for result in variant.results:
            if variant is not rows[0] or result.precision != "fp32":
                last[result.runtime, result.batch] = (variant, result)
    yield from last.values()


def _gate_value(
    name: str, original: schema.Variant, variant: schema.Variant, result: schema.Result
) -> float | None:
    if name == "metric_drop" or (name == "top1_drop_pct" and result.primary is None):
        return None if result.change is None else result.change.drop
    if name == "top1_drop_pct":
        return None
    if name == "size_ratio":
        return size_ratio(original, variant, result)
    value: float | None = getattr(result, name)
    return value


def _unmeasured(name: str, result: schema.Result, variant: schema.Variant) -> str:
    if name == "size_ratio":
        return "the file has no size"
    if name in {"top1_drop_pct", "worst_class_drop_pct"} and result.primary is not None:
        return f"the task is judged by {result.primary}, not by classes: use metric_drop"
    return numbers.reason({"metric_drop": "top1_change_pct"}.get(name, name), result, variant)


def _variant(
    context: RunContext,
    variant: RunVariant,
    results: Mapping[str, tuple[schema.Result, ...]],
    absent: Mapping[str, str],
) -> schema.Variant:
    path = context.path(variant)
    return schema.Variant(
        name=variant.name,
        stage=variant.stage,
        artifact=variant.path,
        sha256=sha256(path),
        parent=variant.parent,
        params=variant.params,
        macs=variant.macs,
        size_mib=measure.size_mib(path),
        skipped=dict(absent),
        results=results.get(variant.name, ()),
    )


def _undecided(results: Mapping[str, Sequence[schema.Result]]) -> dict[str, Any]:
    """Return ``results`` without verdicts on accuracy: a network that knows nothing loses none."""
    said = {"verdict": "the original is no fair reference"}

    def undecided(row: schema.Result) -> schema.Result:
        update: dict[str, Any] = {}
        if row.top1_verdict is not None:
            update["top1_verdict"] = said["verdict"]
        if row.changes is not None:
            changes = row.changes.items()
            update["changes"] = {name: each.model_copy(update=said) for name, each in changes}
        return row.model_copy(update=update)

    return {name: tuple(map(undecided, rows)) for name, rows in results.items()}


def _provenance(
    context: RunContext, outcomes: Sequence[StageResult], measured: Measured
) -> schema.Provenance:
    description, root = context.run.description(), context.run.root.as_posix()
    found = environment.describe_machine()
    return schema.Provenance(
        created=description.get("created"),
        command=shlex.join(["compress", "run", f"{root}/{RECIPE_FILE}", "--out", f"{root}-again"]),
        commit=found.pop("commit", None),
        seed=context.recipe.seed,
        settings=to_json(context.recipe),
        data=schema.DataRecord(
            name=context.dataset.name,
            fingerprint=context.dataset.fingerprint,
            images={name: len(split) for name, split in context.dataset.splits.items()},
            calibration_sha256=outcomes[-1].facts.get("calibration", {}).get("sha256"),
        ),
        versions=found.pop("versions", {}),
        device=found.pop("device", {}),
        conditions=measured.conditions,
    )


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
