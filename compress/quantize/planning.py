"""From Statistics to a QuantPlan: an observer chooses the range of each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress import plugins
from compress.errors import UsageError
from compress.qdq.plan import ActivationRange, QuantPlan
from compress.quantize.statistics import Statistics


def make_plan(
    statistics: Statistics,
    *,
    target: str = "onnxruntime",
    observer: str | Mapping[str, Any] = "mse",
    exclude: Mapping[str, str] | None = None,
) -> QuantPlan:
    """Return a plan with the ranges that ``observer`` chooses; one pass serves any of them.

    Args:
        statistics: What ``calibrate`` saw.
        target: The runtime the plan is for.
        observer: Name of a plug-in, with options or without.
        exclude: Nodes to leave in float, and why.

    Raises:
        UsageError: the observer needs histograms and only extremes were kept.
        UnknownNameError: there is no such observer or target.
    """
    name, _ = plugins.parse("observers", observer)
    choose = plugins.create("observers", observer)
    if not statistics.counted and name != "minmax":
        raise UsageError(
            f"observer {name!r} needs histograms, and calibration kept extremes only",
            fix="Calibrate with histograms=True",
        )
    ranges = {}
    for tensor, seen in statistics.tensors.items():
        low, high = seen.trimmed(*choose(seen, symmetric=False))
        limit = max(map(abs, seen.trimmed(*choose(seen, symmetric=True))))
        ranges[tensor] = ActivationRange(low, high, limit, name, (seen.low, seen.high))
    return QuantPlan(target, name, ranges, float_nodes=dict(exclude or {}))
