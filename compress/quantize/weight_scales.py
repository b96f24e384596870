"""Scales of weights: for each channel the step whose grid fits its few values best."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from compress.graph.model import GraphIndex
from compress.qdq.placement import place
from compress.qdq.plan import QuantPlan, WeightScales
from compress.qdq.rewrite import apply_corrections
from compress.qdq.writer import scale_axis

_FEW = 256  # values of a channel; with more of them no step is better than the finest
_COARSEST = 16


def search_weight_scales(prepared: ModelProto, plan: QuantPlan) -> QuantPlan:
    """Return ``plan`` with the scale largest/m, m in 16..127, of least squared error per channel.

    Few values, as the nine of a depthwise filter, may lie on a coarser grid by luck; the
    largest is always kept exactly.
    """
    graph = GraphIndex(apply_corrections(prepared, plan))
    nodes = {node.name: node for node in graph.nodes}
    weights = dict(plan.weights)
    for name in place(graph, plan.target, plan.float_nodes).weights:
        tensor = nodes[name].input[1]
        value = graph.constant(tensor)
        if value is None or tensor in weights:
            continue
        axis = scale_axis(nodes[name], value.ndim)
        if axis is None or value.size // value.shape[axis] > _FEW:
            continue
        rows = np.moveaxis(value, axis, 0).reshape(value.shape[axis], -1)
        weights[tensor] = WeightScales(axis, tuple(float(s) for s in best_scales(rows)))
    return plan.changed(weights=weights)


def best_scales(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Return the scale, (C,), of least squared error for each row of values, (C, K)."""
    largest = np.abs(rows).max(1).astype(np.float64)
    largest[largest == 0] = 1.0
    best = (largest / 127).astype(np.float32)
    least = np.full(len(rows), np.inf)
    for m in range(127, _COARSEST - 1, -1):
        scale = (largest / m).astype(np.float32)
        codes = np.rint(rows / scale[:, None])
        error = np.square(codes * scale[:, None] - rows).sum(1, dtype=np.float64)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return np.asarray(best, np.float32)
