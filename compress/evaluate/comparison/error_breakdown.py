"""Error breakdown from the trained network to the engine: which step adds what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compress.errors import UsageError
from compress.evaluate.comparison.predictions import Comparison, compare_predictions
from compress.evaluate.predictions import Predictions


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
        told: dict[str, Any] = {"name": self.name, "top1_pct": self.top1_pct}
        if self.added is not None and self.total is not None:
            told |= {
                "error": self.error,
                "added": self.added.row(),
                "total": self.total.row(),
            }
        return told


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
    for index, step in enumerate(steps):
        top1_pct = 100 * float(step.predictions.correct.mean())
        before, first = steps[max(0, index - 1)].predictions, steps[0].predictions
        links.append(
            BreakdownStep(
                name=step.name,
                error=step.error,
                top1_pct=top1_pct,
                added=compare_predictions(before, step.predictions) if index else None,
                total=compare_predictions(first, step.predictions) if index else None,
            )
        )
    return tuple(links)
