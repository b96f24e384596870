"""Shapes and element types of every tensor of an ONNX graph, and which dimension is the batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy

import onnx

from compress.errors import ModelError, boundary

Shapes = Mapping[str, tuple[int | None, ...]]
PRODUCTS = {  # ops that multiply and accumulate -> which inputs are data and weights
    "Conv": (0, 1),
    "ConvInteger": (0, 1),
    "QLinearConv": (0, 3),
    "ConvTranspose": (0, 1),
    "Gemm": (0, 1),
    "QGemm": (0, 3),
    "MatMul": (0, 1),
    "MatMulInteger": (0, 1),
    "QLinearMatMul": (0, 3),
}


def macs(node: onnx.NodeProto, shapes: Shapes) -> int | None:
    """Return the multiply-accumulates of one of ``PRODUCTS``; None where a shape is not known."""
    names = (*(node.input[index] for index in PRODUCTS[node.op_type]), node.output[0])
    data, weight, output = (_sizes(shapes.get(name)) for name in names)
    if not data or not weight:
        return None
    if node.op_type == "ConvTranspose":
        return math.prod(data) * math.prod(weight[1:])
    if output is None:
        return None
    if "Conv" in node.op_type:
        return math.prod(output) * math.prod(weight[1:])
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return math.prod(output) * (data[0] if transposed else data[-1])


def real_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Return the inputs that are no weights; old exporters list both."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def dims_of(value: onnx.ValueInfoProto) -> list[int | None]:
    """Return the sizes of a tensor; None where one is free."""
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.dim_value > 0 else None for dim in dims]


def _sizes(shape: tuple[int | None, ...] | None) -> tuple[int, ...] | None:
    """Return a shape; None where a size is not known."""
    sizes = tuple(size for size in shape or () if size is not None)
    return sizes if shape is not None and len(sizes) == len(shape) else None


def shapes_of(
    model: onnx.ModelProto, batch: int = 1, *, others: int | None = None
) -> tuple[dict[str, tuple[int | None, ...]], dict[str, int]]:
    """Return shape and element type of each tensor, as inferred with a free batch set to ``batch``.

    Other free dimensions of inputs have the size ``others``; they stay free if None. A size that is
    not known is None; a tensor of which nothing is known is absent.

    Raises:
        ModelError: the graph breaks the rules of ONNX.
    """
    fixed = deepcopy(model)
    for value in real_inputs(fixed):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_value < 1 and (axis == 0 or others is not None):
                dim.dim_value = batch if axis == 0 else others or 1
    if others is not None:  # what the file says is of free sizes
        del fixed.graph.value_info[:]
        for value in fixed.graph.output:
            value.type.tensor_type.ClearField("shape")
    with boundary(ModelError, "is no valid graph: the shapes of its tensors contradict each other"):
        inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    shapes: dict[str, tuple[int | None, ...]] = {
        tensor.name: tuple(tensor.dims) for tensor in inferred.initializer
    }
    kinds = {tensor.name: tensor.data_type for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        kinds[value.name] = value.type.tensor_type.elem_type
        if value.type.tensor_type.HasField("shape"):
            shapes[value.name] = tuple(dims_of(value))
    return shapes, kinds


Shape = Sequence[int | str | None]  # None, or free_1 of dimension 1: free, without a name


def leading(shapes: Mapping[str, Shape | None]) -> str:
    """Return the input that begins with the batch, if one does; the first if none is known to.

    It is free there, or of its size all others have some dimension.
    """
    known = {name: shape for name, shape in shapes.items() if shape}
    large = {name: shape for name, shape in known.items() if len(shape) > 1}
    free = (name for name, shape in known.items() if not isinstance(shape[0], int))
    fits = (name for name, own in large.items() if all(own[0] in each for each in large.values()))
    return next((name for names in (free, fits, large) for name in names), next(iter(shapes), ""))


def batch_axis(shape: Shape | None, first: Shape | None) -> int:
    """Return which dimension of ``shape`` is the batch, with which ``first`` begins.

    It has the same name or size, or it alone is free; 0 where no other dimension is alone in this.
    """
    if not shape or not first or shape[0] == first[0]:
        return 0
    batch = first[0]
    if isinstance(batch, int):
        found = [axis for axis, size in enumerate(shape) if size == batch]
    elif batch in _named(first) and batch in _named(shape):
        found = [shape.index(batch)]
    elif isinstance(shape[0], int):
        others = _named(first)  # height or width, as a grid of positions has them
        free = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
        found = [axis for axis in free if shape[axis] not in others]
    else:
        return 0
    return found[0] if len(found) == 1 else 0


def input_axes(shapes: Mapping[str, Shape | None]) -> dict[str, int]:
    """Return which dimension of each input is the batch, of those that do not begin with it."""
    first = shapes.get(leading(shapes))
    found = {name: batch_axis(shape, first) for name, shape in shapes.items()}
    return {name: axis for name, axis in found.items() if axis}


def graph_axes(model: onnx.ModelProto) -> dict[str, int]:
    """Return which dimension of inputs and outputs is the batch, where it is not the first."""
    shapes = {value.name: _shape_of(value) for value in real_inputs(model)}
    first = shapes.get(leading(shapes))
    outputs = {value.name: batch_axis(_shape_of(value), first) for value in model.graph.output}
    return input_axes(shapes) | {name: axis for name, axis in outputs.items() if axis}


def _named(shape: Shape) -> set[int | str | None]:
    """Return the names of free dimensions that a file gives, not we."""
    return {
        size for axis, size in enumerate(shape) if isinstance(size, str) and size != f"free_{axis}"
    }


def _shape_of(value: onnx.ValueInfoProto) -> Shape | None:
    """Return the sizes of a tensor as the file says them; None where it says nothing."""
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return [dim.dim_value if dim.dim_value > 0 else dim.dim_param or None for dim in kind.shape.dim]
