"""Learning curves, from the rows that training writes after every few steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compress.report.schema import Curve, Line

CURVES = (  # key of a row, title, label of the y axis
    ("loss", "Training loss", "loss"),
    ("validation_top1_pct", "Accuracy on validation images", "top-1, %"),
)


def learning_curves(stage: str, history: Sequence[Mapping[str, Any]]) -> Iterator[Curve]:
    """Yield a chart of each figure that ``history``, rows of metrics.jsonl, has two points of."""
    known = {key for key, _, _ in CURVES}
    others = {key for row in history for key in row if key.startswith("validation_")} - known
    own = [
        (key, "Validation images", key.removeprefix("validation_").replace("_", " "))
        for key in sorted(others - {"validation_loss"})
    ]
    for key, title, label in (*CURVES, *own):
        points = [(row["epoch"], row[key]) for row in history if row.get(key) is not None]
        if len(points) > 1:
            x, y = zip(*points, strict=True)
            lines = (Line(name=stage, x=x, y=y),)
            yield Curve(title=f"{title}, {stage}", x_label="epoch", y_label=label, lines=lines)
