"""Rules for ONNX Runtime on a CPU, which computes an op in int8 only between a DQ and a Q."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import onnx

from compress.graph.model import tail
from compress.qdq.lint.finding import Problem
from compress.qdq.lint.graph import Array, Graph, Use, attribute, label
from compress.qdq.lint.patterns import (
    DQ,
    MOVING,
    UINT8,
    Pair,
    Q,
    is_never_negative,
    pair_before,
    pair_of,
    weight_of,
)

# Operators with int8 kernels that need Q on their output.
CHAINED = frozenset(
    {"Conv", "Add", "Mul", "AveragePool", "GlobalAveragePool", "Concat", "LeakyRelu", "Sigmoid"}
    | {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "DepthToSpace"}
)
ABSORBED = frozenset({"Relu", "Clip"})


def reduce_mean(graph: Graph) -> Iterator[Problem]:
    """ReduceMean over the image, which stays float where GlobalAveragePool would not."""
    for node in graph.of_type("ReduceMean"):
        rank = graph.rank(node.input[0])
        axes = _axes(graph, node)
        quantized = any(pair_before(graph, value) for value in node.input[:1])
        if not quantized or rank != 4 or axes is None or sorted(a % 4 for a in axes) != [2, 3]:
            continue
        yield Problem(
            label(node),
            "ReduceMean over the image has no int8 kernel; GlobalAveragePool is the same and has",
            partial(_write_pool, graph, node),
        )


def missing_input_quantization(graph: Graph) -> Iterator[Problem]:
    """An op with some inputs quantized and some not, which therefore runs in float."""
    answers = tail(graph.nodes)
    for node in graph.of_type("Add", "Mul", "Concat"):
        if node.output[0] in answers:
            continue
        sides = [pair_before(graph, value) for value in node.input]
        if all(sides) or not any(sides):
            continue
        index = sides.index(None)
        if graph.constant(node.input[index]) is not None or _is_parameter(graph, node.input[index]):
            continue
        found = [
            pair_of(graph, use.node)
            for use in graph.readers(node.input[index])
            if use.node.op_type == Q
        ]
        pair = next((p for p in found if p.dequantizes), None)
        yield Problem(
            label(node),
            f"its input {node.input[index]!r} is not quantized, the others are: it runs in float"
            + ("" if pair else "; its range is not in the graph, quantize again"),
            (partial(graph.rewire, Use(node, index), pair.dequantizes[0].output[0]))
            if pair
            else None,
        )


def missing_output_quantization(graph: Graph) -> Iterator[Problem]:
    """An op with quantized inputs whose output is not quantized, so that no int8 kernel is used."""
    answers = tail(graph.nodes)
    for node in graph.of_type(*CHAINED):
        if node.output[0] in answers or not _inputs_quantized(graph, node):
            continue
        value = _absorbed(graph, node)
        readers = [use.node for use in graph.readers(value)]
        if _is_answer(graph, value) or any(reader.op_type == Q for reader in readers):
            continue
        pair = _range_of_output(graph, node, value)
        known = pair is not None
        yield Problem(
            label(node),
            "its inputs are quantized and its output is not, so it runs in float"
            + ("" if known else "; the range of its output is not in the graph, quantize again"),
            (partial(_insert, graph, value, *pair)) if pair is not None else None,
        )


def _is_parameter(graph: Graph, value: str) -> bool:
    """Return whether ``value`` is an input that is no image: a threshold, a factor."""
    rank = graph.rank(value)
    return graph.maker(value) is None and rank is not None and rank < 2


def _is_answer(graph: Graph, value: str) -> bool:
    """Return whether ``value`` is an output of the graph, or only moved on its way to one."""
    while value not in graph.outputs:
        readers = graph.readers(value)
        if len(readers) != 1 or readers[0].node.op_type not in MOVING:
            return False
        value = str(readers[0].node.output[0])
    return True


def _inputs_quantized(graph: Graph, node: onnx.NodeProto) -> bool:
    if node.op_type == "Conv":
        return pair_before(graph, node.input[0]) is not None and weight_of(graph, node) is not None
    data = node.input if node.op_type in ("Add", "Mul", "Concat") else node.input[:1]
    return all(pair_before(graph, value) is not None for value in data)


def _absorbed(graph: Graph, node: onnx.NodeProto) -> str:
    """Return the value after the Relu or Clip that is computed together with ``node``."""
    value = str(node.output[0])
    readers = graph.readers(value)
    if len(readers) == 1 and readers[0].node.op_type in ABSORBED and readers[0].index == 0:
        return str(readers[0].node.output[0])
    return value


def _range_of_output(graph: Graph, node: onnx.NodeProto, value: str) -> tuple[Array, Array] | None:
    """Return scale and zero point (uint8) of an output that follow from those of the inputs."""
    behind = _numbers_behind(graph, value)
    if behind is not None:
        return behind
    sides = [pair_before(graph, name) for name in node.input]
    known = [p for p in sides if isinstance(p, Pair) and p.numbers.scale is not None]
    if not known or node.op_type in ("Conv", "Mul", "LeakyRelu", "GlobalAveragePool"):
        return None
    limits = np.array([p.numbers.limits for p in known])
    numbers = known[0].numbers
    if numbers.scale is None:
        return None
    if node.op_type in MOVING or node.op_type == "AveragePool":
        return (numbers.scale, numbers.zero) if numbers.dtype == UINT8 else None
    if node.op_type == "Sigmoid":
        low, high = 0.0, 1.0
    elif node.op_type == "Add":
        low, high = limits[:, 0].sum(), limits[:, 1].sum()
    else:
        low, high = limits[:, 0].min(), limits[:, 1].max()
    low = 0.0 if is_never_negative(graph, value) else float(low)
    scale = (float(high) - low) / 255
    return np.asarray(scale, numbers.scale.dtype), np.asarray(round(-low / scale), np.int64)


def _numbers_behind(graph: Graph, value: str) -> tuple[Array, Array] | None:
    """Return scale and zero point of the Q that reads ``value`` behind ops that move values."""
    for use in graph.readers(value):
        node = use.node
        if node.op_type == Q:
            numbers = pair_of(graph, node).numbers
            fits = numbers.scale is not None and numbers.dtype == UINT8
            return (numbers.scale, numbers.zero) if fits and numbers.scale is not None else None
        if node.op_type in MOVING and use.index == 0:
            return _numbers_behind(graph, node.output[0])
    return None


def _insert(graph: Graph, value: str, scale: Array, zero: Array) -> None:
    numbers = [
        graph.add_constant(f"{value}_scale", scale),
        graph.add_constant(f"{value}_zero_point", np.asarray(zero).astype(np.uint8)),
    ]
    integers = graph.add(Q, [value, *numbers], f"{value}_quantized")
    real = graph.add(DQ, [integers, *numbers], f"{value}_dequantized")
    quantize = graph.maker(integers)
    graph.replace(value, real, keep=[quantize] if quantize is not None else [])


def _axes(graph: Graph, node: onnx.NodeProto) -> list[int] | None:
    axes = attribute(node, "axes")
    if axes is None and len(node.input) > 1 and node.input[1]:
        constant = graph.constant(node.input[1])
        axes = None if constant is None else constant.tolist()
    return None if axes is None else [int(a) for a in axes]


def _write_pool(graph: Graph, node: onnx.NodeProto) -> None:
    pooled = graph.add("GlobalAveragePool", [node.input[0]], f"{node.output[0]}_pooled")
    if not attribute(node, "keepdims", 1):
        pooled = graph.add("Flatten", [pooled], f"{node.output[0]}_flat", axis=1)
    graph.replace(node.output[0], pooled)
