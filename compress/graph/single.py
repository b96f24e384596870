"""A graph in half or double precision written in single precision, which int8 begins from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    helper,
    numpy_helper,
)

from compress.graph.model import graphs_in

HALF, SINGLE, DOUBLE = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE
_TYPES = frozenset({"to", "dtype"})  # attributes that name an element type


def to_single(model: ModelProto) -> None:
    """Write what ``model`` computes in half or double precision in single, where its weights are.

    People keep networks in fp16, often as the only file that they have, and those of numpy and
    scikit-learn are in double precision. Their numbers are as good to quantize as any: the layers
    become int8, and the rest is what it was before the conversion. Inputs and outputs keep their
    type, with a cast.

    Args:
        model: Without functions of its own. Changed in place.
    """
    tensors = list(_tensors(model.graph))
    if any(tensor.data_type == HALF for tensor in tensors):
        _write_single(model.graph, HALF)
    # Sizes are computed in double precision, in networks that are not: of a matrix nobody does that
    if any(tensor.data_type == DOUBLE and len(tensor.dims) > 1 for tensor in tensors):
        _write_single(model.graph, DOUBLE)


def _write_single(graph: GraphProto, kind: int) -> None:
    given = [v.name for v in graph.input if v.type.tensor_type.elem_type == kind]
    weights = {tensor.name for tensor in graph.initializer}
    _convert(graph, kind)
    for name in given:
        if name not in weights:
            _take(graph, name, kind)
    for value in graph.output:
        if value.type.tensor_type.elem_type == kind:
            _give(graph, value.name, kind)


def _take(graph: GraphProto, name: str, kind: int) -> None:
    """Let the input ``name`` be of ``kind``, and all that reads it read a single copy."""
    for node in _nodes(graph):
        for index, read in enumerate(node.input):
            if read == name:
                node.input[index] = f"{name}_single"
    value = next(value for value in graph.input if value.name == name)
    value.type.tensor_type.elem_type = kind
    cast = helper.make_node("Cast", [name], [f"{name}_single"], f"{name}_single", to=SINGLE)
    rest = GraphProto(node=graph.node)
    del graph.node[:]
    graph.node.extend([cast, *rest.node])


def _give(graph: GraphProto, name: str, kind: int) -> None:
    """Let the output ``name`` be of ``kind``, made of a single one."""
    for node in _nodes(graph):
        for names in (node.input, node.output):
            for index, each in enumerate(names):
                if each == name:
                    names[index] = f"{name}_single"
    cast = helper.make_node("Cast", [f"{name}_single"], [name], f"{name}_cast", to=kind)
    graph.node.append(cast)


def _convert(graph: GraphProto, kind: int) -> None:
    for inner in graphs_in(graph):
        outer = inner is graph
        for tensor in inner.initializer:
            _convert_tensor(tensor, kind)
        for value in (*inner.value_info, *inner.input, *(() if outer else inner.output)):
            if value.type.tensor_type.elem_type == kind:
                value.type.tensor_type.elem_type = SINGLE
        for node in inner.node:
            for attribute in node.attribute:
                _convert_attribute(attribute, kind)


def _convert_attribute(attribute: AttributeProto, kind: int) -> None:
    if attribute.name in _TYPES and attribute.i == kind:
        attribute.i = SINGLE
    if attribute.HasField("t"):
        _convert_tensor(attribute.t, kind)


def _convert_tensor(tensor: TensorProto, kind: int) -> None:
    if tensor.data_type == kind:
        single = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(single, tensor.name))


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for inner in graphs_in(graph):
        yield from inner.node


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    for inner in graphs_in(graph):
        yield from inner.initializer
        for node in inner.node:
            if node.op_type == "Constant":
                yield from (item.t for item in node.attribute if item.HasField("t"))
