"""Edit an ONNX graph on onnx_ir, where values know what makes and uses them; their signs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import ModelProto, TypeProto
from onnx_ir.passes import common as passes

from compress.errors import ModelError
from compress.graph.model import SAME_SCALE, attribute, fresh_name

Array = NDArray[Any]
KNOWN = frozenset({"", "ai.onnx", "com.microsoft", "org.openvinotoolkit"})  # domains of operators


class EditableGraph:
    """A copy of a file's model on onnx_ir, or one that is there: to change, or to walk by values.

    To look tensors of a file up by name, ``GraphIndex`` is made in a tenth of the time.
    """

    def __init__(self, model: ModelProto | ir.Model) -> None:
        self.model = model if isinstance(model, ir.Model) else _as_ir(model)
        self.body = self.model.graph
        names = {value.name for value in (*self.body.inputs, *self.body.initializers.values())}
        for node in self.nodes:
            names |= {node.name, *(value.name for value in node.outputs)}
        self._taken = {name or "" for name in names}

    @property
    def nodes(self) -> list[ir.Node]:
        """The nodes, in the order of the file; added ones last."""
        return list(self.body)

    def of_type(self, *ops: str) -> Iterator[ir.Node]:
        """Yield the nodes of the given operators; the graph may be edited meanwhile.

        What is called so in a domain that is not known may compute anything else.
        """
        for node in self.nodes:
            if node.op_type in ops and node.domain in KNOWN and node.graph is self.body:
                yield node

    def add_constant(self, hint: str, array: Array) -> ir.Value:
        """Add an initializer named after ``hint``."""
        return self._initializer(self.free_name(hint), array)

    def set_constant(self, value: ir.Value, array: Array) -> None:
        """Give a constant another value, or a computed value a constant in its place."""
        if value.producer() is None:
            value.const_value = ir.Tensor(np.asarray(array, order="C"), name=value.name)
            return
        name, value.name = value.name, None
        value.replace_all_uses_with(self._initializer(name, array), replace_graph_outputs=True)

    def add(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        hint: str,
        name: str | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Add a node with one output, named after ``hint``, and return the output.

        The node has the name of its output, or is named after ``name``.
        """
        (value,) = self.add_several(op, inputs, [hint], name, **attributes)
        return value

    def add_several(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        hints: Sequence[str],
        name: str | None = None,
        **attributes: Any,
    ) -> list[ir.Value]:
        """Add a node with one output for each of ``hints``, as ``add`` does, and return them."""
        outputs = [ir.Value(name=self.free_name(hint)) for hint in hints]
        own = outputs[0].name if name is None else self.free_name(name)
        self.body.append(ir.node(op, inputs, attributes, outputs=outputs, name=own))
        return outputs

    def substitute(
        self, node: ir.Node, op: str, inputs: Sequence[ir.Value | None], **attributes: Any
    ) -> None:
        """Let another operator make the first output of ``node``, under the same names."""
        new = ir.node(op, inputs, attributes, name=node.name)
        self.body.insert_before(node, new)
        self.take_over(node, new)

    def take_over(self, node: ir.Node, other: ir.Node) -> None:
        """Let ``other`` make what ``node`` makes, under its name; ``node`` goes."""
        old, new = node.outputs[0], other.outputs[0]
        name, old.name = old.name, None
        new.name, new.shape, new.type = name, old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.body.remove(node, safe=True)

    def replace(self, old: ir.Value, new: ir.Value, *, keep: Collection[ir.Node] = ()) -> None:
        """Let everything that reads ``old`` read ``new``, but for the nodes of ``keep``.

        A graph output keeps its name: the node that makes ``new`` takes it over.
        """
        for node, index in old.uses():
            if node not in keep:
                node.replace_input_with(index, new)
        if old.is_graph_output():
            if new.producer() is None or new.is_graph_output():
                new = self.add("Identity", [new], f"{old.name}_identity")
            self.hand_over(old, new, f"{old.name}_unused")

    def hand_over(self, old: ir.Value, new: ir.Value, hint: str) -> None:
        """Make ``new`` the graph output that ``old`` is; ``old`` is named after ``hint``."""
        self.body.outputs[self.body.outputs.index(old)] = new
        name, old.name = old.name, self.free_name(hint)
        new.name, new.shape, new.type = name, old.shape, old.type

    def rank(self, value: ir.Value) -> int | None:
        """Return the number of dimensions of ``value`` where shape inference knows it."""
        if value.shape is None:
            self.infer_shapes()
        return None if value.shape is None else value.shape.rank()

    def infer_shapes(self) -> None:
        """Fill in the shapes and types of values where inference finds them."""
        passes.ShapeInferencePass(check_type=False, strict_mode=False)(self.model)

    def sweep(self) -> None:
        """Remove nodes and constants that nothing reads."""
        passes.RemoveUnusedNodesPass()(self.model)

    def to_model(self) -> ModelProto:
        """Return the graph as a model: nodes in topological order, nothing unused."""
        self.sweep()
        self.body.sort()
        for node in self.of_type("QuantizeLinear"):  # its type may be another by now
            node.outputs[0].type = node.outputs[0].shape = None
        for value in self.body.initializers.values():  # what they are is written with their values
            if not value.is_graph_input() and not value.is_graph_output():
                value.type = value.shape = None
        return ir.to_proto(self.model)

    def _initializer(self, name: str | None, array: Array) -> ir.Value:
        value = ir.val(name, const_value=ir.Tensor(np.asarray(array, order="C"), name=name))
        self.body.register_initializer(value)
        return value

    def free_name(self, hint: str) -> str:
        """Return a name that nothing has, made of ``hint``; it is taken from then on."""
        return fresh_name(self._taken, hint)


