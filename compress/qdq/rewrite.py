"""Changes of the fp32 graph before Q/DQ: a plan's corrections, and ops a target does better."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from compress.errors import QuantizationError
from compress.graph.model import (
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
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for step in plan.equalization:
        factors = np.asarray(step.factors, np.float64)
        if step.producer:
            _scale_output(tensors, _named(nodes, step.producer), 1 / factors)
        if step.consumer:
            _scale_input(tensors, _named(nodes, step.consumer), factors)
    taken, graph = all_names(model), Graph(model)
    for name, bias in plan.biases.items():
        node = _named(nodes, name)
        wanted = _outputs_of(graph, node)
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


def _outputs_of(graph: Graph, node: NodeProto) -> int:
    """Return the number of output channels of a weighted node.

    Raises:
        QuantizationError: it has no constant weight.
    """
    weight = graph.weight(node)
    if weight is None:
        raise QuantizationError(f"node {node.name!r} of the plan has no constant weight")
    groups = attribute(node, "group", 1) if node.op_type == "ConvTranspose" else 1
    shape = graph.initializers[weight].dims
    return int(shape[channel_axis(node)]) * int(groups)


Tensors = dict[str, TensorProto]


def _scale_output(tensors: Tensors, node: NodeProto, factors: NDArray[Any]) -> None:
    if node.op_type == "BatchNormalization":
        for position in (1, 2):  # its scale and offset
            _multiply(tensors, node, position, factors)
        return
    weight = tensors.get(node.input[1])
    if weight is None or weight.dims[channel_axis(node)] != len(factors):
        raise QuantizationError(f"the factors of the plan do not fit node {node.name!r}")
    shape = [1] * len(weight.dims)
    shape[channel_axis(node)] = -1
    _multiply(tensors, node, 1, factors.reshape(shape))
    if len(node.input) > 2 and node.input[2]:
        _multiply(tensors, node, 2, factors)


def _scale_input(tensors: Tensors, node: NodeProto, factors: NDArray[Any]) -> None:
    if node.op_type == "BatchNormalization":
        _multiply(tensors, node, 1, factors)
        _multiply(tensors, node, 3, 1 / factors)  # the mean
        return
    weight = tensors.get(node.input[1])
    if weight is None:
        raise QuantizationError(f"node {node.name!r} has no constant weight to rescale")
    if node.op_type == "Conv":  # (out, in/groups, ...): each group reads channels of its own
        groups = attribute(node, "group", 1)
        if len(factors) != groups * weight.dims[1]:
            raise QuantizationError(f"the factors of the plan do not fit node {node.name!r}")
        rows = factors.reshape(groups, -1).repeat(weight.dims[0] // groups, 0)
        factors = rows.reshape(*rows.shape, *[1] * (len(weight.dims) - 2))
    elif not attribute(node, "transB", 0):  # (in, out)
        factors = factors.reshape(-1, 1)
    _multiply(tensors, node, 1, factors)


def _multiply(tensors: Tensors, node: NodeProto, position: int, factors: NDArray[Any]) -> None:
    """Multiply a constant that ``node`` reads."""
    tensor = tensors.get(node.input[position])
    if tensor is None:
        raise QuantizationError(f"what node {node.name!r} reads is no constant to rescale")
    value = numpy_helper.to_array(tensor)
    flat = value.reshape(-1) if position == 2 else value
    try:
        scaled = np.asarray(flat * factors, value.dtype).reshape(value.shape)
    except ValueError:
        raise QuantizationError(f"the factors of the plan do not fit node {node.name!r}") from None
    tensor.CopyFrom(numpy_helper.from_array(scaled, tensor.name))
