"""Changes of the fp32 graph before Q/DQ: a plan's corrections, and ops a target does better."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from compress.errors import QuantizationError
from compress.qdq.graph import (
    Graph,
    all_names,
    attribute,
    channel_axis,
    fresh_name,
    replace_nodes,
    set_constant,
)
from compress.qdq.plan import QuantPlan


def apply_corrections(model: ModelProto, plan: QuantPlan) -> None:
    """Rescale neighbouring layers and replace biases as ``plan`` says; ``model`` is changed.

    Raises:
        QuantizationError: the plan names a node that is not there or does not fit.
    """
    nodes = {node.name: node for node in model.graph.node}
    for pair in plan.equalization:
        factors = np.asarray(pair.factors, np.float64)
        _scale_output(model, _named(nodes, pair.producer), 1 / factors)
        _scale_input(model, _named(nodes, pair.consumer), factors)
    taken = all_names(model)
    for name, bias in plan.biases.items():
        node = _named(nodes, name)
        wanted = _outputs_of(model, node)
        if len(bias) != wanted:
            raise QuantizationError(
                f"the plan has {len(bias)} biases for node {name!r}", expected=f"{wanted}"
            )
        del node.input[2:]
        node.input.append(fresh_name(taken, f"{name}_bias"))
        set_constant(model, node.input[2], np.asarray(bias, np.float32))


def rewrite_for(model: ModelProto, target: str) -> None:
    """Write ops as others that ``target`` computes in int8; ``model`` is changed."""
    if target != "onnxruntime":  # the others fuse a BatchNorm into what is around it
        return
    graph = Graph(model)
    taken = all_names(model)
    nodes = []
    for node in model.graph.node:
        nodes.append(_batchnorm_as_conv(model, graph, node, taken) or node)
    replace_nodes(model, nodes)


def _batchnorm_as_conv(
    model: ModelProto, graph: Graph, node: NodeProto, taken: set[str]
) -> NodeProto | None:
    """Return a BatchNorm that could not be folded as a 1x1 depthwise Conv, exact in int8."""
    values = [graph.constant(name) for name in node.input[1:5]]
    if node.op_type != "BatchNormalization" or any(v is None for v in values):
        return None
    if graph.rank(node.input[0]) != 4:
        return None
    scale, bias, mean, variance = (np.asarray(v, np.float64) for v in values)
    factor = scale / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    names = [fresh_name(taken, f"{node.name}_{part}") for part in ("factor", "offset")]
    set_constant(model, names[0], factor.reshape(-1, 1, 1, 1).astype(np.float32))
    set_constant(model, names[1], (bias - mean * factor).astype(np.float32))
    return helper.make_node(
        "Conv",
        [node.input[0], *names],
        [node.output[0]],
        name=node.name,
        group=len(factor),
        kernel_shape=[1, 1],
    )


def _named(nodes: dict[str, NodeProto], name: str) -> NodeProto:
    if name not in nodes:
        raise QuantizationError(
            f"the plan speaks of node {name!r}, which is not in the graph",
            expected="the plan that was made for this graph",
            fix="Make the plan again with `compress quantize`",
        )
    return nodes[name]


def _outputs_of(model: ModelProto, node: NodeProto) -> int:
    """Return the number of output channels of a weighted node.

    Raises:
        QuantizationError: it has no constant weight.
    """
    weight = Graph(model).weight(node)
    if weight is None:
        raise QuantizationError(f"node {node.name!r} of the plan has no constant weight")
    groups = attribute(node, "group", 1) if node.op_type == "ConvTranspose" else 1
    shape = next(t.dims for t in model.graph.initializer if t.name == weight)
    return int(shape[channel_axis(node)]) * int(groups)


def _scale_output(model: ModelProto, node: NodeProto, factors: NDArray[Any]) -> None:
    graph = Graph(model)
    weight = graph.constant(node.input[1])
    if weight is None or weight.shape[channel_axis(node)] != len(factors):
        raise QuantizationError(f"the factors of the plan do not fit node {node.name!r}")
    shape = [1] * weight.ndim
    shape[channel_axis(node)] = -1
    set_constant(model, node.input[1], (weight * factors.reshape(shape)).astype(weight.dtype))
    if len(node.input) > 2:
        bias = graph.constant(node.input[2])
        if bias is not None:
            scaled = bias.reshape(-1) * factors
            set_constant(model, node.input[2], scaled.astype(bias.dtype))


def _scale_input(model: ModelProto, node: NodeProto, factors: NDArray[Any]) -> None:
    weight = Graph(model).constant(node.input[1])
    if weight is None:
        raise QuantizationError(f"node {node.name!r} has no constant weight to rescale")
    shape = [1] * weight.ndim
    depthwise = node.op_type == "Conv" and attribute(node, "group", 1) > 1
    axis = 0 if depthwise else 1
    if node.op_type == "Gemm" and not attribute(node, "transB", 0):
        axis = 0
    if weight.shape[axis] != len(factors):
        raise QuantizationError(f"the factors of the plan do not fit node {node.name!r}")
    shape[axis] = -1
    set_constant(model, node.input[1], (weight * factors.reshape(shape)).astype(weight.dtype))
