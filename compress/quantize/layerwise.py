"""Layer-wise execution of a Q/DQ graph: each layer can be corrected before the next runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from compress import progress
from compress.graph.model import GraphIndex, attribute, reads
from compress.qdq.placement import place
from compress.qdq.plan import QuantPlan
from compress.qdq.rewrite import apply_corrections, rewrite_for
from compress.qdq.writer import broadcast_along, write_qdq
from compress.quantize.calibration import ActivationFunction, activation_of, identity
from compress.quantize.images import Feed, images_in
from compress.quantize.sessions import session_of, with_outputs

Values = dict[str, NDArray[Any]]
_POSITIONS = 4096  # of a channel, whose mean stands for that of all


@dataclass
class QuantizedLayer:
    """A weighted node whose input, as the quantized network makes it, is known."""

    graph: GraphIndex  # the Q/DQ graph
    node: NodeProto  # the weighted node in the Q/DQ graph; its weight may be given another value
    incoming: NDArray[Any]  # its dequantized input, (B, C, ...)
    # What it makes of that, without its activation; None where nobody asked
    output: NDArray[Any] | None = None
    outgoing: NDArray[Any] | None = None  # what the rest of the graph is to read

    @property
    def bias(self) -> NDArray[Any] | None:
        """Its float bias, or None."""
        return self.graph.constant(self.node.input[2]) if len(self.node.input) > 2 else None

    def run(self, weight: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return the output of the layer, without its activation, for another weight or its own."""
        if weight is None and self.output is not None:
            return self.output
        own = _weight(self.graph, self.node) if weight is None else weight
        feed = {"x": self.incoming, "w": own}
        if (bias := self.bias) is not None:
            feed["b"] = bias
        node = deepcopy(self.node)
        del node.input[:]
        node.input.extend(feed)
        node.output[0] = "y"
        (value,) = _run(self.graph, [node], feed, ["y"])
        return value


def layers(
    written: ModelProto, feed: Feed, names: Sequence[str], *, outputs: bool = False
) -> Iterator[QuantizedLayer]:
    """Yield the layers ``names`` of a Q/DQ graph in order, each fed by the ones before.

    What the caller puts in ``outgoing`` is what later layers see. Memory holds the tensors that
    are still needed, for all images of ``feed`` at once.

    The graph is float, or has float biases; the weights of its layers are constant or come from a
    DequantizeLinear. With ``outputs`` the output of each is computed too, at once with what lies
    before it.
    """
    graph = GraphIndex(written)
    wanted = set(names)
    last_use = {name: i for i, node in enumerate(graph.nodes) for name in reads(node)}
    values: Values = dict(feed)
    pending: list[NodeProto] = []
    for position, node in enumerate(graph.nodes):
        if outputs or node.name not in wanted:
            pending.append(node)
        if node.name not in wanted:
            continue
        ends = [node.output[0]] if outputs else []
        values = _advance(graph, pending, values, last_use, position, node, ends)
        pending = []
        layer = QuantizedLayer(graph, node, values[node.input[0]], *(values[name] for name in ends))
        yield layer
        values[node.output[0]] = layer.run() if layer.outgoing is None else layer.outgoing
        values = {name: v for name, v in values.items() if last_use.get(name, -1) > position}


def _weight(graph: GraphIndex, node: NodeProto) -> NDArray[Any]:
    constant = graph.constant(node.input[1])
    if constant is not None:
        return constant
    dequantize = graph.producer[node.input[1]]
    codes, scales, zeros = (graph.constant(name) for name in dequantize.input)
    if codes is None or scales is None or zeros is None:
        raise TypeError(f"{node.name} has no constant weight")
    shape = [1] * codes.ndim
    if scales.ndim:
        shape[attribute(dequantize, "axis", 1)] = -1
    steps = codes.astype(np.float32) - zeros.reshape(shape)
    return np.asarray(steps * scales.reshape(shape), np.float32)


def _advance(
    graph: GraphIndex,
    pending: list[NodeProto],
    values: Values,
    last_use: dict[str, int],
    position: int,
    node: NodeProto,
    ends: Sequence[str],
) -> Values:
    made = [name for step in pending for name in step.output if name]
    wanted = [name for name in made if name in ends or last_use.get(name, -1) >= position]
    wanted = [name for name in wanted if name != node.input[1]]
    if wanted:
        needed = _needed(pending, wanted)
        read = {name for step in needed for name in reads(step)}
        feed = {name: value for name, value in values.items() if name in read}
        found = _run(graph, needed, feed, wanted)
        values = values | dict(zip(wanted, found, strict=True))
    return {n: value for n, value in values.items() if n in ends or last_use.get(n, -1) >= position}


