"""Compare two artifacts: predictions, numbers, and the first tensor that differs.

Here are predictions: agreement, flips, change of accuracy, and which step adds what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress import statistics
from compress.errors import DataError, UsageError
from compress.evaluate.comparison.bisection import Bisection, bisect
from compress.evaluate.comparison.numerical_difference import Drift, compare_outputs, outputs_row
from compress.evaluate.predictions import Predictions, in_percent
from compress.report.schema import Flip

__all__ = [
    "Bisection",
    "BreakdownStep",
    "Comparison",
    "Drift",
    "NetworkForm",
    "against",
    "bisect",
    "chain",
    "compare_outputs",
    "compare_predictions",
    "outputs_row",
]

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class ClassDrop:
    """Loss of recall of one class."""

    name: str
    images: int
    drop_pct: float  # recall of the reference less that of the candidate, points
    drop_ci95: tuple[float, float]  # paired score interval over the images of the class


@dataclass(frozen=True)
class Comparison:
    """A candidate against its reference on the same images."""

    images: int
    agreement_pct: float  # images with the same answer, right or wrong
    agreement_ci95: tuple[float, float]  # Wilson
    flip_pct: float  # the reference right and the candidate wrong
    won_pct: float  # the reverse
    top1_change_pct: float  # candidate less reference, points
    top1_change_ci95: tuple[float, float]  # paired score interval (Tango)
    top1_p_value: float  # McNemar, mid-p
    ece_change_pct: float  # calibration error, candidate less reference, points
    logits: Drift
    class_drops: tuple[ClassDrop, ...]  # of every class that has images, the largest drop first
    flips: tuple[Flip, ...]  # images answered differently: lost ones first, surest first

    @property
    def verdict(self) -> str:
        """Return "more accurate", "less accurate", or what so many images cannot tell.

        "no significant difference" is said only where a loss of more than a point is ruled out.
        """
        if self.top1_p_value >= SIGNIFICANCE:
            open_loss = statistics.undecided(self.images, self.top1_change_ci95)
            return open_loss or "no significant difference"
        return "more accurate" if self.top1_change_pct > 0 else "less accurate"

    @property
    def worst(self) -> ClassDrop:
        """The class that lost most."""
        return self.class_drops[0]

    def row(self) -> dict[str, Any]:
        """Return the numbers of this comparison as one flat row, for a report."""
        return {
            "agreement_pct": self.agreement_pct,
            "agreement_ci95": self.agreement_ci95,
            "flip_pct": self.flip_pct,
            "won_pct": self.won_pct,
            "top1_change_pct": self.top1_change_pct,
            "top1_change_ci95": self.top1_change_ci95,
            "top1_p_value": self.top1_p_value,
            "top1_verdict": self.verdict,
            "ece_change_pct": self.ece_change_pct,
            "worst_class": self.worst.name,
            "worst_class_images": self.worst.images,
            "worst_class_drop_pct": self.worst.drop_pct,
            "worst_class_drop_ci95": self.worst.drop_ci95,
            **self.logits.to_json(),
        }

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON-able data."""
        return {
            "images": self.images,
            **self.row(),
            "class_drops": [asdict(drop) for drop in self.class_drops],
            "flips": [
                flip.model_dump(exclude_none=True) | {"kind": flip.kind} for flip in self.flips
            ],
        }


def compare_predictions(
    reference: Predictions, candidate: Predictions, classes: Sequence[str] | None = None
) -> Comparison:
    """Return what changed from ``reference`` to ``candidate`` on the same images.

    **Method:** both answered the same images in the same order, so all tests are paired: McNemar's
    mid-p test on the images that exactly one gets right, and Tango's score interval for the
    change of accuracy. A change that is not significant may still be real; it only means that
    this many images cannot tell. The worst of many classes is the most unlucky one as well: mind
    its interval and its number of images.

    Raises:
        DataError: the images, their order or the number of classes differ.
    """
    _check_pair(reference, candidate)
    names = classes or [str(k) for k in range(reference.logits.shape[1])]
    same = int((reference.answers == candidate.answers).sum())
    images = len(reference.labels)
    lost = int((reference.correct & ~candidate.correct).sum())
    won = int((~reference.correct & candidate.correct).sum())
    change = statistics.accuracy_change_interval(reference.correct, candidate.correct)
    return Comparison(
        images=images,
        agreement_pct=100 * same / images,
        agreement_ci95=in_percent(statistics.wilson_interval(same, images)),
        flip_pct=100 * lost / images,
        won_pct=100 * won / images,
        top1_change_pct=100 * (won - lost) / images,
        top1_change_ci95=in_percent(change),
        top1_p_value=statistics.mcnemar(lost, won),
        ece_change_pct=100 * (_calibration_error(candidate) - _calibration_error(reference)),
        logits=Drift.between(reference.logits, candidate.logits),
        class_drops=_class_drops(reference, candidate, names),
        flips=_flips(reference, candidate),
    )


