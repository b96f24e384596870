"""Rules for any target about where Q and DQ stand: in pairs, once for each tensor."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import onnx

from compress.qdq.lint.activations import implied_clip
from compress.qdq.lint.finding import Problem
from compress.qdq.lint.graph import Graph, Use, attribute, label
from compress.qdq.lint.patterns import (
    DQ,
    INT8,
    WEIGHTED,
    Pair,
    Q,
    Weight,
    along,
    best_scale,
    is_quantized,
    pair_before,
    pair_of,
    pairs,
    weight_of,
)

FUSED_AFTER = frozenset({"Relu", "Clip", "BatchNormalization"})
INTEGER_OPS = frozenset(
    {"QLinearConv", "QLinearMatMul", "QLinearAdd", "QLinearMul", "QLinearConcat", "QGemm"}
    | {"QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearSigmoid", "ConvInteger"}
    | {"MatMulInteger", "DynamicQuantizeLinear", "FakeQuantize"}
)


def operator_format(graph: Graph) -> Iterator[Problem]:
    """Integer operators in place of Q/DQ pairs: another runtime's format."""
    for node in graph.of_type(*INTEGER_OPS):
        yield Problem(
            label(node),
            f"{node.op_type} is no Q/DQ form; only the runtime it was written for reads it; "
            "quantize the float graph again",
        )


def nothing_quantized(graph: Graph) -> Iterator[Problem]:
    """A graph without a single Q or DQ node."""
    if not any(node.op_type in (Q, DQ) or node.op_type in INTEGER_OPS for node in graph.nodes):
        yield Problem("graph", "nothing in it is quantized; run `compress quantize` on it first")


def unread_quantize(graph: Graph) -> Iterator[Problem]:
    """A Q whose integers go somewhere else than to DQ."""
    for node in graph.of_type(Q):
        others = [u.node for u in graph.readers(node.output[0]) if u.node.op_type != DQ]
        if others or node.output[0] in graph.outputs:
            reader = others[0].op_type if others else "the output of the graph"
            yield Problem(
                label(node),
                f"its integers go to {reader}, not to DequantizeLinear; runtimes recognize pairs",
            )


def double_quantization(graph: Graph) -> Iterator[Problem]:
    """A value quantized twice in a row."""
    for pair in pairs(graph):
        before = pair_before(graph, pair.source)
        if before is not None:
            yield Problem(
                label(pair.quantize),
                f"it quantizes what {label(before.quantize)!r} has quantized already: one rounding "
                "too many, and a conversion at run time",
                partial(_skip_first, graph, pair, before),
            )


def duplicate_quantize(graph: Graph) -> Iterator[Problem]:
    """Several Q nodes on one tensor."""
    seen: set[str] = set()
    for pair in pairs(graph):
        if pair.source in seen or not pair.dequantizes:
            continue
        seen.add(pair.source)
        twins = [
            twin
            for use in graph.readers(pair.source)
            if use.node.op_type == Q and (twin := pair_of(graph, use.node)).dequantizes
        ]
        if len(twins) > 1:
            yield Problem(
                label(pair.quantize),
                f"tensor {pair.source!r} is quantized {len(twins)} times; one Q, shared, saves "
                "the conversions",
                partial(_merge, graph, twins),
            )


def quantized_before_activation(graph: Graph) -> Iterator[Problem]:
    """Q between a layer and the Relu, Clip or BatchNorm that would be fused with it."""
    for node in graph.of_type(*FUSED_AFTER):
        pair = pair_before(graph, node.input[0])
        maker = graph.maker(pair.source) if pair is not None else None
        if pair is None or maker is None or maker.op_type not in WEIGHTED | {"Add"}:
            continue
        yield Problem(
            label(node),
            f"Q and DQ stand between it and {label(maker)!r}: the two are not fused, and the "
            f"values are rounded before {node.op_type} and again after it",
            partial(_move_behind, graph, node, pair),
        )


def half_quantized(graph: Graph) -> Iterator[Problem]:
    """A layer with a quantized weight and a float input: computed in float, at full error."""
    for node in graph.of_type(*WEIGHTED):
        weight = weight_of(graph, node)
        if graph.constant(node.input[1]) is not None:  # a layer in float, on purpose or not
            continue
        left = is_quantized(graph, node.input[0])
        right = weight is not None or is_quantized(graph, node.input[1])
        if left == right:
            continue
        if weight is None:
            index = 0 if left else 1
            if len(graph.readers(node.input[index])) > 1:
                continue  # the pair serves others as well: reading it costs nothing
            yield Problem(
                label(node),
                f"of its two inputs only {'the first' if left else 'the second'} is quantized, so "
                "it runs in float",
                (partial(_bypass, graph, Use(node, index)))
                if pair_before(graph, node.input[index])
                else None,
            )
        else:
            yield Problem(
                label(node),
                "its weight is quantized and its input is not, so it runs in float with the "
                "error of int8",
                partial(_quantize_input, graph, node, weight),
            )


def unfolded_batchnorm(graph: Graph) -> Iterator[Problem]:
    """BatchNorm behind a quantized convolution, computed in float on its own."""
    for node in graph.of_type("BatchNormalization"):
        conv = graph.maker(node.input[0])
        if conv is None or conv.op_type != "Conv" or not graph.is_read_once(conv.output[0]):
            continue
        weight = weight_of(graph, conv)
        if weight is None or weight.numbers.scale is None or weight.axis not in (None, 0):
            continue
        statistics = [graph.constant(name) for name in node.input[1:5]]
        bias = graph.constant(conv.input[2]) if len(conv.input) > 2 else np.zeros(())
        known = bias is not None and all(s is not None for s in statistics)
        yield Problem(
            label(node),
            "BatchNorm is not folded into the quantized convolution before it, so it runs in "
            "float on its own",
            (partial(_fold, graph, node, weight)) if known else None,
        )


