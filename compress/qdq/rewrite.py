"""Changes of the fp32 graph before Q/DQ: a plan's corrections, and ops a target does better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import ModelProto

from compress.errors import QuantizationError
from compress.graph.model import ACTIVATIONS, WEIGHTED, attribute, channel_axis
from compress.graph.rewrites import is_convolution, write_convolution
from compress.graph.values import (
    EditableGraph,
    constant,
    is_never_negative,
    is_read_once,
    maker,
    set_input,
)
from compress.qdq.grid import put_on_grid
from compress.qdq.plan import QuantPlan


def apply_corrections(model: ModelProto, plan: QuantPlan) -> ModelProto:
    """Return ``model`` with inputs on their grids, layers rescaled and biases replaced.

    Raises:
        QuantizationError: the plan names a node that is not there or does not fit.
    """
    model = put_on_grid(model, plan)
    if not plan.equalization and not plan.biases:
        return model
    graph = EditableGraph(model)
    correct(graph, plan)
    return graph.to_model()


def correct(graph: EditableGraph, plan: QuantPlan) -> None:
    """Rescale neighbouring layers of ``graph`` and replace biases as ``plan`` says.

    Raises:
        QuantizationError: the plan names a node that is not there or does not fit.
    """
    nodes = {node.name or "": node for node in graph.nodes}
    for step in plan.equalization:
        factors = np.asarray(step.factors, np.float64)
        if step.producer:
            _scale_output(graph, _named(nodes, step.producer), 1 / factors)
        if step.consumer:
            _scale_input(graph, _named(nodes, step.consumer), factors)
    for name, bias in plan.biases.items():
        node = _named(nodes, name)
        wanted = _outputs_of(node)
        if len(bias) != wanted:
            raise QuantizationError(
                f"the plan has {len(bias)} biases for node {name!r}", expected=f"{wanted}"
            )
        set_input(node, 2, graph.add_constant(f"{name}_bias", np.asarray(bias, np.float32)))


def rewrite_for(model: ModelProto, target: str) -> ModelProto:
    """Return ``model`` with ops written as others that ``target`` computes in int8."""
    rules = _REWRITTEN.get(target, {})
    if not any(node.op_type in rules for node in model.graph.node):
        return model
    graph = EditableGraph(model)
    for node in graph.of_type(*rules):
        rules[node.op_type](graph, node)
    return graph.to_model()


def _write_as_conv(graph: EditableGraph, node: ir.Node) -> None:
    """Write a BatchNorm that could not be folded as a 1x1 depthwise Conv, exact in int8."""
    values = [constant(value) for value in node.inputs[1:5]]
    image = node.inputs[0]
    trains = attribute(node, "training_mode", 0)  # takes mean and variance of the batch
    if (
        trains
        or image is None
        or any(v is None for v in values)
        or not (graph.rank(image) or 0) > 2
    ):
        return
    places = [1] * ((graph.rank(image) or 0) - 2)
    scale, bias, mean, variance = (np.asarray(v, np.float64) for v in values)
    factor = scale / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    weight = factor.reshape(-1, 1, *places).astype(np.float32)
    inputs = [
        image,
        graph.add_constant(f"{node.name}_factor", weight),
        graph.add_constant(f"{node.name}_offset", (bias - mean * factor).astype(np.float32)),
    ]
    graph.substitute(node, "Conv", inputs, group=len(factor), kernel_shape=places)


def _write_pool(graph: EditableGraph, node: ir.Node) -> None:
    """Write an AveragePool that OpenVINO would pad wrongly as a depthwise Conv."""
    if is_convolution(node) and not is_never_negative(node.inputs[0]):
        write_convolution(graph, node)


def _write_apart(graph: EditableGraph, node: ir.Node) -> None:
    """Write a PRelu as x + (slope - 1) * min(x, 0).

    ONNX Runtime's own kernel takes the numbers one by one, in six times the time of all three.
    """
    x, slope, name = node.inputs[0], constant(node.inputs[1]), node.outputs[0].name
    if slope is None:
        return
    zero = graph.add_constant(f"{name}_zero", np.zeros((), slope.dtype))
    less = graph.add_constant(f"{name}_slope", slope - slope.dtype.type(1))
    below = graph.add("Min", [x, zero], f"{name}_below")
    # A Sum, as an Add would be one of int8: between float operators it gains nothing
    graph.substitute(node, "Sum", [x, graph.add("Mul", [below, less], f"{name}_product")])


def activate_after_pools(graph: EditableGraph) -> None:
    """Let a MaxPool that is in float, between a Relu or Clip and a Q, run before that activation.

    The answer is the same. But ONNX Runtime moves a Q that follows a MaxPool before it, whose int8
    kernel, with no other before it, takes ten times as long as that in float: SqueezeNet 1.1 with
    its first convolution in float took 2.6 times as long as all in int8, and so takes 0.8 times as
    long. The activation costs nothing: a Q whose range begins at 0 does the same.
    """
    for pool in graph.of_type("MaxPool"):
        activation, pooled = maker(pool.inputs[0]), pool.outputs[0]
        if activation is None or activation.op_type not in ACTIVATIONS or len(pool.outputs) > 1:
            continue
        given, active = activation.inputs[0], activation.outputs[0]
        before, readers = maker(given), {node.op_type for node, _ in pooled.uses()}
        is_int8 = before is not None and before.op_type == "DequantizeLinear"
        if is_int8 or not is_read_once(active) or readers != {"QuantizeLinear"}:
            continue
        for node, index in pooled.uses():
            node.replace_input_with(index, active)
        activation.replace_input_with(0, pooled)
        pool.replace_input_with(0, given)
        name, pooled.name = pooled.name, graph.free_name(f"{pooled.name}_of_sums")
        active.name = name


# The other runtimes fuse BatchNorm and PRelu
_REWRITTEN: dict[str, dict[str, Callable[[EditableGraph, ir.Node], None]]] = {
    "onnxruntime": {"BatchNormalization": _write_as_conv, "PRelu": _write_apart},
    "openvino": {"AveragePool": _write_pool},
}


def _named(nodes: dict[str, ir.Node], name: str) -> ir.Node:
    if name not in nodes:
        raise QuantizationError(
            f"the plan names node {name!r}, which is not in the graph",
            expected="the plan that was made for this graph",
            fix="Make the plan again with `compress quantize`",
        )
    return nodes[name]


def _outputs_of(node: ir.Node) -> int:
    """Return the number of output channels of a weighted node.

    Raises:
        QuantizationError: it has no constant weight.
    """
    weight = constant(node.inputs[1]) if node.op_type in WEIGHTED else None
    if weight is None:
        raise QuantizationError(f"node {node.name!r} of the plan has no constant weight")
    groups = attribute(node, "group", 1) if node.op_type == "ConvTranspose" else 1
    return int(weight.shape[channel_axis(node)]) * int(groups)


def _scale_output(graph: EditableGraph, node: ir.Node, factors: NDArray[Any]) -> None:
    if node.op_type == "BatchNormalization":
        for position in (1, 2):  # its scale and offset
            _multiply(graph, node, position, factors)
        return
    weight = constant(node.inputs[1])
    if weight is None or weight.shape[channel_axis(node)] != len(factors):
        raise _unfit(node)
    shape = [1] * weight.ndim
    shape[channel_axis(node)] = -1
    _multiply(graph, node, 1, factors.reshape(shape))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        _multiply(graph, node, 2, factors)


def _scale_input(graph: EditableGraph, node: ir.Node, factors: NDArray[Any]) -> None:
    if node.op_type == "BatchNormalization":
        _multiply(graph, node, 1, factors)
        _multiply(graph, node, 3, 1 / factors)  # the mean
        return
    weight = constant(node.inputs[1])
    if weight is None:
        raise QuantizationError(f"node {node.name!r} has no constant weight to rescale")
    if node.op_type == "Conv":  # (out, in/groups, ...): each group reads channels of its own
        groups = attribute(node, "group", 1)
        if len(factors) != groups * weight.shape[1]:
            raise _unfit(node)
        rows = factors.reshape(groups, -1).repeat(weight.shape[0] // groups, 0)
        factors = rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))
    elif node.op_type == "ConvTranspose" or not attribute(node, "transB", 0):  # (in, out, ...)
        factors = factors.reshape(-1, *[1] * (weight.ndim - 1))
    _multiply(graph, node, 1, factors)


def _multiply(graph: EditableGraph, node: ir.Node, position: int, factors: NDArray[Any]) -> None:
    """Multiply a constant that ``node`` reads, for it alone."""
    given = node.inputs[position]
    value = constant(given)
    if value is None or given is None:
        raise QuantizationError(f"what node {node.name!r} reads is no constant to rescale")
    flat = value.reshape(-1) if position == 2 else value
    try:
        scaled = np.asarray(flat * factors, value.dtype).reshape(value.shape)
    except ValueError:
        raise _unfit(node) from None
    if len(given.uses()) > 1:
        set_input(node, position, graph.add_constant(f"{node.name}_{position}", scaled))
    else:
        graph.set_constant(given, scaled)


def _unfit(node: ir.Node) -> QuantizationError:
    return QuantizationError(f"the factors of the plan do not fit node {node.name!r}")
