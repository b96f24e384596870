"""Reshapes of the batch, written as runtimes compute them in int8."""

from __future__ import annotations

from collections.abc import Container

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from compress.graph.model import attribute
from compress.graph.values import EditableGraph, constant, maker

_CARRIES = frozenset({"Unsqueeze", "Squeeze", "Cast", "Identity"})  # one number, as it was


def constant_targets(graph: EditableGraph) -> dict[ir.Node, NDArray[np.int64]]:
    """Return a constant target for each Reshape whose own begins with its batch.

    Exporters write ``x.view(x.size(0), C, -1)`` as Concat(Gather(Shape(t), 0), C, -1). Where t has
    the batch of what is reshaped, the constant (0, C, -1) is the same: 0 keeps the dimension.
    """
    computed = [n for n in graph.of_type("Reshape") if constant(n.inputs[1]) is None]
    if computed:
        graph.infer_shapes()
    targets = {node: _target(node) for node in computed}
    return {node: target for node, target in targets.items() if target is not None}


def keep_batch(graph: EditableGraph) -> None:
    """Give Reshapes their constant targets.

    With a target computed at run time, OpenVINO joins int8 tensors wrongly behind the Reshape.
    """
    for node, target in constant_targets(graph).items():
        set_target(graph, node, target)


def set_target(graph: EditableGraph, node: ir.Node, target: NDArray[np.int64]) -> None:
    """Give a Reshape a constant target."""
    node.replace_input_with(1, graph.add_constant(f"{node.outputs[0].name}_shape", target))


def _target(node: ir.Node) -> NDArray[np.int64] | None:
    concat = maker(node.inputs[1])
    if concat is None or concat.op_type != "Concat" or attribute(node, "allowzero", 0):
        return None
    rest = [_number(value) for value in concat.inputs[1:]]
    tensor = _whose_batch(concat.inputs[0])
    if tensor is None or any(value is None for value in rest):
        return None
    batch = _batch(tensor)
    if tensor is not node.inputs[0] and (not batch or _batch(node.inputs[0]) != batch):
        return None
    return np.concatenate(
        [[0], *(value.reshape(-1) for value in rest if value is not None)]
    ).astype(np.int64)


def _batch(value: ir.Value | None) -> str | None:
    """Return the name of a free first dimension."""
    shape = None if value is None else value.shape
    first = shape[0] if shape else None
    return first.value if isinstance(first, ir.SymbolicDim) else None


def _whose_batch(value: ir.Value | None) -> ir.Value | None:
    """Return the tensor whose first dimension ``value`` holds, or None."""
    node = _before(maker(value), _CARRIES)
    if node is None or node.op_type not in ("Gather", "Slice"):
        return None
    wanted = [0] if node.op_type == "Gather" else [0, 1]  # an index; a start and an end
    values = [_number(given) for given in node.inputs[1 : 1 + len(wanted)]]
    if [v.reshape(-1).tolist() for v in values if v is not None] != [[w] for w in wanted]:
        return None
    shape = _before(maker(node.inputs[0]), {"Cast"})
    is_whole = shape is not None and shape.op_type == "Shape" and not shape.attributes
    return shape.inputs[0] if shape is not None and is_whole else None


def _before(node: ir.Node | None, kinds: Container[str]) -> ir.Node | None:
    """Return the first node, from ``node`` on upwards, that is of none of these kinds."""
    while node is not None and node.op_type in kinds:
        node = maker(node.inputs[0])
    return node


def _number(value: ir.Value | None) -> NDArray[np.int64] | None:
    """Return the integers of a constant, or None."""
    array, node = constant(value), maker(value)
    while array is None and node is not None and node.op_type in _CARRIES:
        array, node = constant(node.inputs[0]), maker(node.inputs[0])
    return None if array is None else array.astype(np.int64)
