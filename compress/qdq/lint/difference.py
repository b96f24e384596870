"""What a target's placement quantizes in the float graph that lies under a Q/DQ graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from compress.graph.model import WEIGHTED, GraphIndex, attribute
from compress.graph.values import Array, EditableGraph, constant, label, maker, name_of
from compress.graph.weightless import LARGEST, infer_shapes
from compress.qdq.lint.patterns import (
    DQ,
    Q,
    QdqPair,
    is_quantized,
    pair_before,
    pairs_on,
    weight_of,
)
from compress.qdq.placement import Placement, place


@dataclass(frozen=True)
class Wanted:
    """A placement, asked by the nodes of the Q/DQ graph."""

    placement: Placement
    names: Mapping[ir.Node, str]  # by which the placement knows a node

    def reads(self, node: ir.Node, index: int) -> bool:
        """Return whether ``node`` is to read this input quantized."""
        readers = self.placement.readers.get(name_of(source_of(node.inputs[index])), ())
        return (self.names.get(node, ""), index) in readers

    def quantizes(self, value: ir.Value) -> bool:
        """Return whether anything is to read ``value`` quantized."""
        return name_of(value) in self.placement.readers

    def missing(self, graph: EditableGraph) -> Iterator[tuple[ir.Node, int, QdqPair | None]]:
        """Yield inputs that are read in float and are to be read quantized; a pair of the tensor.

        The first of each node that computes without weights.
        """
        for node in graph.nodes:
            if node.op_type in (Q, DQ, *WEIGHTED):
                continue
            for index, value in enumerate(node.inputs):
                if value is not None and self.reads(node, index) and pair_before(value) is None:
                    yield node, index, next(iter(pairs_on(value)), None)
                    break


def wanted(graph: EditableGraph, target: str) -> Wanted:
    """Return what the writer would quantize for ``target``, had it the float graph.

    Layers that are in float with both their input and their weight stay so: somebody meant it.
    """
    model, names = _without_pairs(graph)
    left = {names[n]: "in float" for n in graph.of_type(*WEIGHTED) if _is_left(n, target)}
    return Wanted(place(GraphIndex(model), target, left), names)


def source_of(value: ir.Value | None) -> ir.Value | None:
    """Return the float value that ``value`` stands for: before all pairs and Identities."""
    while (node := maker(value)) is not None:
        pair = pair_before(value)
        if pair is None and node.op_type != "Identity":
            break
        value = node.inputs[0] if pair is None else pair.source
    return value


def _is_left(node: ir.Node, target: str) -> bool:
    if weight_of(node) is not None or _constant(node.inputs[1]) is None:
        return False
    return target != "tensorrt" or not is_quantized(node.inputs[0])  # which rounds weights itself


def _without_pairs(graph: EditableGraph) -> tuple[ModelProto, dict[ir.Node, str]]:
    """Return the float graph, its large weights without values, and the names of its nodes."""
    model = ModelProto(ir_version=8)
    model.opset_import.extend(helper.make_opsetid(*o) for o in graph.body.opset_imports.items())
    names: dict[ir.Node, str] = {}
    constants: dict[str, Array] = {}
    for node in graph.nodes:
        if _is_wire(node) or all(_constant(value) is not None for value in node.outputs):
            continue
        names[node] = f"{label(node)}_{len(names)}"
        new: NodeProto = ir.to_proto(node)
        new.name = names[node]
        for index, value in enumerate(node.inputs):
            source = source_of(value)
            if source is None or source.name is None:
                continue
            new.input[index] = source.name
            array = _constant(source)
            if array is not None:
                constants[source.name] = array
        model.graph.node.append(new)
    model.graph.initializer.extend(_tensor(name, array) for name, array in constants.items())
    model.graph.input.extend(_end(value) for value in graph.body.inputs)
    sources = dict.fromkeys(map(source_of, graph.body.outputs))
    model.graph.output.extend(_end(value) for value in sources if value is not None)
    infer_shapes(model)
    return model, names


_FLOATS = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def _end(value: ir.Value) -> ValueInfoProto:
    end: ValueInfoProto = ir.to_proto(value)
    if end.type.tensor_type.elem_type in _FLOATS:
        end.type.tensor_type.elem_type = TensorProto.FLOAT
    return end


def _is_wire(node: ir.Node) -> bool:
    """Return whether the float graph is without ``node``: it rounds values or hands them on."""
    if node.op_type == Q:
        return all(reader.op_type == DQ for reader, _ in node.outputs[0].uses())
    return node.op_type == "Identity" or (
        node.op_type == DQ and pair_before(node.outputs[0]) is not None
    )


def _constant(value: ir.Value | None) -> Array | None:
    """Return a constant of the float graph, of zeros where only its shape is of use."""
    found, node = constant(value), maker(value)
    if found is not None:
        return found.astype(np.float32) if found.dtype.kind == "f" else found
    if node is None or node.op_type not in (Q, DQ, "Transpose"):
        return None
    inner = _constant(node.inputs[0])
    if inner is None or node.op_type == Q:
        return inner
    if node.op_type == DQ:
        return np.broadcast_to(np.float32(0), inner.shape)
    return np.transpose(inner, attribute(node, "perm"))


def _tensor(name: str, array: Array) -> TensorProto:
    if array.size <= LARGEST:
        plain = array.astype(object) if array.dtype.kind == "S" else array  # texts of one length
        return numpy_helper.from_array(np.asarray(plain, order="C"), name)
    return TensorProto(
        name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype)
    )
