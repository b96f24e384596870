"""What a network is for: its loss, its predictions, its metrics, how two networks agree.

A task is a class in a file of its own in this folder, or the user's own (``path/file.py:Class``).
Metrics are computed from what single images contribute, so that every metric has a bootstrap
interval over images and every comparison of two networks is paired.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compress import plugins
from compress.data._pictures import Fit
from compress.errors import EngineError, UsageError, boundary
from compress.tasks._metrics import (
    TOP1,
    Array,
    Change,
    Kind,
    Metric,
    Primary,
    agreement,
    class_metrics,
    compare_metrics,
    mean_of,
    metrics,
    values_of,
)

__all__ = [
    "TOP1",
    "Array",
    "Change",
    "Contribution",
    "Form",
    "Kind",
    "Metric",
    "Prediction",
    "Primary",
    "Row",
    "Target",
    "Task",
    "agreement",
    "arrays_told",
    "channels_first",
    "class_metrics",
    "compare_metrics",
    "contributions",
    "default_task",
    "load_task",
    "main_output",
    "mean_of",
    "metrics",
    "nearest_task",
    "numeric",
    "primary_of",
    "scored",
    "shapes_told",
    "values_of",
]

if TYPE_CHECKING:
    from compress.graph.nms import Nms

Prediction = dict[str, Array]  # of one image, by name: "label", "boxes", "class_map", ...
Target = Any  # of one image: a class, a row of zeros and ones, a mask, boxes with labels, an image
Contribution = Mapping[str, Any]  # of one image to the metrics: a number or an array by name
Row = dict[str, Any]  # of a table about one image: JSON-able values by the names of the columns
Form = Literal["outputs", "classes", "several classes", "class map", "boxes", "image", "embedding"]


def primary_of(task: Task | None) -> Primary:
    """Return the primary metric of ``task``; None is classification."""
    if task is None or task.tells_classes:
        return TOP1
    return Primary(task.primary, task.kinds[task.primary])


class Task(abc.ABC):
    """What a network is for.

    An own task needs ``kinds``, ``primary``, ``loss``, ``predict`` and ``score``; metrics are then
    the means of what ``score`` returns for each image. Metrics that are no means (mAP, mIoU)
    override ``summarize``.
    """

    kinds: ClassVar[Mapping[str, Kind]]  # every metric by name; none where images have no labels
    primary: ClassVar[str]  # the metric that gates, budgets, checkpoints and the verdict use
    agreement_unit: ClassVar[str] = "pct"
    legend: ClassVar[str] = ""  # what ``draw`` and ``draw_change`` leave out or stress
    tells_classes: ClassVar[bool] = False  # one class an image: top-1, confusions, flips
    answers: ClassVar[Literal["classes", "numbers"]] = "numbers"  # "classes": logits of them
    loss_reads_outputs: ClassVar[bool] = True  # not: labels, or what the network keeps inside
    losses: ClassVar[tuple[str, ...]] = ("mse",)  # that a student is taught by where none are named
    class_metric: ClassVar[str] = ""  # what ``class_values`` returns: "IoU", "AP"
    target: ClassVar[str] = "class"  # what labels must be: class, classes, mask, boxes, image
    form: ClassVar[Form] = "outputs"  # as which a device without this package shows its outputs
    classes: Sequence[str] = ()

    @abc.abstractmethod
    def loss(self, model: nn.Module, images: Tensor, targets: Any) -> Tensor:
        """Return the training loss of a batch, a scalar.

        Args:
            model: In training mode.
            images: (B, C, H, W) float32, normalized.
            targets: Of each image, as the data delivers them: a tensor, or a list of dictionaries.
        """

    @abc.abstractmethod
    def predict(self, outputs: Mapping[str, Any]) -> list[Prediction]:
        """Return the prediction for each image of a batch.

        Args:
            outputs: Raw outputs of a network by name, in their order: arrays with the images along
                the first dimension.

        Raises:
            EngineError: the outputs are not what this task reads; the message gives their shapes.
        """

    def score(self, prediction: Prediction, target: Target) -> Contribution:
        """Return what one image contributes to the metrics: numbers or arrays by name."""
        raise UsageError(
            f"{type(self).__name__} has no method score", expected="score(prediction, target)"
        )

    def summarize(self, scores: Sequence[Contribution], counts: Array) -> dict[str, Array]:
        """Return each metric, (R,), of R samples of the images.

        Args:
            scores: What each of N images contributes.
            counts: (R, N) how often each image is in each sample: ones for the metric itself.
        """
        return {name: mean_of([each[name] for each in scores], counts) for name in self.kinds}

    def agreement(self, reference: Prediction, candidate: Prediction) -> float:
        """Return how alike two predictions for one image are, in ``agreement_unit``."""
        same = [np.array_equal(reference[key], candidate[key]) for key in reference]
        return 100.0 * float(np.mean(same))

    def in_picture(self, prediction: Prediction, fit: Fit, size: tuple[int, int]) -> Prediction:
        """Return a prediction for the network's input as one for the picture it was made from.

        Args:
            prediction: What ``predict`` returned.
            fit: How the picture was fitted to the input.
            size: Height and width of the picture, pixels.
        """
        return prediction

    def describe(self, predictions: Sequence[Prediction], images: Sequence[str]) -> list[list[Row]]:
        """Return what is told of each image: rows of one table.

        Args:
            predictions: Of each image, ``in_picture``.
            images: Their names, for tasks that compare images.
        """
        return [arrays_told(each) for each in predictions]

    def draw(self, image: NDArray[np.uint8], prediction: Prediction) -> NDArray[np.uint8]:
        """Return ``image`` (H, W, 3) with the prediction, ``in_picture``, drawn onto it."""
        return image

    def draw_change(
        self, image: NDArray[np.uint8], reference: Prediction, candidate: Prediction
    ) -> NDArray[np.uint8] | None:
        """Return where two predictions for ``image`` (H, W, 3) differ; None: no such picture."""
        return None

    def truth(self, target: Target) -> Prediction | None:
        """Return what a perfect network would predict, for ``draw``; None where that is unknown."""
        return None

    def class_values(self, scores: Sequence[Contribution], counts: Array) -> Array | None:
        """Return ``class_metric`` of each class, (R, K) in percent, NaN where it never occurs."""
        return None

    def name_of(self, label: int) -> str:
        """Return the name of a class, its number where it has none."""
        return self.classes[label] if 0 <= label < len(self.classes) else str(label)

    def counted_outputs(self, outputs: Mapping[str, Any]) -> tuple[str, ...] | None:
        """Return the places of the outputs whose channels must stay in pruning; None: all.

        Args:
            outputs: Tensors that the network returns, by their places.
        """
        return None

    def read_outputs(self, outputs: Mapping[str, Any]) -> tuple[str, ...] | None:
        """Return the places of the outputs that ``predict`` reads; None: all. Files hold no others.

        Args:
            outputs: Tensors that the network returns, by their places.
        """
        return None

    def ending(self) -> Nms | None:
        """Return the NMS that exported files end in; None: they end as the network does."""
        return None


class OutputTask(Task):
    """A task whose loss is of outputs and targets alone, so that criteria can take its gradients.

    Has ``output_loss`` in place of ``loss``.
    """

    @abc.abstractmethod
    def output_loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss of what a network returns for a batch, a scalar."""

    def loss(self, model: nn.Module, images: Tensor, targets: Any) -> Tensor:
        """Return the training loss of a batch, a scalar."""
        return self.output_loss(model(images), targets)


def arrays_told(arrays: Mapping[str, Any]) -> list[Row]:
    """Return shape and range of each array, (nothing,) of an empty one."""
    found = {name: np.asarray(value) for name, value in arrays.items()}
    return [
        {
            "output": name,
            "shape": "x".join(map(str, each.shape)) or "a number",
            "lowest": float(each.min()) if each.size else None,
            "mean": float(each.mean()) if each.size else None,
            "highest": float(each.max()) if each.size else None,
        }
        for name, each in found.items()
    ]


def load_task(reference: str | Mapping[str, Any], **supplied: Any) -> Task:
    """Return the task that ``reference`` names.

    Args:
        reference: A name, one name with its options, or ``path/file.py:Class``.
        supplied: Options, such as ``classes``; those that the task does not have are left out
            where they are ``classes``.

    Raises:
        UnknownNameError: there is no such task.
        UsageError: an option is not known, or an own class is no Task.
    """
    name, given = plugins.parse("tasks", reference)
    known = plugins.options("tasks", name)
    filled = {"classes": supplied.pop("classes")} if "classes" in supplied else {}
    made = plugins.create("tasks", {name: supplied | given}, **filled)
    if not isinstance(made, Task):
        raise UsageError(f"{name} is no task", expected="a class derived from compress.tasks.Task")
    if "classes" not in known and filled:
        object.__setattr__(made, "classes", tuple(filled["classes"]))
    if made.kinds and made.primary not in made.kinds:
        raise UsageError(
            f"{name}: primary {made.primary!r} is none of its metrics",
            expected=f"one of: {', '.join(made.kinds)}",
        )
    return made


