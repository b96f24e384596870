"""An fp32 graph, quantized or not, with the float part in half precision and fragile ops held back.

TensorRT 11 is strongly typed: what is fp32 in the graph runs in fp32. So half precision has to be
written into the graph, and beside int8 layers it is what the rest of the network runs in. Scales
of Q and DQ stay fp32, with casts beside them: TensorRT-RTX builds the same kernels as with fp16
scales, without its warning that it converts them back, and small scales are not lost.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from compress.graph.model import WEIGHTED, attribute
from compress.graph.values import EditableGraph, constant, has_body, maker

LARGEST = 65504.0  # of fp16
SMALLEST = 2.0**-24  # subnormal of fp16
MANY = 1024  # elements, from which a sum in half precision is not trusted

HELD = frozenset(  # stay in fp32
    # norms: squares overflow, small variances vanish
    {"BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization"}
    | {"LpNormalization", "MeanVarianceNormalization", "RMSNormalization", "LRN"}
    # steep: small errors of the input grow, large values overflow
    | {"Softmax", "LogSoftmax", "Exp", "Log", "Pow", "Sqrt", "Reciprocal", "Softplus", "Mish"}
    # sums of many or large values
    | {"ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp"}
    | {"ReduceProd", "CumSum", "LpPool", "GlobalLpPool"}
    # whose type is an attribute
    | {"Cast", "CastLike", "ConstantOfShape", "EyeLike", "RandomNormal", "RandomNormalLike"}
    | {"RandomUniform", "RandomUniformLike", "Constant", "Range"}
    # whose scale stays fp32
    | {"QuantizeLinear", "DequantizeLinear"}
)
MEANS = frozenset({"ReduceMean", "GlobalAveragePool"})
ANY_TYPE = frozenset({"Shape", "Size"})  # read what is there, whatever its type


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of an fp32 graph, with or without Q/DQ nodes, with its float part in fp16.

    Inputs and outputs stay fp32.
    """
    graph = EditableGraph(onnx.shape_inference.infer_shapes(model, data_prop=True))
    held = _held(graph)
    casts = _Casts(graph)
    for node in graph.nodes:
        slots = set() if node in held else set(_slots(node))
        if node.op_type not in ANY_TYPE:
            for index, value in enumerate(node.inputs):
                if value is not None and _is_float(value):
                    node.replace_input_with(index, casts.typed(value, index in slots))
        if node not in held:
            casts.make_half(node)
    half = graph.to_model()
    del half.graph.value_info[:]
    half = onnx.shape_inference.infer_shapes(half)
    onnx.checker.check_model(half, full_check=True)
    return half


def _held(graph: EditableGraph) -> set[ir.Node]:
    """Return the nodes that stay in fp32: fragile ones, what bodies of If or Loop read."""
    held = {
        node
        for node in graph.nodes
        if _is_fragile(node) or any(each.graph is not graph.body for each in _readers(node))
    }
    for node in graph.nodes:  # between held nodes two casts cost more than they save
        made = [made for value in node.inputs if (made := maker(value)) is not None]
        readers = _readers(node)
        if node in held or not made or not readers or node.op_type in ANY_TYPE:
            continue
        if node.op_type in WEIGHTED and any(
            constant(value) is not None for value in node.inputs[:2]
        ):
            continue
        if all(each in held for each in (*made, *readers)):
            held.add(node)
    return held


def _readers(node: ir.Node) -> list[ir.Node]:
    return [reader for value in node.outputs for reader, _ in value.uses()]


def _is_fragile(node: ir.Node) -> bool:
    """Return whether a node has no form in half precision, or loses too much in it."""
    is_sum = node.op_type in MEANS and _elements(node) > MANY
    if node.op_type in HELD or is_sum or has_body(node) or not _slots(node):
        return True
    constants = (constant(value) for value in node.inputs)
    return any(
        array is not None
        and array.dtype == np.float32
        and np.isfinite(array).all()
        and np.abs(array).max(initial=0.0) > LARGEST
        for array in constants
    )


