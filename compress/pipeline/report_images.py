"""The images of a report: predictions that changed most, drawn; what networks look at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compress import tasks
from compress.data import Dataset, targets_of
from compress.data._pictures import Fit
from compress.evaluate import Evaluation
from compress.evaluate.attribution import ANSWERS, Samples, compare_maps
from compress.evaluate.predictions import Predictions
from compress.pipeline.context import JudgedPredictions, RunContext, RunVariant
from compress.report import schema
from compress.report.pictures import thumbnail
from compress.runtimes import open_session, runtime_class
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
    On one in which neither finds anything there is nothing to agree on: the last to be drawn.
    """
    task = context.task
    if type(task).draw is Task.draw or getattr(task, "inner", task) is None:
        return ()  # its predictions are no pictures
    pairs = list(zip(reference.predictions, candidate.predictions, strict=True))
    agreements = np.array(
        [task.agreement(*pair) if any(map(task.finds, pair)) else np.nan for pair in pairs]
    )
    found = []
    count = int((agreements < ALIKE).sum()) if task.agreement_unit == "pct" else MOST
    for index in np.argsort(agreements, kind="stable")[: min(count or LEAST, MOST)].tolist():
        picture, fit = _picture(context, index)
        size = picture.shape[0], picture.shape[1]
        before, after = (task.in_picture(each, fit, size) for each in pairs[index])
        truth = None
        if task.kinds:
            target = targets_of(context.dataset.splits["test"], np.array([index]))[0]
            known = task.truth(target)
            truth = None if known is None else task.in_picture(known, fit, size)
        changed = task.draw_change(picture, before, after)
        found.append(
            schema.DrawnChange(
                index=index,
                variant=place[0],
                runtime=place[1],
                agreement=None if np.isnan(agreements[index]) else float(agreements[index]),
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


# A variant beside the original, a runtime on which both were judged, and the answers of both.
Judged = tuple[RunVariant, str, tuple[Path, Path]]


def explain_variants(
    context: RunContext, variants: Sequence[RunVariant], judged: JudgedPredictions
) -> tuple[tuple[schema.Attribution, ...], tuple[schema.Similarity, ...]]:
    """Return attribution maps of what the run made and how alike they are, if a recipe asks for it.

    Methods that need gradients explain the last float network. Methods that need answers only
    explain the file that ships, on its runtime: the int8 graph, or the last float network if there
    is none. A method is left out where its network ran on no runtime of the recipe: nobody knows
    which images flipped.

    Raises:
        MissingPackageError: captum is not installed.
    """
    count = context.recipe.measure.explain_images
    if not count:
        return (), ()
    attributions, similarities = list[schema.Attribution](), list[schema.Similarity]()
    pairs = list(_pairs(context, variants, judged))
    for method in context.recipe.measure.explain_methods:
        pair = _explained(pairs, needs_gradients=method not in ANSWERS)
        if pair is None:
            continue
        variant, runtime, answers = pair
        in_torch = method not in ANSWERS or runtime_class(runtime).opens != "onnx"
        before, after = map(Predictions.load, answers)
        samples = explained_samples(context.dataset, before, after, count)
        with contextlib.ExitStack() as stack:
            original, compressed = (
                context.network(each)
                if in_torch
                else stack.enter_context(open_session(context.path(each), runtime))
                for each in (variants[0], variant)
            )
            maps, similarity = compare_maps(
                original, compressed, samples, variant=variant.name, method=method
            )
        attributions += maps
        similarities.append(similarity)
    return tuple(attributions), tuple(similarities)


def _pairs(
    context: RunContext, variants: Sequence[RunVariant], judged: JudgedPredictions
) -> Iterator[Judged]:
    """Yield the variants whose answers to the test images are known, beside the original's."""
    runtimes = dict.fromkeys(target.runtime for target in context.recipe.targets)
    for variant in variants[1:]:
        for runtime in runtimes:
            before, after = (
                judged.path(each.name, runtime, each.precision) for each in (variants[0], variant)
            )
            if before.is_file() and after.is_file():
                yield variant, runtime, (before, after)


def _explained(pairs: Sequence[Judged], *, needs_gradients: bool) -> Judged | None:
    """Return the first runtime's int8 graph, or the last float network."""
    for variant, runtime, answers in () if needs_gradients else pairs:
        if variant.target and runtime_class(runtime).opens == "onnx":
            return variant, runtime, answers
    floats = [pair for pair in pairs if pair[0].target is None]
    return floats[-1] if floats else None


def explained_samples(
    dataset: Dataset, before: Predictions, after: Predictions, count: int
) -> Samples:
    """Return test images to explain: those that flipped from right to wrong, then others.

    They are ``count`` at most of those that ``before`` and ``after`` answer; half of them at most
    are flipped ones, so that the similarity of maps is not about lost images alone. The others are
    spread evenly over the rest.
    """
    flipped = np.flatnonzero(before.correct & ~after.correct)[: max(1, count // 2)]
    others = np.setdiff1d(np.arange(len(before.labels)), flipped)
    places = np.linspace(0, len(others) - 1, max(0, min(count - len(flipped), len(others))))
    chosen = np.concatenate([flipped, others[places.astype(np.int64)]])
    images = dataset.splits["test"].take(chosen)
    return Samples(
        images=dataset.normalize(images),
        pictures=np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy()),
        labels=before.labels[chosen],
        indices=[int(index) for index in chosen],
    )
