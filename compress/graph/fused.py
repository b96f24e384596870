"""What ONNX Runtime fused when it saved a graph, written as the operators of ONNX again."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx import ModelProto

from compress.graph.model import attribute
from compress.graph.values import EditableGraph, maker

# Layouts of the CPU that a file was optimized on: weights are stored in blocks of its registers.
OF_ONE_CPU = frozenset({"com.microsoft.nchwc", "com.ms.internal.nhwc"})
_FUSED = {"FusedConv": "Conv", "FusedGemm": "Gemm"}
_GIVEN = {  # the names of the numbers of an activation, in order
    **dict.fromkeys(("Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "HardSwish"), ()),
    **dict.fromkeys(("LeakyRelu", "Elu", "ThresholdedRelu"), ("alpha",)),
    "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),
}


def unfused(model: ModelProto) -> ModelProto:
    """Return ``model`` with layers that hold an activation written as layer, sum and activation.

    Int8 kernels are chosen for the operators of ONNX; what is fused already stays in float.
    """
    if not any(node.op_type in _FUSED for node in model.graph.node):
        return model
    graph = EditableGraph(model)
    for node in graph.of_type(*_FUSED):
        activation = attribute(node, "activation", "")
        if activation in ("", *_GIVEN) and node.domain == "com.microsoft":
            _write_apart(graph, node, activation)
    return graph.to_model()


def _write_apart(graph: EditableGraph, node: ir.Node, activation: str) -> None:
    kind, end, whole = _FUSED[node.op_type], node.outputs[0].name, node.name
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
        limits = [
            graph.add_constant(f"{end}_{n}", np.array(v, np.float32)) for n, v in named.items()
        ]
        graph.substitute(node, "Clip", [made, *limits])
    else:
        graph.substitute(node, activation, [made], **named)
