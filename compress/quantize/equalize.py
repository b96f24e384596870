"""Equalization: channels of a tensor are scaled alike, and the layers around it undo it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from compress.qdq.graph import Graph, attribute
from compress.qdq.plan import Equalization, QuantPlan
from compress.quantize.activations import activation_of
from compress.quantize.images import Feed
from compress.quantize.sessions import session_of, with_outputs

_LEAST, _MOST = 1 / 32, 32.0  # factors


def equalize(prepared: ModelProto, plan: QuantPlan, feed: Feed, alpha: float) -> QuantPlan:
    """Return ``plan`` with rescalings between each layer and the only one that reads it.

    Channel c of the tensor between them is divided by (range of c / largest range) ** alpha, before
    the activation, and the weights that read it are multiplied. Behind Relu any factor is exact;
    behind a Clip only factors that keep the channel below the bound on all of ``feed``. Where a
    depthwise layer reads the tensor its own scales absorb the factor, so alpha is 1 there.

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
    graph = Graph(prepared)
    found = [(a, b, bound) for a in graph.nodes for b, bound in _reader(graph, a, plan)]
    if not found:
        return plan
    tensors = [producer_end(graph, a) for a, _, _ in found]
    largest = _largest(prepared, feed, tensors)
    steps = []
    for (producer, consumer, bound), tensor in zip(found, tensors, strict=True):
        seen = largest[tensor]
        power = 1.0 if _is_depthwise(graph, consumer) else alpha
        top = seen.max()
        if not top > 0:
            continue
        factors = np.clip(np.maximum(seen / top, 1e-6) ** power, _LEAST, _MOST)
        if math.isfinite(bound):
            factors = np.where(seen < bound, np.maximum(factors, seen / bound), 1.0)
        if np.ptp(factors) > 0.01:
            steps.append(
                Equalization(producer.name, consumer.name, tuple(float(f) for f in factors))
            )
    return plan.changed(equalization=tuple(steps))


def producer_end(graph: Graph, node: NodeProto) -> str:
    """Return the tensor behind the activation of ``node``."""
    return activation_of(graph, node).output


def _reader(graph: Graph, node: NodeProto, plan: QuantPlan) -> list[tuple[NodeProto, float]]:
    """Return the one layer that reads ``node`` and the bound of the Clip between them, if any."""
    if not _can_scale(graph, node, plan):
        return []
    bound = math.inf
    after = graph.activation_after(node)
    tensor = node.output[0]
    if after is not None:
        tensor = after.output[0]
        if after.op_type == "Clip":
            low, high = (graph.constant(name) for name in (*after.input[1:], "", "")[:2])
            if low is None or low.item() != 0:
                return []
            bound = math.inf if high is None else float(high.item())
    reader = graph.only_reader(tensor)
    if reader is None or reader.input[0] != tensor or not _can_scale(graph, reader, plan):
        return []
    grouped = attribute(reader, "group", 1) > 1 and not _is_depthwise(graph, reader)
    return [] if grouped else [(reader, bound)]


def _can_scale(graph: Graph, node: NodeProto, plan: QuantPlan) -> bool:
    if node.op_type not in ("Conv", "Gemm") or graph.weight(node) is None:
        return False
    if node.op_type == "Gemm" and attribute(node, "transA", 0):
        return False
    return len(graph.readers[node.input[1]]) == 1 and node.name not in plan.float_nodes


def _is_depthwise(graph: Graph, node: NodeProto) -> bool:
    shape = graph.initializers[node.input[1]].dims
    group = attribute(node, "group", 1)
    return bool(node.op_type == "Conv" and group > 1 and group == shape[0] and shape[1] == 1)


def _largest(
    prepared: ModelProto, feed: Feed, tensors: list[str], batch: int = 8
) -> dict[str, NDArray[np.float64]]:
    session = session_of(with_outputs(prepared, tensors))
    found: dict[str, NDArray[np.float64]] = {}
    for start in range(0, len(next(iter(feed.values()))), batch):
        part = {name: array[start : start + batch] for name, array in feed.items()}
        for name, value in zip(tensors, session.run(tensors, part), strict=True):
            others = tuple(d for d in range(value.ndim) if d != 1)
            largest = np.abs(value).max(axis=others).astype(np.float64)
            found[name] = np.maximum(found.get(name, 0.0), largest)
    return found
