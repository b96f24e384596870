"""The pruning-sensitivity chart of the report: accuracy with one group cut at a time."""

from __future__ import annotations

import itertools
from dataclasses import replace

from torch import nn

from compress import models
from compress.data import Dataset
from compress.pipeline.context import RunContext, RunVariant
from compress.prune.sensitivity import PruneSensitivity, prune_sensitivity
from compress.report.schema import Curve, Line
from compress.tasks import Task, primary_of
from compress.train.validation import primary_value

RECALIBRATION_BATCHES = 8  # of BatchNorm, after each cut that is judged


def unmeasured(context: RunContext, original: RunVariant) -> str | None:
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


def pruning_curve(context: RunContext, original: RunVariant) -> tuple[Curve, ...]:
    """Return accuracy on validation images against kept channels, a line for each group.

    One group is cut at a time, by L2, and BatchNorm is re-estimated; nothing is refitted.
    """
    if unmeasured(context, original) is not None:
        return ()
    return (sensitivity_chart(cut_alone(context.network(original), context.dataset, context.task)),)


def cut_alone(model: nn.Module, dataset: Dataset, task: Task) -> PruneSensitivity:
    """Return the primary metric on validation images with one group cut at a time."""
    found = prune_sensitivity(
        model,
        dataset.example,
        lambda cut: primary_value(cut, dataset, task) or 0.0,
        recalibrate=list(itertools.islice(dataset.batches("train"), RECALIBRATION_BATCHES)),
    )
    return replace(found, metric=primary_of(task))


def sensitivity_chart(found: PruneSensitivity) -> Curve:
    """Return ``found`` as a chart whose lines end where the network is whole."""
    lines = []
    for curve in found.curves:
        points = sorted((point.keep_channels, point.value) for point in curve.points)
        x, y = zip(*points, (1.0, found.baseline), strict=True)
        lines.append(Line(name=curve.group, x=x, y=y))
    return Curve(
        title="Each group of channels cut alone, the rest whole",
        x_label="share of channels kept",
        y_label=f"validation {found.metric.title}",
        lines=tuple(lines),
        variant=None,
    )
