"""The outputs of the original network, where images have no labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from compress.errors import DataError, EngineError
from compress.tasks import Kind, Prediction, Task, numeric


@dataclass(frozen=True)
class Fidelity(Task):
    """How near outputs are to those of the original network; for images without labels.

    It reads every output of any network. There is no accuracy: a report tells the signal-to-noise
    ratio of each output and, of scores of classes, how many images keep their answer.
    """

    classes: Sequence[str] = ()
    reason: str = "the images have no labels"  # why accuracy is not measured

    kinds: ClassVar[Mapping[str, Kind]] = {}
    primary: ClassVar[str] = ""
    target: ClassVar[str] = "none"
    loss_reads_outputs: ClassVar[bool] = False

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
