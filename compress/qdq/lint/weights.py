"""Rules about constants: weights' axis, symmetry and range; biases in float or int32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from compress.graph.model import BIAS_LIMIT, WEIGHTED, attribute
from compress.graph.values import Array, EditableGraph, constant, label, maker
from compress.qdq.lint.patterns import (
    DQ,
    INT8,
    Problem,
    Weight,
    best_scale,
    numbers_of,
    pair_before,
    store_weight,
    weight_of,
    weights,
)
from compress.qdq.writer import add_dequantize, broadcast_along

FEW_LEVELS = 32  # a channel that reaches no higher than this has lost two bits to its neighbours
CLIPPED_SHARE = 0.01
MANY = 4  # channels, below which "all of them" says little


def weight_axis(graph: EditableGraph) -> Iterator[Problem]:
    """Scales along a dimension other than the output channel, which no sum can be scaled by."""
    for weight in weights(graph):
        if weight.axis is None or weight.channel_axis in (None, weight.axis):
            continue
        yield Problem(
            label(weight.node),
            f"the scales of its weight run along dimension {weight.axis}; output channels are "
            f"dimension {weight.channel_axis}, and no int8 kernel can use another",
            partial(_fit, graph, weight, weight.channel_axis),
        )


def weight_zero_point(graph: EditableGraph) -> Iterator[Problem]:
    """Weights that are uint8 or have a zero point, which costs a correction term in every sum."""
    for weight in weights(graph):
        if weight.numbers.dtype == INT8 and not weight.numbers.is_asymmetric:
            continue
        axis = weight.axis if weight.quantize is None else weight.channel_axis
        yield Problem(
            label(weight.node),
            f"its weight is {weight.numbers.dtype} with a zero point of "
            f"{int(weight.numbers.zero.flat[0])}; int8 kernels want symmetric int8 weights",
            partial(_fit, graph, weight, axis),
        )


def weight_minus_128(graph: EditableGraph) -> Iterator[Problem]:
    """Weights of -128, outside the symmetric range that TensorRT computes with."""
    for weight in _symmetric(graph):
        if weight.integers.min() < -127 and weight.numbers.dtype == INT8:
            yield Problem(
                label(weight.node),
                "its weight holds -128; TensorRT's symmetric range is [-127, 127]",
                partial(_keep_in_range, graph, weight),
            )


def weight_clipped(graph: EditableGraph) -> Iterator[Problem]:
    """Float weights of which a large share lies outside the range of their scale."""
    for weight in _symmetric(graph):
        if weight.quantize is None:
            continue
        ratio = np.abs(
            weight.stored / broadcast_along(_scale(weight), weight.axis, weight.stored.ndim)
        )
        share = float(np.mean(ratio > 128))
        if share > CLIPPED_SHARE:
            yield Problem(
                label(weight.node),
                f"{100 * share:.1f} % of its weights lie outside the range of their scale, the "
                f"worst {ratio.max() / 127:.1f} times; they are clipped",
                partial(_fit, graph, weight, weight.axis),
            )


def weight_half_range(graph: EditableGraph) -> Iterator[Problem]:
    """Weights kept to half of their range, as NNCF does for CPUs without VNNI."""
    for weight in _symmetric(graph):
        peaks = _peaks(weight)
        if peaks.size >= MANY and bool(np.all((peaks == 63) | (peaks == 64))):
            yield Problem(
                label(weight.node),
                "all its integers lie in [-64, 64]: one bit given away against overflows that "
                "this target does not have; quantize again with overflow_fix=DISABLE",
            )


def weight_per_tensor(graph: EditableGraph) -> Iterator[Problem]:
    """One scale for all channels, where some channels are much smaller than the largest."""
    for weight in _symmetric(graph):
        if weight.axis is not None or weight.node.op_type == "ConvTranspose":
            continue
        if weight.channel_axis is None or weight.stored.shape[weight.channel_axis] < 2:
            continue
        live = (peaks := _peaks(weight))[peaks > 0]
        if live.size == 0 or live.min() > FEW_LEVELS:
            continue
        floats = weight.quantize is not None
        yield Problem(
            label(weight.node),
            f"one scale for {peaks.size} channels: the smallest uses {int(live.min())} of 127 "
            "levels; a scale for each channel costs nothing"
            + ("" if floats else ", but needs the float weights: quantize again per channel"),
            partial(_fit, graph, weight, weight.channel_axis) if floats else None,
        )


def _fit(graph: EditableGraph, weight: Weight, axis: int | None) -> None:
    """Store ``weight`` with the smallest scales along ``axis`` that hold it."""
    store_weight(graph, weight, best_scale(weight.values, axis), axis)


def _symmetric(graph: EditableGraph) -> Iterator[Weight]:
    for weight in weights(graph):
        integer = weight.numbers.dtype == INT8
        scale = _scale(weight)
        if integer and not weight.numbers.is_asymmetric and bool(np.all(scale > 0)):
            yield weight


def _scale(weight: Weight) -> Array:
    return np.ones(()) if weight.numbers.scale is None else weight.numbers.scale


def _keep_in_range(graph: EditableGraph, weight: Weight) -> None:
    scale = _scale(weight)
    if weight.quantize is not None:  # the floats are there: widen the scales at fault
        axis = weight.axis
        scale = np.maximum(scale, best_scale(weight.values, axis))
    store_weight(graph, weight, scale, weight.axis)


def _peaks(weight: Weight) -> Array:  # (C,) int64
    if weight.channel_axis is None:
        return np.zeros(0, np.int64)
    others = tuple(d for d in range(weight.stored.ndim) if d != weight.channel_axis)
    return np.asarray(np.abs(weight.integers).max(axis=others))


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
