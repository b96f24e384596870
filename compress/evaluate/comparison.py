"""Compare two networks on the same images: answers, flips, change of accuracy, and raw outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress import statistics
from compress.errors import DataError, EngineError
from compress.evaluate.predictions import Predictions, in_percent
from compress.progress import track
from compress.report.schema import LEVEL, SAME, Flip
from compress.runtimes import Session
from compress.tasks import Prediction


@dataclass(frozen=True)
class Drift:
    """Differences of one tensor, summed up; add the drifts of two batches to get that of both."""

    signal: float = 0.0  # sum of squares of the reference
    noise: float = 0.0  # sum of squares of the differences
    total_abs: float = 0.0
    max_abs_diff: float = 0.0
    values: int = 0
    not_finite: int = 0  # values that are finite in the reference only

    @property
    def sqnr_db(self) -> float:
        """Signal-to-noise ratio, dB: +inf if all is equal, -inf if a value is not finite.

        20 dB is an error of a tenth of the signal, 40 dB of a hundredth.
        """
        if self.not_finite:
            return -math.inf
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def mean_abs_diff(self) -> float:
        """Mean absolute difference."""
        return self.total_abs / self.values if self.values else 0.0

    def __add__(self, other: Drift) -> Drift:
        summed = {key: value + getattr(other, key) for key, value in vars(self).items()}
        return Drift(**summed | {"max_abs_diff": max(self.max_abs_diff, other.max_abs_diff)})

    def to_json(self) -> dict[str, Any]:
        """Return this drift as JSON-able data; an infinite ratio is absent.

        ``zero_reference`` is 1 where the reference is zero everywhere: to equal it tells nothing.
        """
        told: dict[str, Any] = {
            "max_abs_diff": self.max_abs_diff,
            "mean_abs_diff": self.mean_abs_diff,
        }
        if math.isfinite(self.sqnr_db):
            told["sqnr_db"] = self.sqnr_db
        if self.not_finite:
            told["not_finite"] = self.not_finite
        if not self.signal:
            told["zero_reference"] = 1.0
        return told

    @classmethod
    def between(cls, reference: NDArray[Any], candidate: NDArray[Any], where: str = "") -> Drift:
        """Return the drift of ``candidate`` from ``reference``.

        Raises:
            EngineError: the shapes differ.
        """
        if reference.shape != candidate.shape:
            raise EngineError(
                f"the reference has shape {reference.shape}, the candidate {candidate.shape}",
                where=where,
                expected="the same shape of both",
            )
        old, new = reference.astype(np.float64), candidate.astype(np.float64)
        usable = np.isfinite(old) & np.isfinite(new)
        difference = np.abs(np.where(usable, new, 0) - np.where(usable, old, 0))
        return cls(
            signal=float(np.square(old, where=usable, out=np.zeros_like(old)).sum()),
            noise=float(np.square(difference).sum()),
            total_abs=float(difference.sum()),
            max_abs_diff=float(difference.max(initial=0.0)),
            values=old.size,
            not_finite=int((np.isfinite(old) & ~np.isfinite(new)).sum()),
        )


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
        if self.top1_p_value >= LEVEL:
            open_loss = statistics.undecided(self.images, self.top1_change_ci95)
            return open_loss or SAME
        return "more accurate" if self.top1_change_pct > 0 else "less accurate"

    def row(self) -> dict[str, Any]:
        """Return the numbers of this comparison as one flat row, for a report."""
        apart = ("images", "logits", "class_drops", "flips")
        told = {key: value for key, value in vars(self).items() if key not in apart}
        worst = {f"worst_class_{key}": value for key, value in vars(self.class_drops[0]).items()}
        told |= {
            "top1_verdict": self.verdict,
            "worst_class": worst.pop("worst_class_name"),
            **worst,
        }
        return told | self.logits.to_json()

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON-able data."""
        return {
            "images": self.images,
            **self.row(),
            "class_drops": [asdict(drop) for drop in self.class_drops],
            "flips": [flip.to_json() | {"kind": flip.kind} for flip in self.flips],
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


def compare_outputs(
    reference: Session, candidate: Session, inputs: Iterable[tuple[NDArray[Any], ...]]
) -> dict[str, Drift]:
    """Return the drift of each output of ``candidate``, by the reference's name for it.

    They are matched by name where all names agree, else by position. ``inputs`` are batches: for
    each the arrays that both sessions are called with.

    Raises:
        EngineError: the number or the shapes of the outputs differ, or there are no batches.
    """
    old, new = ([spec.name for spec in each.outputs] for each in (reference, candidate))
    pairs = [(name, new.index(other)) for name, other in matched_outputs(old, new).items()]
    drifts = {name: Drift() for name, _ in pairs}
    batches = 0
    for arrays in track(inputs, "comparing"):
        exact, found = reference.run(*arrays), candidate.run(*arrays)
        for (name, position), array in zip(pairs, exact, strict=True):
            drifts[name] += Drift.between(array, found[position], f"output {name!r}")
        batches += 1
    if not batches:
        raise EngineError("there is nothing to compare on", expected="at least one batch of images")
    return drifts


def matched_outputs(old: Sequence[str], new: Sequence[str]) -> dict[str, str]:
    """Return the candidate's name of each output of the reference: by name, else by position.

    Raises:
        EngineError: they have different numbers of outputs.
    """
    if len(old) != len(new):
        raise EngineError(
            f"the reference has {len(old)} outputs ({', '.join(old)}), "
            f"the candidate {len(new)} ({', '.join(new)})",
            expected="two artifacts of one network",
        )
    return dict(zip(old, old if set(old) == set(new) else new, strict=True))


def outputs_row(reference: Sequence[Prediction], candidate: Sequence[Prediction]) -> dict[str, Any]:
    """Return how near the outputs of one network are to those of another, for a report.

    Raises:
        EngineError: the networks have different outputs.
    """
    drifts = drifts_of(reference, candidate)
    found: dict[str, Any] = {"outputs": {name: each.to_json() for name, each in drifts.items()}}
    first = next(iter(matched_outputs(list(reference[0]), list(candidate[0])).items()))
    ratios = [each["sqnr_db"] for each in found["outputs"].values() if "sqnr_db" in each]
    if ratios:
        found["sqnr_db"] = min(ratios)
    answers = [
        [image[name] for image in each]
        for name, each in zip(first, (reference, candidate), strict=True)
    ]
    if len(drifts) == 1 and all(a.ndim == 1 and len(a) > 1 for a in answers[0]):
        same = sum(int(a.argmax() == b.argmax()) for a, b in zip(*answers, strict=True))
        images = len(answers[0])
        found["agreement_pct"] = 100 * same / images
        found["agreement_ci95"] = in_percent(statistics.wilson_interval(same, images))
    return found


def drifts_of(reference: Sequence[Prediction], candidate: Sequence[Prediction]) -> dict[str, Drift]:
    """Return the drift of each output over all images, by the reference's name for it.

    Raises:
        EngineError: the networks have different outputs, or there are no images.
    """
    if not reference or len(reference) != len(candidate):
        raise EngineError(f"{len(reference)} and {len(candidate)} images cannot be compared")
    return {
        name: sum(
            (Drift.between(a[name], b[other], f"output {name!r}")
             for a, b in zip(reference, candidate, strict=True)),
            Drift(),
        )
        for name, other in matched_outputs(list(reference[0]), list(candidate[0])).items()
    }  # fmt: skip


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
