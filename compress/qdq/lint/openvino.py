"""What OpenVINO computes wrongly, or not in the kernel of the layer before."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import onnx

from compress.graph.reshapes import constant_targets
from compress.qdq.lint.finding import Problem
from compress.qdq.lint.graph import Array, Graph, Use, label
from compress.qdq.lint.patterns import WEIGHTED, Pair, is_quantized, pair_before
from compress.qdq.lint.placement import bypass


def split_activation(graph: Graph) -> Iterator[Problem]:
    """Q between a layer and the SiLU, Sigmoid or LeakyRelu that would run in its kernel."""
    for node in graph.of_type("Sigmoid", "HardSigmoid", "LeakyRelu"):
        pair = pair_before(graph, node.input[0])
        maker = graph.maker(pair.source) if pair is not None else None
        if pair is None or maker is None or maker.op_type not in WEIGHTED:
            continue
        yield Problem(
            label(node),
            f"Q and DQ stand between it and {label(maker)!r}: it becomes a kernel of its own, "
            "which takes longer than int8 saves",
            partial(_join, graph, node, pair),
        )


def computed_batch(graph: Graph) -> Iterator[Problem]:
    """A Reshape of int8 values whose target is computed from the batch at run time."""
    targets = constant_targets(graph.to_model())
    for node in graph.of_type("Reshape"):
        target = targets.get(node.output[0])
        if target is None or not is_quantized(graph, node.input[0]):
            continue
        yield Problem(
            label(node),
            "its target is computed from the batch at run time: OpenVINO joins such tensors "
            f"wrongly; the constant {target.tolist()} is the same",
            partial(_set_target, graph, node, target),
        )


def _set_target(graph: Graph, node: onnx.NodeProto, target: Array) -> None:
    graph.rewire(Use(node, 1), graph.add_constant(f"{node.output[0]}_shape", target))


def _join(graph: Graph, gate: onnx.NodeProto, pair: Pair) -> None:
    """Let ``gate`` read the layer in float, and so the product of the two, if there is one."""
    product = _product(graph, gate, pair)
    bypass(graph, Use(gate, 0), pair)
    for index, value in enumerate(product.input if product is not None else ()):
        before = pair_before(graph, value)
        if before is not None and product is not None:
            bypass(graph, Use(product, index), before)


def _product(graph: Graph, gate: onnx.NodeProto, pair: Pair) -> onnx.NodeProto | None:
    """Return the Mul of what ``gate`` reads with what it makes, which together are SiLU."""
    wanted = {pair.source, gate.output[0]}
    for dequantize in pair.dequantizes:
        for use in graph.readers(dequantize.output[0]):
            if use.node.op_type == "Mul" and {_real(graph, v) for v in use.node.input} == wanted:
                return use.node
    return None


def _real(graph: Graph, value: str) -> str:
    pair = pair_before(graph, value)
    return value if pair is None else pair.source
