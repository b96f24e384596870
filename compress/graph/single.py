"""A graph in half precision written in single precision: the same numbers, in wider types."""

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

HALF, SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT
_TYPES = frozenset({"to", "dtype"})  # attributes that name an element type


def to_single(model: ModelProto) -> None:
    """Write what ``model`` computes in half precision in single precision, where its weights are.

    People keep networks in fp16, often as the only file that they have. Its numbers are as good
    to quantize as any: the layers become int8, and the rest is what it was before the conversion.
    Inputs and outputs keep their type, with a cast.

    Args:
        model: Without functions of its own. Changed in place.
    """
    if not any(tensor.data_type == HALF for tensor in _tensors(model.graph)):
        return
    graph = model.graph
    given = [v.name for v in graph.input if v.type.tensor_type.elem_type == HALF]
    weights = {tensor.name for tensor in graph.initializer}
    _widen(graph)
    for name in given:
        if name not in weights:
            _take_half(graph, name)
    for value in graph.output:
        if value.type.tensor_type.elem_type == HALF:
            _give_half(graph, value.name)


def _take_half(graph: GraphProto, name: str) -> None:
    """Let the input ``name`` be half, and all that reads it read a wider copy."""
    for node in _nodes(graph):
        for index, read in enumerate(node.input):
            if read == name:
                node.input[index] = f"{name}_single"
    value = next(value for value in graph.input if value.name == name)
    value.type.tensor_type.elem_type = HALF
    cast = helper.make_node("Cast", [name], [f"{name}_single"], f"{name}_single", to=SINGLE)
    rest = GraphProto(node=graph.node)
    del graph.node[:]
    graph.node.extend([cast, *rest.node])


def _give_half(graph: GraphProto, name: str) -> None:
    """Let the output ``name`` be half, made of a wider one."""
    for node in _nodes(graph):
        for names in (node.input, node.output):
            for index, each in enumerate(names):
                if each == name:
                    names[index] = f"{name}_single"
    cast = helper.make_node("Cast", [f"{name}_single"], [name], f"{name}_half", to=HALF)
    graph.node.append(cast)


def _widen(graph: GraphProto) -> None:
    for inner in graphs_in(graph):
        outer = inner is graph
        for tensor in inner.initializer:
            _widen_tensor(tensor)
        for value in (*inner.value_info, *inner.input, *(() if outer else inner.output)):
            if value.type.tensor_type.elem_type == HALF:
                value.type.tensor_type.elem_type = SINGLE
        for node in inner.node:
            for attribute in node.attribute:
                _widen_attribute(attribute)


def _widen_attribute(attribute: AttributeProto) -> None:
    if attribute.name in _TYPES and attribute.i == HALF:
        attribute.i = SINGLE
    if attribute.HasField("t"):
        _widen_tensor(attribute.t)


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type == HALF:
        wide = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for inner in graphs_in(graph):
        yield from inner.node


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    for inner in graphs_in(graph):
        yield from inner.initializer
        for node in inner.node:
            if node.op_type == "Constant":
                yield from (item.t for item in node.attribute if item.HasField("t"))
