"""Layer-wise execution of a Q/DQ graph: each layer can be corrected before the next runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from compress.graph.model import GraphIndex, attribute, reads
from compress.quantize.images import Feed
from compress.quantize.sessions import session_of

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
        node = NodeProto()
        node.CopyFrom(self.node)
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
    last_use = _last_uses(graph)
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


def _last_uses(graph: GraphIndex) -> dict[str, int]:
    return {name: i for i, node in enumerate(graph.nodes) for name in reads(node)}


def _constants(graph: GraphIndex, nodes: Sequence[NodeProto]) -> list[onnx.TensorProto]:
    read = {name for node in nodes for name in reads(node)}
    return [tensor for name, tensor in graph.initializers.items() if name in read]


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
    constants = [t for t in _constants(graph, nodes) if t.name not in feed]
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


def channel_means(values: NDArray[Any], axis: int = 1) -> NDArray[np.float64]:
    """Return the mean of each channel, (C,), over images and space."""
    others = tuple(d for d in range(values.ndim) if d != axis % values.ndim)
    return np.asarray(values.mean(axis=others, dtype=np.float64))