def bypass(graph: Graph, use: Use, pair: Pair) -> None:
    """Let one reader of a pair read what the pair quantizes."""
    graph.rewire(use, implied_clip(graph, pair))


def _bypass(graph: Graph, use: Use) -> None:
    pair = pair_before(graph, use.node.input[use.index])
    if pair is not None:
        bypass(graph, use, pair)


def _skip_first(graph: Graph, second: Pair, first: Pair) -> None:
    same = second.numbers.equals(first.numbers)
    value = first.source if same else implied_clip(graph, first)
    graph.rewire(Use(second.quantize, 0), value)


def _merge(graph: Graph, twins: list[Pair]) -> None:
    def width(pair: Pair) -> float:
        low, high = pair.numbers.limits
        return high - low

    keeper = max(twins, key=width)
    for twin in twins:
        if twin is not keeper:
            for node in twin.dequantizes:
                graph.replace(node.output[0], keeper.dequantizes[0].output[0])


def _move_behind(graph: Graph, node: onnx.NodeProto, pair: Pair) -> None:
    graph.rewire(Use(node, 0), pair.source)
    readers = graph.readers(node.output[0])
    if any(use.node.op_type == Q for use in readers) or not readers:
        return
    numbers = list(pair.quantize.input[1:])
    integers = graph.add(Q, [node.output[0], *numbers], f"{node.output[0]}_quantized")
    real = graph.add(DQ, [integers, *numbers], f"{node.output[0]}_dequantized")
    quantize = graph.maker(integers)
    graph.replace(node.output[0], real, keep=[quantize] if quantize is not None else [])


def quantize_weight(graph: Graph, node: onnx.NodeProto) -> None:
    """Store the constant float weight of ``node`` as int8, a scale for each channel."""
    values = graph.constant(node.input[1])
    if values is None:
        return
    axis = _weight_axis(node, values.ndim)
    scale = best_scale(values, axis)
    raw = np.rint(values / along(scale, axis, values.ndim))
    integers = np.clip(raw, -127, 127).astype(np.int8)
    name = node.input[1]
    inputs = [
        graph.add_constant(f"{name}_int8", integers),
        graph.add_constant(f"{name}_scale", scale),
        graph.add_constant(f"{name}_zero_point", np.zeros(scale.shape, INT8)),
    ]
    attributes = {} if axis is None else {"axis": axis}
    graph.rewire(Use(node, 1), graph.add(DQ, inputs, f"{name}_dequantized", **attributes))


def _weight_axis(node: onnx.NodeProto, rank: int) -> int | None:
    if node.op_type == "ConvTranspose":
        return None
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return rank - 1


def _quantize_input(graph: Graph, node: onnx.NodeProto, weight: Weight | None) -> None:
    """Read the same tensor's existing pair; else give up the int8 weight, which brings nothing."""
    for use in graph.readers(node.input[0]):
        if use.node.op_type == Q and (pair := pair_of(graph, use.node)).dequantizes:
            graph.rewire(Use(node, 0), pair.dequantizes[0].output[0])
            return
    if weight is not None:
        name = graph.add_constant(f"{weight.dequantize.output[0]}_float", weight.values)
        if weight.dequantize.output[0] == node.input[1]:
            graph.rewire(Use(node, 1), name)
        else:
            graph.replace(weight.dequantize.output[0], name)


def _fold(graph: Graph, node: onnx.NodeProto, weight: Weight) -> None:
    gamma, beta, mean, variance = (graph.constant(name) for name in node.input[1:5])
    if gamma is None or beta is None or mean is None or variance is None:
        return
    factor = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    conv = weight.node
    old = graph.constant(conv.input[2]) if len(conv.input) > 2 else None
    bias = ((old if old is not None else 0) - mean) * factor + beta
    dtype = weight.values.dtype
    values = weight.values * factor.reshape(-1, *[1] * (weight.stored.ndim - 1))
    if weight.quantize is None:
        # The integers stay as they are, up to their sign: only the scale of each channel changes.
        folded = np.abs(np.broadcast_to(np.asarray(weight.numbers.scale), factor.shape) * factor)
        scale = np.where(folded > 0, folded, 1).astype(dtype)
    else:
        scale = best_scale(values, 0)
    integers = np.rint(values / scale.reshape(-1, *[1] * (weight.stored.ndim - 1)))
    inputs = [
        graph.add_constant(f"{conv.input[1]}_folded", np.clip(integers, -127, 127).astype(np.int8)),
        graph.add_constant(f"{conv.input[1]}_folded_scale", scale),
        graph.add_constant(f"{conv.input[1]}_folded_zero_point", np.zeros(scale.shape, np.int8)),
    ]
    graph.rewire(Use(conv, 1), graph.add(DQ, inputs, f"{conv.input[1]}_folded_dq", axis=0))
    name = graph.add_constant(f"{conv.output[0]}_folded_bias", bias.astype(dtype))
    if len(conv.input) > 2:
        graph.rewire(Use(conv, 2), name)
    else:
        graph.extend_input(conv, name)
    graph.replace(node.output[0], conv.output[0], keep=[node])
