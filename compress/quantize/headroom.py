"""Weights whose products with activations do not overflow where two are added in 16 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from compress.graph.model import GraphIndex
from compress.qdq.plan import QuantPlan, WeightScales, pack_codes, unpack_codes
from compress.qdq.rewrite import apply_corrections
from compress.qdq.writer import broadcast_along, default_scales, encode, scale_axis, write_qdq
from compress.quantize.images import Feed
from compress.quantize.layerwise import QuantizedLayer, correct_biases, fewer, layers
from compress.quantize.overflow import LargestCodes, largest_codes, needed_factors
from compress.quantize.rounding import codes_at
from compress.quantize.workbench import Workbench, first


def with_headroom(bench: Workbench, plan: QuantPlan) -> QuantPlan:
    """Return ``plan`` with longer steps for the channels that need them, and biases to match.

    ``vpmaddubsw``, with which CPUs without VNNI multiply, adds the products of two neighbouring
    inputs in 16 bits and saturates. Weights of 7 bits never overflow there, and cost 6 dB
    everywhere; here a channel gets just the step that its largest pair of products needs, with the
    largest activations that images have, and depthwise layers keep theirs.

    Source: Intel, "Lower Numerical Precision Deep Learning Inference and Training", 2018.
    """
    if plan.weights in bench.safe:
        return plan
    safe = refitted_with_headroom(bench, plan, bench.fitted)
    return plan if safe.weights == plan.weights else safe


def refitted_with_headroom(bench: Workbench, plan: QuantPlan, feed: Feed) -> QuantPlan:
    """As ``with_headroom``; biases that were corrected are corrected again at any rate."""
    weights = dict(plan.weights)

    def choose(
        layer: QuantizedLayer, graph: GraphIndex, node: NodeProto
    ) -> NDArray[np.float32] | None:
        value, largest = graph.constant(node.input[1]), largest_codes(layer)
        planned = plan.weights.get(node.input[1])
        if value is None or largest is None:
            return None
        widened = _widened(layer, node, value, planned, largest)
        if widened is None:
            return None
        weights[node.input[1]] = widened
        scales = np.asarray(widened.scales, np.float32)
        codes = (
            unpack_codes(widened.codes, value.shape)
            if widened.codes
            else encode(value, scales, widened.axis)
        )
        return np.asarray(codes * broadcast_along(scales, widened.axis, value.ndim), np.float32)

    if plan.biases:
        safe = correct_biases(bench.prepared, plan, feed, bench.float_means, choose)
    else:
        safe = plan
        graph = GraphIndex(apply_corrections(bench.prepared, plan))
        nodes = {node.name: node for node in graph.nodes if graph.weight(node)}
        feed = fewer(bench.prepared, feed)
        if not bench.is_free:
            feed = first(feed, bench.images.fixed_batch or 1)
        for layer in layers(write_qdq(bench.prepared, plan, float_bias=True), feed, list(nodes)):
            choose(layer, graph, nodes[layer.node.name])
    bench.safe.append(weights)
    return safe.changed(weights=weights)


def _widened(
    layer: QuantizedLayer,
    node: NodeProto,
    value: NDArray[Any],
    planned: WeightScales | None,
    largest: LargestCodes,
) -> WeightScales | None:
    """Return the scales that a layer needs; None where those it has will do."""
    axis = scale_axis(node, value.ndim)
    scales, codes = default_scales(value, axis), None
    if planned is not None:
        axis, scales = planned.axis, np.asarray(planned.scales, np.float32)
        codes = unpack_codes(planned.codes, value.shape) if planned.codes else None
    whole = encode(value, scales, axis) if codes is None else codes
    factors = needed_factors(node, whole, largest)
    if axis is None:
        factors = factors.max(keepdims=True)
    if (factors == 1).all():
        return None
    scales = scales * factors
    if codes is not None:  # the integers that were chosen stay where their step does
        kept = broadcast_along(factors == 1, axis, value.ndim)
        codes = np.where(kept, codes, codes_at(scales, layer, node, value))
    packed = None if codes is None else pack_codes(codes)
    return WeightScales(axis, tuple(float(scale) for scale in scales), packed)