def _elements(node: ir.Node) -> float:
    """Return how many elements are averaged into one; infinite where it is unknown."""
    image = node.inputs[0]
    shape = None if image is None else image.shape
    if shape is None:
        return float("inf")
    axes = range(2, len(shape))
    if node.op_type == "ReduceMean":
        given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = attribute(node, "axes", range(len(shape)) if given is None else given.tolist())
    sizes = [shape[axis] for axis in axes]
    return math.prod(n if isinstance(n, int) and n else float("inf") for n in sizes)


def _slots(node: ir.Node) -> list[int]:
    """Return the inputs of ``node`` that may be fp16 instead of fp32."""
    schema = _schema(node)
    return [
        index
        for index, value in enumerate(node.inputs)
        if value is not None and _is_float(value) and _allows(schema, "inputs", index)
    ]


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (None, ir.DataType.FLOAT)


def _schema(node: ir.Node) -> onnx.defs.OpSchema | None:
    domain = "" if node.domain == "ai.onnx" else node.domain
    versions = node.graph.opset_imports if node.graph is not None else {}
    try:
        return onnx.defs.get_schema(node.op_type, versions.get(domain, 1), domain)
    except onnx.defs.SchemaError:  # an operator of somebody's own
        return None


def _allows(schema: onnx.defs.OpSchema | None, ends: str, index: int) -> bool:
    """Return whether an operator's "inputs" or "outputs" at this place may be fp16."""
    if schema is None:
        return False
    formal = getattr(schema, ends)
    kind = formal[min(index, len(formal) - 1)].type_str
    for constraint in schema.type_constraints:
        if constraint.type_param_str == kind:
            return "tensor(float16)" in constraint.allowed_type_strs
    return str(kind) == "tensor(float16)"


def _as_half(array: NDArray[Any]) -> NDArray[np.float16]:
    """Return ``array`` in fp16; infinities stay, positive values stay positive."""
    half = np.clip(array, -LARGEST, LARGEST).astype(np.float16)
    half = np.where(np.isfinite(array), half, array.astype(np.float16))
    vanished = (half == 0) & (array > 0)
    return np.where(vanished, np.float16(SMALLEST), half).astype(np.float16)


class _Casts:
    """The values of one graph in the other precision, each made once."""

    def __init__(self, graph: EditableGraph) -> None:
        self.graph = graph
        self.made: dict[ir.Value, ir.Value] = {}
        self.half: set[ir.Value] = set()  # values that their own node makes in fp16

    def typed(self, value: ir.Value, as_half: bool) -> ir.Value:
        """Return ``value`` in one precision, made where it is not there yet."""
        if (value in self.half) == as_half:
            return value
        if value not in self.made:
            array = constant(value)
            hint = f"{value.name}_fp{16 if as_half else 32}"
            is_given = array is not None and value.producer() is None
            self.made[value] = (
                self.graph.add_constant(hint, _as_half(array))
                if array is not None and is_given
                else self._cast(value, hint, as_half)
            )
        return self.made[value]

    def make_half(self, node: ir.Node) -> None:
        """Let ``node`` make fp16 values; an output of the graph leaves its name to a cast back."""
        schema = _schema(node)
        for index, value in enumerate(node.outputs if schema is not None else ()):
            if not value.name or not _is_float(value) or not _allows(schema, "outputs", index):
                continue
            self.half.add(value)
            if value.is_graph_output():
                back = self.made[value] = self._cast(value, f"{value.name}", False)
                self.graph.hand_over(value, back, f"{value.name}_fp16")

    def _cast(self, value: ir.Value, hint: str, as_half: bool) -> ir.Value:
        return self.graph.add("Cast", [value], hint, f"{hint}_cast", to=10 if as_half else 1)
