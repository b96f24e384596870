"""Rules for any target about where Q and DQ stand: in pairs, once a tensor, not around scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from compress.graph.model import ACTIVATIONS, WEIGHTED, attribute
from compress.graph.plain import OF_ONE_CPU, is_fused
from compress.graph.values import (
    MOVING,
    EditableGraph,
    constant,
    is_read_once,
    label,
    maker,
    moves,
    set_input,
)
from compress.qdq.lint.activations import implied_clip
from compress.qdq.lint.patterns import (
    DQ,
    Problem,
    Q,
    QdqPair,
    Weight,
    best_scale,
    insert_pair,
    is_quantized,
    pair_before,
    pairs,
    pairs_on,
    weight_of,
)
from compress.qdq.writer import add_dequantize, encode, scale_axis

FUSED_AFTER = ACTIVATIONS | {"BatchNormalization"}
INTEGER_OPS = frozenset(
    {"QLinearConv", "QLinearMatMul", "QLinearAdd", "QLinearMul", "QLinearConcat", "QGemm"}
    | {"QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearSigmoid", "ConvInteger"}
    | {"MatMulInteger", "DynamicQuantizeLinear", "FakeQuantize"}
)


def operator_format(graph: EditableGraph) -> Iterator[Problem]:
    """Operators of one runtime, or one CPU, in place of those of ONNX with Q/DQ pairs."""
    is_int8 = any(graph.of_type(Q, DQ))
    for node in graph.nodes:
        if node.domain in OF_ONE_CPU:
            yield Problem(
                label(node),
                f"{node.op_type} is in the layout of the CPU that ONNX Runtime optimized the file "
                f"on ({node.domain}); take the file from before, or level 'extended' at most",
            )
        elif is_int8 and is_fused(node) and node.op_type.startswith("Fused"):
            yield Problem(
                label(node),
                f"ONNX Runtime fused {node.op_type} of several operators, which has no int8 "
                "kernel; quantize the float graph again",
            )
    for node in graph.of_type(*INTEGER_OPS):
        yield Problem(
            label(node),
            f"{node.op_type} is no Q/DQ form; only the runtime it was written for reads it; "
            "quantize the float graph again",
        )


def nothing_quantized(graph: EditableGraph) -> Iterator[Problem]:
    """A graph without a single Q or DQ node."""
    if not any(node.op_type in (Q, DQ) or node.op_type in INTEGER_OPS for node in graph.nodes):
        yield Problem("graph", "nothing in it is quantized; run `compress quantize` on it first")


def unread_quantize(graph: EditableGraph) -> Iterator[Problem]:
    """A Q whose integers go somewhere else than to DQ."""
    for node in graph.of_type(Q):
        others = [reader for reader, _ in node.outputs[0].uses() if reader.op_type != DQ]
        if others or node.outputs[0].is_graph_output():
            reader = others[0].op_type if others else "the output of the graph"
            yield Problem(
                label(node),
                f"its integers go to {reader}, not to DequantizeLinear; runtimes recognize pairs",
            )


def double_quantization(graph: EditableGraph) -> Iterator[Problem]:
    """A value quantized twice in a row."""
    for pair in pairs(graph):
        before = pair_before(pair.source)
        if before is not None:
            yield Problem(
                label(pair.quantize),
                f"it quantizes what {label(before.quantize)!r} has quantized already: one rounding "
                "too many, and a conversion at run time",
                partial(_skip_first, graph, pair, before),
            )


def duplicate_quantize(graph: EditableGraph) -> Iterator[Problem]:
    """Several Q nodes on one tensor."""
    for pair in pairs(graph):
        twins = pairs_on(pair.source)
        if len(twins) > 1 and pair.quantize is twins[0].quantize:
            yield Problem(
                label(pair.quantize),
                f"tensor {pair.source.name!r} is quantized {len(twins)} times; one Q, shared, "
                "saves the conversions",
                partial(_merge, graph, twins),
            )


def quantized_before_activation(graph: EditableGraph) -> Iterator[Problem]:
    """Q between a layer and the Relu, Clip or BatchNorm that would be fused with it."""
    for node in graph.of_type(*FUSED_AFTER):
        pair = pair_before(node.inputs[0])
        made = maker(pair.source) if pair is not None else None
        if pair is None or made is None or made.op_type not in WEIGHTED | {"Add"}:
            continue
        if node.inputs[0] is not None and _serves_others(node.inputs[0]):
            continue  # what others read as well is fused with none of them
        yield Problem(
            label(node),
            f"Q and DQ stand between it and {label(made)!r}: the two are not fused, and the "
            f"values are rounded before {node.op_type} and again after it",
            partial(_move_behind, graph, node, pair),
        )


def half_quantized(graph: EditableGraph) -> Iterator[Problem]:
    """A layer with a quantized weight and a float input: computed in float, at full error."""
    for node in graph.of_type(*WEIGHTED):
        if constant(node.inputs[1]) is not None:  # a layer in float, on purpose or not
            continue
        weight = weight_of(node)
        left = is_quantized(node.inputs[0])
        right = weight is not None or is_quantized(node.inputs[1])
        if left == right:
            continue
        if weight is None:
            value = node.inputs[0 if left else 1]
            if value is None or _serves_others(value):
                continue  # reading the pair costs nothing
            pair = pair_before(value)
            yield Problem(
                label(node),
                f"of its two inputs only {'the first' if left else 'the second'} is quantized, so "
                "it runs in float",
                partial(bypass, graph, node, 0 if left else 1, pair) if pair else None,
            )
        else:
            yield Problem(
                label(node),
                "its weight is quantized and its input is not, so it runs in float with the "
                "error of int8",
                partial(_quantize_input, graph, node, weight),
            )


def _serves_others(value: ir.Value) -> bool:
    """Return whether more is made of the DQ node that ``value`` comes from."""
    node = maker(value)
    if len(value.uses()) > 1 or value.is_graph_output():
        return True
    if node is None or node.op_type not in MOVING or node.inputs[0] is None:
        return False
    others = [output for output in node.outputs if output is not value]  # of a Split
    if any(output.uses() or output.is_graph_output() for output in others):
        return True
    return _serves_others(node.inputs[0])


def unfolded_batchnorm(graph: EditableGraph) -> Iterator[Problem]:
    """BatchNorm behind a quantized convolution, computed in float on its own."""
    for node in graph.of_type("BatchNormalization"):
        conv = maker(node.inputs[0])
        if conv is None or conv.op_type != "Conv" or not is_read_once(conv.outputs[0]):
            continue
        weight = weight_of(conv)
        if weight is None or weight.numbers.scale is None or weight.axis not in (None, 0):
            continue
        statistics = [constant(value) for value in node.inputs[1:5]]
        bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 else np.zeros(())
        known = bias is not None and all(s is not None for s in statistics)
        yield Problem(
            label(node),
            "BatchNorm is not folded into the quantized convolution before it, so it runs in "
            "float on its own",
            (partial(_fold, graph, node, weight)) if known else None,
        )


def bypass(graph: EditableGraph, node: ir.Node, index: int, pair: QdqPair) -> None:
    """Let one reader of a pair read what the pair quantizes."""
    node.replace_input_with(index, implied_clip(graph, pair))


def _skip_first(graph: EditableGraph, second: QdqPair, first: QdqPair) -> None:
    same = second.numbers.equals(first.numbers)
    second.quantize.replace_input_with(0, first.source if same else implied_clip(graph, first))


def _merge(graph: EditableGraph, twins: list[QdqPair]) -> None:
    def width(pair: QdqPair) -> float:
        low, high = pair.numbers.limits
        return high - low

    keeper = max(twins, key=width)
    for twin in twins:
        if twin is not keeper:
            for node in twin.dequantizes:
                graph.replace(node.outputs[0], keeper.real)


def _move_behind(graph: EditableGraph, node: ir.Node, pair: QdqPair) -> None:
    node.replace_input_with(0, pair.source)
    value = node.outputs[0]
    if value.uses() and not any(reader.op_type == Q for reader, _ in value.uses()):
        insert_pair(graph, value, list(pair.quantize.inputs[1:]))


def quantize_weight(graph: EditableGraph, node: ir.Node) -> None:
    """Store the constant float weight of ``node`` as int8, a scale for each channel."""
    values, given = constant(node.inputs[1]), node.inputs[1]
    if values is None or given is None:
        return
    axis = scale_axis(node, values.ndim)
    scale = best_scale(values, axis)
    stored = add_dequantize(graph, str(given.name), encode(values, scale, axis), scale, axis)
    node.replace_input_with(1, stored)


def _quantize_input(graph: EditableGraph, node: ir.Node, weight: Weight) -> None:
    """Read the same tensor's existing pair; else give up the int8 weight, which brings nothing."""
    for pair in pairs_on(node.inputs[0]) if node.inputs[0] is not None else ():
        node.replace_input_with(0, pair.real)
        return
    real = weight.dequantize.outputs[0]
    value = graph.add_constant(f"{real.name}_float", weight.values)
    if real is node.inputs[1]:
        node.replace_input_with(1, value)
    else:
        graph.replace(real, value)


