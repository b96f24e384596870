"""What a graph has to compute: the multiply-accumulates of every node with weights."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import ModelProto, NodeProto

from compress.graph.model import WEIGHTED, GraphIndex
from compress.graph.shapes import macs, shapes_of


@dataclass(frozen=True)
class Work:
    """One node that multiplies."""

    node: str
    operator: str
    macs: int  # for a batch of one
    doubt: str  # why a runtime could not take it to int8, by the graph; "" if it could


@dataclass(frozen=True)
class Workload:
    """The nodes of an ONNX graph, by what they are to a runtime that fuses them."""

    work: dict[str, Work]  # by node name
    adds: tuple[str, ...]  # nodes that add two activations
    tensors: dict[str, int]  # element type of every tensor that is known
    nodes: frozenset[str]  # the names of all nodes
    makers: dict[str, str]  # the node that makes a tensor, by the tensor's name

    @property
    def macs(self) -> int:
        """Return all multiply-accumulates, for a batch of one."""
        return sum(work.macs for work in self.work.values())


def with_node_names(model: ModelProto) -> ModelProto:
    """Return a copy in which every node has a name of its own."""
    copy = ModelProto()
    copy.CopyFrom(model)
    seen: set[str] = set()
    for index, node in enumerate(copy.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{index}"
        seen.add(node.name)
    return copy


def read(model: ModelProto, *, needs_quantized_output: bool) -> Workload:
    """Return what ``model`` has to compute.

    Args:
        model: Every node named. Not modified.
        needs_quantized_output: Whether the runtime takes a convolution to int8 only with a
            quantizer behind it, as ONNX Runtime does.
    """
    shapes, tensors = shapes_of(model, others=1)
    view = GraphIndex(model)
    constants = _constants(model)
    work = {
        node.name: Work(
            node.name,
            node.op_type,
            macs(node, shapes) or 0,  # where a shape is not known
            _doubt(view, node, needs_quantized_output),
        )
        for node in model.graph.node
        if node.op_type in WEIGHTED
    }
    adds = tuple(
        node.name
        for node in model.graph.node
        if node.op_type in ("Add", "Sum") and not set(node.input) & constants
    )
    nodes = frozenset(node.name for node in model.graph.node)
    makers = {output: node.name for output, node in view.producer.items()}
    return Workload(work, adds, tensors, nodes, makers)


def _constants(model: ModelProto) -> set[str]:
    """Return the names of all tensors that do not depend on the input."""
    known = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if set(node.input) - {""} <= known:
            known.update(node.output)
    return known


def _doubt(graph: GraphIndex, node: NodeProto, needs_quantized_output: bool) -> str:
    def is_dequantized(name: str) -> bool:
        return name in graph.producer and graph.producer[name].op_type == "DequantizeLinear"

    if not is_dequantized(node.input[0]):
        return "its input is not quantized"
    if not is_dequantized(node.input[1]):
        return "its weight is not quantized"
    if needs_quantized_output and node.op_type in ("Conv", "MatMul"):
        last = graph.activation_after(node) or node
        readers = [reader.op_type for reader, _ in graph.readers.get(last.output[0], [])]
        if not readers or set(readers) != {"QuantizeLinear"}:
            return "its output is not quantized"
    return ""
