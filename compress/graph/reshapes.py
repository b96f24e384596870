"""Reshapes that ask for the batch at run time, written with a constant that says the same."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from compress.graph.model import Graph, all_names, attribute, fresh_name, set_constant
from compress.graph.weightless import infer_shapes

_CARRIES = frozenset({"Unsqueeze", "Squeeze", "Cast", "Identity"})  # one number, as it was


def constant_targets(model: ModelProto) -> dict[str, NDArray[np.int64]]:
    """Return a constant target for each Reshape of ``model`` whose own begins with its batch.

    Exporters write ``x.view(x.size(0), C, -1)`` as Concat(Gather(Shape(t), 0), C, -1). Where t has
    the batch of what is reshaped, the constant (0, C, -1) is the same: 0 keeps the dimension.

    Args:
        model: Any graph. Not modified.

    Returns:
        Targets, by output of the Reshape.
    """
    if not any(node.op_type == "Reshape" for node in model.graph.node):
        return {}
    copy = ModelProto()
    copy.CopyFrom(model)
    infer_shapes(copy)
    graph = Graph(copy)
    batches = {
        value.name: dims[0].dim_param
        for value in (*copy.graph.input, *copy.graph.value_info, *copy.graph.output)
        if (dims := value.type.tensor_type.shape.dim)
    }
    found = {}
    for node in graph.nodes:
        target = _target(graph, node, batches) if node.op_type == "Reshape" else None
        if target is not None:
            found[node.output[0]] = target
    return found


def keep_batch(model: ModelProto) -> None:
    """Give Reshapes their constant targets; ``model`` is changed.

    With a target computed at run time, OpenVINO joins int8 tensors wrongly behind the Reshape.
    """
    taken = all_names(model)
    targets = constant_targets(model)
    for node in model.graph.node:
        if node.output[0] in targets:
            node.input[1] = fresh_name(taken, f"{node.output[0]}_shape")
            set_constant(model, node.input[1], targets[node.output[0]])


def _target(graph: Graph, node: NodeProto, batches: dict[str, str]) -> NDArray[np.int64] | None:
    concat = graph.producer.get(node.input[1])
    if concat is None or concat.op_type != "Concat" or attribute(node, "allowzero", 0):
        return None
    rest = [_constant(graph, name) for name in concat.input[1:]]
    tensor = _whose_batch(graph, concat.input[0])
    if tensor is None or any(value is None for value in rest):
        return None
    batch = batches.get(tensor)
    if tensor != node.input[0] and (not batch or batches.get(node.input[0]) != batch):
        return None
    return np.concatenate(
        [[0], *(value.reshape(-1) for value in rest if value is not None)]
    ).astype(np.int64)


def _whose_batch(graph: Graph, name: str) -> str | None:
    """Return the tensor whose first dimension ``name`` holds, or None."""
    node = graph.producer.get(name)
    while node is not None and node.op_type in _CARRIES:
        node = graph.producer.get(node.input[0])
    if node is None or node.op_type not in ("Gather", "Slice"):
        return None
    wanted = [0] if node.op_type == "Gather" else [0, 1]  # an index; a start and an end
    values = [_constant(graph, given) for given in node.input[1 : 1 + len(wanted)]]
    if [v.reshape(-1).tolist() for v in values if v is not None] != [[w] for w in wanted]:
        return None
    shape = graph.producer.get(node.input[0])
    while shape is not None and shape.op_type == "Cast":
        shape = graph.producer.get(shape.input[0])
    is_whole = shape is not None and shape.op_type == "Shape" and not shape.attribute
    return shape.input[0] if shape is not None and is_whole else None


def _constant(graph: Graph, name: str) -> NDArray[np.int64] | None:
    """Return the integers of an initializer or of a Constant node, or None."""
    value, node = graph.constant(name), graph.producer.get(name)
    while node is not None and node.op_type in _CARRIES:
        value, node = graph.constant(node.input[0]), graph.producer.get(node.input[0])
    if value is None and node is not None and node.op_type == "Constant":
        item = onnx.helper.get_attribute_value(node.attribute[0])
        is_tensor = isinstance(item, onnx.TensorProto)
        value = onnx.numpy_helper.to_array(item) if is_tensor else np.asarray(item)
    return None if value is None else value.astype(np.int64)
