"""Look up in an ONNX file what makes and reads a tensor, by name; ``values`` edits graphs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import FunctionProto, GraphProto, NodeProto, numpy_helper

from compress.graph.shapes import dims_of, real_inputs

SAME_SCALE = frozenset(  # what comes out was in what went in
    {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split"}
    | {"Gather", "DepthToSpace", "SpaceToDepth", "Resize"}
)
ACTIVATIONS = frozenset({"Relu", "Clip"})  # what a runtime computes together with the op before
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_SIZES = frozenset({"Shape", "Size"})  # of a tensor, whatever its values
_MOVES = frozenset(  # on the way from a Softmax to what averages over it
    {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Identity"}
    | {"QuantizeLinear", "DequantizeLinear"}
)
Body = TypeVar("Body", GraphProto, FunctionProto)
BIAS_LIMIT = 2.0**30  # of an int32 bias; leaves room for the sum it is added to


class GraphIndex:
    """Producers, readers and constants of a file by tensor name, read-only: to decide and to plan.

    Plans name tensors, and runtimes take files: this reads the file as it stands. To change a
    graph, or to walk it value by value, take ``EditableGraph``, which is a copy on onnx_ir.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: Sequence[NodeProto] = model.graph.node
        self.initializers = {t.name: t for t in model.graph.initializer}
        self.inputs = [value.name for value in real_inputs(model)]
        self.outputs = {o.name for o in model.graph.output}
        self.captured: set[str] = set()  # what the bodies of loops and branches read
        self.sized: set[str] = set()  # made of constants and of the sizes of images alone
        self.producer: dict[str, NodeProto] = {}
        self.readers: dict[str, list[tuple[NodeProto, int]]] = defaultdict(list)
        for node in self.nodes:
            for name in node.output:
                self.producer[name] = node
            for position, name in enumerate(node.input):
                if name:
                    self.readers[name].append((node, position))
            inside = captured(node)
            self.captured |= inside
            if node.op_type in _SIZES or (not inside and self._is_sized(node)):
                self.sized.update(node.output)
        self.shapes = {
            v.name: tuple(dims_of(v)) if v.type.tensor_type.HasField("shape") else None
            for v in (*model.graph.input, *model.graph.value_info)
        }
        self.types = {
            v.name: v.type.tensor_type.elem_type
            for v in (*model.graph.input, *model.graph.value_info, *model.graph.output)
        }

    def _is_sized(self, node: NodeProto) -> bool:
        known = [name for name in node.input if name in self.sized or name in self.initializers]
        return not self.sized.isdisjoint(known) and len(known) == sum(map(bool, node.input))

    def constant(self, name: str) -> NDArray[Any] | None:
        """Return the value of an initializer, or None if ``name`` is none."""
        tensor = self.initializers.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def is_constant(self, name: str) -> bool:
        """Return whether ``name`` is an initializer, or no image: an input, or made of sizes."""
        is_given = name in self.initializers or name in self.sized
        return is_given or (name in self.inputs and self.is_parameter(name))

    def is_parameter(self, name: str) -> bool:
        """Return whether the input ``name`` is one value for the whole batch, as a threshold is.

        A scalar is, and what has only fixed sizes where it is a vector or another input begins with
        a free one: none holds a row for each image.
        """
        shape = self.shapes.get(name)
        if shape is None or None in shape:
            return False
        firsts = [(self.shapes.get(each) or (0,))[0] for each in self.inputs]
        return len(shape) < 2 or None in firsts

    def is_float(self, name: str) -> bool:
        """Return whether ``name`` holds float32 values; what has no known type counts as such."""
        kind: int = self.types.get(name, onnx.TensorProto.FLOAT)
        return kind == onnx.TensorProto.FLOAT

    def data_inputs(self, node: NodeProto) -> list[str]:
        """Return the inputs of ``node`` that depend on the images."""
        return [name for name in node.input if name and not self.is_constant(name)]

    def only_reader(self, name: str) -> NodeProto | None:
        """Return the node that alone reads ``name``, or None."""
        readers = self.readers.get(name, [])
        return readers[0][0] if len(readers) == 1 and not self.is_seen(name) else None

    def is_seen(self, name: str) -> bool:
        """Return whether more than nodes read ``name``: it is an output, or a body reads it."""
        return name in self.outputs or name in self.captured

    def activation_after(self, node: NodeProto) -> NodeProto | None:
        """Return the Relu or Clip that alone reads the output of ``node``, or None."""
        reader = self.only_reader(node.output[0])
        return reader if reader is not None and reader.op_type in ACTIVATIONS else None

    def keeps_scale(self, node: NodeProto) -> bool:
        """Return whether ``node`` only moves what it reads, or puts zeros beside it."""
        if node.op_type != "Pad":
            return node.op_type in SAME_SCALE
        if attribute(node, "mode", b"constant") != b"constant":
            return True
        given = node.input[2] if len(node.input) > 2 else ""
        filling = self.constant(given) if given else attribute(node, "value", 0.0)
        return filling is not None and not np.any(filling)

    def weight(self, node: NodeProto) -> str | None:
        """Return the constant float weight of a weighted op, or None."""
        if node.op_type not in WEIGHTED or len(node.input) < 2:
            return None
        tensor = self.initializers.get(node.input[1])
        is_float = tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT
        return node.input[1] if is_float and not self.is_constant(node.input[0]) else None

    def rank(self, name: str) -> int | None:
        """Return the number of dimensions of a tensor, or None where it is unknown."""
        shape = self.shapes.get(name)
        return None if shape is None else len(shape)


