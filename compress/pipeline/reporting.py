"""Assemble the report from what stages and measurements recorded; nothing is measured here."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from compress import environment, measure
from compress.artifact import sha256
from compress.pipeline import cautions
from compress.pipeline.context import JudgedPredictions, RunContext, RunVariant, StageResult
from compress.pipeline.details import details_of, int8_plans
from compress.pipeline.measure import Measured
from compress.quantize.notes import by_reason
from compress.recipe.loading import to_json
from compress.recipe.settings import Gates
from compress.report import numbers, schema
from compress.report.run_folder import RECIPE_FILE
from compress.report.verdict import size_ratio

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


def _last_results(
    rows: Sequence[schema.Variant],
) -> Iterator[tuple[schema.Variant, schema.Result]]:
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
    """Return why nothing was measured for a gate."""
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
