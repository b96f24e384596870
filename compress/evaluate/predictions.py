"""Predictions of a network on labelled images, and how right they are for each class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress import statistics
from compress.artifact import replacing
from compress.errors import DataError, boundary


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
                fix="Give the data the network was trained for, or set "
                "model.num_classes (--num-classes)",
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
        from scipy.special import softmax

        return softmax(self.logits.astype(np.float64), axis=1)

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
        with boundary(DataError, "holds no predictions", where=str(path)), path.open("rb") as file:
            stored = np.load(file, allow_pickle=False)
            return cls(stored["logits"], stored["labels"])


_ROW = ("images", "top1_pct", "top1_ci95", "top5_pct", "top5_ci95", "ece_pct")


@dataclass(frozen=True)
class ClassAccuracy:
    """Precision, recall and F1 of one class; None where it has no images or no predictions."""

    name: str
    images: int
    precision_pct: float | None
    recall_pct: float | None
    f1_pct: float | None


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a classifier, with 95 % intervals."""

    images: int
    top1_pct: float
    top1_ci95: tuple[float, float]  # percent, Wilson
    top5_pct: float | None  # None where there are five classes or fewer
    top5_ci95: tuple[float, float] | None
    ece_pct: float  # expected calibration error, 15 bins
    calibration: dict[str, list[float]]  # confidence_pct, accuracy_pct, images of each bin in use
    confusion: tuple[tuple[int, ...], ...]  # (K, K), row = label, column = answer
    per_class: tuple[ClassAccuracy, ...]
    per_subgroup: dict[str, dict[str, Any]] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Return what a table of results holds of this, without what was not measured."""
        told = self.to_json()
        return {key: told[key] for key in _ROW if key in told}

    def to_json(self) -> dict[str, Any]:
        """Return this accuracy as JSON-able data, without what was not measured."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def accuracy(
    predictions: Predictions,
    classes: Sequence[str] | None = None,
    subgroups: Sequence[str] | None = None,
) -> Accuracy:
    """Return the accuracy of ``predictions``.

    **Method:** top-1 is the share of images whose largest logit is the label; its interval is
    Wilson's, so it says how far another sample of as many images might differ, not how the
    network would do on other kinds of images. Top-5 counts a label whose logit has fewer than five
    larger ones.

    Args:
        predictions: Of N images and K classes.
        classes: K names; numbers where absent.
        subgroups: For each image the subgroup it belongs to, (N,), where the data has that.

    Raises:
        DataError: the number of names or subgroups does not fit.
    """
    total, count = predictions.logits.shape
    names = tuple(classes) if classes is not None else tuple(str(k) for k in range(count))
    if len(names) != count:
        raise DataError(f"{len(names)} class names, but the network has {count} class outputs")
    right = int(predictions.correct.sum())
    own = np.take_along_axis(predictions.logits, predictions.labels[:, None], 1)
    larger = (predictions.logits > own).sum(1)
    near = int((larger < 5).sum()) if count > 5 else None
    bins = statistics.calibration_bins(predictions.confidence, predictions.correct)
    confusion = np.bincount(
        predictions.labels * count + predictions.answers, minlength=count * count
    ).reshape(count, count)
    return Accuracy(
        images=total,
        top1_pct=100 * right / total,
        top1_ci95=in_percent(statistics.wilson_interval(right, total)),
        top5_pct=None if near is None else 100 * near / total,
        top5_ci95=None if near is None else in_percent(statistics.wilson_interval(near, total)),
        ece_pct=100 * bins.error,
        calibration={
            "confidence_pct": [100 * value for value in bins.confidence],
            "accuracy_pct": [100 * value for value in bins.accuracy],
            "images": list(bins.answers),
        },
        confusion=tuple(tuple(int(n) for n in row) for row in confusion),
        per_class=tuple(_class_accuracy(confusion, k, name) for k, name in enumerate(names)),
        per_subgroup=_per_subgroup(predictions, subgroups) if subgroups is not None else {},
    )


def _per_subgroup(predictions: Predictions, subgroups: Sequence[str]) -> dict[str, dict[str, Any]]:
    if len(subgroups) != len(predictions.labels):
        raise DataError(
            f"{len(subgroups)} subgroups for {len(predictions.labels)} images",
            expected="one subgroup for each image",
        )
    member = np.asarray(subgroups)
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(set(subgroups)):
        correct = predictions.correct[member == name]
        right, images = int(correct.sum()), len(correct)
        interval = in_percent(statistics.wilson_interval(right, images))
        found[name] = {"images": images, "top1_pct": 100 * right / images, "top1_ci95": interval}
    return found


def _class_accuracy(confusion: NDArray[Any], k: int, name: str) -> ClassAccuracy:
    hit, images, answers = confusion[k, k], confusion[k].sum(), confusion[:, k].sum()
    return ClassAccuracy(
        name=name,
        images=int(images),
        precision_pct=float(100 * hit / answers) if answers else None,
        recall_pct=float(100 * hit / images) if images else None,
        f1_pct=float(200 * hit / (images + answers)) if images + answers else None,
    )


def in_percent(interval: tuple[float, float]) -> tuple[float, float]:
    """Return the ends of an interval of shares in percent."""
    return 100 * interval[0], 100 * interval[1]
