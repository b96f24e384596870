"""Rules about constant weights: axis, symmetry, range, and how well a scale fits its channels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from compress.graph.values import Array, EditableGraph, label
from compress.qdq.lint.finding import Problem
from compress.qdq.lint.patterns import INT8, Weight, best_scale, store_weight, weights
from compress.qdq.writer import broadcast_along

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
