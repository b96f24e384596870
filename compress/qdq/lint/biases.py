"""Rules about biases: float for TensorRT, int32 with exactly the right scale for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from compress.graph.model import BIAS_LIMIT, WEIGHTED, attribute
from compress.graph.values import Array, EditableGraph, constant, label, maker
from compress.qdq.lint.finding import Problem
from compress.qdq.lint.patterns import DQ, Weight, numbers_of, pair_before, store_weight, weight_of
from compress.qdq.writer import add_dequantize

LARGEST = BIAS_LIMIT * (1 + 1e-6)  # what the writer aims at, rounded to float32, is no overflow


@dataclass(frozen=True)
class Bias:
    """The constant bias of an op whose input and weight are quantized."""

    node: ir.Node
    values: Array  # (C,)
    weight: Weight
    input_scale: float
    scale: Array  # (C,) or (): input scale x weight scale, what the int32 bias must have
    stored_scale: Array | None  # of an int32 bias; None = the bias is float


def bias_quantized(graph: EditableGraph) -> Iterator[Problem]:
    """A quantized bias, which TensorRT refuses: it adds the bias in float."""
    for node in graph.of_type(*WEIGHTED):
        made = maker(node.inputs[2]) if len(node.inputs) > 2 else None
        if made is None or made.op_type != DQ:
            continue
        values = _dequantized(made)
        yield Problem(
            label(node),
            "its bias is quantized; TensorRT refuses int32 biases and adds them in float",
            (partial(_store_float, graph, node, values)) if values is not None else None,
        )


def bias_overflow(graph: EditableGraph) -> Iterator[Problem]:
    """Biases too large for int32 at the scale they must have, as nearly dead channels have them."""
    for bias in _biases(graph):
        over = np.abs(bias.values / bias.scale) > LARGEST
        if not np.any(over):
            continue
        lost = bias.stored_scale is not None and np.any(
            np.abs(bias.values / bias.stored_scale) > np.iinfo(np.int32).max - 128
        )
        yield Problem(
            label(bias.node),
            f"{int(over.sum())} channels have weights so small that the bias overflows int32; "
            + ("it was cut off, quantize again" if lost else "they need a larger weight scale"),
            None if lost else partial(_raise_scale, graph, bias),
        )


def bias_scale(graph: EditableGraph) -> Iterator[Problem]:
    """int32 biases whose scale is not input scale x weight scale, the only one the kernel knows."""
    for bias in _biases(graph):
        if bias.stored_scale is None:
            continue
        if not np.allclose(bias.stored_scale, bias.scale, rtol=1e-3, atol=0):
            yield Problem(
                label(bias.node),
                "the scale of its bias is not input scale x weight scale; the fused kernel adds "
                "the integers as they are, and the sum comes out wrong",
                partial(_store_int32, graph, bias),
            )


def bias_float(graph: EditableGraph) -> Iterator[Problem]:
    """Float biases, with which ONNX Runtime does not compute Gemm in int8."""
    for bias in _biases(graph):
        if bias.stored_scale is None:
            yield Problem(
                label(bias.node),
                "its bias is float; ONNX Runtime's int8 kernels add int32 biases",
                partial(_store_int32, graph, bias),
            )


def _biases(graph: EditableGraph) -> Iterator[Bias]:
    for node in graph.of_type("Conv", "Gemm"):
        if len(node.inputs) < 3 or attribute(node, "beta", 1.0) != 1.0:
            continue
        pair, weight = pair_before(node.inputs[0]), weight_of(node)
        if pair is None or weight is None:
            continue
        input_scale, weight_scale = pair.numbers.scale, weight.numbers.scale
        if input_scale is None or weight_scale is None or input_scale.size != 1:
            continue
        if weight.axis not in (None, weight.channel_axis):
            continue
        values, stored = _values(node.inputs[2])
        if values is None or values.ndim != 1:
            continue
        scale = weight_scale.astype(np.float64) * float(input_scale.item())
        scale = np.maximum(scale.reshape(-1) if scale.size > 1 else scale.reshape(()), 1e-38)
        yield Bias(node, values, weight, float(input_scale.item()), scale, stored)


def _values(value: ir.Value | None) -> tuple[Array | None, Array | None]:
    given, made = constant(value), maker(value)
    if given is not None or made is None or made.op_type != DQ:
        return given, None
    return _dequantized(made), numbers_of(made).scale


def _dequantized(node: ir.Node) -> Array | None:
    stored, numbers = constant(node.inputs[0]), numbers_of(node)
    if stored is None:
        before = maker(node.inputs[0])  # a Q of a float constant
        return constant(before.inputs[0]) if before is not None else None
    if numbers.scale is None:
        return None
    real = (stored.astype(np.int64) - numbers.zero) * numbers.scale.astype(np.float64)
    return real.astype(numbers.scale.dtype)


def _store_float(graph: EditableGraph, node: ir.Node, values: Array) -> None:
    node.replace_input_with(2, graph.add_constant(f"{label(node)}_bias_float", values))


def _store_int32(graph: EditableGraph, bias: Bias) -> None:
    info = np.iinfo(np.int32)
    integers = np.clip(np.rint(bias.values / bias.scale), info.min, info.max).astype(np.int32)
    scale = bias.scale.astype(np.float32)
    axis = 0 if scale.ndim else None
    stored = add_dequantize(graph, f"{label(bias.node)}_bias", integers, scale, axis)
    bias.node.replace_input_with(2, stored)


def _raise_scale(graph: EditableGraph, bias: Bias) -> None:
    scale = bias.scale / bias.input_scale
    needed = 2 * np.abs(bias.values) / (bias.input_scale * LARGEST)
    if bias.weight.axis is None:
        needed = needed.max()
    over = np.abs(bias.values).max() if bias.weight.axis is None else np.abs(bias.values)
    scale = np.where(over / bias.scale > LARGEST, needed, scale)
    store_weight(graph, bias.weight, scale, bias.weight.axis)