def _fold(graph: EditableGraph, node: ir.Node, weight: Weight) -> None:
    gamma, beta, mean, variance = (constant(value) for value in node.inputs[1:5])
    if gamma is None or beta is None or mean is None or variance is None:
        return
    factor = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    conv = weight.node
    old = constant(conv.inputs[2]) if len(conv.inputs) > 2 else None
    bias = ((old if old is not None else 0) - mean) * factor + beta
    dtype = weight.values.dtype
    values = weight.values * factor.reshape(-1, *[1] * (weight.stored.ndim - 1))
    if weight.quantize is None:
        # The integers stay as they are, up to their sign: only the scale of each channel changes.
        folded = np.abs(np.broadcast_to(np.asarray(weight.numbers.scale), factor.shape) * factor)
        scale = np.where(folded > 0, folded, 1).astype(dtype)
    else:
        scale = best_scale(values, 0)
    hint = f"{weight.dequantize.outputs[0].name}_folded"
    folded_weight = add_dequantize(graph, hint, encode(values, scale, 0), scale, 0)
    conv.replace_input_with(1, folded_weight)
    folded_bias = f"{conv.outputs[0].name}_folded_bias"
    set_input(conv, 2, graph.add_constant(folded_bias, bias.astype(dtype)))
    graph.replace(node.outputs[0], conv.outputs[0], keep=[node])


