"""Sums of two products, which CPUs without VNNI keep in 16 bits: how large they get in a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto

from compress.graph.model import attribute
from compress.qdq.writer import scale_axis
from compress.quantize.layerwise import QuantizedLayer

LARGEST_SUM = 2**15 - 1 - 255  # of two products, less what rounding of both codes may add
_MARGIN = 1.1  # by which other images may exceed the largest activations of these


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
