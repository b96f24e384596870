"""Where TensorRT wants Q and DQ: on inputs of weighted ops, and on the skip of a residual Add.

Source: NVIDIA, TensorRT documentation, Working with Quantized Types, Q/DQ placement.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import onnx_ir as ir

from compress.graph.model import WEIGHTED
from compress.graph.values import MOVING, EditableGraph, constant, label, maker
from compress.qdq.lint.activations import implied_clip
from compress.qdq.lint.difference import Wanted, wanted
from compress.qdq.lint.patterns import DQ, Problem, Q, QdqPair, is_quantized, pair_before, pairs
from compress.qdq.lint.placement import bypass, quantize_weight


def residual_both_sides(graph: EditableGraph) -> Iterator[Problem]:
    """Q/DQ on both inputs of a residual Add, which keeps it out of the convolution before it."""
    target = wanted(graph, "tensorrt")
    for node in graph.of_type("Add"):
        sides = [side for value in node.inputs if (side := pair_before(value)) is not None]
        if len(sides) < 2 or sides[0].source is sides[1].source:
            continue
        index = 0 if target.reads(node, 1) else 1
        yield Problem(
            label(node),
            "both of its inputs are quantized; with the branch left float, Conv, Add and Relu "
            "become one int8 kernel",
            partial(bypass, graph, node, index, sides[index]),
        )


def residual_skip_float(graph: EditableGraph) -> Iterator[Problem]:
    """A residual Add that reads its skip in float though the same tensor is there quantized."""
    for node, index, pair in wanted(graph, "tensorrt").missing(graph):
        if node.op_type == "Add" and pair is not None:
            yield Problem(
                label(node),
                f"it reads {pair.source.name!r} in float though that is quantized for the next "
                "layer; the float copy doubles the traffic and keeps the kernel out of int8",
                partial(node.replace_input_with, index, pair.real),
            )


def needless_pair(graph: EditableGraph) -> Iterator[Problem]:
    """Q/DQ before an op that runs in float all the same: global pooling, gates, the output."""
    target = wanted(graph, "tensorrt")
    for pair in pairs(graph):
        for dequantize in pair.dequantizes:
            value = dequantize.outputs[0]
            if value.is_graph_output():
                yield Problem(
                    label(dequantize),
                    "the output of the network is quantized: error without any gain in speed",
                    partial(_give_float, graph, value, pair),
                )
            for node, index in value.uses():
                if not _gains(target, node, index):
                    yield Problem(
                        label(node),
                        f"{node.op_type} reads a quantized value but runs in float: error "
                        "without any gain in speed",
                        partial(bypass, graph, node, index, pair),
                    )


def float_weight(graph: EditableGraph) -> Iterator[Problem]:
    """A layer that reads int8 and multiplies with float weights.

    On a CPU this is how a layer is kept in float between int8 neighbours. TensorRT reads the float
    value just as well.
    """
    for node in graph.of_type(*WEIGHTED):
        if constant(node.inputs[1]) is not None and is_quantized(node.inputs[0]):
            yield Problem(
                label(node),
                "its input is quantized and its weight is not, so it runs in float",
                partial(quantize_weight, graph, node),
            )


def _gains(target: Wanted, node: ir.Node, index: int, depth: int = 30) -> bool:
    """Return whether a quantized value brings speed there, or behind ops that move values."""
    if node.op_type in WEIGHTED or node.op_type == Q or target.reads(node, index) or depth == 0:
        return True
    if node.op_type == "Add":  # of two quantized inputs another rule speaks
        other = maker(node.inputs[1 - index])
        return other is not None and other.op_type == DQ
    behind = [use for value in node.outputs for use in value.uses()]
    if node.op_type == "AveragePool":
        return any(reader.op_type == Q for reader, _ in behind)
    moves = node.op_type == "Concat" or (node.op_type in MOVING and index == 0)
    return moves and any(_gains(target, *use, depth - 1) for use in behind)


def _give_float(graph: EditableGraph, value: ir.Value, pair: QdqPair) -> None:
    graph.replace(value, implied_clip(graph, pair))
