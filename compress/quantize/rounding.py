"""Weights: scales by search, and rounding with feedback: errors cancel in the layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto
from scipy.linalg.lapack import dtrtri

from compress.graph.model import GraphIndex, attribute
from compress.qdq.placement import place
from compress.qdq.plan import QuantPlan, WeightScales, pack_codes
from compress.qdq.rewrite import apply_corrections
from compress.qdq.writer import broadcast_along, default_scales, scale_axis
from compress.quantize.images import Feed
from compress.quantize.layerwise import FloatMeans, QuantizedLayer, correct_biases

_LARGEST = 2304  # inputs of one output, beyond which the normal equations cost too much
_ROWS = 16  # input patches for each weight of an output; with few, noise is fitted
_FEWEST_ROWS, _MOST_ROWS = 2048, 12_288
_BLOCK = 64  # weights of an output that are rounded before the others hear of it
_RIDGE = 0.02  # of the mean diagonal: how strongly each weight is held where it was


def improve_rounding(
    prepared: ModelProto, plan: QuantPlan, feed: Feed, known: FloatMeans | None = None
) -> QuantPlan:
    """Return ``plan`` with the integers of each convolution chosen anew, and biases to match.

    ``plan`` itself where there is no convolution that this can be done for.

    The weights of an output are rounded one after the other, each rounding error being made good by
    the weights still to come, on the inputs that the quantized network gives the layer. What is
    aimed at is the float layer's answer to these same inputs: to aim at its answer to float inputs
    (least squares before rounding) lost 1 dB on residual networks. Then the bias of the layer is
    corrected, so that the next one is fed as it will be: biases that were corrected before are
    found anew. ``known`` is as in ``correct_biases``.

    Source: Frantar et al., GPTQ, ICLR 2023, https://arxiv.org/abs/2210.17323, algorithm 1.
    """
    bare = plan.changed(biases={})
    graph = GraphIndex(apply_corrections(prepared, bare))
    nodes = {node.name: node for node in graph.nodes if _fits(graph, node)}
    if not nodes:
        return plan
    rounded = {node.input[1] for node in nodes.values()}
    weights = {name: scales for name, scales in plan.weights.items() if name not in rounded}
    generator = np.random.default_rng(0)

    def choose(layer: QuantizedLayer) -> NDArray[np.float32] | None:
        node = nodes.get(layer.node.name)
        value = None if node is None else graph.constant(node.input[1])
        if node is None or value is None:
            return None
        groups = attribute(node, "group", 1)
        at = _positions(node, value, layer.incoming.shape, generator)
        x = _patches(node, value.shape, layer.incoming, at)
        rows = value.reshape(groups, value.shape[0] // groups, -1).astype(np.float64)
        codes, scales = fit_codes(x, rows)
        flat = scales.reshape(-1).astype(np.float32)
        packed = pack_codes(codes.reshape(value.shape))
        weights[node.input[1]] = WeightScales(0, tuple(float(s) for s in flat), packed)
        return np.asarray(
            codes.reshape(value.shape) * broadcast_along(flat, 0, value.ndim), np.float32
        )

    bare = bare.changed(weights=dict(weights))
    return correct_biases(prepared, bare, feed, known, choose).changed(weights=weights)


def fit_codes(
    x: NDArray[np.float32], weight: NDArray[np.float64]
) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """Return integers, (G, O, K), and scales, (G, O), with codes * scale near ``weight`` on ``x``.

    ``x`` are inputs of each group, (G, P, K), ``weight`` its float weights, (G, O, K).
    """
    gram = (x.transpose(0, 2, 1) @ x).astype(np.float64)
    diagonal = np.einsum("gkk->gk", gram)  # a view
    diagonal += _RIDGE * diagonal.mean(1, keepdims=True) + 1e-12
    scales = default_scales(weight.reshape(-1, weight.shape[2]), 0).astype(np.float64)
    scales = scales.reshape(weight.shape[:2])
    return _round_with_feedback(weight, scales, gram), scales


def _round_with_feedback(
    weight: NDArray[np.float64], scales: NDArray[np.float64], gram: NDArray[np.float64]
) -> NDArray[np.int8]:
    """Return integers, (G, O, K); what rounding leaves over goes to the weights that follow.

    Weights of a block see the errors before it at once, in one product of matrices.
    """
    upper = _upper_roots_of_inverses(gram)
    left = weight.copy()
    codes = np.zeros(weight.shape, np.int8)
    for start in range(0, weight.shape[2], _BLOCK):
        end = min(start + _BLOCK, weight.shape[2])
        errors = np.empty((*weight.shape[:2], end - start))
        for k in range(start, end):
            code = np.clip(np.rint(left[:, :, k] / scales), -127, 127)
            codes[:, :, k] = code.astype(np.int8)
            error = (left[:, :, k] - code * scales) / upper[:, None, k, k]
            left[:, :, k + 1 : end] -= error[:, :, None] * upper[:, None, k, k + 1 : end]
            errors[:, :, k - start] = error
        left[:, :, end:] -= errors @ upper[:, start:end, end:]
    return codes


def _upper_roots_of_inverses(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return upper triangular U with U.T @ U = inverse of each of ``gram``, (G, K, K).

    Nothing is inverted but triangles: the Cholesky factor of the matrix read backwards is, read
    backwards, upper triangular: R with R @ R.T = gram, and U is its inverse.
    """
    backwards = np.linalg.cholesky(gram[:, ::-1, ::-1])[:, ::-1, ::-1]
    if len(gram) == 1:  # large: no copy
        return np.asarray(dtrtri(backwards[0])[0])[None]
    return np.stack([dtrtri(each)[0] for each in backwards])