def _as_ir(model: ModelProto) -> ir.Model:
    """Return a copy; raise ModelError for an output that is a map, which onnx_ir cannot hold."""
    for output in model.graph.output:
        if _is_map(output.type):
            raise ModelError(
                f"output {output.name!r} is a map (of labels to scores)",
                expected="tensors",
                fix="Export it without ZipMap: skl2onnx's options={'zipmap': False}",
            )
    return ir.from_proto(model)


def _is_map(kind: TypeProto) -> bool:
    inner = [kind.sequence_type.elem_type] if kind.HasField("sequence_type") else []
    inner += [kind.optional_type.elem_type] if kind.HasField("optional_type") else []
    return kind.HasField("map_type") or any(map(_is_map, inner))


def maker(value: ir.Value | None) -> ir.Node | None:
    """Return the node that computes ``value``; None for inputs and constants."""
    return None if value is None else value.producer()


def is_read_once(value: ir.Value) -> bool:
    """Return whether one input of one node is all that reads ``value``."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def constant(value: ir.Value | None) -> Array | None:
    """Return the array of an initializer or Constant; None where ``value`` is computed."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is not None and node.op_type == "Identity":
        return constant(node.inputs[0])
    if node is None or node.op_type != "Constant":
        return None
    ((name, item),) = node.attributes.items()
    if name == "value":
        return np.asarray(item.value.numpy())
    kind = np.float32 if "float" in name else np.int64
    return np.asarray(item.value, dtype=None if "string" in name else kind)


def set_attribute(node: ir.Node, name: str, value: Any) -> None:
    """Set an attribute; None removes it."""
    node.attributes.pop(name, None)
    if value is not None:
        node.attributes.add(ir.convenience.convert_attribute(name, value))


def set_input(node: ir.Node, index: int, value: ir.Value) -> None:
    """Let ``node`` read ``value`` there, as one more input if need be."""
    node.resize_inputs(max(len(node.inputs), index + 1))
    node.replace_input_with(index, value)


def has_body(node: ir.Node) -> bool:
    """Return whether ``node`` has graphs of its own, as If and Loop have."""
    bodies = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(item.type in bodies for item in node.attributes.values())


def label(node: ir.Node) -> str:
    """Return the name of a node, or of its first output where it has none."""
    return node.name or next(filter(None, map(name_of, node.outputs)), node.op_type)


def name_of(value: ir.Value | None) -> str:
    """Return the name of a value; "" for an input that is left out."""
    return (value.name or "") if value is not None else ""


# Operators that pick or move values and compute none: quantizing before or after is the same.
MOVING = (SAME_SCALE - {"Resize"}) | {"Identity", "GlobalMaxPool", "Expand", "Tile"}
_MOVES = MOVING | {"Resize", "Pad", "Concat"}  # these in most of their modes
AVERAGING = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})
_NEVER_NEGATIVE = frozenset(
    {"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Exp", "Abs", "Softplus", "ReduceL1", "Sqrt"}
)
_KEEPS_SIGN = MOVING | AVERAGING | {"ReduceMax", "Dropout"}
_KEEPS_SIGN_OF_ALL = frozenset({"Concat", "Add", "Mul", "Max", "Sum"})


def moves(node: ir.Node) -> bool:
    """Return whether ``node`` only moves the values that it reads, or puts zeros beside them."""
    if node.op_type == "Resize":
        return bool(attribute(node, "mode", "nearest") == "nearest")
    if node.op_type == "Pad" and attribute(node, "mode", "constant") == "constant":
        given = node.inputs[2] if len(node.inputs) > 2 else None
        filling = attribute(node, "value", 0.0) if given is None else constant(given)
        return filling is not None and not np.any(filling)
    return node.op_type in _MOVES


def is_never_negative(value: ir.Value | None, depth: int = 12) -> bool:
    """Return whether ``value``, of a float or a Q/DQ graph, is certainly not negative."""
    node = maker(value)
    if node is None or depth == 0:
        return False
    if node.op_type in _NEVER_NEGATIVE:
        return True
    if node.op_type == "Clip":
        low = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        low = low if low is not None else np.asarray(attribute(node, "min", -1.0))
        return bool(low >= 0)
    if node.op_type == "DequantizeLinear":
        zero = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros((), np.uint8)
        return zero is not None and bool(np.all(zero <= np.iinfo(zero.dtype).min))
    if node.op_type in _KEEPS_SIGN_OF_ALL:
        return all(is_never_negative(each, depth - 1) for each in node.inputs)
    return node.op_type in _KEEPS_SIGN and is_never_negative(node.inputs[0], depth - 1)