def against(
    reference: Predictions, candidate: Predictions, classes: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return ``compare_predictions`` as one flat row of a report."""
    return compare_predictions(reference, candidate, classes).row()


@dataclass(frozen=True)
class NetworkForm:
    """One form of the network and its answers."""

    name: str  # "torch fp32", "onnxruntime fp32", "onnxruntime Q/DQ", "openvino int8"
    error: str  # what was done to get here: "export", "quantization", "engine"; "" for the first
    predictions: Predictions


@dataclass(frozen=True)
class BreakdownStep:
    """One step against the one before it, and against the first."""

    name: str
    error: str
    top1_pct: float
    added: Comparison | None  # against the step before; None for the first
    total: Comparison | None  # against the first step

    def to_json(self) -> dict[str, Any]:
        """Return this link as JSON-able data."""
        told = {"name": self.name, "top1_pct": self.top1_pct}
        if self.added is None or self.total is None:
            return told
        return told | {"error": self.error, "added": self.added.row(), "total": self.total.row()}


def chain(steps: Sequence[NetworkForm]) -> tuple[BreakdownStep, ...]:
    """Return what each step adds to the error, and what it comes to.

    Differences to the step before tell who is to blame; they do not add up to the difference to
    the first, because errors can cancel or compound.

    Raises:
        UsageError: there are fewer than two steps.
        DataError: two steps did not answer the same images.
    """
    if len(steps) < 2:
        raise UsageError("a chain needs at least two steps", expected="a reference and a candidate")
    links = []
    for before, step in zip([None, *steps], steps, strict=False):
        top1_pct = 100 * float(step.predictions.correct.mean())
        added, total = (
            compare_predictions(each.predictions, step.predictions) if before else None
            for each in (before or step, steps[0])
        )
        links.append(BreakdownStep(step.name, step.error, top1_pct, added, total))
    return tuple(links)


def _check_pair(reference: Predictions, candidate: Predictions) -> None:
    if reference.logits.shape[1] != candidate.logits.shape[1]:
        raise DataError(
            f"the reference has {reference.logits.shape[1]} class outputs, "
            f"the candidate {candidate.logits.shape[1]}",
            expected="two networks for the same classes",
        )
    if len(reference.labels) != len(candidate.labels):
        raise DataError(
            f"the reference answered {len(reference.labels)} images, "
            f"the candidate {len(candidate.labels)}",
            expected="predictions for the same images",
        )
    differing = np.flatnonzero(reference.labels != candidate.labels)
    if len(differing):
        raise DataError(
            f"image {differing[0]} has label {reference.labels[differing[0]]} for the reference "
            f"and {candidate.labels[differing[0]]} for the candidate",
            expected="predictions for the same images in the same order",
        )


def _class_drops(
    reference: Predictions, candidate: Predictions, names: Sequence[str]
) -> tuple[ClassDrop, ...]:
    drops = []
    for k in np.unique(reference.labels):
        own = reference.labels == k
        before, after = reference.correct[own], candidate.correct[own]
        low, high = in_percent(statistics.accuracy_change_interval(before, after))
        drop = 100 * float(before.mean() - after.mean())
        drops.append(ClassDrop(names[k], int(own.sum()), drop, (0.0 - high, 0.0 - low)))
    return tuple(sorted(drops, key=lambda drop: (-drop.drop_pct, drop.name)))


def _flips(reference: Predictions, candidate: Predictions) -> tuple[Flip, ...]:
    changed: NDArray[np.int64] = np.flatnonzero(reference.answers != candidate.answers)
    flips = [
        Flip(
            index=int(i),
            label=int(reference.labels[i]),
            before=int(reference.answers[i]),
            after=int(candidate.answers[i]),
            before_confidence_pct=100 * float(reference.confidence[i]),
            after_confidence_pct=100 * float(candidate.confidence[i]),
        )
        for i in changed
    ]
    rank = {"lost": 0, "won": 1, "other": 2}
    surest = -100 * candidate.confidence
    return tuple(sorted(flips, key=lambda flip: (rank[flip.kind], surest[flip.index], flip.index)))


def _calibration_error(predictions: Predictions) -> float:
    return statistics.calibration_bins(predictions.confidence, predictions.correct).error
