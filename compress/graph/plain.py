"""What ONNX Runtime fused, and half or double precision, written plainly: int8 begins from fp32."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir
from onnx import ModelProto

from compress.graph.model import attribute
from compress.graph.values import EditableGraph, constant, label, maker, set_attribute

# Layouts of the CPU that a file was optimized on: weights are stored in blocks of its registers.
OF_ONE_CPU = frozenset({"com.microsoft.nchwc", "com.ms.internal.nhwc"})
_DOMAIN = "com.microsoft"
_LAYERS = {"FusedConv": "Conv", "FusedGemm": "Gemm"}
_GIVEN = {  # the names of the numbers of an activation, in order
    **dict.fromkeys(("Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "HardSwish"), ()),
    **dict.fromkeys(("LeakyRelu", "Elu", "ThresholdedRelu"), ("alpha",)),
    "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),
}


def is_fused(node: ir.Node) -> bool:
    """Return whether ``node`` is an operator that ``unfused`` writes apart."""
    return node.domain == _DOMAIN and node.op_type in _WRITERS


def unfused(model: ModelProto) -> ModelProto:
    """Return ``model`` with what holds several operators written as these.

    Int8 kernels are chosen for the operators of ONNX; what is fused already stays in float.
    """
    if not any(node.op_type in _WRITERS for node in model.graph.node):
        return model
    graph = EditableGraph(model)
    for node in graph.of_type(*_WRITERS):
        if is_fused(node):
            _WRITERS[node.op_type](graph, node)
    return graph.to_model()


def _write_layer(graph: EditableGraph, node: ir.Node) -> None:
    """Write layer, sum and activation."""
    activation = attribute(node, "activation", "")
    if activation not in ("", *_GIVEN):
        return
    kind, end, whole = _LAYERS[node.op_type], node.outputs[0].name, node.name
    given = {n: attribute(node, n) for n in node.attributes if not n.startswith("activation")}
    made = graph.add(kind, node.inputs[:3], f"{end}_alone", **given)
    if node.inputs[3:] and node.inputs[3] is not None:
        made = graph.add("Add", [made, node.inputs[3]], f"{end}_sum")
    if not activation:
        graph.substitute(node, "Identity", [made])
        return
    layer = maker(made)
    if layer is not None and whole:
        layer.name, node.name = whole, f"{whole}_{activation}"
    numbers = attribute(node, "activation_params") or [
        attribute(node, f"activation_{name}") for name in ("alpha", "beta", "gamma")
    ]
    named = {n: v for n, v in zip(_GIVEN[activation], numbers, strict=False) if v is not None}
    if activation == "Clip":
        limits = [_number(graph, node, n, v) for n, v in named.items()]
        graph.substitute(node, "Clip", [made, *limits])
    else:
        graph.substitute(node, activation, [made], **named)


def _write_product(graph: EditableGraph, node: ir.Node) -> None:
    """Write a product of matrices, one of them transposed or both, times a number."""
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        return
    factors = list(node.inputs)
    ranks = [None if value is None else graph.rank(value) for value in factors]
    alpha, weight = attribute(node, "alpha", 1.0), constant(factors[1])
    for index, name in enumerate(("transA", "transB")):
        rank = ranks[index]
        if not attribute(node, name, 0) or rank == 1:  # a vector has nothing to transpose
            continue
        if rank is None:
            return
        order = [*range(rank - 2), rank - 1, rank - 2]
        if index == 1 and weight is not None:
            weight = np.ascontiguousarray(weight.transpose(order))
        else:
            hint = f"{node.outputs[0].name}_{name}"
            factors[index] = graph.add("Transpose", [factors[index]], hint, perm=order)
    if weight is not None:
        scaled = np.asarray(weight * np.asarray(alpha, weight.dtype), weight.dtype)
        factors[1] = graph.add_constant(f"{label(node)}_weight", scaled)
        graph.substitute(node, "MatMul", factors)
    elif alpha == 1.0:
        graph.substitute(node, "MatMul", factors)
    else:
        product = graph.add("MatMul", factors, f"{node.outputs[0].name}_alone")
        graph.substitute(node, "Mul", [product, _number(graph, node, "alpha", alpha)])


def _write_gelu(graph: EditableGraph, node: ir.Node) -> None:
    """Write x * (1 + erf(x / sqrt(2))) / 2, of a sum if there is a bias."""
    end = node.outputs[0].name
    x = node.inputs[0]
    if node.inputs[1:] and node.inputs[1] is not None:
        x = graph.add("Add", node.inputs[:2], f"{end}_sum")
    root = graph.add("Mul", [x, _number(graph, node, "root", 0.5**0.5)], f"{end}_root")
    error = graph.add("Erf", [root], f"{end}_erf")
    gate = graph.add("Add", [error, _number(graph, node, "one", 1.0)], f"{end}_gate")
    twice = graph.add("Mul", [x, gate], f"{end}_twice")
    graph.substitute(node, "Mul", [twice, _number(graph, node, "half", 0.5)])


def _write_gate(graph: EditableGraph, node: ir.Node) -> None:
    """Write x * sigmoid(alpha * x)."""
    x, alpha, end = node.inputs[0], attribute(node, "alpha", 1.702), node.outputs[0].name
    scaled = x
    if alpha != 1.0:
        scaled = graph.add("Mul", [x, _number(graph, node, "alpha", alpha)], f"{end}_scaled")
    graph.substitute(node, "Mul", [x, graph.add("Sigmoid", [scaled], f"{end}_gate")])


def _number(graph: EditableGraph, node: ir.Node, name: str, value: float) -> ir.Value:
    """Add a constant of the type that ``node`` computes in."""
    given = node.inputs[0].dtype if node.inputs[0] is not None else None
    kind = np.float32 if given is None else given.numpy()
    return graph.add_constant(f"{node.outputs[0].name}_{name}", np.array(value, kind))


_WRITERS: dict[str, Callable[[EditableGraph, ir.Node], None]] = {
    **dict.fromkeys(_LAYERS, _write_layer),
    "FusedMatMul": _write_product,
    **dict.fromkeys(("BiasGelu", "Gelu"), _write_gelu),
    "QuickGelu": _write_gate,
}

HALF, SINGLE, DOUBLE = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE
_TYPES = ("to", "dtype")  # attributes that name an element type


def to_single(model: ModelProto) -> ModelProto:
    """Return ``model`` with what it computes in half or double precision, as its weights are.

    People keep networks in fp16, often as the only file that they have, and those of numpy and
    scikit-learn are in double precision. Their numbers are as good to quantize as any: the layers
    become int8, and the rest is what it was before the conversion. Inputs and outputs keep their
    type, with a cast. The model has no functions of its own.
    """
    graph = EditableGraph(model)
    tensors = list(_constants(graph))
    # Sizes are computed in double precision, in networks that are not: of a matrix nobody does that
    kinds = [HALF] if any(each.dtype == HALF for each in tensors) else []
    kinds += [DOUBLE] if any(t.dtype == DOUBLE and len(t.shape) > 1 for t in tensors) else []
    for kind in kinds:
        _write_single(graph, kind)
    return graph.to_model() if kinds else model


def _write_single(graph: EditableGraph, kind: ir.DataType) -> None:
    body = graph.body
    inputs = [each for each in body.inputs if each.dtype == kind and each.const_value is None]
    outputs = [each for each in body.outputs if each.dtype == kind]
    for value in _values(graph):
        if value.dtype == kind:
            value.dtype = SINGLE
        if value.const_value is not None and value.const_value.dtype == kind:
            value.const_value = _as_single(value.const_value)
    for node in body.all_nodes():
        for name, item in list(node.attributes.items()):
            if name in _TYPES and item.value == kind:
                set_attribute(node, name, int(SINGLE))
            elif item.type == ir.AttributeType.TENSOR and item.value.dtype == kind:
                set_attribute(node, name, _as_single(item.value))
    for value in inputs:
        value.dtype = kind
        single = graph.add("Cast", [value], f"{value.name}_single", to=int(SINGLE))
        cast = maker(single)
        graph.replace(value, single, keep=[] if cast is None else [cast])
    for value in outputs:
        hint = f"{value.name}_single"
        back = graph.add("Cast", [value], f"{value.name}_cast", to=int(kind))
        graph.hand_over(value, back, hint)
        back.type = ir.TensorType(kind)  # not the one it was handed


def _as_single(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _values(graph: EditableGraph) -> Iterator[ir.Value]:
    """Yield all values, those of branches and loops too."""
    for each in (graph.body, *graph.body.subgraphs()):
        yield from itertools.chain(each.inputs, each.initializers.values())
        yield from (value for node in each for value in node.outputs)


def _constants(graph: EditableGraph) -> Iterator[ir.TensorProtocol]:
    yield from (value.const_value for value in _values(graph) if value.const_value is not None)
    for node in graph.body.all_nodes():
        if node.op_type == "Constant":
            yield from (
                a.value for a in node.attributes.values() if a.type == ir.AttributeType.TENSOR
            )
