"""Equalization: channels of a tensor are scaled alike, and the layers around it undo it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from compress.graph.model import GraphIndex, attribute
from compress.qdq.plan import Equalization, QuantPlan
from compress.quantize.channels import ChannelLabels, channels
from compress.quantize.images import Feed
from compress.quantize.sessions import session_of, with_outputs
from compress.quantize.sqnr import portions

_LEAST = 1 / 32  # factor
_NONE = 1e-6  # relative size of a dead channel
_UNSEEN = 8  # images; with as many a channel may be twice as large on images yet to come


def equalize(prepared: ModelProto, plan: QuantPlan, feed: Feed, alpha: float) -> QuantPlan:
    """Return ``plan`` with rescalings of all channels that the layers around them can undo.

    Channels that belong together (through Add, Concat, pooling, ...) are divided by one factor:
    (range of the channel / range of its tensor) ** alpha, the largest of them if they are several,
    and with room for what larger values other images bring, the more the fewer ``feed`` holds.
    The weights that make them are divided, the weights that read them multiplied. Behind Relu any
    factor is exact; behind a Clip only factors that keep the channel below the bound on all of
    ``feed``. Where depthwise layers alone read the channel their own scales absorb the factor, so
    alpha is 1 there.

    Args:
        prepared: The fp32 graph.
        plan: Must not hold rescalings, scales or biases yet. Its ranges are those of the graph
            as it was: calibrate again.
        feed: Images, by input name.
        alpha: How far to go, in (0, 1].

    Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction,
    ICCV 2019, https://arxiv.org/abs/1906.04721, section 4.1; here by ranges of activations, since
    weights have a scale for each channel.
    """
    graph = GraphIndex(prepared)
    found = channels(graph, set(plan.float_nodes))
    factors = _factors(prepared, plan, feed, alpha, found)
    steps = []
    for node in graph.nodes:
        if node.name not in found.layers:
            continue
        made, read = (found.labels.get(name) for name in (node.output[0], node.input[0]))
        for labels, names in ((made, (node.name, "")), (read, ("", node.name))):
            if labels is not None and np.any(factors[labels] != 1):
                steps.append(Equalization(*names, tuple(float(f) for f in factors[labels])))
    return plan.changed(equalization=tuple(steps), notes=(*plan.notes, _note(plan, found, factors)))


def _factors(
    prepared: ModelProto, plan: QuantPlan, feed: Feed, alpha: float, found: ChannelLabels
) -> NDArray[np.float64]:
    """Return the factor of each label."""
    scaled = {name: labels for name, labels in found.labels.items() if labels.any()}
    count = 1 + max((int(labels.max()) for labels in scaled.values()), default=0)
    size, floor = np.full(count, _NONE), np.zeros(count)
    dense = np.zeros(count, bool)
    ranged = plan.activations or scaled
    seen = _largest(prepared, feed, [n for n in scaled if n in ranged or n in found.bounds])
    for name, largest in seen.items():
        labels = scaled[name]
        if name in ranged and largest.max() > 0:
            np.maximum.at(size, labels, largest / largest.max())
        if name in found.bounds:
            bound = found.bounds[name]
            np.maximum.at(floor, labels, np.where(largest < bound, largest / bound, 1.0))
    size *= 1 + _UNSEEN / max(len(array) for array in feed.values())
    for node in found.graph.nodes:
        if node.name in found.layers and not _is_depthwise(found.graph, node):
            dense[scaled.get(node.input[0], [])] = True
    factors = np.clip(np.minimum(size, 1.0) ** np.where(dense, alpha, 1.0), _LEAST, 1.0)
    factors = np.maximum(factors, np.minimum(floor, 1.0))
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


def _largest(
    prepared: ModelProto, feed: Feed, tensors: list[str]
) -> dict[str, NDArray[np.float64]]:
    """Return the largest magnitude of each channel, (C,), of tensors on all of ``feed``."""
    session = session_of(with_outputs(prepared, tensors))
    found: dict[str, NDArray[np.float64]] = {}
    for part in portions(feed) if tensors else ():
        for name, value in zip(tensors, session.run(tensors, part), strict=True):
            others = tuple(d for d in range(value.ndim) if d != 1)
            largest = np.abs(value).max(axis=others).astype(np.float64)
            found[name] = np.maximum(found.get(name, 0.0), largest)
    return found
