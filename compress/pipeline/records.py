"""Quantization ranges, int8 coverage, calibration and image samples as records of the report."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from compress.data import Dataset
from compress.evaluate import Accuracy, Predictions
from compress.evaluate.attribution import Samples
from compress.qdq.plan import QuantPlan
from compress.qdq.writer import RULES
from compress.report import schema
from compress.runtimes._fusion import Fusion

BITS = 8
LARGEST_CODE = 127  # of a weight


def ranges(plan: QuantPlan, variant: str) -> Iterator[schema.TensorRange]:
    """Yield what part of each tensor's values the codes of ``plan`` cover on its target.

    A weight with a scale of its own for each channel is told with the widest of them.
    """
    for name, found in plan.activations.items():
        low, high = found.low, found.high
        if not RULES[plan.target].asymmetric:
            low, high = -found.limit, found.limit
        yield schema.TensorRange(
            tensor=name, kind="activation", bits=BITS, low=low, high=high, variant=variant
        )
    for name, weight in plan.weights.items():
        limit = LARGEST_CODE * max(weight.scales)
        yield schema.TensorRange(
            tensor=name, kind="weight", bits=BITS, low=-limit, high=limit, variant=variant
        )


def coverage(fusion: Fusion, variant: str) -> schema.Coverage:
    """Return how much of ``variant`` its runtime really runs in int8, and what stays in float."""
    layers = {layer.node: layer for layer in fusion.float_layers}
    islanded = {node for nodes in fusion.islands for node in nodes}
    islands = []
    for nodes in (*fusion.islands, *((node,) for node in layers if node not in islanded)):
        inside = [layers[node] for node in nodes if node in layers]
        reasons = dict.fromkeys(layer.reason for layer in inside)
        islands.append(
            schema.Island(
                nodes=nodes,
                macs=sum(layer.macs for layer in inside) if inside else None,
                reason="; ".join(reasons) or None,
            )
        )
    return schema.Coverage(
        variant=variant,
        runtime=fusion.runtime,
        int8_macs_pct=100 * fusion.int8_share,
        reformats=len(fusion.reformats),
        islands=tuple(islands),
    )


def calibration(accuracy: Accuracy, variant: str, runtime: str) -> schema.Calibration:
    """Return confidence against accuracy in equal bins, and the calibration error over them."""
    return schema.Calibration(
        variant=variant, runtime=runtime, ece_pct=accuracy.ece_pct, **accuracy.calibration
    )


def samples(dataset: Dataset, before: Predictions, after: Predictions, count: int) -> Samples:
    """Return test images to explain: those that flipped from right to wrong, then others.

    Args:
        dataset: Of which ``before`` and ``after`` answer the first test images.
        before: Answers of the original.
        after: Answers of the compressed network.
        count: Images, at most; half of them at most are flipped ones, so that the similarity of
            maps is not about lost images alone. The others are spread evenly over the rest.
    """
    flipped = np.flatnonzero(before.correct & ~after.correct)[: max(1, count // 2)]
    others = np.setdiff1d(np.arange(len(before.labels)), flipped)
    places = np.linspace(0, len(others) - 1, max(0, min(count - len(flipped), len(others))))
    chosen = np.concatenate([flipped, others[places.astype(np.int64)]])
    images = dataset.splits["test"].take(chosen)
    return Samples(
        images=dataset.normalize(images),
        pictures=np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy()),
        labels=before.labels[chosen],
        indices=[int(index) for index in chosen],
    )
