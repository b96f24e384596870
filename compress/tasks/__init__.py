"""What a network is for: its loss, its predictions, its metrics, how two networks agree.

A task is a class in a file of its own in this folder, or the user's own (``path/file.py:Class``).
Metrics are computed from what single images contribute, so that every metric has a bootstrap
interval over images and every comparison of two networks is paired.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from compress import plugins
from compress.data._pictures import Fit
from compress.errors import UsageError
from compress.tasks._metrics import (
    TOP1,
    Array,
    Kind,
    Primary,
    agreement,
    channels_first,
    check_repeated,
    class_metrics,
    compare_metrics,
    contributions,
    main_output,
    mean_of,
    metrics,
    nearest_task,
    numeric,
    predicted,
    scored,
    shapes_told,
    values_of,
)
from compress.tasks._plain_answers import arrays_told

__all__ = [
    "TOP1",
    "Array",
    "Contribution",
    "Form",
    "Kind",
    "Prediction",
    "Primary",
    "Row",
    "Target",
    "Task",
    "agreement",
    "arrays_told",
    "channels_first",
    "check_repeated",
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
    "predicted",
    "primary_of",
    "scored",
    "shapes_told",
    "values_of",
]

if TYPE_CHECKING:
    from compress.graph.ends import Nms

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

    def finds(self, prediction: Prediction) -> bool:
        """Return whether there is anything to agree on: in an image there may be no box."""
        return True

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
        """Return which ``outputs``, tensors by their places, keep their channels; None: all."""
        return None

    def read_outputs(self, outputs: Mapping[str, Any]) -> tuple[str, ...] | None:
        """Return which ``outputs``, tensors by their places, ``predict`` reads; None: all.

        Files hold no others.
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
