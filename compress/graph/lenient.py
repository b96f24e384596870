"""Files of old opsets, and what runtimes take but ONNX's checker does not, as ONNX has it now."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import onnx
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, helper
from onnx_ir import serde

from compress.errors import QuantizationError, reason_of
from compress.graph.model import attribute, bodies, fresh_name, graphs_in, reads

_SHARED_BY_GROUPS = range(18, 21)  # opsets whose GroupNormalization has one scale for each group


def write_plainly(model: ModelProto) -> None:
    """Name all domains that ``model`` uses, and write out what ONNX defined wrongly or withdrew.

    Runtimes read such files as they were meant. It is changed in place.
    """
    inputs = {value.name for value in model.graph.input}
    if not inputs.issuperset(tensor.name for tensor in model.graph.initializer):
        model.ir_version = max(model.ir_version, 4)  # before, all weights were inputs
    for body in (model, *model.functions):
        parts = list(graphs_in(body.graph if isinstance(body, ModelProto) else body))
        named = {each.domain or "ai.onnx" for each in body.opset_import}
        used = {node.domain or "ai.onnx" for part in parts for node in part.node}
        body.opset_import.extend(
            helper.make_opsetid(domain, 1) for domain in sorted(used - named - {"ai.onnx"})
        )
        opset = max(
            (o.version for o in body.opset_import if o.domain in ("", "ai.onnx")), default=0
        )
        for part in parts:
            _write_norms(part, opset)


def _write_norms(body: GraphProto | FunctionProto, opset: int) -> None:
    nodes: list[NodeProto] = []
    for node in body.node:
        is_standard = node.domain in ("", "ai.onnx")
        if is_standard and node.op_type == "GroupNormalization" and opset in _SHARED_BY_GROUPS:
            nodes += _by_instance(node)
            continue
        if is_standard and node.op_type == "MeanVarianceNormalization" and not node.attribute:
            node.attribute.append(helper.make_attribute("axes", [0, 2, 3]))  # its default
        nodes.append(node)
    if len(nodes) > len(body.node):
        rest = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del body.node[:]
        body.node.extend(rest)


def _by_instance(node: NodeProto) -> Iterator[NodeProto]:
    """Yield what computes a GroupNormalization that has one scale and bias for each group."""
    made, make = node.output[0], helper.make_node
    given = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    sizes, target, grouped, normed = (
        f"{made}_{part}" for part in ("sizes", "target", "groups", "normed")
    )
    how = {"epsilon": given.get("epsilon", 1e-5)}
    yield make("Shape", node.input[:1], [sizes], sizes)
    yield make("Constant", [], [target], target, value_ints=[0, given["num_groups"], -1])
    yield make("Reshape", [node.input[0], target], [grouped], grouped)
    yield make("InstanceNormalization", [grouped, *node.input[1:]], [normed], node.name, **how)
    yield make("Reshape", [normed, sizes], [made], f"{made}_ungrouped")


def sort_nodes(graph: GraphProto) -> None:
    """Put the nodes of ``graph``, and those inside them, behind what they read.

    Tools that convert a file to half precision append their casts at its end. ONNX Runtime sorts
    such files for itself; ONNX's checker and its shape inference refuse them or stop there. A graph
    in order is left as it is, and so is one whose nodes need each other.
    """
    if not _is_sorted(graph):
        with contextlib.suppress(ValueError):  # others tell of circles
            ordered = serde.deserialize_graph(graph)
            ordered.sort()
            nodes = serde.serialize_graph(ordered).node
            del graph.node[:]
            graph.node.extend(nodes)


def _is_sorted(graph: GraphProto) -> bool:
    inner = (body for node in graph.node for body in bodies(node))
    later = {name for node in graph.node for name in node.output if name}
    for node in graph.node:
        if later.intersection(reads(node)):
            return False
        later.difference_update(node.output)
    return all(map(_is_sorted, inner))


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
