"""Bias correction: each channel of the quantized network gets the mean it has in float."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from compress import progress
from compress.graph.model import GraphIndex
from compress.qdq.placement import place
from compress.qdq.plan import QuantPlan
from compress.qdq.rewrite import apply_corrections, rewrite_for
from compress.qdq.writer import write_qdq
from compress.quantize.calibration import ActivationFunction, activation_of, identity
from compress.quantize.images import Feed
from compress.quantize.layerwise import QuantizedLayer, channel_means, layers, some_positions
from compress.quantize.sessions import session_of, with_outputs

_STEPS = 3
_ELEMENTS = 40_000_000  # of the largest tensor, for all images that a correction looks at
_MOST = 0.5  # standard deviations that a bias may move
_NEAR = 3e-4  # and within how many of them a mean is met


FloatMeans = dict[int, dict[str, NDArray[np.float64]]]  # of each channel, by number of images


def correct_biases(
    prepared: ModelProto,
    plan: QuantPlan,
    feed: Feed,
    known: FloatMeans | None = None,
    choose: Callable[[QuantizedLayer], NDArray[np.float32] | None] | None = None,
) -> QuantPlan:
    """Return ``plan`` with biases that undo the shift of means, layer by layer.

    Each layer is fed by the quantized layers before it, themselves corrected. Its bias moves until
    the mean of every channel *after* the activation is that of the float network on the same
    images; matched before the activation, a shift that the activation cuts off would do harm.

    Biases of ``plan`` that are corrected already are the start. ``known`` are means of the float
    graph that were found before, for one graph and images that begin alike; what is found here is
    added. ``choose`` gives a layer another weight before its bias is corrected, or None.

    Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction,
    ICCV 2019, https://arxiv.org/abs/1906.04721, section 4.2, with measured means.
    """
    feed = fewer(prepared, feed)
    corrected = apply_corrections(prepared, plan.changed(biases={}))
    graph = GraphIndex(rewrite_for(corrected, plan.target))
    own = {node.name for node in GraphIndex(prepared).nodes if node.op_type in _CORRECTED}
    names = [n for n in place(graph, plan.target, plan.float_nodes).weights if n in own]
    nodes = {node.name: node for node in graph.nodes}
    activations = {name: activation_of(graph, nodes[name]) for name in names}
    known = {} if known is None else known
    images = len(next(iter(feed.values())))
    outputs = [a.output for a in activations.values()]
    if not known.get(images, {}).keys() >= set(outputs):
        known[images] = float_means(prepared, feed, outputs)
    factors = {step.producer: np.asarray(step.factors) for step in plan.equalization}
    wanted = {
        name: known[images][a.output] / factors.get(name, 1.0) for name, a in activations.items()
    }
    biases = dict(plan.biases)
    written = write_qdq(prepared, plan, float_bias=True)
    with progress.task("Correcting biases", len(names)) as counter:
        for layer in layers(written, feed, names, outputs=choose is None):
            activation = activations[layer.node.name]
            output = layer.run(None if choose is None else choose(layer))
            some = some_positions(output, images)
            shift = find_shift(some, activation, wanted[layer.node.name])
            shape = [1] * output.ndim
            shape[1] = -1
            output += shift.reshape(shape).astype(output.dtype)
            layer.outgoing = output
            old = 0.0 if layer.bias is None else layer.bias.reshape(-1).astype(np.float64)
            biases[layer.node.name] = tuple(float(b) for b in old + shift)
            counter.advance()
    return plan.changed(biases=biases)


_CORRECTED = frozenset({"Conv", "Gemm", "ConvTranspose"})  # with a bias of their own


def find_shift(
    output: NDArray[Any], activation: ActivationFunction, wanted: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return what to add to each channel, (C,), that gives ``wanted`` means after the activation.

    Newton's method; a channel whose activation passes nothing on is left alone. ``output`` is the
    layer's at some positions, (P, C), ``wanted`` the float network's means there, (C,).
    """
    if activation.value is identity:
        return wanted - channel_means(output)
    spread = output.std(axis=0, dtype=np.float64)
    shift = np.zeros(output.shape[1])
    best, least = shift, np.full(output.shape[1], np.inf)
    for left in range(_STEPS, -1, -1):
        moved = output + shift.astype(output.dtype)
        missing = wanted - channel_means(activation.value(moved))
        better = np.abs(missing) < least
        best, least = np.where(better, shift, best), np.where(better, np.abs(missing), least)
        if not left or np.all(least <= _NEAR * spread):
            break
        slope = channel_means(activation.slope(moved))
        step = np.where(slope > 0.01, missing / np.maximum(slope, 0.01), 0.0)
        shift = np.clip(shift + step, -_MOST * spread, _MOST * spread)
    return best


def fewer(prepared: ModelProto, feed: Feed) -> Feed:
    """Return as many images of ``feed`` as fit in memory layer by layer, at least eight."""
    largest = 1
    for shape in GraphIndex(prepared).shapes.values():
        largest = max(largest, math.prod(d or 1 for d in shape[1:]) if shape else 1)
    count = max(_ELEMENTS // largest, 8)
    return {name: array[:count] for name, array in feed.items()}


def float_means(
    model: ModelProto, feed: Feed, names: list[str], batch: int = 8
) -> dict[str, NDArray[np.float64]]:
    """Return the mean of each channel, (C,), of tensors of a float graph, at some positions."""
    session = session_of(with_outputs(model, names))
    count = len(next(iter(feed.values())))
    sums: dict[str, NDArray[np.float64]] = {}
    for start in range(0, count, batch):
        part = {name: array[start : start + batch] for name, array in feed.items()}
        share = len(next(iter(part.values()))) / count
        for name, value in zip(names, session.run(names, part), strict=True):
            sums[name] = sums.get(name, 0.0) + channel_means(some_positions(value, count)) * share
    return sums