def _fits(graph: GraphIndex, node: NodeProto) -> bool:
    value = graph.initializers.get(node.input[1]) if node.op_type == "Conv" else None
    if value is None or len(value.dims) != 4:
        return False
    padded = attribute(node, "auto_pad", b"NOTSET") == b"NOTSET"
    shared = len(graph.readers[node.input[1]]) > 1
    inputs = int(np.prod(value.dims[1:]))
    return padded and not shared and inputs <= _LARGEST and scale_axis(node, 4) == 0


def _positions(
    node: NodeProto, weight: NDArray[Any], shape: Sequence[int], generator: np.random.Generator
) -> tuple[NDArray[np.int64], ...]:
    """Return images, rows and columns of the outputs that are looked at, (P,) each."""
    wanted = _ROWS * int(np.prod(weight.shape[1:]))
    count = min(max(wanted, _FEWEST_ROWS), _MOST_ROWS)
    height, width = _output_size(node, weight.shape, shape)
    there = shape[0] * height * width
    picks = np.arange(there) if there <= count else generator.integers(0, there, count)
    return tuple(np.unravel_index(picks, (shape[0], height, width)))


def _geometry(node: NodeProto) -> tuple[list[int], list[int], list[int]]:
    return (
        list(attribute(node, "pads", [0, 0, 0, 0])),
        list(attribute(node, "strides", [1, 1])),
        list(attribute(node, "dilations", [1, 1])),
    )


def _output_size(node: NodeProto, weight: Sequence[int], shape: Sequence[int]) -> tuple[int, int]:
    pads, strides, dilations = _geometry(node)
    height, width = (
        (shape[2 + d] + pads[d] + pads[2 + d] - dilations[d] * (weight[2 + d] - 1) - 1)
        // strides[d]
        + 1
        for d in (0, 1)
    )
    return height, width


def _patches(
    node: NodeProto,
    weight: Sequence[int],
    incoming: NDArray[Any],
    at: tuple[NDArray[np.int64], ...],
) -> NDArray[np.float32]:
    """Return what each output position sees, (G, P, K)."""
    pads, strides, dilations = _geometry(node)
    image, row, column = at
    y = (row * strides[0] - pads[0])[:, None, None] + (np.arange(weight[2]) * dilations[0])[:, None]
    x = (column * strides[1] - pads[1])[:, None, None] + np.arange(weight[3]) * dilations[1]
    height, width = incoming.shape[2:]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)  # padded images would be a copy
    y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
    seen = incoming[image[:, None, None], :, y, x]  # (P, kh, kw, C)
    seen[~inside] = 0
    groups = attribute(node, "group", 1)
    split = seen.transpose(0, 3, 1, 2).reshape(len(row), groups, -1)
    return np.ascontiguousarray(split.transpose(1, 0, 2), np.float32)


_FEW = 256  # values of a channel; with more of them no step is better than the finest
_FINENESS = np.arange(127, 15, -1)  # steps from zero to the largest value
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
