"""What may mend a Q/DQ graph that a runtime computes wrongly: longer steps, layers in float."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from compress.graph.model import GraphIndex, attribute, tail
from compress.qdq.plan import QuantPlan, WeightScales, pack_codes, unpack_codes
from compress.qdq.rewrite import apply_corrections
from compress.qdq.writer import broadcast_along, default_scales, encode, scale_axis, write_qdq
from compress.quantize.images import Feed
from compress.quantize.layerwise import QuantizedLayer, correct_biases, fewer, layers
from compress.quantize.rounding import codes_at
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


@dataclass(frozen=True)
class LargestCodes:
    """The largest integers that a layer reads, as kernels see them: from 0 to 255.

    Kernels multiply the inputs of a group two by two: the first with the second, the third with the
    fourth; the last of an odd number stands alone.
    """

    alone: NDArray[np.float64]  # of each input channel, in pairs, (G, C / G / 2, 2)
    together: NDArray[np.float64]  # of the sum of a pair in one place, (G, C / G / 2)


def largest_codes(layer: QuantizedLayer) -> LargestCodes | None:
    """Return the largest integers that ``layer`` reads; None where it reads float.

    Kernels add 128 to signed activations first.
    """
    made = layer.graph.producer.get(layer.node.input[0])
    if made is None or made.op_type != "DequantizeLinear":
        return None
    scale = layer.graph.constant(made.input[1])
    zero = layer.graph.constant(made.input[2]) if len(made.input) > 2 else np.zeros(1, np.uint8)
    if scale is None or zero is None:
        return None
    x, step = layer.incoming, float(scale.reshape(-1)[0])
    channel = 1 if layer.node.op_type in {"Conv", "ConvTranspose"} else x.ndim - 1
    groups = attribute(layer.node, "group", 1) if layer.node.op_type == "Conv" else 1
    x = np.moveaxis(x, channel, 1).reshape(len(x), groups, x.shape[channel] // groups, -1)
    before = float(zero.reshape(-1)[0]) + 128 * (zero.dtype == np.int8)  # the code of 0
    alone = in_pairs(np.clip(x.max((0, 3)) * (_MARGIN / step) + before, 0, 255))
    even = x[:, :, : x.shape[2] // 2 * 2]
    both = (even[:, :, ::2] + even[:, :, 1::2]).max((0, 3), initial=-np.inf)
    together = alone.sum(2)
    known = together[:, : both.shape[1]]  # the last may be alone
    seen = np.clip(both * (_MARGIN / step) + 2 * before, 0, known)
    known[:] = (seen + known) / 2  # on other images a pair may come together that did not here
    return LargestCodes(alone, together)


def in_pairs(values: NDArray[Any]) -> NDArray[Any]:
    """Return ``values``, (..., C), as (..., C / 2, 2), an odd number of them filled up with 0."""
    odd = values.shape[-1] % 2
    padded = np.pad(values, [*[(0, 0)] * (values.ndim - 1), (0, odd)])
    return padded.reshape(*values.shape[:-1], -1, 2)


def largest_sums(
    node: NodeProto, codes: NDArray[np.int8], largest: LargestCodes
) -> NDArray[np.float64]:
    """Return, for each output channel, the largest |sum| of two products that kernels add.

    Products of two signs cannot overflow, nor those of a depthwise layer, which stand alone.
    ``codes`` are the weights of ``node``.
    """
    groups = len(largest.alone)
    if node.op_type == "ConvTranspose":  # (I, O / groups, ...): one scale for all
        rows = np.moveaxis(codes, 0, -1)
    elif node.op_type == "Conv":
        rows = np.moveaxis(codes, 1, -1)
    else:
        rows = np.moveaxis(codes, scale_axis(node, codes.ndim) or 0, 0)
    if rows.shape[-1] == 1:
        return np.zeros(len(rows))
    pairs = in_pairs(rows.reshape(groups, len(rows) // groups, -1, rows.shape[-1]))
    pairs = pairs.astype(np.float32)  # (G, O / G, taps, C / G / 2, 2)
    size = np.abs(pairs)
    smaller, excess = size.min(-1), size[..., 0] - size[..., 1]
    alone = largest.alone[:, None, None]
    rest = np.where(excess > 0, excess * alone[..., 0], -excess * alone[..., 1])
    sums = smaller * largest.together[:, None, None] + rest
    sums[pairs.prod(-1) <= 0] = 0
    return np.asarray(sums.reshape(len(rows), -1).max(1, initial=0), np.float64)


def needed_factors(
    node: NodeProto, codes: NDArray[np.int8], largest: LargestCodes
) -> NDArray[np.float32]:
    """Return by how much longer, >= 1, the step of each output channel must be not to overflow."""
    return np.maximum(1, largest_sums(node, codes, largest) / LARGEST_SUM).astype(np.float32)


WHY = "the runtime computes it wrongly in int8"
Remedy = Callable[[Workbench, QuantPlan], QuantPlan]


def seven_bits(bench: Workbench, plan: QuantPlan) -> QuantPlan:
    """Return ``plan`` with steps of weights twice as long, and biases that make up for it."""
    graph = GraphIndex(apply_corrections(bench.prepared, plan))
    scales = {}
    for node in graph.nodes:
        value = graph.constant(node.input[1]) if graph.weight(node) else None
        if value is not None:
            axis = scale_axis(node, value.ndim)
            doubled = 2 * default_scales(value, axis)
            scales[node.input[1]] = WeightScales(axis, tuple(float(s) for s in doubled))
    coarser = plan.changed(weights=scales)
    return bench.corrected(coarser) if plan.biases else coarser


def transposed_in_float(bench: Workbench, plan: QuantPlan) -> QuantPlan:
    """Return ``plan`` with all transposed convolutions in float, their biases as they were."""
    nodes = GraphIndex(bench.prepared).nodes
    return plan.keep_float([n.name for n in nodes if n.op_type == "ConvTranspose"], WHY)


def ends_in_float(bench: Workbench, plan: QuantPlan) -> QuantPlan:
    """Return ``plan`` with the last layers in float, their biases as they were."""
    return plan.keep_float(last_layers(GraphIndex(bench.prepared)), WHY)


def last_layers(graph: GraphIndex) -> list[str]:
    """Return the weighted ops of ``graph`` that no other one follows."""
    made = tail(graph.nodes)
    return [
        node.name
        for node in graph.nodes
        if graph.weight(node)
        and all(made.issuperset(reader.output) for reader, _ in graph.readers[node.output[0]])
    ]


SAID: dict[Remedy, str] = {
    with_headroom: "weights whose products overflow in 16 bits have longer steps",
    seven_bits: "weights have 7 bits, as int8 kernels of CPUs without VNNI need",
    transposed_in_float: "transposed convolutions are left in float",
    ends_in_float: "the last layers are left in float",
}
LADDER: tuple[tuple[Remedy, ...], ...] = (
    (with_headroom,),
    (transposed_in_float,),
    (with_headroom, transposed_in_float),
    (seven_bits,),
    (ends_in_float,),
    (with_headroom, ends_in_float),
    (seven_bits, ends_in_float),
    (with_headroom, transposed_in_float, ends_in_float),
)


MOST_ALONE = 3  # layers found one by one; after them all that follow the next are taken


def needed_in_float(
    layers: Sequence[str], is_right: Callable[[Sequence[str]], bool]
) -> list[str] | None:
    """Return few of ``layers`` that, left in float, make a graph right; None if all do not.

    The last layer is looked for from which on all must be in float; it alone is taken, and the
    search goes on with those after it. Each costs as many questions, put to ``is_right``, as
    ``len(layers)`` has bits. Layers are in the order in which the graph computes them.
    """
    if not is_right(layers):
        return None
    taken: list[str] = []
    start = 0
    while True:
        right, wrong = start, len(layers)  # in float from there on: is right, is wrong
        while wrong - right > 1:
            middle = (right + wrong) // 2
            if is_right([*taken, *layers[middle:]]):
                right = middle
            else:
                wrong = middle
        if right == len(layers) - 1 or len(taken) == MOST_ALONE:
            return [*taken, *layers[right:]]
        taken.append(layers[right])
        start = right + 1
        if is_right(taken):
            return taken


def most_asked(layers: Sequence[str]) -> int:
    """Return how often ``needed_in_float`` asks at most."""
    return 1 + (MOST_ALONE + 1) * (len(layers).bit_length() + 1)
