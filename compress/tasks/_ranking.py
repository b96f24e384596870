"""Average precision of ranked items, each counted as often as its image was drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
RECALLS = np.linspace(0.0, 1.0, 101)  # at which COCO reads the precision


def average_precision(scores: Array, hits: Array, weights: Array) -> float:
    """Return the area under precision over recall; NaN where there are no positives.

    Args:
        scores: Of each item, (M,), best first; equal ones are one threshold.
        hits: Whether each item is right, (M,).
        weights: How often each item counts, (M,).
    """
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    right, seen = np.cumsum(hits * weights)[last], np.cumsum(weights)[last]
    if not right[-1]:
        return float("nan")
    precision = np.divide(right, seen, out=np.zeros(len(seen)), where=seen > 0)
    return float((precision * np.diff(right, prepend=0)).sum() / right[-1])


def coco_average_precision(hits: Array, weights: Array, positives: float) -> float:
    """Return the mean precision at 101 recalls, as COCO does; NaN without positives.

    Args:
        hits: Whether each detection is right, (M,), best score first.
        weights: How often each detection counts, (M,); detections that match an ignored object
            have weight 0.
        positives: Objects that should be found, counted likewise.

    Source: Lin et al., Microsoft COCO, ECCV 2014, https://arxiv.org/abs/1405.0312, and the COCO
    evaluation code's definition.
    """
    if positives <= 0:
        return float("nan")
    if not len(hits):
        return 0.0
    right = np.cumsum(hits * weights)
    seen = np.cumsum(weights)
    precision = np.divide(right, seen, out=np.zeros(len(seen)), where=seen > 0)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(right / positives, RECALLS, side="left")
    return float(np.append(precision, 0.0)[at].mean())


def mean_over(values: Array) -> Array:
    """Return the mean over the last axis without NaN; NaN where nothing else is there."""
    there = ~np.isnan(values)
    total = np.where(there, values, 0.0).sum(-1)
    count = there.sum(-1)
    mean: Array = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean
