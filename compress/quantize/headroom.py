"""Weights whose products with activations do not overflow where two are added in 16 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from compress.graph.model import GraphIndex, attribute
from compress.qdq.plan import QuantPlan, WeightScales, pack_codes, unpack_codes
from compress.qdq.rewrite import apply_corrections
from compress.qdq.writer import broadcast_along, default_scales, encode, scale_axis, write_qdq
from compress.quantize.images import Feed
from compress.quantize.layerwise import QuantizedLayer, correct_biases, fewer, layers
from compress.quantize.workbench import Workbench, first

LARGEST_SUM = 2**15 - 1 - 255  # of two products, less what rounding of both codes may add
_MARGIN = 1.1  # by which other images may exceed the largest activations of these


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
        widened = _widened(node, value, planned, largest)
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


def largest_codes(layer: QuantizedLayer) -> NDArray[np.float64] | None:
    """Return the largest integer of each input channel as kernels see it, (C,), in 0..255.

    None where the layer reads float. Kernels add 128 to signed activations first.
    """
    made = layer.graph.producer.get(layer.node.input[0])
    if made is None or made.op_type != "DequantizeLinear":
        return None
    scale = layer.graph.constant(made.input[1])
    zero = layer.graph.constant(made.input[2]) if len(made.input) > 2 else np.zeros(1, np.uint8)
    if scale is None or zero is None:
        return None
    channel = 1 if layer.node.op_type in {"Conv", "ConvTranspose"} else layer.incoming.ndim - 1
    others = tuple(dim for dim in range(layer.incoming.ndim) if dim != channel)
    codes = layer.incoming.max(others) / float(scale.reshape(-1)[0]) * _MARGIN
    codes = codes + float(zero.reshape(-1)[0]) + 128 * (zero.dtype == np.int8)
    return np.asarray(np.clip(codes, 0, 255), np.float64)


def _widened(
    node: NodeProto,
    value: NDArray[Any],
    planned: WeightScales | None,
    largest: NDArray[np.float64],
) -> WeightScales | None:
    """Return the scales that a layer needs; None where those it has will do."""
    axis = scale_axis(node, value.ndim)
    scales, codes = default_scales(value, axis), None
    if planned is not None:
        axis, scales = planned.axis, np.asarray(planned.scales, np.float32)
        codes = unpack_codes(planned.codes, value.shape) if planned.codes else None
    whole = encode(value, scales, axis) if codes is None else codes
    sums = largest_sums(node, whole, largest)
    needed = sums if axis is not None else sums.max(keepdims=True)
    factors = np.maximum(1, needed / LARGEST_SUM).astype(np.float32)
    if (factors == 1).all():
        return None
    scales = scales * factors
    if codes is not None:  # the integers that were chosen stay where their step does
        kept = broadcast_along(factors == 1, axis, value.ndim)
        codes = np.where(kept, codes, encode(value, scales, axis))
    packed = None if codes is None else pack_codes(codes)
    return WeightScales(axis, tuple(float(scale) for scale in scales), packed)


def largest_sums(
    node: NodeProto, codes: NDArray[np.int8], largest: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return, for each output channel, the largest |sum| of two products that follow each other.

    They follow in the order (kernel, input channel), in which kernels multiply; the inputs of a
    depthwise layer have no neighbours. Products of two signs cannot overflow. ``codes`` are the
    weights of ``node``, ``largest`` the integers of its input channels, (C,).
    """
    if node.op_type == "ConvTranspose":  # (I, O / groups, ...): one scale for all
        rows, seen = np.moveaxis(codes, 0, -1), largest
    elif node.op_type == "Conv":
        groups = attribute(node, "group", 1)
        if groups > 1 and codes.shape[1] == 1:
            return np.zeros(len(codes))
        rows = np.moveaxis(codes, 1, -1)
        each = np.repeat(largest.reshape(groups, -1), len(codes) // groups, axis=0)
        seen = each.reshape(len(codes), *(1,) * (codes.ndim - 2), -1)
    else:
        axis = scale_axis(node, codes.ndim) or 0
        rows, seen = np.moveaxis(codes, axis, 0), largest
    products = (rows * seen).reshape(len(rows), -1)
    first, second = products[:, :-1], products[:, 1:]
    sums = np.where(first * second > 0, np.abs(first + second), 0)
    return np.asarray(sums.max(1, initial=0), np.float64)
