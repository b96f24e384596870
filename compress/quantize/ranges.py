"""From Statistics to a QuantPlan: an observer chooses the range of each tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from onnx import ModelProto

from compress import plugins
from compress.errors import UsageError
from compress.graph.model import ACTIVATIONS, GraphIndex
from compress.qdq.plan import ActivationRange, QuantPlan
from compress.quantize.calibration import Statistics


def make_quant_plan(
    statistics: Statistics,
    *,
    target: str = "onnxruntime",
    observer: str | Mapping[str, Any] = "mse",
    exclude: Mapping[str, str] | None = None,
) -> QuantPlan:
    """Return a plan with the ranges that ``observer`` chooses; one pass serves any of them.

    Args:
        statistics: What ``calibrate`` saw.
        target: The runtime the plan is for.
        observer: Name of a plug-in, with options or without.
        exclude: Nodes to leave in float, and why.

    Raises:
        UsageError: the observer needs histograms and only extremes were kept.
        UnknownNameError: there is no such observer or target.
    """
    name, _ = plugins.parse("observers", observer)
    choose = plugins.create("observers", observer)
    if not statistics.counted and name != "minmax":
        raise UsageError(
            f"observer {name!r} needs histograms, and calibration kept extremes only",
            fix="Calibrate with histograms=True",
        )
    ranges = {}
    for tensor, seen in statistics.tensors.items():
        low, high = seen.trimmed(*choose(seen, symmetric=False))
        limit = max(map(abs, seen.trimmed(*choose(seen, symmetric=True))))
        ranges[tensor] = ActivationRange(low, high, limit, name, (seen.low, seen.high))
    return QuantPlan(target, name, ranges, float_nodes=dict(exclude or {}))


def begin_below_zero(plan: QuantPlan, prepared: ModelProto) -> QuantPlan:
    """Return a plan for OpenVINO with a zero point of 1 behind BatchNorms that no layer took up.

    With a range that begins at 0, quantizing does what the Relu between them does. OpenVINO then
    drops the Relu and folds the BatchNorm into the quantization, as an op that it runs in fp32
    between two reorders: DenseNet-121 takes 1.3 times as long. One code of 255 keeps them apart.
    Plans for other targets are returned as they are.
    """
    if plan.target != "openvino":
        return plan
    ranges = dict(plan.activations)
    for tensor in _behind_batchnorm(GraphIndex(prepared)):
        found = ranges.get(tensor)
        if found is not None and found.low >= 0.0:
            ranges[tensor] = dataclasses.replace(found, low=-found.high / 254)
    return plan.changed(activations=ranges)


def _behind_batchnorm(graph: GraphIndex) -> Iterator[str]:
    """Yield the outputs of activations that read a BatchNorm."""
    for node in graph.nodes:
        maker = graph.producer.get(node.input[0]) if node.op_type in ACTIVATIONS else None
        if maker is not None and maker.op_type == "BatchNormalization":
            yield node.output[0]