UP_TO_ONE = frozenset({"Sigmoid", "HardSigmoid", "Softmax"})
FEWEST_STEPS = 32  # between 0 and 1; with fewer of them scores of different objects are equal


def vanishing_scores(graph: EditableGraph) -> Iterator[Problem]:
    """Scores up to 1 quantized with the step of what they are joined with, as boxes in pixels."""
    for pair in pairs(graph):
        if pair.numbers.scale is None or pair.numbers.scale.size != 1:
            continue
        step = float(np.max(pair.numbers.scale))
        scores = [n for n in _makers(pair.source) if n.op_type in UP_TO_ONE]
        if not scores or step * FEWEST_STEPS <= 1 or _is_feature_map(pair.dequantizes):
            continue
        feeds_layer = any(node.op_type in WEIGHTED for node, _ in _uses(pair))
        yield Problem(
            label(pair.quantize),
            f"values of {label(scores[0])!r}, at most 1, are quantized in steps of {step:.3g}: "
            f"{int(1 / step)} of them; leave what joins them with larger values in float",
            None if feeds_layer else partial(_skip, graph, pair),
        )


def _makers(value: ir.Value) -> Iterator[ir.Node]:
    """Yield the nodes whose values ``value`` holds, as they were but for their place."""
    waiting: list[ir.Value | None] = [value]
    while waiting:
        each = waiting.pop()
        pair, node = pair_before(each), maker(each)
        if pair is not None:
            waiting.append(pair.source)
        elif node is not None and node.op_type == "Concat":
            waiting += node.inputs
        elif node is not None and node.op_type in MOVING:
            waiting.append(node.inputs[0])
        elif node is not None:
            yield node


def _is_feature_map(nodes: Sequence[ir.Node]) -> bool:
    """Return whether layers alone read what ``nodes`` make, in whatever place: it is no answer."""
    values = [value for node in nodes for value in node.outputs]
    readers = [reader for value in values for reader, _ in value.uses()]
    moved = [node for node in readers if node.op_type in (Q, DQ) or moves(node)]
    rest = [node for node in readers if node.op_type not in WEIGHTED and node not in moved]
    ends = not readers or rest or any(value.is_graph_output() for value in values)
    return not ends and (not moved or _is_feature_map(moved))


def _uses(pair: QdqPair) -> list[tuple[ir.Node, int]]:
    return [use for node in pair.dequantizes for use in node.outputs[0].uses()]


def _skip(graph: EditableGraph, pair: QdqPair) -> None:
    """Let all that reads ``pair`` read what it quantizes."""
    for node, index in _uses(pair):
        bypass(graph, node, index, pair)
    for dequantize in pair.dequantizes:
        if dequantize.outputs[0].is_graph_output():
            graph.replace(dequantize.outputs[0], pair.source)
