"""Equalization: channels of a tensor are scaled alike, and the layers around it undo it.

Which channels must be scaled together is told by labels, one for each channel of every tensor. An
operator whose result is scaled as its inputs are joins their labels; a layer with weights ends
them, since its weights take a factor up; any other operator fixes them, that is, joins them with
label 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from compress.graph.model import GraphIndex, attribute, channel_axis
from compress.qdq.plan import Equalization, QuantPlan
from compress.quantize.calibration import Statistics

Labels = NDArray[np.int64]

_LIKE_INPUT = frozenset({"Relu", "LeakyRelu", "PRelu", "Identity", "Dropout"})
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
_OVER_SPACE = frozenset({"Resize"})  # interpolation adds up values of one channel


@dataclass
class ChannelLabels:
    """Labels of the channels of one graph."""

    graph: GraphIndex  # the graph
    # Of each tensor with channels in dimension 1, (C,); 0 = must not be scaled
    labels: dict[str, Labels] = field(default_factory=dict)
    # Names of the nodes whose weights take factors up
    layers: set[str] = field(default_factory=set)
    # Number of tensors that must not be scaled, by the operator that says so
    fixed: Counter[str] = field(default_factory=Counter)


class _Labeller:
    def __init__(self, graph: GraphIndex, floating: set[str]) -> None:
        self.graph, self.floating = graph, floating
        self.found = ChannelLabels(graph)
        self.pairs: list[tuple[Labels, Labels]] = []
        self.count = 1  # label 0 = fixed
        self.rules: dict[str, Callable[[NodeProto], bool]] = {
            **dict.fromkeys(_LIKE_INPUT | _POOLS | _OVER_SPACE, self._same),
            "Clip": self._clip,
            "Add": self._sum,
            "Mul": self._gate,
            "Concat": lambda node: self._whole(node, node.output[0], list(node.input)),
            "Split": lambda node: self._whole(node, node.input[0], list(node.output)),
            "Slice": self._slice,
            "Pad": self._pad,
            "Flatten": self._flatten,
        }

    def of(self, tensor: str) -> Labels | None:
        """Return the labels of ``tensor``, new ones at first; None without known channels."""
        if tensor not in self.found.labels:
            shape = self.graph.shapes.get(tensor)
            if shape is None or len(shape) < 2 or shape[1] is None:
                return None
            self.found.labels[tensor] = np.arange(self.count, self.count + shape[1])
            self.count += shape[1]
        return self.found.labels[tensor]

    def join(self, one: Labels | None, other: Labels | None) -> bool:
        """Let two sets of channels have the same factors; return whether they fit."""
        if one is None or other is None or len(one) != len(other):
            return False
        self.pairs.append((one, other))
        return True

    def fix(self, tensor: str, why: str) -> None:
        labels = self.of(tensor)
        if labels is not None and tensor not in self.graph.initializers:
            self.pairs.append((labels, np.zeros_like(labels)))
            self.found.fixed[why] += 1

    def visit(self, node: NodeProto) -> None:
        if self.is_layer(node):
            self.found.layers.add(node.name)
            for tensor in (node.input[0], node.output[0]):  # perhaps no other operator has it
                self.of(tensor)
            return
        rule = self.rules.get(node.op_type)
        if rule is None or not rule(node):
            for tensor in (*self.graph.data_inputs(node), *node.output):
                self.fix(tensor, node.op_type)

    def _same(self, node: NodeProto) -> bool:
        alone = len(node.output) == 1
        return alone and self.join(self.of(node.input[0]), self.of(node.output[0]))

    def _sum(self, node: NodeProto) -> bool:
        if len(self.graph.data_inputs(node)) != 2:
            return False
        one, other, made = (self.of(name) for name in (*node.input, node.output[0]))
        return self.join(one, other) and self.join(one, made)

    def _slice(self, node: NodeProto) -> bool:
        """A part of the channels, or of the space of all of them."""
        given = [self.graph.constant(name) for name in (*node.input[1:], "", "")[:4]]
        starts, ends = given[:2]
        if starts is None or ends is None or len(node.output) != 1:
            return False
        if any(value is None for value, name in zip(given, node.input[1:], strict=False) if name):
            return False
        rank = self.graph.rank(node.input[0]) or 0
        axes = np.arange(len(starts)) if given[2] is None else given[2] % max(rank, 1)
        steps = np.ones(len(starts), int) if given[3] is None else given[3]
        whole, part = self.of(node.input[0]), self.of(node.output[0])
        for axis, *bounds in zip(axes, starts, ends, steps, strict=True):
            if axis == 1 and whole is not None:
                whole = whole[slice(*map(int, bounds))]
        return self.join(whole, part)

    def _pad(self, node: NodeProto) -> bool:
        """Zeros around the image, or channels of zeros, which any factor leaves as they are."""
        pads = self.graph.constant(node.input[1]) if len(node.input) > 1 else None
        value = self.graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else 0.0
        inside, whole = self.of(node.input[0]), self.of(node.output[0])
        if (
            pads is None
            or value is None
            or np.any(value)
            or (len(node.input) > 3 and node.input[3])
        ):
            return False
        if inside is None or whole is None:
            return False
        before, after = int(pads[1]), int(pads[1 + len(pads) // 2])
        if (before or after) and attribute(node, "mode", b"constant") != b"constant":
            return False
        return min(before, after) >= 0 and self.join(inside, whole[before : before + len(inside)])

    def _whole(self, node: NodeProto, whole: str, parts: list[str]) -> bool:
        """Join the channels of ``whole`` with those of its parts, one after the other."""
        if attribute(node, "axis", 0) not in (1, 1 - (self.graph.rank(whole) or 0)):
            return False
        labels = [part for name in parts if (part := self.of(name)) is not None]
        return len(labels) == len(parts) and self.join(self.of(whole), np.concatenate(labels))

    def is_layer(self, node: NodeProto) -> bool:
        """Return whether the weights of ``node`` take factors up on both sides."""
        graph = self.graph
        if node.op_type == "BatchNormalization":
            return all(name in graph.initializers for name in node.input[1:])
        weight = graph.weight(node)
        if weight is None or len(graph.readers[weight]) > 1 or node.name in self.floating:
            return False
        if len(node.input) > 2 and node.input[2]:
            bias = graph.constant(node.input[2])
            if bias is None or bias.size != graph.initializers[weight].dims[channel_axis(node)]:
                return False
        if node.op_type == "Gemm":
            odd = attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0
            return not odd and attribute(node, "beta", 1.0) == 1.0
        if node.op_type == "ConvTranspose":
            return bool(attribute(node, "group", 1) == 1)
        return node.op_type == "Conv"

    def _clip(self, node: NodeProto) -> bool:
        """What cuts at zero alone, as Relu does; an upper bound must cut where it did.

        Channels that stayed below it on the images seen may be scaled up to it, but what other
        images bring is then cut: of EfficientNet-Lite0 that cost 1 dB on images not seen.
        """
        low, high = (*node.input[1:], "", "")[:2]
        least = self.graph.constant(low)
        at_zero = least is not None and least.item() == 0
        return at_zero and not high and self.join(self.of(node.input[0]), self.of(node.output[0]))

    def _gate(self, node: NodeProto) -> bool:
        """A product with one number for each channel, as squeeze-excite: the other side scales."""
        shapes = [self.graph.shapes.get(name) for name in self.graph.data_inputs(node)]
        small = [shape is not None and len(shape) == 4 and shape[2:] == (1, 1) for shape in shapes]
        if len(small) != 2 or sum(small) != 1:
            return False
        gate, other = node.input[small.index(True)], node.input[small.index(False)]
        self.fix(gate, "gate")
        return self.join(self.of(other), self.of(node.output[0]))

    def _flatten(self, node: NodeProto) -> bool:
        labels, flat = self.of(node.input[0]), self.of(node.output[0])
        if labels is None or flat is None or len(flat) % len(labels):
            return False
        return attribute(node, "axis", 1) == 1 and self.join(
            np.repeat(labels, len(flat) // len(labels)), flat
        )


def channels(graph: GraphIndex, floating: set[str]) -> ChannelLabels:
    """Return the labels of all channels of a prepared graph; ``floating`` nodes stay as is."""
    labeller = _Labeller(graph, floating)
    for tensor in (*graph.inputs, *graph.outputs, *graph.captured):
        labeller.fix(tensor, "input or output")
    for node in graph.nodes:
        labeller.visit(node)
    found = labeller.found
    if not labeller.pairs:
        return found
    left = np.concatenate([a for a, _ in labeller.pairs])
    right = np.concatenate([b for _, b in labeller.pairs])
    size = labeller.count
    edges = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(size, size))
    _, found_in = connected_components(edges, directed=False)
    fixed = found_in == found_in[0]
    component: Labels = np.where(fixed, 0, found_in + 1).astype(np.int64)
    found.labels = {name: component[labels] for name, labels in found.labels.items()}
    return found


_LEAST = 1 / 32  # factor
_NONE = 1e-6  # relative size of a dead channel
_UNSEEN = 8  # images; with as many a channel may be twice as large on images yet to come


def scalable(graph: GraphIndex, ranged: Collection[str], floating: Iterable[str] = ()) -> list[str]:
    """Return those of ``ranged``, of a prepared graph, whose channels ``equalize`` must know."""
    found = channels(graph, set(floating))
    return [name for name in ranged if name in found.labels and found.labels[name].any()]


def equalize(
    prepared: ModelProto, plan: QuantPlan, seen: Statistics, alpha: float
) -> tuple[QuantPlan, Statistics]:
    """Return ``plan`` with rescalings of all channels that the layers around them can undo.

    Channels that belong together (through Add, Concat, pooling, ...) are divided by one factor:
    (range of the channel / range of its tensor) ** alpha, the largest of them if they are several,
    and with room for what larger values other images bring, the more the fewer were seen.
    The weights that make them are divided, the weights that read them multiplied. Where depthwise
    layers alone read the channel their own scales absorb the factor, so alpha is 1 there.

    With the plan comes what would be seen of the rescaled graph. ``plan`` must not hold rescalings,
    scales or biases yet; ``seen`` has the channels of the ``scalable`` tensors. An ``alpha`` of 0
    scales only what depthwise layers alone read, which costs nothing elsewhere.

    Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction,
    ICCV 2019, https://arxiv.org/abs/1906.04721, section 4.1; here by ranges of activations, since
    weights have a scale for each channel.
    """
    graph = GraphIndex(prepared)
    found = channels(graph, set(plan.float_nodes))
    factors = _factors(plan, seen, alpha, found)
    steps = []
    for node in graph.nodes:
        if node.name not in found.layers:
            continue
        made, read = (found.labels.get(name) for name in (node.output[0], node.input[0]))
        for labels, names in ((made, (node.name, "")), (read, ("", node.name))):
            if labels is not None and np.any(factors[labels] != 1):
                steps.append(Equalization(*names, tuple(float(f) for f in factors[labels])))
    notes = (*plan.notes, _note(plan, found, factors))
    by_tensor = {name: factors[found.labels[name]] for name in seen.by_channel}
    moved = {name: each for name, each in by_tensor.items() if np.any(each != 1)}
    return plan.changed(equalization=tuple(steps), notes=notes), seen.divided(moved)


def _factors(
    plan: QuantPlan, seen: Statistics, alpha: float, found: ChannelLabels
) -> NDArray[np.float64]:
    """Return the factor of each label."""
    scaled = {name: labels for name, labels in found.labels.items() if labels.any()}
    count = 1 + max((int(labels.max()) for labels in scaled.values()), default=0)
    size = np.full(count, _NONE)
    dense = np.zeros(count, bool)
    ranged = plan.activations or scaled
    for name in scaled.keys() & seen.by_channel.keys():
        labels, largest = scaled[name], seen.by_channel[name].largest
        if name in ranged and largest.max() > 0:
            np.maximum.at(size, labels, largest / largest.max())
    size *= 1 + _UNSEEN / max(seen.images, 1)
    for node in found.graph.nodes:
        if node.name in found.layers and not is_depthwise(found.graph, node):
            dense[scaled.get(node.input[0], [])] = True
    factors = np.clip(np.minimum(size, 1.0) ** np.where(dense, alpha, 1.0), _LEAST, 1.0)
    factors[0] = 1.0
    return np.asarray(factors)


def _note(plan: QuantPlan, found: ChannelLabels, factors: NDArray[np.float64]) -> str:
    quantized = [found.labels[name] for name in plan.activations if name in found.labels]
    done = sum(bool(np.any(factors[labels] != 1)) for labels in quantized)
    why = ", ".join(f"{op} {count}" for op, count in found.fixed.most_common(6))
    return (
        f"equalization scales {done} of {len(plan.activations)} tensors"
        + f"; tensors that must stay as they are, by the operator that says so: {why}" * bool(why)
    )


def is_depthwise(graph: GraphIndex, node: NodeProto) -> bool:
    """Return whether a layer with constant weights has one filter for each channel."""
    if node.op_type == "BatchNormalization":
        return True
    shape = graph.initializers[node.input[1]].dims
    group = attribute(node, "group", 1)
    return bool(node.op_type == "Conv" and group > 1 and group == shape[0] and shape[1] == 1)
