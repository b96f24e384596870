"""Numerical difference of arrays: signal-to-noise ratio, largest and mean."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compress import statistics
from compress.errors import EngineError
from compress.evaluate.predictions import in_percent
from compress.progress import track
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
        return Drift(
            self.signal + other.signal,
            self.noise + other.noise,
            self.total_abs + other.total_abs,
            max(self.max_abs_diff, other.max_abs_diff),
            self.values + other.values,
            self.not_finite + other.not_finite,
        )

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


class Answering(Protocol):
    """What is compared: a session of a runtime."""

    @property
    def outputs(self) -> tuple[Any, ...]:
        """What it returns: each has a name."""
        ...

    def run(self, *arrays: NDArray[Any]) -> list[NDArray[Any]]:
        """Return one array for each output."""
        ...


def compare_outputs(
    reference: Answering, candidate: Answering, inputs: Iterable[tuple[NDArray[Any], ...]]
) -> dict[str, Drift]:
    """Return the drift of every output of ``candidate`` from that of ``reference``.

    Args:
        reference: A session.
        candidate: A session with as many outputs. They are matched by name where all names agree,
            else by position.
        inputs: Batches: for each the arrays that both sessions are called with.

    Returns:
        Name of the reference's output -> drift over all batches.

    Raises:
        EngineError: the number or the shapes of the outputs differ, or there are no batches.
    """
    old, new = ([spec.name for spec in each.outputs] for each in (reference, candidate))
    pairs = [(name, new.index(other)) for name, other in matched_outputs(old, new).items()]
    drifts = {name: Drift() for name, _ in pairs}
    batches = 0
    for arrays in track(inputs, "comparing"):
        old, new = reference.run(*arrays), candidate.run(*arrays)
        for (name, position), array in zip(pairs, old, strict=True):
            drifts[name] += Drift.between(array, new[position], f"output {name!r}")
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
    first = next(iter(drifts))
    ratios = [each["sqnr_db"] for each in found["outputs"].values() if "sqnr_db" in each]
    if ratios:
        found["sqnr_db"] = min(ratios)
    answers = [[image[first] for image in each] for each in (reference, candidate)]
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
