"""What OpenVINO computes wrongly, or not in the kernel of the layer before."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import onnx_ir as ir

from compress.graph.model import WEIGHTED
from compress.graph.rewrites import (
    constant_targets,
    counts_padding,
    is_convolution,
    set_target,
    write_convolution,
)
from compress.graph.values import EditableGraph, label, maker
from compress.qdq.lint.patterns import Problem, QdqPair, is_quantized, pair_before
from compress.qdq.lint.placement import bypass


def split_activation(graph: EditableGraph) -> Iterator[Problem]:
    """Q between a layer and the SiLU, Sigmoid or LeakyRelu that would run in its kernel."""
    for node in graph.of_type("Sigmoid", "HardSigmoid", "LeakyRelu"):
        pair = pair_before(node.inputs[0])
        made = maker(pair.source) if pair is not None else None
        if pair is None or made is None or made.op_type not in WEIGHTED:
            continue
        yield Problem(
            label(node),
            f"Q and DQ stand between it and {label(made)!r}: it becomes a kernel of its own, "
            "which takes longer than int8 saves",
            partial(_join, graph, node, pair),
        )


def computed_batch(graph: EditableGraph) -> Iterator[Problem]:
    """A Reshape of int8 values whose target is computed from the batch at run time."""
    for node, target in constant_targets(graph).items():
        if not is_quantized(node.inputs[0]):
            continue
        yield Problem(
            label(node),
            "its target is computed from the batch at run time: OpenVINO joins such tensors "
            f"wrongly; the constant {target.tolist()} is the same",
            partial(set_target, graph, node, target),
        )


def padded_average_pool(graph: EditableGraph) -> Iterator[Problem]:
    """AveragePool that counts padding, of integers whose zero point is not 0."""
    for node in graph.of_type("AveragePool"):
        pair = pair_before(node.inputs[0])
        if pair is None or not np.any(pair.numbers.zero) or not counts_padding(node):
            continue
        graph.infer_shapes()
        yield Problem(
            label(node),
            "it counts padding, and OpenVINO pads integers with code 0, which stands for "
            f"{pair.numbers.limits[0]:.4g} here; a depthwise Conv is the same and right",
            partial(write_convolution, graph, node) if is_convolution(node) else None,
        )


def _join(graph: EditableGraph, gate: ir.Node, pair: QdqPair) -> None:
    """Let ``gate`` read the layer in float, and so the product of the two, if there is one."""
    product = _product(gate, pair)
    bypass(graph, gate, 0, pair)
    for index, value in enumerate(product.inputs if product is not None else ()):
        before = pair_before(value)
        if before is not None and product is not None:
            bypass(graph, product, index, before)


def _product(gate: ir.Node, pair: QdqPair) -> ir.Node | None:
    """Return the Mul of what ``gate`` reads with what it makes, which together are SiLU."""
    wanted = {pair.source, gate.outputs[0]}
    for dequantize in pair.dequantizes:
        for node, _ in dequantize.outputs[0].uses():
            if node.op_type == "Mul" and {_real(value) for value in node.inputs} == wanted:
                return node
    return None


def _real(value: ir.Value | None) -> ir.Value | None:
    pair = pair_before(value)
    return value if pair is None else pair.source
