"""How good a network is at its task, alone and beside another network on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from compress import tasks
from compress.evaluate.comparison import compare_predictions, outputs_row
from compress.evaluate.predictions import Accuracy, Predictions, accuracy
from compress.report.schema import MetricRecord


class Evaluation:
    """How good a network is at a task, and what each image contributed."""

    def __init__(
        self,
        task: tasks.Task,
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
        task: tasks.Task,
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