def default_task(target: str) -> str:
    """Return the first task for labels of the form ``target``.

    Raises:
        UsageError: there is none.
    """
    for name in plugins.names("tasks"):
        if plugins.plugin_class("tasks", name).target == target:
            return name
    raise UsageError(f"no task is for labels of the form {target!r}", fix="Set task: NAME")


def scored(task: Task, outputs: Mapping[str, Any], targets: Any) -> list[Contribution]:
    """Return what a few images contribute, from a task that is tried before anything depends on it.

    Raises:
        UsageError: predict, score or summarize raises, or gives something else for the same
            outputs, or no numbers, or every score is NaN.
    """
    name = type(task).__name__
    with boundary(UsageError, "predict or score fails", where=name, fix="Mend the task"):
        tries = [
            contributions(task, predicted(task, outputs, len(targets)), targets) for _ in range(2)
        ]
    check_repeated(task, *tries)
    first: Contribution = tries[0][0] if tries[0] else {}
    for key, value in first.items():
        if np.ndim(value) == 0 and numeric(value).dtype.kind not in "buif":
            raise UsageError(
                f"score gives {key} as {value!r}", where=name, expected="a number for each image"
            )
        if np.ndim(value) == 0 and all(np.isnan(numeric(each[key])) for each in tries[0]):
            raise UsageError(
                f"score gives {key} as NaN for each of {len(tries[0])} images",
                where=name,
                expected="a number; NaN only for images that do not count",
            )
    _try_summary(task, tries[0])
    return tries[0]


def predicted(task: Task, outputs: Mapping[str, Any], images: int) -> list[Prediction]:
    """Return the prediction for each of so many images.

    Raises:
        EngineError: there is another number of them, or the outputs are not what the task reads.
    """
    found = task.predict(outputs)
    if len(found) != images:
        raise EngineError(
            f"{len(found)} predictions for {images} images",
            where=type(task).__name__,
            expected="outputs with the images along the first dimension",
        )
    return found


def check_repeated(
    task: Task, scores: Sequence[Contribution], again: Sequence[Contribution]
) -> None:
    """Raise UsageError where the same images contribute something else the second time."""
    for number, (one, two) in enumerate(zip(scores, again, strict=True)):
        for key, value in one.items():
            is_float = np.issubdtype(numeric(value).dtype, np.floating)
            if not np.array_equal(numeric(value), numeric(two[key]), equal_nan=is_float):
                raise UsageError(
                    f"score of image {number} gives {key} as {value} and then as {two[key]}",
                    where=type(task).__name__,
                    expected="the same value for the same outputs and target",
                    fix="Take random numbers out of predict and score",
                )


def contributions(
    task: Task, predictions: Sequence[Prediction], targets: Any
) -> list[Contribution]:
    """Return what each image contributes to the metrics.

    Raises:
        UsageError: the task's score raises, or returns no dictionary.
    """
    name, found = type(task).__name__, list[Contribution]()
    for i, each in enumerate(predictions):
        with boundary(UsageError, f"score fails for image {i} of a batch", where=name):
            found.append(task.score(each, targets[i]))
        if not isinstance(found[-1], Mapping):
            raise UsageError(
                f"score gives {found[-1]!r}"[:200],
                where=name,
                expected=f"a dictionary: {{{', '.join(f'{key!r}: ...' for key in task.kinds)}}}",
            )
    return found


