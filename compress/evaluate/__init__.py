"""Evaluate networks: accuracy from logits, and the metrics of any task.

The module can be called: ``compress.evaluate(network, dataset, task)`` is :func:`of_task`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress import tasks
from compress.data import Dataset
from compress.errors import DataError, EngineError
from compress.evaluate.comparison import compare_predictions, outputs_row
from compress.evaluate.feeding import Fed
from compress.evaluate.predictions import Accuracy, Predictions, accuracy
from compress.modules import evaluating
from compress.modules.detectors import before_nms
from compress.modules.inputs import copied
from compress.modules.outputs import logits_of
from compress.packages import make_callable
from compress.progress import track
from compress.report.schema import MetricRecord
from compress.tasks import Task

__all__ = [
    "Accuracy",
    "ClassEvaluation",
    "Evaluation",
    "Predictions",
    "accuracy",
    "of_task",
    "predict",
    "primary_value",
]

TRIED = 4  # images that a task is tried on
UNLABELLED_IMAGES = 64  # compared without labels, as all outputs are kept
BATCH = 64  # images evaluated at a time; accuracy does not depend on it, only the time it takes
Run = Callable[[Tensor], Any]  # images float32 (B, C, H, W) -> logits (B, K), as tensor or array
Batches = Iterable[tuple[Tensor, Tensor]]  # of images float32 (B, C, H, W) and labels int64 (B,)


class Evaluation:
    """How good a network is at a task, and what each image contributed."""

    def __init__(
        self,
        task: Task,
        predictions: Sequence[tasks.Prediction] = (),
        scores: Sequence[tasks.Contribution] = (),
    ) -> None:
        self.task = task
        self._predictions, self._scores = predictions, scores

    @property
    def predictions(self) -> Sequence[tasks.Prediction]:
        """The prediction for each image."""
        return self._predictions

    @property
    def scores(self) -> Sequence[tasks.Contribution]:
        """What each image contributes to the metrics, for paired comparisons; none unlabelled."""
        return self._scores

    @property
    def images(self) -> int:
        """How many images it is measured on."""
        return len(self.predictions)

    @property
    def primary(self) -> str:
        """The metric that counts first."""
        return self.task.primary

    @property
    def unmeasured(self) -> str:
        """Why there are no metrics; empty where there are."""
        return "" if self.task.kinds else getattr(self.task, "reason", "the task has no metrics")

    @property
    def value(self) -> float:
        """The metric that counts first, without an interval."""
        return tasks.values_of(self.task, self.scores)[self.primary]

    @cached_property
    def metrics(self) -> dict[str, MetricRecord]:
        """Every metric with its 95 % interval."""
        return tasks.metrics(self.task, self.scores) if self.task.kinds else {}

    def row(self) -> dict[str, Any]:
        """Return what a table of results holds of this."""
        if self.unmeasured:
            return {"skipped": {"accuracy": self.unmeasured}}
        found = {name: metric.to_json() for name, metric in self.metrics.items()}
        return {"images": self.images, "primary": self.primary, "metrics": found}

    def change_row(self, reference: Any) -> dict[str, Any]:
        """Return what changed from ``reference``, an evaluation on the same images, for a table.

        Raises:
            CompressError: the images differ, or the networks have different outputs.
        """
        if not self.task.kinds:
            alike = outputs_row(reference.predictions, self.predictions)
            is_known = getattr(self.task, "inner", None) is not None
            return alike | (self._agreement_row(reference) if is_known else {})
        changes = tasks.compare_metrics(self.task, reference.scores, self.scores)
        told = {name: change.to_json() for name, change in changes.items()}
        return self._agreement_row(reference) | {"changes": told}

    def _agreement_row(self, reference: Evaluation) -> dict[str, Any]:
        if not any(map(self.task.finds, (*reference.predictions, *self.predictions))):
            return {"skipped": {"agreement_pct": "neither network finds anything in any image"}}
        alike = tasks.agreement(self.task, reference.predictions, self.predictions)
        if alike.unit == "pct":
            return {"agreement_pct": alike.value, "agreement_ci95": alike.ci95}
        return {"agreement": alike.to_json()}


class ClassEvaluation(Evaluation):
    """How good a network is that names one class an image: by its logits, with exact tests."""

    def __init__(
        self,
        task: Task,
        logits: Predictions,
        classes: Sequence[str],
        groups: Sequence[str] | None = None,
    ) -> None:
        super().__init__(task)
        self.logits, self.classes, self.groups = logits, classes, groups

    @cached_property
    def accuracy(self) -> Accuracy:
        """How right the answers are: of all images, each class, and each subgroup."""
        return accuracy(self.logits, self.classes, self.groups)

    @cached_property
    def predictions(self) -> Sequence[tasks.Prediction]:
        """The prediction for each image."""
        return self.task.predict({"logits": self.logits.logits})

    @cached_property
    def scores(self) -> Sequence[tasks.Contribution]:
        """What each image contributes to the metrics of the task."""
        return tasks.contributions(self.task, self.predictions, self.logits.labels)

    @property
    def images(self) -> int:
        """How many images it is measured on."""
        return len(self.logits.labels)

    @property
    def value(self) -> float:
        """The share of right answers, percent."""
        return float(100 * self.logits.correct.mean())

    def row(self) -> dict[str, Any]:
        """Return what a table of results holds of this."""
        return self.accuracy.row()

    def change_row(self, reference: Any) -> dict[str, Any]:
        """Return what changed from ``reference`` on the same images, for a table.

        Raises:
            DataError: the images or the number of classes differ.
        """
        return compare_predictions(reference.logits, self.logits, self.classes).row()


def predict(run: Any, batches: Batches) -> Predictions:
    """Return the logits of ``run`` for all images of ``batches``, in their order.

    Args:
        run: A module (evaluated in eval mode, without gradients, on its own device, and left as it
            was), a session of a runtime, or a function of a batch. Its first output counts.
        batches: Pairs of images float32 (B, C, H, W) and labels int64 (B,). A session of a fixed
            or limited batch size gets batches it takes; a last one that is too small is filled up
            and the filling's answers are dropped.

    Raises:
        DataError: there are no images, or a label is out of range.
        EngineError: the answers are not finite numbers of shape (B, K).
    """
    logits: list[NDArray[np.float32]] = []
    labels: list[NDArray[np.int64]] = []
    with _runnable(run, _first) as answer:
        for images, target in batches:
            logits.append(_checked(answer(images), len(images), sum(map(len, labels))))
            labels.append(target.numpy().astype(np.int64))
    if not logits:
        raise DataError("there are no images to evaluate on", expected="at least one batch")
    return Predictions(np.concatenate(logits), np.concatenate(labels))


def of_task(
    run: Any,
    dataset: Dataset,
    task: Task | str | Mapping[str, Any],
    *,
    split: str = "test",
    limit: int | None = None,
    title: str = "evaluate",
) -> Evaluation:
    """Return the metrics of ``run`` with 95 % intervals.

    Args:
        run: A module (evaluated in eval mode, on its own device, and left as it was), a session of
            a runtime, or a function of a batch.
        dataset: Where images and labels are from.
        task: A task, or what ``load_task`` takes.
        split: Of the dataset.
        limit: Evaluate so many images only, from all over the split.
        title: What is said beside the progress.

    Raises:
        DataError: there are no images, or their labels are not what the task needs.
        EngineError: the outputs are not what the task reads.
    """
    chosen = task if isinstance(task, Task) else tasks.load_task(task, classes=dataset.classes)
    if not chosen.kinds:
        limit = min(limit or UNLABELLED_IMAGES, UNLABELLED_IMAGES)
    dataset = dataset if limit is None else dataset.with_fewer(split, limit)
    is_session = hasattr(run, "run") and not isinstance(run, nn.Module)
    batches = (dataset.pictures if is_session else dataset.batches)(split, BATCH)
    batches = track(batches, title, -(-len(dataset.splits[split]) // BATCH))
    fed = Fed(run, dataset) if is_session else run
    if not chosen.tells_classes:
        return Evaluation(chosen, *predictions_of(fed, chosen, dataset, batches))
    check_labels(dataset, chosen)
    logits = predict(fed, batches)
    named = dataset.test_groups if split == "test" else None
    groups = None if named is None else [str(each) for each in named]
    return ClassEvaluation(chosen, logits, dataset.classes, groups)


def primary_value(model: nn.Module, dataset: Dataset, task: Task) -> float | None:
    """Return the primary metric on "validation", percent of top-1 where one class is told.

    None where no images are held back, or they have no labels.
    """
    if not task.kinds or not len(dataset.splits.get("validation", ())):
        return None
    return of_task(model, dataset, task, split="validation", title="validate").value


def predictions_of(
    run: Any, task: Task, dataset: Dataset, batches: Iterable[tuple[Tensor, Any]]
) -> tuple[list[tasks.Prediction], list[tasks.Contribution]]:
    """Return the prediction of each image, and what it contributes to the metrics.

    The first images are scored once more at the end: an own score may have become random.
    """
    check_labels(dataset, task)
    predictions: list[tasks.Prediction] = []
    scores: list[tasks.Contribution] = []
    first: Any = None
    for found, targets in answered(run, task, batches):
        first = targets if first is None else first
        predictions += found
        if task.kinds:
            scores += tasks.contributions(task, found, targets)
    if scores:
        again = tasks.contributions(task, predictions[: min(TRIED, len(first))], first)
        tasks.check_repeated(task, scores[: len(again)], again)
    return predictions, scores


def answered(
    run: Any, task: Task, batches: Iterable[tuple[Tensor, Any]]
) -> Iterator[tuple[list[tasks.Prediction], Any]]:
    """Yield the predictions for the images of each batch, and its targets as they are.

    Raises:
        EngineError: the outputs are not what the task reads.
    """
    with _runnable(run, named_outputs) as answer:
        for images, targets in batches:
            yield tasks.predicted(task, answer(images), len(images)), targets


def check_task(run: Any, task: Task, dataset: Dataset, *, images: int = TRIED) -> None:
    """Try a network and its task on a few test images, before anything depends on them.

    ``run`` is a module, or a session that takes pictures as the dataset stores them.

    Raises:
        EngineError: the outputs are not what the task reads.
        DataError: the targets do not fit the predictions.
        UsageError: the task's own score is not repeatable, or NaN.
    """
    check_labels(dataset, task)
    batches = dataset.batches if isinstance(run, nn.Module) else dataset.pictures
    with _runnable(run, named_outputs) as answer:
        pictures, targets = next(iter(batches("test", images, images)))
        outputs = answer(pictures)
        if not task.kinds:
            one = task.predict(outputs)[0]
            task.agreement(one, one)  # which reads the outputs as the task of the network does
            return
        tasks.scored(task, outputs, targets)


def named_outputs(output: Any) -> dict[str, Any]:
    """Return what a network returned by name: tensors, or a list of one dictionary an image."""
    if isinstance(output, Mapping):
        return dict(output)
    if not isinstance(output, list | tuple):
        return {"output": output}
    if output and all(isinstance(each, Mapping) for each in output):
        return {"output": list(output)}
    flat = torch.utils._pytree.tree_leaves(output)
    return {f"output_{i}": each for i, each in enumerate(flat) if isinstance(each, Tensor)}


def check_labels(dataset: Dataset, task: Task) -> None:
    """Raise DataError where the labels are not of the form that ``task`` needs."""
    if task.kinds and dataset.target != task.target:
        raise DataError(
            f"the labels are of the form {dataset.target!r}, the task needs {task.target!r}",
            where=dataset.name,
            expected=f"labels of the form {task.target!r}",
            fix="Choose another task, or other labels of the data: {voc: {labels: masks}}",
        )


Form = Callable[[Any], Any]  # from what a network returns to what is read of it


@contextlib.contextmanager
def _runnable(run: Any, form: Form) -> Iterator[Run]:
    """Yield a function of a batch, on any device, for a module, a session or a function."""
    if isinstance(run, nn.Module):
        device, answering = device_of(run), before_nms(run) or run
        with evaluating(run), evaluating(answering), torch.no_grad():
            yield lambda images: form(answering(copied(images).to(device)))
    elif hasattr(run, "run"):
        yield lambda images: form(run_session(run, images.numpy()))
    else:
        yield lambda images: form(run(images))


def device_of(model: nn.Module) -> torch.device:
    """Return where a network computes: the device of its first parameter."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def run_session(session: Any, images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """Return every output for all images by name, in batches that the session takes.

    One image at a time where outputs do not begin with the images, as a text reader's, whose first
    dimension is time. Outputs that are no tensors, as maps of labels to scores, are left out.
    """
    spec = session.inputs[0]
    fixed = spec.shape[0] if spec.shape else None
    limits = getattr(spec, "batch", None) or (1, len(images))  # a user's session may have none
    low, high = (fixed, fixed) if isinstance(fixed, int) else limits
    parts: list[list[NDArray[Any]]] = []
    tensors: dict[int, None] = {}  # positions of outputs

    def answers_to(batch: NDArray[np.float32]) -> list[NDArray[Any]]:
        found = {at: each for at, each in enumerate(session.run(batch)) if hasattr(each, "shape")}
        tensors.update(dict.fromkeys(found))
        return list(found.values())

    for at in range(0, len(images), high):
        part = images[at : at + high]
        filling = np.repeat(part[-1:], max(0, low - len(part)), axis=0)
        padded = np.concatenate([part, filling]) if len(filling) else part
        answers = answers_to(padded)
        if low == 1 < len(padded) and not _are_rows(session, answers, len(padded)):
            alone = (answers_to(padded[row : row + 1]) for row in range(len(padded)))
            parts += [[_rows(output, 1) for output in each] for each in alone]
            continue
        parts.append([_rows(output, len(padded))[: len(part)] for output in answers])
    columns = [_joined(column) for column in zip(*parts, strict=True)]
    known = [each.name for each in getattr(session, "outputs", ())]
    is_known = len(known) > max(tensors, default=0)
    names = [known[at] if is_known else f"output_{at}" for at in tensors]
    return dict(zip(names, columns, strict=True))


def _are_rows(session: Any, answers: Sequence[NDArray[Any]], images: int) -> bool:
    """Return whether every output begins with the images, by its size and by what the file says."""
    told = (getattr(each, "shape", None) for each in getattr(session, "outputs", ()))
    is_fixed = any(shape and isinstance(shape[0], int) and shape[0] > 1 for shape in told)
    return not is_fixed and all(each.shape[:1] == (images,) for each in answers)


def _rows(output: NDArray[Any], images: int) -> Any:
    """Return ``output`` with a row for each image: all of it for one image, as of boxes found."""
    if output.shape[:1] == (images,):
        return output
    if images == 1:
        return output[None]
    raise EngineError(
        f"answered {images} images with an output of shape {output.shape}",
        expected=f"the images along the first dimension: ({images}, ...)",
        fix="Use a graph with a batch of 1",
    )


def _joined(parts: Sequence[NDArray[Any]]) -> Any:
    """Return the rows of all parts; a list where images have outputs of different sizes."""
    if len({part.shape[1:] for part in parts}) == 1:
        return np.concatenate(parts)
    return [row for part in parts for row in part]


def _first(output: Any) -> Any:
    """Return the first scores of classes of a session; ``logits_of`` reads what torch returns."""
    values = list(output.values()) if isinstance(output, Mapping) else output
    if not (isinstance(values, list | tuple) and values and isinstance(values[0], np.ndarray)):
        return output
    found = next((each for each in values if np.ndim(each) == 2), None)
    if found is None and isinstance(output, Mapping):
        return tasks.main_output(output, 2, "logits", "classification")  # says what would fit
    return values[0] if found is None else found


def _checked(output: Any, images: int, before: int) -> NDArray[np.float32]:
    """Return ``output`` as finite float32 logits (images, K), or say what is wrong with it."""
    if not isinstance(output, np.ndarray):
        output = logits_of(output).detach().float().cpu().numpy()
    logits = np.asarray(output, dtype=np.float32)
    if logits.ndim != 2 or len(logits) != images:
        raise EngineError(
            f"answered {images} images with an output of shape {logits.shape}",
            expected=f"logits of shape ({images}, classes)",
        )
    broken = np.flatnonzero(~np.isfinite(logits).all(1))
    if len(broken):
        raise EngineError(
            f"returned outputs that are not finite for {len(broken)} of {images} images, the "
            f"first of them image {before + broken[0]}",
            fix="An fp16 network may have overflowed: keep its widest layers in fp32",
        )
    return logits


make_callable(__name__, "of_task")
