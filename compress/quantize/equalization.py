"""Equalization: channels of a tensor are scaled alike, and the layers around it undo it."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from compress.graph.model import GraphIndex, attribute
from compress.qdq.plan import Equalization, QuantPlan
from compress.quantize.calibration import Statistics
from compress.quantize.channels import ChannelLabels, channels

_LEAST = 1 / 32  # factor
_NONE = 1e-6  # relative size of a dead channel
_UNSEEN = 8  # images; with as many a channel may be twice as large on images yet to come


def scalable(graph: GraphIndex, ranged: Collection[str], floating: Iterable[str] = ()) -> list[str]:
    """Return the tensors whose channels ``equalize`` must know.

    Args:
        graph: A prepared graph.
        ranged: Tensors that may be quantized.
        floating: Nodes left in float.
    """
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

    Args:
        prepared: The fp32 graph.
        plan: Must not hold rescalings, scales or biases yet. Its ranges are those of the graph
            as it was.
        seen: Of ``prepared``, with the channels of its ``scalable`` tensors.
        alpha: How far to go, in [0, 1]; 0 scales only what depthwise layers alone read, which costs
            nothing elsewhere.

    Returns:
        The plan, and what would be seen of the rescaled graph.

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
        if node.name in found.layers and not _is_depthwise(found.graph, node):
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


def _is_depthwise(graph: GraphIndex, node: NodeProto) -> bool:
    if node.op_type == "BatchNormalization":
        return True
    shape = graph.initializers[node.input[1]].dims
    group = attribute(node, "group", 1)
    return bool(node.op_type == "Conv" and group > 1 and group == shape[0] and shape[1] == 1)
