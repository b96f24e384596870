"""HardSwish and HardSigmoid written out in small steps, as one operator that runtimes know."""

from __future__ import annotations

import math

from onnx import ModelProto, NodeProto, helper

from compress.graph.model import Graph, replace_nodes

OLDEST_OPSET = 14  # the first with HardSwish


def join_hard_swish(model: ModelProto) -> None:
    """Write x * clip(x + 3, 0, 6) / 6, in any order, as HardSwish; ``model`` is changed.

    Exporters of older opsets write four operators. Quantized one by one they cost more time than
    the convolution before them saves, and each adds its noise. A gate clip(x + 3, 0, 6) / 6 becomes
    HardSigmoid.
    """
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < OLDEST_OPSET:
        return
    graph = Graph(model)
    replaced: dict[str, NodeProto] = {}
    for node in graph.nodes:
        found = _swish(graph, node) or _gate(graph, node)
        if found is not None:
            kind, source = found
            made = helper.make_node(kind, [source], [node.output[0]], name=node.name)
            if kind == "HardSigmoid":
                made.attribute.append(helper.make_attribute("alpha", 1 / 6))
            replaced[node.output[0]] = made
    if replaced:  # what nobody reads any more is dropped later
        replace_nodes(model, [replaced.get(node.output[0], node) for node in graph.nodes])


def _swish(graph: Graph, node: NodeProto) -> tuple[str, str] | None:
    whole = _sixth(graph, node)
    product = _maker(graph, whole, "Mul")
    if product is not None and whole is not None and graph.only_reader(whole) is not None:
        for source, gate in (product.input, product.input[::-1]):
            if _clipped(graph, gate) == source:
                return "HardSwish", source
    if node.op_type == "Mul" and len(graph.data_inputs(node)) == 2:
        for source, gate in (node.input, node.input[::-1]):
            if _gated(graph, gate) == source:
                return "HardSwish", source
    return None


def _gate(graph: Graph, node: NodeProto) -> tuple[str, str] | None:
    source = _clipped(graph, _sixth(graph, node))
    return None if source is None else ("HardSigmoid", source)


def _gated(graph: Graph, name: str) -> str | None:
    """Return x where ``name`` is clip(x + 3, 0, 6) / 6 in whatever form."""
    node = graph.producer.get(name)
    if node is None:
        return None
    if node.op_type == "HardSigmoid":
        values = {a.name: a.f for a in node.attribute}
        is_sixth = math.isclose(values.get("alpha", 0.2), 1 / 6, rel_tol=1e-3)
        return str(node.input[0]) if is_sixth and values.get("beta", 0.5) == 0.5 else None
    return _clipped(graph, _sixth(graph, node))


def _sixth(graph: Graph, node: NodeProto) -> str | None:
    """Return what ``node`` divides by six, or None."""
    if node.op_type not in ("Div", "Mul") or len(node.input) != 2:
        return None
    for position, wanted in ((1, 6.0), (1, 1 / 6), (0, 1 / 6)):
        if (wanted == 6.0) == (node.op_type == "Div") and _is(graph, node.input[position], wanted):
            return str(node.input[1 - position])
    return None


def _clipped(graph: Graph, name: str | None) -> str | None:
    """Return x where ``name`` is clip(x + 3, 0, 6), or None."""
    clip = _maker(graph, name, "Clip")
    if clip is None or len(clip.input) < 3:
        return None
    if not (_is(graph, clip.input[1], 0.0) and _is(graph, clip.input[2], 6.0)):
        return None
    add = _maker(graph, clip.input[0], "Add")
    for position in (0, 1) if add is not None else ():
        if add is not None and _is(graph, add.input[position], 3.0):
            return str(add.input[1 - position])
    return None


def _maker(graph: Graph, name: str | None, kind: str) -> NodeProto | None:
    node = graph.producer.get(name or "")
    return node if node is not None and node.op_type == kind else None


def _is(graph: Graph, name: str, value: float) -> bool:
    constant = graph.constant(name)
    return (
        constant is not None
        and constant.size == 1
        and math.isclose(float(constant.reshape(-1)[0]), value, rel_tol=1e-4, abs_tol=1e-9)
    )
