"""Build every engine a recipe asks for and measure it: accuracy, latency and memory of variants.

Accuracy is that of the artifact that ships, taken through the runtime that runs it; all variants of
a target are timed side by side in one sitting.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator
from torch import nn

from compress import evaluate, measure, models, plugins, progress
from compress.artifact import sha256
from compress.data import Dataset
from compress.errors import CompressError, EngineError, MissingPackageError, UsageError
from compress.evaluate import Evaluation
from compress.graph import files
from compress.graph.model import GraphIndex
from compress.measure import Timing
from compress.measure.artifacts import Candidate, time_together
from compress.pipeline.context import JudgedPredictions, RunContext, RunVariant
from compress.pipeline.report_images import class_metrics_row, drawn_changes, explain_variants
from compress.prune.sensitivity import PruneSensitivity, prune_sensitivity
from compress.quantize.images import fixed_batch
from compress.recipe.settings import Target
from compress.report import schema
from compress.runtimes import build_engine, build_record, runtime_class, unavailable
from compress.runtimes._fusion import Fusion, check_fusion
from compress.tasks import Task, primary_of

RECALIBRATION_BATCHES = 8  # of BatchNorm, after each cut that is judged


@dataclass(frozen=True, kw_only=True)
class Entry(Candidate):
    """One variant on one target: the file that the runtime opens."""

    variant: RunVariant
    precision: str
    target: Target


class Measured(schema.Record):
    """All results of a run, by variant, and why others are missing."""

    results: dict[str, tuple[schema.Result, ...]]
    skipped: schema.Reasons
    conditions: dict[str, Any]
    coverage: tuple[schema.Coverage, ...]
    attributions: tuple[schema.Attribution, ...] = ()
    similarities: tuple[schema.Similarity, ...] = ()
    sensitivity: tuple[schema.Curve, ...] = ()
    drawn: tuple[schema.DrawnChange, ...] = ()
    class_metrics: tuple[schema.ClassMetrics, ...] = ()
    engines: dict[Path, Path] = Field({}, exclude=True)  # built -> the graph it was built from

    @field_validator("results", mode="before")
    @classmethod
    def _of_earlier_versions(cls, results: dict[str, Any]) -> dict[str, Any]:
        """Return results with their numbers of memory in one of them, as they are today."""
        return {
            name: [_with_memory(row) if isinstance(row, dict) else row for row in rows]
            for name, rows in results.items()
        }


def measure_targets(
    context: RunContext, variants: Sequence[RunVariant], judged: JudgedPredictions
) -> Measured:
    """Build and measure every variant on every target of the recipe.

    Targets that cannot be built or run here are under "skipped".
    """
    results: dict[str, list[schema.Result]] = {variant.name: [] for variant in variants}
    skipped: dict[str, str] = {}
    engines: dict[Path, Path] = {}
    conditions: dict[str, Any] = {}
    coverage: list[schema.Coverage] = []
    shown: dict[str, Any] = {}
    for targets in places(context.recipe.targets):
        target = targets[0]
        label = f"{target.runtime}, batch {target.batch}"
        try:
            entries = entries_on(context, variants, targets)
        except (EngineError, MissingPackageError) as error:
            if not all(each.when_installed for each in targets):
                raise
            skipped[label] = str(error)
            continue
        sources = ((entry.path, context.path(entry.variant)) for entry in entries)
        engines |= {path: source for path, source in sources if path.is_file() and path != source}
        coverage += _coverage(context, entries)
        reason = unavailable(target.runtime)
        if reason is not None:
            skipped[label] = f"the engines are built; they cannot run here: {reason}"
            continue
        if (why := _absent_int8(targets, entries)) is not None:
            skipped[f"int8 on {label}"] = why
        rows, conditions[label], evaluations = measure_entries(context, entries, judged)
        if not shown:
            shown = _shown(context, entries, evaluations)
        for entry, row in zip(entries, rows, strict=True):
            memory = entry.memory(target.batch, context.dataset)
            memory.pop("file_mib", None)  # it is the size_mib of the row
            memory["skipped"] = row.skipped | memory.get("skipped", {})
            results[entry.variant.name].append(row.model_copy(update=_with_memory(memory)))
    attributions, similarities = explain_variants(context, variants, judged)
    return Measured(
        results={name: tuple(rows) for name, rows in results.items()},
        skipped=skipped,
        conditions=conditions,
        coverage=tuple(dict.fromkeys(coverage)),
        attributions=attributions,
        similarities=similarities,
        sensitivity=pruning_curve(context, variants[0]),
        engines=engines,
        **shown,
    )


def _with_memory(row: dict[str, Any]) -> dict[str, Any]:
    """Return ``row`` with the numbers of memory that a result has no field for in one of them."""
    apart = [key for key in row if key.endswith("_mib") and key not in schema.Result.model_fields]
    return row | {"memory_mib": {key.removesuffix("_mib"): row[key] for key in apart}}


def places(targets: Sequence[Target]) -> list[list[Target]]:
    """Return the targets of each place: one runtime, batch size and number of threads.

    What is measured in one place is timed side by side, whatever its precision.
    """
    found: dict[tuple[Any, ...], list[Target]] = {}
    for target in targets:
        place = (target.runtime, repr(target.options), target.batch, target.threads)
        found.setdefault(place, []).append(target)
    return list(found.values())


def entries_on(
    context: RunContext, variants: Sequence[RunVariant], targets: Sequence[Target]
) -> list[Entry]:
    """Return the variants that can run in one place, with the engines they need there built.

    The first is the original in fp32, which the others are compared with. Where a target asks for
    fp16, every float variant is there in fp16 as well, the original included; where all of them
    do, in fp16 alone.
    """
    target = targets[0]
    form = runtime_class(target.runtime).int8_form
    chosen = [variant for variant in variants if variant.target in {None, form}]
    wanted = {each.precision for each in targets}
    pairs = [
        (variant, precision)
        for variant in chosen
        for precision in _precisions(variant, wanted, is_reference=variant is chosen[0])
    ]
    return [
        _entry(context, variant, precision, target)
        for variant, precision in progress.track(pairs, f"build {target.runtime}")
    ]


def _entry(context: RunContext, variant: RunVariant, precision: str, target: Target) -> Entry:
    options = dict(target.options)
    if precision == "fp16" and "dtype" in plugins.options("runtimes", target.runtime):
        options["dtype"] = "float16"  # the file itself is fp32
    return Entry(
        name=f"{variant.name} {precision}",
        path=_engine(context, variant, target, precision),
        runtime=target.runtime,
        options=options,
        threads=target.threads,
        variant=variant,
        precision=precision,
        target=target,
    )


def _precisions(variant: RunVariant, wanted: Set[str], *, is_reference: bool) -> list[str]:
    """Return the precisions in which a variant is measured where ``wanted`` are asked for."""
    if variant.precision != "fp32":
        return [variant.precision]
    plain = ["fp32"] if is_reference or wanted != {"fp16"} else []
    return [*plain, "fp16"] if "fp16" in wanted else plain


def _absent_int8(targets: Sequence[Target], entries: Sequence[Entry]) -> str | None:
    """Return why an int8 target has no int8 variant; None if it has one or asks for none."""
    is_wanted = any(target.precision == "int8" for target in targets)
    if not is_wanted or any(entry.precision == "int8" for entry in entries):
        return None
    return f"no stage wrote an int8 graph for {targets[0].runtime}"


def _engine(context: RunContext, variant: RunVariant, target: Target, precision: str) -> Path:
    source = context.path(variant)
    plugin = runtime_class(target.runtime)
    extension = plugin.extension
    if plugin.opens == "network":
        return context.run.root / variant.stage
    if extension == source.suffix and precision != "fp16":
        return source
    form = "" if precision == "fp32" else f".{precision}"
    out = source.with_name(f"{source.stem}{form}.{target.runtime}-b{target.batch}{extension}")
    if out.is_file() and build_record(out).get("source_sha256") == sha256(source):
        return out
    build = functools.partial(
        build_engine, source, out,
        runtime=target.reference, precision=precision if precision == "fp16" else None,
    )  # fmt: skip
    try:
        return build(batch=(1, target.batch, max(target.batch, evaluate.BATCH)))
    except CompressError:
        fixed = fixed_batch(GraphIndex(files.load(source, weights=False)))
        if not fixed:
            raise
        return build(batch=(fixed,) * 3)  # timing says that another batch was skipped


def _coverage(context: RunContext, entries: Sequence[Entry]) -> list[schema.Coverage]:
    """Return how much of every int8 graph runs in int8, where the runtime can tell."""
    found = []
    for entry in entries:
        if entry.precision != "int8":
            continue
        source, runtime = context.path(entry.variant), entry.target.runtime
        engine = entry.path if entry.path != source else None
        with contextlib.suppress(EngineError, UsageError):  # it cannot tell: nothing is claimed
            fusion = check_fusion(source, runtime, engine=engine, threads=entry.target.threads)
            found.append(int8_coverage(fusion, entry.variant.name))
    return found


def int8_coverage(fusion: Fusion, variant: str) -> schema.Coverage:
    """Return how much of ``variant`` its runtime really runs in int8, and what stays in float."""
    layers = {layer.node: layer for layer in fusion.float_layers}
    islanded = {node for nodes in fusion.islands for node in nodes}
    islands = []
    for nodes in (*fusion.islands, *((node,) for node in layers if node not in islanded)):
        inside = [layers[node] for node in nodes if node in layers]
        reasons = dict.fromkeys(layer.reason for layer in inside)
        islands.append(
            schema.Island(
                nodes=nodes,
                macs=sum(layer.macs for layer in inside) if inside else None,
                reason="; ".join(reasons) or None,
            )
        )
    return schema.Coverage(
        variant=variant,
        runtime=fusion.runtime,
        int8_macs_pct=100 * fusion.int8_share,
        reformats=len(fusion.reformats),
        islands=tuple(islands),
    )


def measure_entries(
    context: RunContext, entries: Sequence[Entry], judged: JudgedPredictions
) -> tuple[list[schema.Result], dict[str, Any], list[Evaluation]]:
    """Return accuracy and latency of ``entries``, the machine's state, and their evaluations.

    Predictions that ``judged`` holds are not taken again.
    """
    evaluations = [_evaluated(context, entry, judged) for entry in entries]
    settings = context.recipe.measure
    timing = Timing(
        seconds=settings.rounds * settings.round_ms / 1000,
        block_seconds=settings.round_ms / 1000,
        min_rounds=settings.rounds,
    )
    latency = time_together(entries, entries[0].target.batch, context.dataset, timing)
    rows = []
    for entry, own in zip(entries, evaluations, strict=True):
        row = own.row()
        if own is not evaluations[0]:
            row |= own.change_row(evaluations[0])
        if entry.name in latency:
            row |= latency[entry.name].to_json()
            row |= {key: latency.conditions[key] for key in ("busy",) if key in latency.conditions}
        else:
            row["skipped"] = row.get("skipped", {}) | {"latency": latency.skipped[entry.name]}
        of_entry = {
            "runtime": entry.target.runtime,
            "precision": entry.precision,
            "size_mib": measure.size_mib(entry.path),
            "device": plugins.create("runtimes", entry.reference).device_kind(),
            "batch": entry.target.batch,
            "threads": entry.target.threads,
            "options": dict(entry.target.options) or None,
        }
        rows.append(schema.Result(**(of_entry | row)))
    return rows, latency.conditions, evaluations


def _shown(
    context: RunContext, entries: Sequence[Entry], evaluations: Sequence[Evaluation]
) -> dict[str, Any]:
    if context.task.tells_classes or len(entries) < 2:
        return {}
    places = [(entry.variant.name, entry.target.runtime) for entry in entries]
    classes = map(functools.partial(class_metrics_row, context), places, evaluations)
    return {
        "drawn": drawn_changes(context, places[-1], evaluations[0], evaluations[-1]),
        "class_metrics": tuple(each for each in classes if each is not None),
    }


def _evaluated(context: RunContext, entry: Entry, judged: JudgedPredictions) -> Evaluation:
    """Return the evaluation on the test images; logits are from disk if they were taken before."""
    path = judged.path(entry.variant.name, entry.runtime, entry.precision)
    if path.is_file():
        found: Evaluation = judged.evaluation(path)
    else:
        title = f"{entry.name} on {entry.target.runtime}"
        with entry.open() as session:
            found = evaluate.of_task(session, context.dataset, context.task, title=title)
    judged.keep(path, found)
    return found


def no_sensitivity(context: RunContext, original: RunVariant) -> str | None:
    """Return why a run has no sensitivity curves; None if it is to have them."""
    if not context.recipe.measure.sensitivity:
        return "the recipe does not ask for it: measure.sensitivity"
    if not (context.run.root / original.stage / models.DESCRIPTION_FILE).is_file():
        return "the original is an ONNX file, and cuts are tried on torch networks"
    if not len(context.dataset.splits["validation"]):
        return "the data has no validation images to judge cuts on"
    if not context.task.kinds:
        return "the images have no labels to judge cuts by"
    return None


def pruning_curve(context: RunContext, original: RunVariant) -> tuple[schema.Curve, ...]:
    """Return accuracy on validation images against kept channels, a line for each group.

    One group is cut at a time, by L2, and BatchNorm is re-estimated; nothing is refitted.
    """
    if no_sensitivity(context, original) is not None:
        return ()
    return (sensitivity_chart(cut_alone(context.network(original), context.dataset, context.task)),)


def cut_alone(model: nn.Module, dataset: Dataset, task: Task) -> PruneSensitivity:
    """Return the primary metric on validation images with one group cut at a time."""
    found = prune_sensitivity(
        model,
        dataset.example,
        lambda cut: evaluate.primary_value(cut, dataset, task) or 0.0,
        recalibrate=list(itertools.islice(dataset.batches("train"), RECALIBRATION_BATCHES)),
    )
    return replace(found, metric=primary_of(task))


def sensitivity_chart(found: PruneSensitivity) -> schema.Curve:
    """Return ``found`` as a chart whose lines end where the network is whole."""
    lines = []
    for curve in found.curves:
        points = sorted((point.keep_channels, point.value) for point in curve.points)
        x, y = zip(*points, (1.0, found.baseline), strict=True)
        lines.append(schema.Line(name=curve.group, x=x, y=y))
    return schema.Curve(
        title="Each group of channels cut alone, the rest whole",
        x_label="share of channels kept",
        y_label=f"validation {found.metric.title}",
        lines=tuple(lines),
    )
