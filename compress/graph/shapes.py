"""Shapes and element types of every tensor of an ONNX graph."""

from __future__ import annotations

import onnx

from compress.errors import ModelError, boundary


def shapes_of(
    model: onnx.ModelProto, batch: int = 1
) -> tuple[dict[str, tuple[int | None, ...]], dict[str, int]]:
    """Return shape and element type of each tensor, as inferred with a free batch set to ``batch``.

    A size that is not known is None; a tensor of which nothing is known is absent.

    Raises:
        ModelError: the graph breaks the rules of ONNX.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    known = {tensor.name for tensor in fixed.graph.initializer}
    for value in fixed.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in known and dims and dims[0].dim_value < 1:
            dims[0].dim_value = batch
    with boundary(ModelError, "is no valid graph: the shapes of its tensors contradict each other"):
        inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    shapes: dict[str, tuple[int | None, ...]] = {
        tensor.name: tuple(tensor.dims) for tensor in inferred.initializer
    }
    kinds = {tensor.name: tensor.data_type for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        kinds[value.name] = value.type.tensor_type.elem_type
        if value.type.tensor_type.HasField("shape"):
            shapes[value.name] = tuple(
                dim.dim_value if dim.dim_value > 0 else None
                for dim in value.type.tensor_type.shape.dim
            )
    return shapes, kinds
