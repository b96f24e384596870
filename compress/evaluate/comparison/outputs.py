"""Numerical difference of the outputs of two networks, whatever they mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress import statistics
from compress.errors import EngineError
from compress.evaluate.comparison.numerical_difference import Drift, matched_outputs
from compress.tasks import Prediction


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
        found["agreement_ci95"] = tuple(
            100 * end for end in statistics.wilson_interval(same, images)
        )
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
