"""Rules for ONNX Runtime on a CPU, which computes an op in int8 only between a DQ and a Q."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import onnx_ir as ir

from compress.graph.model import ACTIVATIONS, WEIGHTED
from compress.graph.rewrites import (
    counts_padding,
    is_ambiguous,
    is_spatial_mean,
    say_plainly,
    write_pool,
)
from compress.graph.values import (
    MOVING,
    Array,
    EditableGraph,
    is_never_negative,
    label,
    maker,
    name_of,
)
from compress.qdq.lint.difference import wanted
from compress.qdq.lint.patterns import (
    UINT8,
    Problem,
    Q,
    insert_pair,
    pair_before,
    pair_of,
    pairs_on,
    weight_of,
)
from compress.qdq.lint.placement import bypass


def reduce_mean(graph: EditableGraph) -> Iterator[Problem]:
    """ReduceMean over the image, which stays float where GlobalAveragePool would not."""
    for node in graph.of_type("ReduceMean"):
        if pair_before(node.inputs[0]) is not None and is_spatial_mean(graph, node):
            yield Problem(
                label(node),
                "ReduceMean over the image has no int8 kernel; GlobalAveragePool is the same and "
                "has",
                partial(write_pool, graph, node),
            )


def rounded_up_pool(graph: EditableGraph) -> Iterator[Problem]:
    """AveragePool whose last windows reach over the edge: int8 divides them by too much."""
    for node in graph.of_type("AveragePool"):
        pair = pair_before(node.inputs[0])
        if pair is None or not is_ambiguous(node):
            continue
        padded = counts_padding(node)
        yield Problem(
            label(node),
            "with ceil_mode and count_include_pad its int8 kernel divides windows that reach over "
            "the edge by their whole size"
            + ("" if padded else "; there is no padding to count, so that neither is the same"),
            partial(bypass, graph, node, 0, pair) if padded else partial(say_plainly, node),
        )


def missing_input_quantization(graph: EditableGraph) -> Iterator[Problem]:
    """An op with some inputs quantized and some not, which therefore runs in float."""
    for node, index, pair in wanted(graph, "onnxruntime").missing(graph):
        if not any(pair_before(value) for value in node.inputs):
            continue
        yield Problem(
            label(node),
            f"its input {name_of(node.inputs[index])!r} is not quantized, the others are: it runs "
            "in float" + ("" if pair else "; its range is not in the graph, quantize again"),
            partial(node.replace_input_with, index, pair.real) if pair else None,
        )


def missing_output_quantization(graph: EditableGraph) -> Iterator[Problem]:
    """An op with quantized inputs whose output is not quantized, so that no int8 kernel is used."""
    target = wanted(graph, "onnxruntime")
    for made in graph.nodes:
        value = made.outputs[0]
        if not target.quantizes(value) or pairs_on(value):
            continue
        before = maker(made.inputs[0]) if made.op_type in ACTIVATIONS else None
        node = before or made  # a Relu is computed together with what is before it
        if not _inputs_quantized(node):
            continue
        numbers = _range_of_output(node, value)
        yield Problem(
            label(node),
            "its inputs are quantized and its output is not, so it runs in float"
            + ("" if numbers else "; the range of its output is not in the graph, quantize again"),
            partial(_insert, graph, value, *numbers) if numbers else None,
        )


def _inputs_quantized(node: ir.Node) -> bool:
    if node.op_type in WEIGHTED:
        return pair_before(node.inputs[0]) is not None and weight_of(node) is not None
    data = node.inputs if node.op_type in ("Add", "Mul", "Concat") else node.inputs[:1]
    return all(pair_before(value) is not None for value in data)


def _range_of_output(node: ir.Node, value: ir.Value) -> tuple[Array, Array] | None:
    """Return scale and zero point (uint8) of an output that follow from those of the inputs."""
    behind = _numbers_behind(value)
    if behind is not None:
        return behind
    known = [p.numbers for p in map(pair_before, node.inputs) if p and p.numbers.scale is not None]
    no_rule = ("Mul", "LeakyRelu", "GlobalAveragePool")
    if not known or known[0].scale is None or node.op_type in (*WEIGHTED, *no_rule):
        return None
    limits, numbers = np.array([each.limits for each in known]), known[0]
    if node.op_type in MOVING or node.op_type == "AveragePool":
        return (known[0].scale, numbers.zero) if numbers.dtype == UINT8 else None
    if node.op_type == "Sigmoid":
        low, high = 0.0, 1.0
    elif node.op_type == "Add":
        low, high = limits[:, 0].sum(), limits[:, 1].sum()
    else:
        low, high = limits[:, 0].min(), limits[:, 1].max()
    low = 0.0 if is_never_negative(value) else float(low)
    scale = (float(high) - low) / 255
    return np.asarray(scale, known[0].scale.dtype), np.asarray(round(-low / scale), np.int64)


def _numbers_behind(value: ir.Value) -> tuple[Array, Array] | None:
    """Return scale and zero point of the Q that reads ``value`` behind ops that move values."""
    for node, index in value.uses():
        if node.op_type == Q:
            numbers = pair_of(node).numbers
            fits = numbers.scale is not None and numbers.dtype == UINT8
            return (numbers.scale, numbers.zero) if fits and numbers.scale is not None else None
        if node.op_type in MOVING and index == 0:
            return _numbers_behind(node.outputs[0])
    return None


def _insert(graph: EditableGraph, value: ir.Value, scale: Array, zero: Array) -> None:
    point = graph.add_constant(f"{value.name}_zero_point", np.asarray(zero).astype(np.uint8))
    insert_pair(graph, value, [graph.add_constant(f"{value.name}_scale", scale), point])
