"""An fp32 graph, quantized or not, with the float part in half precision and fragile ops held back.

TensorRT 11 is strongly typed: what is fp32 in the graph runs in fp32. So half precision has to be
written into the graph, and beside int8 layers it is what the rest of the network runs in. Scales
of Q and DQ stay fp32, with casts beside them: TensorRT-RTX builds the same kernels as with fp16
scales, without its warning that it converts them back, and small scales are not lost.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from compress.errors import ExportError

LARGEST = 65504.0  # of fp16
SMALLEST = 2.0**-24  # subnormal of fp16
MANY = 1024  # elements, from which a sum in half precision is not trusted

NORMS = frozenset(
    {"BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization"}
    | {"LpNormalization", "MeanVarianceNormalization", "RMSNormalization", "LRN"}
)
STEEP = frozenset(
    {"Softmax", "LogSoftmax", "Exp", "Log", "Pow", "Sqrt", "Reciprocal", "Softplus", "Mish"}
)
SUMS = frozenset(
    {"ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp"}
    | {"ReduceProd", "CumSum", "LpPool", "GlobalLpPool"}
)
MEANS = frozenset({"ReduceMean", "GlobalAveragePool"})
TYPED_BY_ATTRIBUTE = frozenset(
    {"Cast", "CastLike", "ConstantOfShape", "EyeLike", "RandomNormal", "RandomNormalLike"}
    | {"RandomUniform", "RandomUniformLike", "Constant", "Range"}
)
HEAVY = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
ANY_TYPE = frozenset({"Shape", "Size"})  # read what is there, whatever its type


def to_half(model: onnx.ModelProto, *, keep: Collection[str] = ()) -> onnx.ModelProto:
    """Return ``model`` with its float part in fp16; inputs and outputs stay fp32.

    Args:
        model: An fp32 graph with or without Q/DQ nodes. Not modified.
        keep: Names of nodes to hold in fp32.

    Raises:
        ExportError: ``keep`` names a node that is not there.
    """
    graph = _Half(model)
    held = graph.hold(keep)
    return graph.write(held)


_FLOAT = TensorProto.FLOAT
_HALF = TensorProto.FLOAT16


@dataclass
class _Half:
    """One conversion: the model, what is known of its values, and the casts made so far."""

    model: onnx.ModelProto
    casts: dict[tuple[str, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Index types, constants and readers."""
        inferred = onnx.shape_inference.infer_shapes(self.model, data_prop=True)
        graph = inferred.graph
        self.nodes: Sequence[NodeProto] = self.model.graph.node
        self.opsets = {o.domain: o.version for o in self.model.opset_import}
        self.constants = {t.name: t for t in graph.initializer}
        self.types = {name: t.data_type for name, t in self.constants.items()}
        self.shapes: dict[str, list[int]] = {}
        for value in [*graph.input, *graph.value_info, *graph.output]:
            kind = value.type.tensor_type
            self.types.setdefault(value.name, kind.elem_type)
            if kind.HasField("shape"):
                self.shapes[value.name] = [d.dim_value for d in kind.shape.dim]
        self.makers = {name: i for i, node in enumerate(self.nodes) for name in node.output}
        self.readers: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in node.input:
                self.readers.setdefault(name, []).append(i)

    def hold(self, keep: Collection[str]) -> dict[int, str]:
        """Return the positions of the nodes that stay in fp32, and why."""
        names = {node.name for node in self.nodes}
        if absent := sorted(set(keep) - names):
            raise ExportError(
                f"there is no node {absent[0]!r} to hold in fp32",
                fix="Name nodes as they are called in the ONNX file",
            )
        captured = _captured(self.nodes)
        held = {}
        for i, node in enumerate(self.nodes):
            why = "asked for" if node.name in keep else self._why_held(node)
            if not why and captured & set(node.output):
                why = "read by the body of an If or Loop"
            if why:
                held[i] = why
        self._close_islands(held)
        return held

    def _why_held(self, node: NodeProto) -> str:
        kind = node.op_type
        if kind in ("QuantizeLinear", "DequantizeLinear"):
            return "its scale stays fp32"
        if kind in NORMS:
            return "a norm: squares overflow, small variances vanish"
        if kind in STEEP:
            return "steep: small errors of its input grow, large values overflow"
        if kind in SUMS or (kind in MEANS and self._elements(node) > MANY):
            return "a sum of many or large values"
        if kind in TYPED_BY_ATTRIBUTE:
            return "its type is an attribute"
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            return "it has a body"
        if not self._slots(node):
            return "it has no form in half precision"
        return self._why_constants_do_not_fit(node)

    def _why_constants_do_not_fit(self, node: NodeProto) -> str:
        for name in node.input:
            tensor = self.constants.get(name)
            if tensor is None or tensor.data_type != _FLOAT:
                continue
            array = np.abs(numpy_helper.to_array(tensor).astype(np.float64))
            if array.size and float(array.max()) > LARGEST and np.isfinite(array).all():
                return f"constant {name!r} reaches {array.max():.3g}"
        return ""

    def _elements(self, node: NodeProto) -> float:
        """Return how many elements are averaged into one; infinite where it is unknown."""
        shape = self.shapes.get(node.input[0])
        if shape is None:
            return float("inf")
        axes: Sequence[int] = range(2, len(shape))
        if node.op_type == "ReduceMean":
            found = next((list(a.ints) for a in node.attribute if a.name == "axes"), None)
            if found is None and len(node.input) > 1 and node.input[1] in self.constants:
                found = numpy_helper.to_array(self.constants[node.input[1]]).tolist()
            axes = found if found is not None else range(len(shape))
        sizes = [shape[axis] for axis in axes]
        return float(np.prod(sizes)) if all(sizes) else float("inf")

    def _slots(self, node: NodeProto) -> list[int]:
        """Return the inputs of ``node`` that may be fp16 instead of fp32."""
        schema = _schema(node, self.opsets)
        if schema is None:
            return []
        slots = []
        for i, name in enumerate(node.input):
            formal = schema.inputs[min(i, len(schema.inputs) - 1)]
            is_float = self.types.get(name, _FLOAT) == _FLOAT
            if name and is_float and _allows_half(schema, formal.type_str):
                slots.append(i)
        return slots

    def _makes_half(self, node: NodeProto) -> list[str]:
        """Return the outputs of a node in half precision that are fp16 instead of fp32."""
        schema = _schema(node, self.opsets)
        if schema is None:
            return []
        return [
            name
            for i, name in enumerate(node.output)
            if name
            and self.types.get(name, _FLOAT) == _FLOAT
            and _allows_half(schema, schema.outputs[min(i, len(schema.outputs) - 1)].type_str)
        ]

    def _close_islands(self, held: dict[int, str]) -> None:
        """Hold what lies between held nodes only: two casts cost more than they save."""
        for i, node in enumerate(self.nodes):
            makers = [self.makers[name] for name in node.input if name in self.makers]
            readers = [r for name in node.output for r in self.readers.get(name, [])]
            if i in held or not makers or not readers or node.op_type in ANY_TYPE:
                continue
            if node.op_type in HEAVY and any(name in self.constants for name in node.input[:2]):
                continue
            if all(m in held for m in makers) and all(r in held for r in readers):
                held[i] = "between ops in fp32"

    def write(self, held: Mapping[int, str]) -> onnx.ModelProto:
        """Return the converted model."""
        native: dict[str, int] = {}
        for i, node in enumerate(self.nodes):
            if i not in held:
                native |= dict.fromkeys(self._makes_half(node), _HALF)
        outputs = {value.name for value in self.model.graph.output}
        nodes: list[NodeProto] = []
        for i, node in enumerate(self.nodes):
            new = NodeProto()
            new.CopyFrom(node)
            slots = set() if i in held else set(self._slots(node))
            for position, name in enumerate(node.input):
                if not name or node.op_type in ANY_TYPE:
                    new.input[position] = _renamed(name, native, outputs)
                    continue
                wanted = _HALF if position in slots else _FLOAT
                new.input[position] = self._typed(name, wanted, native, outputs, nodes)
            for position, name in enumerate(node.output):
                new.output[position] = _renamed(name, native, outputs)
            nodes.append(new)
            nodes += [
                _cast(_renamed(name, native, outputs), name, _FLOAT)
                for name in node.output
                if name in outputs and native.get(name) == _HALF
            ]
        return self._assemble(nodes)

    def _typed(
        self,
        name: str,
        wanted: int,
        native: Mapping[str, int],
        outputs: Collection[str],
        nodes: list[NodeProto],
    ) -> str:
        """Return the name under which ``name`` is to be had in the type ``wanted``."""
        if self.types.get(name, _FLOAT) != _FLOAT:
            return name
        present = native.get(name, _FLOAT)
        if present == wanted:
            return _renamed(name, native, outputs)
        if (name, wanted) in self.casts:
            return self.casts[name, wanted]
        made = self.casts[name, wanted] = f"{name}_{'fp16' if wanted == _HALF else 'fp32'}"
        if name in self.constants:
            array = numpy_helper.to_array(self.constants[name])
            self.constants[made] = numpy_helper.from_array(_as_half(array), made)
        elif name in outputs:  # already cast back for the caller
            self.casts[name, wanted] = made = name
        else:
            nodes.append(_cast(_renamed(name, native, outputs), made, wanted))
        return made

    def _assemble(self, nodes: Iterable[NodeProto]) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        graph = model.graph
        del graph.node[:], graph.value_info[:], graph.initializer[:]
        graph.node.extend(nodes)
        read = {name for node in graph.node for name in node.input} | _captured(graph.node)
        read |= {value.name for value in graph.output}
        graph.initializer.extend(t for name, t in self.constants.items() if name in read)
        model = onnx.shape_inference.infer_shapes(model)
        onnx.checker.check_model(model, full_check=True)
        return model