def _needed(pending: list[NodeProto], wanted: Sequence[str]) -> list[NodeProto]:
    names, kept = set(wanted), []
    for node in reversed(pending):
        if names.intersection(node.output):
            kept.append(node)
            names.update(reads(node))
    return kept[::-1]


def _run(
    graph: GraphIndex,
    nodes: Sequence[NodeProto],
    feed: Values,
    outputs: Sequence[str],
) -> list[NDArray[Any]]:
    """Return ``outputs`` of a few nodes, in plain float arithmetic."""
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
        )
        for name, value in feed.items()
    ]
    read = {name for node in nodes for name in reads(node)} - feed.keys()
    constants = [tensor for name, tensor in graph.initializers.items() if name in read]
    ends = [helper.make_empty_tensor_value_info(name) for name in outputs]
    part = helper.make_graph(list(nodes), "part", inputs, ends, constants)
    model = helper.make_model(
        part, opset_imports=graph.model.opset_import, ir_version=graph.model.ir_version
    )
    found: list[NDArray[Any]] = session_of(model, float_qdq=True).run(list(outputs), feed)
    return found


def some_positions(values: NDArray[Any], images: int) -> NDArray[Any]:
    """Return evenly spaced values of each channel, (P, C), of ``values``, (B, C, ...).

    The same ones of each image, whichever of the ``images`` are in this batch.
    """
    rows = values.reshape(*values.shape[:2], -1)
    stride = images * rows.shape[2] // _POSITIONS | 1  # odd: it walks over all columns
    return np.ascontiguousarray(rows[:, :, ::stride].swapaxes(1, 2)).reshape(-1, rows.shape[1])


def channel_means(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return the mean of each channel, (C,), over images and space."""
    others = tuple(d for d in range(values.ndim) if d != 1 % values.ndim)
    return np.asarray(values.mean(axis=others, dtype=np.float64))


_STEPS = 3
_ELEMENTS = 40_000_000  # of the largest tensor, for all images that a correction looks at
_MOST = 0.5  # standard deviations that a bias may move
_AT_ONCE = 2  # images of the float graph: their values stay in the caches
_NEAR = 3e-4  # and within how many of them a mean is met


FloatMeans = dict[int, dict[str, NDArray[np.float64]]]  # of each channel, by number of images
# Another weight for a layer, or None; the layer in the float graph follows the Q/DQ one
Choose = Callable[[QuantizedLayer, GraphIndex, NodeProto], NDArray[np.float32] | None]


def correct_biases(
    prepared: ModelProto,
    plan: QuantPlan,
    feed: Feed,
    known: FloatMeans | None = None,
    choose: Choose | None = None,
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
    names = place(graph, plan.target, plan.float_nodes).weights
    nodes = {node.name: node for node in graph.nodes}
    activations = {name: activation_of(graph, nodes[name]) for name in names if name in own}
    known = {} if known is None else known
    images = images_in(feed)
    outputs = [a.output for a in activations.values()]
    if not known.get(images, {}).keys() >= set(outputs):
        known[images] = float_means(prepared, feed, outputs)
    factors = {step.producer: np.asarray(step.factors) for step in plan.equalization}
    biases = dict(plan.biases)
    written = write_qdq(prepared, plan, float_bias=True)
    with progress.task("Correcting biases", len(names)) as counter:
        for layer in layers(written, feed, names, outputs=choose is None):
            name = layer.node.name
            output = layer.run(None if choose is None else choose(layer, graph, nodes[name]))
            if name in own:
                activation = activations[name]
                wanted = known[images][activation.output] / factors.get(name, 1.0)
                shift = find_shift(some_positions(output, images), activation, wanted)
                output += broadcast_along(shift.astype(output.dtype), 1, output.ndim)
                old = 0.0 if layer.bias is None else layer.bias.reshape(-1).astype(np.float64)
                biases[name] = tuple(float(b) for b in old + shift)
            layer.outgoing = output
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


def float_means(model: ModelProto, feed: Feed, names: list[str]) -> dict[str, NDArray[np.float64]]:
    """Return the mean of each channel, (C,), of tensors of a float graph, at some positions."""
    session = session_of(with_outputs(model, names))
    count = images_in(feed)
    sums: dict[str, NDArray[np.float64]] = {}
    for start in range(0, count, _AT_ONCE):
        part = {name: array[start : start + _AT_ONCE] for name, array in feed.items()}
        share = images_in(part) / count
        for name, value in zip(names, session.run(names, part), strict=True):
            sums[name] = sums.get(name, 0.0) + channel_means(some_positions(value, count)) * share
    return sums
