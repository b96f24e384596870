"""An ONNX graph that can be asked who makes and who reads a value, and edited without surprises."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

Array = npt.NDArray[Any]
DType = np.dtype[Any]


@dataclass(frozen=True)
class Use:
    """One input of one node."""

    node: onnx.NodeProto
    index: int


class Graph:
    """Nodes, constants, and the wires between them; the model it was made from is not modified.

    Nodes are NodeProto objects compared by identity. Change wires only through the methods, which
    keep the two indexes right.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = onnx.ModelProto()
        self._model.CopyFrom(model)
        graph = self._model.graph
        self.inputs = [value.name for value in graph.input]
        self.outputs = [value.name for value in graph.output]
        self.nodes: list[onnx.NodeProto] = []
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._arrays: dict[str, Array] = {}
        self._makers: dict[str, onnx.NodeProto] = {}
        self._readers: dict[str, list[Use]] = defaultdict(list)
        self._inner = _read_by_subgraphs(graph.node)
        for node in graph.node:
            self._attach(node)
        self._changed = True  # since shapes were last inferred
        self._ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.input}

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return next(int(o.version) for o in self._model.opset_import if o.domain in ("", "ai.onnx"))

    def maker(self, value: str) -> onnx.NodeProto | None:
        """Return the node that computes ``value``; None for inputs and constants."""
        return self._makers.get(value)

    def readers(self, value: str) -> list[Use]:
        """Return the uses of ``value`` by nodes (graph outputs are in ``outputs``)."""
        return list(self._readers.get(value, ()))

    def is_read_once(self, value: str) -> bool:
        """Return whether one input of one node is all that reads ``value``."""
        seen = len(self._readers.get(value, ()))
        return seen == 1 and value not in self.outputs and value not in self._inner

    def constant(self, value: str) -> Array | None:
        """Return the array of an initializer or Constant; None where ``value`` is computed."""
        if value in self._arrays:
            return self._arrays[value]
        tensor = self._tensors.get(value)
        if tensor is not None:
            self._arrays[value] = numpy_helper.to_array(tensor)
            return self._arrays[value]
        node = self._makers.get(value)
        if node is None:
            return None
        if node.op_type == "Constant":
            self._arrays[value] = _constant_of(node)
            return self._arrays[value]
        return self.constant(node.input[0]) if node.op_type == "Identity" else None

    def of_type(self, *ops: str) -> Iterator[onnx.NodeProto]:
        """Yield the nodes of the given operators; the graph may be edited meanwhile."""
        for node in list(self.nodes):
            if node.op_type in ops and self._makers.get(node.output[0]) is node:
                yield node

    def add_constant(self, hint: str, array: Array) -> str:
        """Add an initializer named after ``hint`` and return its name."""
        name = self._free(hint)
        array = np.ascontiguousarray(array).reshape(array.shape)
        self._tensors[name] = numpy_helper.from_array(array, name)
        self._arrays[name] = array
        return name

    def add(self, op: str, inputs: Iterable[str], hint: str, **attributes: Any) -> str:
        """Add a node with one output, named after ``hint``, and return the output's name."""
        output = self._free(hint)
        self._attach(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def rewire(self, use: Use, value: str) -> None:
        """Let one input read ``value`` instead."""
        old = use.node.input[use.index]
        self._readers[old] = [
            u for u in self._readers[old] if u.node is not use.node or u.index != use.index
        ]
        use.node.input[use.index] = value
        self._readers[value].append(use)

    def extend_input(self, node: onnx.NodeProto, value: str) -> None:
        """Append an input to ``node``."""
        node.input.append(value)
        self._readers[value].append(Use(node, len(node.input) - 1))

    def replace(self, old: str, new: str, *, keep: Iterable[onnx.NodeProto] = ()) -> None:
        """Let everything that reads ``old`` read ``new``, but for the nodes of ``keep``.

        A graph output keeps its name: the node that makes ``new`` takes it over.
        """
        kept = [id(node) for node in keep]
        for use in self.readers(old):
            if id(use.node) not in kept:
                self.rewire(use, new)
        if old in self.outputs:
            self._rename_output(old, new)

    def remove(self, node: onnx.NodeProto) -> None:
        """Take ``node`` out; its outputs must not be read any more."""
        for index, value in enumerate(node.input):
            self._readers[value] = [
                u for u in self._readers[value] if u.node is not node or u.index != index
            ]
        for value in node.output:
            if self._makers.get(value) is node:
                del self._makers[value]
        self.nodes = [other for other in self.nodes if other is not node]

    def sweep(self) -> None:
        """Remove every node whose outputs nobody reads."""
        wanted = set(self.outputs) | self._inner
        waiting = list(self.nodes)
        while waiting:
            node = waiting.pop()
            if any(value in wanted or self._readers.get(value) for value in node.output):
                continue
            if not any(self._makers.get(value) is node for value in node.output):
                continue
            makers = [self._makers.get(value) for value in node.input]
            self.remove(node)
            waiting += [maker for maker in makers if maker is not None]

    def rank(self, value: str) -> int | None:
        """Return the number of dimensions of ``value`` where shape inference knows it."""
        if value not in self._ranks and self._changed:
            self._infer()
        return self._ranks.get(value)

    def in_order(self) -> list[onnx.NodeProto]:
        """Return the nodes, each after those whose outputs it reads."""
        done: set[int] = set()
        order: list[onnx.NodeProto] = []
        for root in self.nodes:
            stack = [(root, False)]
            while stack:
                node, ready = stack.pop()
                if id(node) in done:
                    continue
                if ready:
                    done.add(id(node))
                    order.append(node)
                    continue
                stack.append((node, True))
                for value in [*node.input, *_read_by_subgraphs([node])]:
                    maker = self._makers.get(value)
                    if maker is not None and id(maker) not in done:
                        stack.append((maker, False))
        return order

    def to_model(self) -> onnx.ModelProto:
        """Return the graph as a model: nodes in topological order, unused constants dropped."""
        self.sweep()
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        graph = model.graph
        del graph.node[:]
        graph.node.extend(self.in_order())
        read = {value for node in graph.node for value in node.input} | self._inner
        read |= set(self.outputs)
        kept = [t for name, t in self._tensors.items() if name in read]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        # What Q nodes make may have changed its type; shape inference finds it again.
        made = {v for n in graph.node if n.op_type != "QuantizeLinear" for v in n.output}
        information = [v for v in graph.value_info if v.name in made]
        del graph.value_info[:]
        graph.value_info.extend(information)
        return model

    def _attach(self, node: onnx.NodeProto) -> None:
        self.nodes.append(node)
        self._changed = True
        for value in node.output:
            if value:
                self._makers[value] = node
        for index, value in enumerate(node.input):
            if value:
                self._readers[value].append(Use(node, index))

    def _free(self, hint: str) -> str:
        name, count = hint, 0
        while name in self._tensors or name in self._makers or name in self.inputs:
            count += 1
            name = f"{hint}_{count}"
        return name

    def _rename_output(self, old: str, new: str) -> None:
        maker = self._makers.get(new)
        former = self._makers.pop(old, None)
        if former is not None:
            spare = self._free(f"{old}_unused")
            former.output[list(former.output).index(old)] = spare
            self._makers[spare] = former
            for use in self.readers(old):  # only nodes that were told to keep reading it
                self.rewire(use, spare)
        if maker is None or new in self.outputs:  # an input, a constant or another output
            self._attach(helper.make_node("Identity", [new], [old], name=f"{old}_identity"))
            return
        maker.output[list(maker.output).index(new)] = old
        del self._makers[new]
        self._makers[old] = maker
        for use in self.readers(new):
            self.rewire(use, old)

    def _infer(self) -> None:
        self._changed = False
        inferred = onnx.shape_inference.infer_shapes(self.to_model())
        for value in [*inferred.graph.value_info, *inferred.graph.output]:
            kind = value.type.tensor_type
            if kind.HasField("shape"):
                self._ranks[value.name] = len(kind.shape.dim)


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return the value of an attribute, or ``default``."""
    for item in node.attribute:
        if item.name == name:
            return helper.get_attribute_value(item)
    return default


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    """Set an attribute; None removes it."""
    kept = [item for item in node.attribute if item.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    if value is not None:
        node.attribute.append(helper.make_attribute(name, value))


def label(node: onnx.NodeProto) -> str:
    """Return the name of a node, or of its first output where it has none."""
    return node.name or next((value for value in node.output if value), node.op_type)


def _constant_of(node: onnx.NodeProto) -> Array:
    item = node.attribute[0]
    value = helper.get_attribute_value(item)
    if item.name == "value":
        return numpy_helper.to_array(value)
    kind = np.float32 if "float" in item.name else np.int64
    return np.asarray(value, dtype=None if "string" in item.name else kind)


def _read_by_subgraphs(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Return the values that the bodies of If, Loop and Scan read."""
    read: set[str] = set()
    for node in nodes:
        for item in node.attribute:
            for body in [item.g] if item.HasField("g") else item.graphs:
                read |= {value for inner in body.node for value in inner.input}
                read |= {value.name for value in body.output} | _read_by_subgraphs(body.node)
    return read