def bodies(node: NodeProto) -> Iterator[GraphProto]:
    """Yield the graphs inside a node: branches of an If, the body of a Loop or Scan."""
    for item in node.attribute:
        if item.HasField("g"):
            yield item.g
        yield from item.graphs


def graphs_in(body: Body) -> Iterator[Body | GraphProto]:
    """Yield ``body`` and the graphs inside its nodes, at any depth."""
    yield body
    for node in body.node:
        for inner in bodies(node):
            yield from graphs_in(inner)


def captured(node: NodeProto) -> set[str]:
    """Return the names that the subgraphs of ``node`` may read from outside."""
    graphs = list(bodies(node))
    ends = {output.name for graph in graphs for output in graph.output}
    return ends | {n for graph in graphs for child in graph.node for n in reads(child)}


def layers_inside(node: NodeProto) -> int:
    """Return the number of weighted ops in the branches and bodies of ``node``."""
    inside = (child for body in bodies(node) for part in graphs_in(body) for child in part.node)
    return sum(child.op_type in WEIGHTED for child in inside)


def reads(node: NodeProto) -> set[str]:
    """Return the names that ``node`` reads, its subgraphs included."""
    return {name for name in node.input if name} | captured(node)


def tail(nodes: Sequence[NodeProto]) -> set[str]:
    """Return the tensors made behind the last weighted ops: their precision is the answer's.

    Nothing quantizes them: the writer does not, and the linter does not ask for it. ``nodes`` are
    in topological order, with or without Q/DQ pairs.
    """
    producer = {name: node for node in nodes for name in node.output}
    before_weights: set[str] = set()  # tensors that a weighted op needs, directly or not
    found: set[str] = set()
    for node in reversed(nodes):
        is_layer = node.op_type in WEIGHTED and not averages_probabilities(node, producer)
        if is_layer or before_weights.intersection(node.output):
            before_weights.update(reads(node))
        else:
            found.update(node.output)
    return found


def averages_probabilities(node: NodeProto, producer: Mapping[str, NodeProto]) -> bool:
    """Return whether ``node``, with constant weights, reads the probabilities of a Softmax.

    So the boxes of YOLO are decoded: a Conv with the weights 0, 1, 2, ... is the mean of a
    distribution over distances. It is part of the answer, and no layer.
    """
    if node.op_type not in WEIGHTED or len(node.input) < 2 or _source(node.input[1], producer):
        return False
    maker = _source(node.input[0], producer)
    return maker is not None and maker.op_type == "Softmax"


def _source(name: str, producer: Mapping[str, NodeProto]) -> NodeProto | None:
    """Return what made the values of ``name``, wherever they were moved; None of a constant."""
    maker = producer.get(name)
    while maker is not None and maker.op_type in _MOVES:
        maker = producer.get(maker.input[0])
    return maker


def attribute(node: NodeProto | ir.Node, name: str, default: Any = None) -> Any:
    """Return the value of an attribute of ``node``."""
    if isinstance(node, ir.Node):
        item = node.attributes.get(name)
        return default if item is None else item.value
    for found in node.attribute:
        if found.name == name:
            return onnx.helper.get_attribute_value(found)
    return default


def channel_axis(node: NodeProto | ir.Node) -> int:
    """Return which dimension of the weight of ``node`` is its output channel.

    A grouped ConvTranspose shares one slice of dimension 1 among its groups.
    """
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return -1  # MatMul: (..., in, out)


def fresh_name(taken: set[str], wish: str) -> str:
    """Return ``wish``, numbered if taken, and take it."""
    name, number = wish, 1
    while name in taken:
        number += 1
        name = f"{wish}_{number}"
    taken.add(name)
    return name
