"""NNCF as a source of ranges and corrected biases; its graph is not used, our writer writes."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
from onnx import ModelProto

from compress.graph.model import GraphIndex
from compress.packages import require
from compress.qdq.plan import ActivationRange, QuantPlan
from compress.quantize.images import Feed, images_in


def import_nncf() -> Any:
    """Import NNCF."""
    return require("nncf", extra="", purpose="method 'nncf'")


def quantize_by_nncf(prepared: ModelProto, feed: Feed) -> ModelProto:
    """Return the graph that NNCF's defaults make, without its workaround for old processors."""
    import logging

    nncf = import_nncf()
    logging.getLogger("nncf").setLevel(logging.ERROR)
    count = images_in(feed)
    items = [{name: array[i : i + 1] for name, array in feed.items()} for i in range(count)]
    advanced = nncf.AdvancedQuantizationParameters(
        overflow_fix=nncf.quantization.advanced_parameters.OverflowFix.DISABLE
    )
    copy = deepcopy(prepared)
    written: ModelProto = nncf.quantize(
        copy, nncf.Dataset(items), subset_size=count, advanced_parameters=advanced
    )
    return written


def plan_by_nncf(prepared: ModelProto, feed: Feed, plan: QuantPlan) -> QuantPlan:
    """Return ``plan`` with the ranges and biases of NNCF where it has any."""
    graph = GraphIndex(quantize_by_nncf(prepared, feed))
    ranges = dict(plan.activations)
    for node in graph.nodes:
        if node.op_type == "QuantizeLinear" and node.input[0] in ranges:
            ranges[node.input[0]] = _range(graph, node.input[1], node.input[2])
    biases = {}
    originals = {node.name: node for node in prepared.graph.node}
    before = GraphIndex(prepared)
    for node in graph.nodes:
        original = originals.get(node.name)
        if original is None or original.op_type not in ("Conv", "Gemm") or len(node.input) < 3:
            continue
        new, old = graph.constant(node.input[2]), before.constant((*original.input, "")[2])
        if new is not None and (old is None or not np.array_equal(new, old)):
            biases[node.name] = tuple(float(b) for b in new.reshape(-1))
    return plan.changed(activations=ranges, biases=biases)


def _range(graph: GraphIndex, scale_name: str, zero_name: str) -> ActivationRange:
    scale, zero = graph.constant(scale_name), graph.constant(zero_name)
    if scale is None or zero is None:
        raise TypeError(f"{scale_name} is not constant")
    step, point = float(scale.item()), int(zero.item())
    bounds = np.iinfo(zero.dtype)
    low, high = (bounds.min - point) * step, (bounds.max - point) * step
    if zero.dtype == np.int8 and point == 0:
        low = -high
    return ActivationRange(low, high, max(-low, high), "nncf", (low, high))
