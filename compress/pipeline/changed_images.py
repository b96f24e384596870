"""The test images whose predictions changed most, drawn; and the classes that lost or won."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from compress import tasks
from compress.data import targets_of
from compress.data._resize import Fit
from compress.evaluate import Evaluation
from compress.pipeline.context import RunContext
from compress.report import schema
from compress.report.pictures import thumbnail
from compress.tasks import Task

MOST = 6  # images drawn
LEAST = 2  # where no prediction changed
ALIKE = 100 - 1e-6  # agreement, percent, of predictions that are the same
SIDE = 256  # pixels of the longer side, at most
SMALLEST = 192  # of the shorter side of what is drawn onto
COLOURS = 64  # of a picture; six images of four pictures stay within what a report holds


def drawn_changes(
    context: RunContext, place: tuple[str, str], reference: Evaluation, candidate: Evaluation
) -> tuple[schema.DrawnChange, ...]:
    """Return the images on which two networks agree least, with both predictions drawn.

    Images on which they agree wholly are left out, but for the first two where there are no others.
    """
    task = context.task
    if type(task).draw is Task.draw or getattr(task, "inner", task) is None:
        return ()  # its predictions are no pictures
    pairs = list(zip(reference.predictions, candidate.predictions, strict=True))
    agreements = np.array([task.agreement(*pair) for pair in pairs])
    found = []
    count = int((agreements < ALIKE).sum()) if task.agreement_unit == "pct" else MOST
    for index in np.argsort(agreements, kind="stable")[: min(count or LEAST, MOST)].tolist():
        picture, fit = _picture(context, index)
        size = picture.shape[0], picture.shape[1]
        before, after = (task.in_picture(each, fit, size) for each in pairs[index])
        truth = _truth(context, index)
        truth = None if truth is None else task.in_picture(truth, fit, size)
        changed = task.draw_change(picture, before, after)
        found.append(
            schema.DrawnChange(
                index=index,
                variant=place[0],
                runtime=place[1],
                agreement=float(agreements[index]),
                unit=task.agreement_unit,
                truth=None if truth is None else _png(task.draw(picture, truth)),
                before=_png(task.draw(picture, before)),
                after=_png(task.draw(picture, after)),
                change=None if changed is None else _png(changed),
            )
        )
    return tuple(found)


def class_metrics_row(
    context: RunContext, place: tuple[str, str], own: Evaluation
) -> schema.ClassMetrics | None:
    """Return the task's metric of each class with its interval; None where it has none."""
    found = tasks.class_metrics(context.task, own.scores) if own.scores else {}
    if not found:
        return None
    return schema.ClassMetrics(
        variant=place[0],
        runtime=place[1],
        metric=context.task.class_metric,
        classes=tuple(found),
        values=tuple(None if each is None else each.value for each in found.values()),
        ci95=tuple(None if each is None else each.ci95 for each in found.values()),
    )


def _truth(context: RunContext, index: int) -> tasks.Prediction | None:
    if not context.task.kinds:
        return None
    return context.task.truth(targets_of(context.dataset.splits["test"], np.array([index]))[0])


def _picture(context: RunContext, index: int) -> tuple[NDArray[np.uint8], Fit]:
    """Return a test image as RGB, (H, W, 3), and how the network's input comes from it.

    It is the input itself, enlarged where it is small: what is drawn onto it is as large as it has
    to be to be read. Black where the network takes no picture.
    """
    pixels = context.dataset.splits["test"].take([index])[0]
    fit = Fit((pixels.shape[1], pixels.shape[2]), "squash")
    if pixels.is_floating_point() or pixels.shape[0] not in {1, 3}:
        return np.zeros((*pixels.shape[1:], 3), np.uint8), fit
    times = -(-SMALLEST // min(pixels.shape[1:]))
    large = pixels.repeat_interleave(times, 1).repeat_interleave(times, 2)
    return np.ascontiguousarray(large.expand(3, -1, -1).permute(1, 2, 0).numpy()), fit


def _png(image: NDArray[np.uint8]) -> str:
    return thumbnail(np.ascontiguousarray(image), SIDE, COLOURS)
