"""Weights: scales by search, and rounding with feedback: errors cancel in the layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto
from scipy.linalg import cholesky

from compress.graph.model import GraphIndex, attribute
from compress.qdq.placement import place
from compress.qdq.plan import QuantPlan, WeightScales, pack_codes
from compress.qdq.rewrite import apply_corrections
from compress.qdq.writer import broadcast_along, default_scales, scale_axis
from compress.quantize.images import Feed
from compress.quantize.layerwise import FloatMeans, QuantizedLayer, correct_biases

_LARGEST = 2304  # inputs of one output, beyond which the normal equations cost too much
_ROWS = 16  # input patches for each weight of an output; with few, noise is fitted
_FEWEST_ROWS, _MOST_ROWS = 1024, 12_288
_BLOCK = 64  # weights of an output that are rounded before the others hear of it
_FINENESS = np.arange(127, 15, -1)  # steps from zero to the largest value
_PRODUCTS = 20_000_000  # that the integers of a layer may take, for all scales that are tried
_RIDGE = 0.02  # of the mean diagonal: how strongly each weight is held where it was


def improve_rounding(
    prepared: ModelProto, plan: QuantPlan, feed: Feed, known: FloatMeans | None = None
) -> QuantPlan:
    """Return ``plan`` with the integers of each convolution chosen anew, and biases to match.

    The weights of an output are rounded one after the other, each rounding error being made good by
    the weights still to come, on the inputs that the quantized network gives the layer. What is
    aimed at is the float layer's answer to these same inputs: to aim at its answer to float inputs
    (least squares before rounding) lost 1 dB on residual networks. Then the bias of the layer is
    corrected, so that the next one is fed as it will be: biases that were corrected before are
    found anew. ``known`` is as in ``correct_biases``.

    Source: Frantar et al., GPTQ, ICLR 2023, https://arxiv.org/abs/2210.17323, algorithm 1, from the
    last weight to the first: so nothing is inverted (Chen et al., The Geometry of LLM Quantization,
    2025, https://arxiv.org/abs/2507.18553).
    """
    weights = dict(plan.weights)
    generator = np.random.default_rng(0)

    def choose(
        layer: QuantizedLayer, graph: GraphIndex, node: NodeProto
    ) -> NDArray[np.float32] | None:
        value = graph.constant(node.input[1])
        if value is None or not _fits(graph, node):
            return None
        codes, scales = fit_codes(*_inputs_and_rows(layer, node, value, generator))
        flat = scales.reshape(-1)
        packed = pack_codes(codes.reshape(value.shape))
        weights[node.input[1]] = WeightScales(0, tuple(float(s) for s in flat), packed)
        near = codes.reshape(value.shape) * broadcast_along(flat, 0, value.ndim)
        return np.asarray(near, np.float32)

    bare = plan.changed(biases={})
    return correct_biases(prepared, bare, feed, known, choose).changed(weights=weights)


def codes_at(
    scales: NDArray[np.float32],
    layer: QuantizedLayer,
    node: NodeProto,
    value: NDArray[np.float32],
) -> NDArray[np.int8]:
    """Return the integers of a layer's weight ``value``, (O, ...), for given ``scales``, (O,)."""
    x, rows = _inputs_and_rows(layer, node, value, np.random.default_rng(0))
    codes, _ = _round_with_feedback(rows, scales.reshape(rows.shape[:2]), _roots(_gram(x)))
    return codes.reshape(value.shape)


def _inputs_and_rows(
    layer: QuantizedLayer,
    node: NodeProto,
    value: NDArray[np.float32],
    generator: np.random.Generator,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return what a convolution reads, (G, K, P), and its weights, (G, O, K)."""
    groups = attribute(node, "group", 1)
    x = _patches(node, value.shape, layer.incoming, generator)
    return x, value.reshape(groups, value.shape[0] // groups, -1)


def fit_codes(
    x: NDArray[np.float32], weight: NDArray[np.float32]
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return integers, (G, O, K), and scales, (G, O), with codes * scale near ``weight`` on ``x``.

    ``x`` are inputs of each group, (G, K, P), ``weight`` its float weights, (G, O, K). The scales
    are largest/m, for m = 127 and, where they cost little, for less: few weights, as the nine of a
    depthwise filter, may lie on a coarser grid by luck.
    """
    finest = default_scales(weight.reshape(-1, weight.shape[2]), 0).reshape(weight.shape[:2])
    grids = _FINENESS[: max(1, _PRODUCTS // (weight.size * weight.shape[2]))]
    tried = np.asarray(finest[:, :, None] * (127 / grids), np.float32)  # (G, O, F)
    repeated = np.repeat(weight, len(grids), axis=1)
    codes, losses = _round_with_feedback(repeated, tried.reshape(len(x), -1), _roots(_gram(x)))
    best = losses.reshape(tried.shape).argmin(2)[:, :, None]
    codes = codes.reshape(*tried.shape, -1)
    codes = np.take_along_axis(codes, best[..., None], 2)[:, :, 0]
    return codes, np.take_along_axis(tried, best, 2)[:, :, 0]


def _round_with_feedback(
    weight: NDArray[np.float32], scales: NDArray[np.float32], lower: NDArray[np.float32]
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return integers, (G, O, K), and the squared error of each output that they leave, (G, O).

    What rounding leaves over goes to the weights before. Weights of a block see the errors behind
    it at once, in one product of matrices.
    """
    codes = np.zeros(weight.shape, np.int8)
    left = np.zeros(weight.shape, np.float32)  # float weight less rounded one
    losses = np.zeros(scales.shape, np.float32)
    for end in range(weight.shape[2], 0, -_BLOCK):
        start = max(end - _BLOCK, 0)
        behind = left[:, :, end:] @ lower[:, end:, start:end]
        for k in range(end - 1, start - 1, -1):
            near = left[:, :, k + 1 : end] @ lower[:, k + 1 : end, k, None]
            owed = (behind[:, :, k - start] + near[:, :, 0]) / lower[:, k, k, None]
            code = np.clip(np.rint((weight[:, :, k] + owed) / scales), -127, 127)
            codes[:, :, k] = code
            left[:, :, k] = weight[:, :, k] - code * scales
            losses += np.square((left[:, :, k] + owed) * lower[:, k, k, None])
    return codes, losses


def _gram(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return x @ x.T of each group, (G, K, K), with a ridge."""
    gram = np.stack([each @ each.T for each in x])  # of a matrix and itself, at half the price
    diagonal = np.einsum("gkk->gk", gram)  # a view
    diagonal += _RIDGE * diagonal.mean(1, keepdims=True) + 1e-12
    return gram


def _roots(gram: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return lower triangular L with L @ L.T = each of ``gram``, (G, K, K)."""
    try:
        if len(gram) == 1:  # several times as fast for a large one
            return np.asarray(cholesky(gram[0], lower=True, check_finite=False))[None]
        return np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:  # single precision does not tell some inputs apart
        return np.linalg.cholesky(gram.astype(np.float64)).astype(np.float32)


def _fits(graph: GraphIndex, node: NodeProto) -> bool:
    value = graph.initializers.get(node.input[1]) if node.op_type == "Conv" else None
    if value is None or len(value.dims) != 4:
        return False
    padded = attribute(node, "auto_pad", b"NOTSET") == b"NOTSET"
    shared = len(graph.readers[node.input[1]]) > 1
    inputs = int(np.prod(value.dims[1:]))
    return padded and not shared and inputs <= _LARGEST and scale_axis(node, 4) == 0


def _patches(
    node: NodeProto,
    weight: Sequence[int],
    incoming: NDArray[np.float32],
    generator: np.random.Generator,
) -> NDArray[np.float32]:
    """Return what the positions of some rows of the output see, (G, K, P), in their order."""
    pads = attribute(node, "pads", [0, 0, 0, 0])
    strides = attribute(node, "strides", [1, 1])
    dilations = attribute(node, "dilations", [1, 1])
    channels, (taps_y, taps_x) = incoming.shape[1], weight[2:]
    height, width = (
        (incoming.shape[2 + d] + pads[d] + pads[2 + d] - dilations[d] * (weight[2 + d] - 1) - 1)
        // strides[d]
        + 1
        for d in (0, 1)
    )
    wanted = int(np.clip(_ROWS * np.prod(weight[1:]), _FEWEST_ROWS, _MOST_ROWS))
    rows = np.arange(len(incoming) * height)
    if (some := -(-wanted // width)) < len(rows):
        rows = np.sort(generator.choice(rows, some, replace=False))
    image, row = np.divmod(rows, height)
    y = (row * strides[0] - pads[0])[:, None] + np.arange(taps_y) * dilations[0]
    seen = incoming[image[:, None], :, np.clip(y, 0, incoming.shape[2] - 1)]  # (R, kh, C, W)
    seen[(y < 0) | (y >= incoming.shape[2])] = 0
    seen = np.pad(seen, ((0, 0), (0, 0), (0, 0), (pads[1], pads[3])))
    found = np.empty((channels, taps_y, taps_x, len(rows), width), np.float32)
    for x in range(taps_x):
        start = x * dilations[1]
        columns = seen[..., start : start + (width - 1) * strides[1] + 1 : strides[1]]
        found[:, :, x] = columns.transpose(2, 1, 0, 3)
    return found.reshape(attribute(node, "group", 1), -1, len(rows) * width)


_FEW = 256  # values of a channel; with more of them no step is better than the finest
_TOGETHER = 65_536  # values that a processor's cache holds


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
    parts = min(-(-rows.size * len(_FINENESS) // _TOGETHER), len(_FINENESS))
    for part in np.array_split(_FINENESS, parts):
        scales = (largest / part[:, None]).astype(np.float32)
        moved = rows / scales[:, :, None]
        np.rint(moved, out=moved)
        moved *= scales[:, :, None]
        moved -= rows
        errors = np.square(moved, out=moved).sum(2, dtype=np.float64)
        at = errors.argmin(0), np.arange(len(rows))
        best = np.where(errors[at] < least, scales[at], best)
        least = np.minimum(errors[at], least)
    return np.asarray(best, np.float32)
