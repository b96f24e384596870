"""Inputs whose values lie on a grid, as pixels do: scaled so that integers hold them exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import ModelProto

from compress.errors import QuantizationError
from compress.graph.model import attribute
from compress.graph.values import EditableGraph, constant, set_attribute, set_input
from compress.qdq.plan import InputGrid, QuantPlan

LAST = 255  # code of 256
OFF = 0.02  # steps that a value may lie beside the grid
_HALF = 0.51  # steps that zero may move where a layer pads with it


def put_on_grid(model: ModelProto, plan: QuantPlan) -> ModelProto:
    """Return ``model`` with the layers of ``plan.grids`` reading values on one grid.

    In front of such a layer each channel is scaled and shifted to one common grid; its weights and
    its bias undo that. Where zero, with which it pads, is then another value in each channel, a
    node before pads instead. Layers that stay in float read what they did.

    Raises:
        QuantizationError: the plan names a node that is not there or does not fit.
    """
    grids = [grid for grid in plan.grids if grid.node not in plan.float_nodes]
    if not grids:
        return model
    graph = EditableGraph(model)
    nodes = {node.name: node for node in graph.nodes}
    for grid in grids:
        node = nodes.get(grid.node)
        weight = constant(node.inputs[1]) if node is not None and node.op_type == "Conv" else None
        fits = weight is not None and weight.shape[1] == len(grid.steps) == len(grid.lows)
        if node is None or weight is None or not fits:
            raise QuantizationError(
                f"the grid of the plan does not fit node {grid.node!r}",
                expected="a Conv of as many input channels",
                fix="Make the plan again with `compress quantize`",
            )
        _put(graph, node, weight, grid)
    return graph.to_model()


def _put(graph: EditableGraph, node: ir.Node, weight: NDArray[Any], grid: InputGrid) -> None:
    image, shape = node.inputs[0], (1, -1, *[1] * (weight.ndim - 2))
    if image is None:
        raise TypeError(f"{node.name} reads nothing")
    factors, shifts = (numbers.reshape(shape) for numbers in changes(grid))
    value, name = image, image.name
    if np.abs(shifts).max() > _HALF * grid.step:  # else zero is where it was
        value = _padded(graph, node, image)
    for op, numbers, without in (("Mul", factors, 1.0), ("Add", shifts, 0.0)):
        if np.any(numbers != without):
            by = graph.add_constant(f"{name}_on_grid_by", numbers.astype(np.float32))
            value = graph.add(op, [value, by], f"{name}_on_grid")
    node.replace_input_with(0, value)
    scaled = weight / factors
    old = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    offset = (scaled * shifts).reshape(len(weight), -1).sum(1)
    bias = (0.0 if old is None else old.reshape(-1)) - offset
    for position, array in ((1, scaled), (2, bias)):
        hint = f"{node.name}_{position}_on_grid"
        set_input(node, position, graph.add_constant(hint, array.astype(np.float32)))


def changes(grid: InputGrid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the factor and the shift, both (C,), that put each channel on the common grid."""
    steps, lows = np.asarray(grid.steps), np.asarray(grid.lows)
    factors = grid.step / steps
    shifts = (-lows / steps - grid.zero) * grid.step
    same = np.abs(factors - 1).max() < OFF / LAST
    moved = np.abs(shifts).max() > OFF * grid.step
    return factors if not same else np.ones_like(factors), shifts if moved else shifts * 0


def _padded(graph: EditableGraph, node: ir.Node, image: ir.Value) -> ir.Value:
    """Return ``image`` with the zeros around it that ``node`` added, which adds none any more."""
    pads = np.reshape(attribute(node, "pads", ()), (2, -1))
    if not pads.any():
        return image
    ends = np.pad(pads, ((0, 0), (2, 0))).reshape(-1).astype(np.int64)
    set_attribute(node, "pads", None)
    set_attribute(node, "auto_pad", None)
    whole = graph.add_constant(f"{image.name}_pads", ends)
    return graph.add("Pad", [image, whole], f"{image.name}_padded")