def _try_summary(task: Task, scores: Sequence[Contribution]) -> None:
    """Raise UsageError unless ``summarize`` gives each metric of two samples, twice the same."""
    name, counts = type(task).__name__, np.ones((2, len(scores)), dtype=np.int64)
    expected = f"an array of shape (2,) for 2 samples, for each of {', '.join(task.kinds)}"
    with boundary(UsageError, "summarize fails", where=name, fix=f"Return {expected}"):
        one, two = (task.summarize(scores, counts) for _ in range(2))
        first, second = (
            {key: numeric(each[key]).astype(np.float64) for key in task.kinds}
            for each in (one, two)
        )
    for key, values in first.items():
        if values.shape != (2,):
            raise UsageError(
                f"summarize gives {key} of shape {values.shape}", where=name, expected=expected
            )
        if not np.array_equal(values, second[key], equal_nan=True):
            raise UsageError(
                f"summarize gives {key} as {values[0]:g} and then as {second[key][0]:g}",
                where=name,
                expected="the same value for the same scores",
            )


def numeric(value: Any) -> Array:
    """Return a tensor or array as a NumPy array on the CPU."""
    if isinstance(value, Tensor):
        value = value.detach()
        value = (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
    return np.asarray(value)


def main_output(
    outputs: Mapping[str, Any], ndim: int, what: str, task: str, channels: int = 0
) -> Array:
    """Return the output called ``what``, else the first with ``ndim`` dimensions, for ``task``.

    If ``channels`` is not 0, outputs of other channels are feature maps, unless the first is one.

    Raises:
        EngineError: there is none, or it holds numbers that are not finite.
    """
    arrays = {name: numeric(value) for name, value in outputs.items()}
    fitting = [name for name, array in arrays.items() if array.ndim == ndim]
    if channels:
        equal = [n for n in fitting if channels in (arrays[n].shape[1], arrays[n].shape[-1])]
        fitting = equal or [n for n in fitting if n in (what, next(iter(arrays)))]
    if not fitting:
        raise EngineError(
            f"task {task} does not fit the network's outputs: {shapes_told(arrays)}",
            expected=f"{what} with {ndim} dimensions",
            fix=f"{nearest_task(arrays.values())}, or check the network",
        )
    found = arrays[what if what in fitting else fitting[0]]
    if not found.size:
        raise EngineError(
            f"output {shapes_told({what: found})} is empty",
            fix="Build the network with at least one class (num_classes)",
        )
    finite = np.isfinite(found).reshape(len(found), -1).all(1)
    if not finite.all():
        first = int(np.flatnonzero(~finite)[0])
        raise EngineError(
            f"outputs that are not finite numbers for {int((~finite).sum())} of {len(found)} "
            f"images, the first of them image {first}",
            fix="An fp16 network may have overflowed: keep its widest layers in fp32",
        )
    return found


def channels_first(array: Array, channels: int) -> Array:
    """Return (B, H, W, C) as (B, C, H, W), and what has its ``channels`` there already as it is."""
    is_last = array.shape[1] != channels and array.shape[3] == channels
    return np.moveaxis(array, 3, 1) if is_last else array


def shapes_told(arrays: Mapping[str, Array]) -> str:
    """Return names and shapes of outputs, the first three of many."""
    first = [f"{name} {array.shape}" for name, array in islice(arrays.items(), 3)]
    more = [f"{len(arrays) - 3} more"] if len(arrays) > 3 else []
    return ", ".join(first + more) or "none"


def nearest_task(arrays: Iterable[Array]) -> str:
    """Return advice to set the task that the first outputs look like."""
    by_ndim = {2: "classification", 3: "detection", 4: "segmentation"}
    likely = [
        "restoration" if array.ndim == 4 and array.shape[1] in {1, 3} else by_ndim[array.ndim]
        for array in arrays
        if array.ndim in by_ndim
    ]
    return f"Set task: {likely[0]}" if likely else "Set another task"