def _schema(node: NodeProto, opsets: Mapping[str, int]) -> onnx.defs.OpSchema | None:
    domain = "" if node.domain == "ai.onnx" else node.domain
    try:
        return onnx.defs.get_schema(node.op_type, opsets.get(domain, 1), domain)
    except onnx.defs.SchemaError:  # an operator of somebody's own
        return None


def _allows_half(schema: onnx.defs.OpSchema, kind: str) -> bool:
    for constraint in schema.type_constraints:
        if constraint.type_param_str == kind:
            return "tensor(float16)" in constraint.allowed_type_strs
    return kind == "tensor(float16)"


def _as_half(array: NDArray[Any]) -> NDArray[np.float16]:
    """Return ``array`` in fp16; infinities stay, positive values stay positive."""
    half = np.clip(array, -LARGEST, LARGEST).astype(np.float16)
    half = np.where(np.isfinite(array), half, array.astype(np.float16))
    vanished = (half == 0) & (array > 0)
    return np.where(vanished, np.float16(SMALLEST), half).astype(np.float16)


def _renamed(name: str, native: Mapping[str, int], outputs: Collection[str]) -> str:
    """Return the inner name of a value: an output made in fp16 leaves its own to the cast."""
    return f"{name}_fp16" if name in outputs and native.get(name) == _HALF else name


def _cast(source: str, target: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}_cast", to=to)


def _captured(nodes: Iterable[NodeProto]) -> set[str]:
    """Return the names that the bodies of If, Loop and Scan read."""
    names: set[str] = set()
    for node in nodes:
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                names |= {name for inner in body.node for name in inner.input}
                names |= {v.name for v in body.output} | _captured(body.node)
    return names
