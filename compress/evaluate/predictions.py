"""Predictions of a network on labelled images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from compress.artifact import replacing
from compress.errors import DataError


@dataclass(frozen=True)
class Predictions:
    """Logits of a network for N images, and the labels."""

    logits: NDArray[np.float32]  # (N, K)
    labels: NDArray[np.int64]  # (N,)

    def __post_init__(self) -> None:
        if self.logits.ndim != 2 or self.labels.shape != self.logits.shape[:1]:
            raise DataError(
                f"logits {self.logits.shape} and labels {self.labels.shape} do not fit together",
                expected="logits (N, K) and labels (N,)",
            )
        if len(self.labels) == 0:
            raise DataError("there are no images to evaluate on", expected="at least one image")
        if not 0 <= self.labels.min() <= self.labels.max() < self.logits.shape[1]:
            raise DataError(
                f"labels reach from {self.labels.min()} to {self.labels.max()}, but the network "
                f"has {self.logits.shape[1]} class outputs",
                expected=f"labels from 0 to {self.logits.shape[1] - 1}",
                fix="Give the data the network was trained for, or set --num-classes",
            )

    @cached_property
    def answers(self) -> NDArray[np.int64]:
        """The class of the largest logit, (N,)."""
        answers: NDArray[np.int64] = np.argmax(self.logits, axis=1)
        return answers

    @cached_property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the answer is the label, (N,)."""
        return np.equal(self.answers, self.labels)

    @cached_property
    def probabilities(self) -> NDArray[np.float64]:
        """Softmax of the logits, (N, K)."""
        shifted = self.logits.astype(np.float64) - self.logits.max(1, keepdims=True)
        exponentials = np.exp(shifted)
        softmax: NDArray[np.float64] = exponentials / exponentials.sum(1, keepdims=True)
        return softmax

    @cached_property
    def confidence(self) -> NDArray[np.float64]:
        """Probability of the given answer, (N,)."""
        confidence: NDArray[np.float64] = np.max(self.probabilities, axis=1)
        return confidence

    def save(self, path: Path) -> None:
        """Write to an .npz file, whole or not at all."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, logits=self.logits, labels=self.labels)

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """Read what ``save`` wrote.

        Raises:
            DataError: the file is absent, damaged or something else.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                return cls(stored["logits"], stored["labels"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise DataError(f"holds no predictions: {error}", where=str(path)) from None
