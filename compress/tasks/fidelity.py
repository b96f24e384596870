"""Equality with the outputs of the original, for images without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from compress.data._pictures import Fit
from compress.errors import DataError, EngineError
from compress.tasks import Kind, Prediction, Task, load_task, numeric


@dataclass(frozen=True)
class Fidelity(Task):
    """How near outputs are to those of the original network; for images without labels.

    It reads every output of any network. There is no accuracy: a report tells the signal-to-noise
    ratio of each output and, of scores of classes, how many images keep their answer. ``of`` is the
    task that the network is for: then predictions are compared as that task compares them, and the
    network is scored and taught as suits it.
    """

    of: str | Mapping[str, Any] | None = None
    classes: Sequence[str] = ()
    reason: str = "the images have no labels"  # why accuracy is not measured

    kinds: ClassVar[Mapping[str, Kind]] = {}
    primary: ClassVar[str] = ""
    target: ClassVar[str] = "none"

    @cached_property
    def inner(self) -> Task | None:
        """The task that the network is for, where that is known."""
        return None if self.of is None else load_task(self.of, classes=self.classes)

    def __post_init__(self) -> None:
        if self.inner is None:
            return
        for name in ("answers", "agreement_unit", "legend"):
            object.__setattr__(self, name, getattr(self.inner, name))
        plain = ("kd",) if self.inner.tells_classes else self.inner.losses  # others need labels
        object.__setattr__(self, "losses", plain)

    def loss(self, model: nn.Module, images: Tensor, targets: Any) -> Tensor:
        """Raise DataError: nothing says what is right.

        Raises:
            DataError: always.
        """
        raise DataError(
            "the images have no labels to train on",
            expected="data with labels, or a stage that learns from a teacher: distill",
        )

    def predict(self, outputs: Mapping[str, Any]) -> list[Prediction]:
        """Return every output for each image, as the network gave it.

        Raises:
            EngineError: an output has not one row for each image.
        """
        arrays = {name: each if isinstance(each, list) else numeric(each)
                  for name, each in outputs.items()}  # fmt: skip
        counts = {len(each) for each in arrays.values()}
        if len(counts) != 1:
            shapes = ", ".join(f"{name} {np.shape(each)}" for name, each in arrays.items())
            raise EngineError(
                f"the outputs have different numbers of rows: {shapes}",
                expected="the images along the first dimension of each",
                fix="Use a graph with a batch of 1",
            )
        return [
            {name: np.asarray(each[row]) for name, each in arrays.items()}
            for row in range(counts.pop())
        ]

    def agreement(self, reference: Prediction, candidate: Prediction) -> float:
        """Return how alike the task's predictions are, or 100 where all outputs are equal."""
        if self.inner is None:
            return super().agreement(reference, candidate)
        return self.inner.agreement(*map(self._predicted, (reference, candidate)))

    def finds(self, prediction: Prediction) -> bool:
        """Return whether the task's prediction holds anything."""
        return self.inner is None or self.inner.finds(self._predicted(prediction))

    def in_picture(self, prediction: Prediction, fit: Fit, size: tuple[int, int]) -> Prediction:
        """Return the task's prediction for the picture, which is what is drawn."""
        if self.inner is None:
            return prediction
        return self.inner.in_picture(self._predicted(prediction), fit, size)

    def draw(self, image: Any, prediction: Prediction) -> Any:
        """Return the image with the task's prediction."""
        return image if self.inner is None else self.inner.draw(image, prediction)

    def draw_change(self, image: Any, reference: Prediction, candidate: Prediction) -> Any:
        """Return where the task's predictions differ."""
        if self.inner is None:
            return None
        return self.inner.draw_change(image, reference, candidate)

    def read_outputs(self, outputs: Mapping[str, Any]) -> tuple[str, ...] | None:
        """Return the places of the outputs that the task reads."""
        return None if self.inner is None else self.inner.read_outputs(outputs)

    def counted_outputs(self, outputs: Mapping[str, Any]) -> tuple[str, ...] | None:
        """Return the places of the outputs that count in pruning."""
        return None if self.inner is None else self.inner.counted_outputs(outputs)

    def _predicted(self, outputs: Prediction) -> Prediction:
        if self.inner is None:
            return outputs
        return self.inner.predict({name: each[None] for name, each in outputs.items()})[0]
