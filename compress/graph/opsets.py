"""Files of old opsets, converted to one that can be quantized."""

from __future__ import annotations

import onnx
from onnx import GraphProto, ModelProto, NodeProto, helper

from compress.errors import QuantizationError, reason_of
from compress.graph.model import attribute, fresh_name, graphs_in

OLDEST_OPSET = 13
CONVERTED_OPSET = 17


def modern(model: ModelProto, where: str) -> ModelProto:
    """Return ``model``, which may be changed, in an opset that can be quantized.

    ONNX's converter does it, but for two kinds of operator whose old meaning it forgets.

    Raises:
        QuantizationError: it is too old, or an operator cannot be converted.
    """
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if not 0 < opset < OLDEST_OPSET:  # 0: it has no standard operators
        return model
    graphs = list(graphs_in(model.graph))
    taken = {
        name for graph in graphs for node in graph.node for name in (*node.input, *node.output)
    }
    for graph in graphs:
        _flatten_before_hardmax(graph, taken)
    try:
        model = onnx.version_converter.convert_version(model, CONVERTED_OPSET)
    except Exception as error:  # noqa: BLE001 - the converter raises bare exceptions of many kinds
        raise QuantizationError(
            f"opset {opset} cannot be converted to {CONVERTED_OPSET}: {reason_of(str(error))}",
            where=where,
            expected=f"opset {OLDEST_OPSET} or newer",
            fix="Export the network again with a newer opset",
        ) from None
    if opset < 11:
        for graph in graphs_in(model.graph):
            _sample_as_before(graph)
    return model


def _flatten_before_hardmax(graph: GraphProto, taken: set[str]) -> None:
    """Let Hardmax look for the largest value of all axes from its own on, as it did before 13."""
    nodes: list[NodeProto] = []
    for node in graph.node:
        axis = attribute(node, "axis", 1)
        if node.op_type != "Hardmax" or axis == -1:
            nodes.append(node)
            continue
        given, made = node.input[0], node.output[0]
        shape, flat, one = (
            fresh_name(taken, f"{made}_{kind}") for kind in ("shape", "flat", "one")
        )
        nodes += [
            helper.make_node("Shape", [given], [shape]),
            helper.make_node("Flatten", [given], [flat], axis=axis),
            helper.make_node("Hardmax", [flat], [one], name=node.name, axis=1),
            helper.make_node("Reshape", [one, shape], [made]),
        ]
    if len(nodes) > len(graph.node):
        del graph.node[:]
        graph.node.extend(nodes)


def _sample_as_before(graph: GraphProto) -> None:
    """Let every Resize sample as Upsample, and Resize before opset 11, did."""
    sampled = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    for node in graph.node:
        if node.op_type == "Resize":
            kept = [item for item in node.attribute if item.name not in sampled]
            del node.attribute[:]
            made = (helper.make_attribute(*each) for each in sampled.items())
            node.attribute.extend([*kept, *made])
