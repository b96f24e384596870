"""HardSwish and HardSigmoid written out in small steps, as one operator that runtimes know."""

from __future__ import annotations

import math

import onnx_ir as ir

from compress.graph.model import attribute
from compress.graph.values import EditableGraph, constant, is_read_once, maker

OLDEST_OPSET = 14  # the first with HardSwish


def join_hard_swish(graph: EditableGraph) -> None:
    """Write x * clip(x + 3, 0, 6) / 6, in any order, as HardSwish.

    Exporters of older opsets write four operators. Quantized one by one they cost more time than
    the convolution before them saves, and each adds its noise. A gate clip(x + 3, 0, 6) / 6 becomes
    HardSigmoid.
    """
    if graph.body.opset_imports.get("", 0) < OLDEST_OPSET:
        return
    found = [(node, _swish(node), _gate(node)) for node in graph.nodes]
    for node, swish, gate in found:
        if swish is not None:
            graph.substitute(node, "HardSwish", [swish])
        elif gate is not None:
            graph.substitute(node, "HardSigmoid", [gate], alpha=1 / 6)


def _swish(node: ir.Node) -> ir.Value | None:
    whole = _sixth(node)
    product = _made_by(whole, "Mul")
    if product is not None and whole is not None and is_read_once(whole):
        for source, gate in (product.inputs, product.inputs[::-1]):
            if source is not None and _clipped(gate) is source:
                return source
    if node.op_type == "Mul" and all(constant(value) is None for value in node.inputs):
        for source, gate in (node.inputs, node.inputs[::-1]):
            if source is not None and _gated(gate) is source:
                return source
    return None


def _gate(node: ir.Node) -> ir.Value | None:
    return _clipped(_sixth(node))


def _gated(value: ir.Value | None) -> ir.Value | None:
    """Return x where ``value`` is clip(x + 3, 0, 6) / 6 in whatever form."""
    node = maker(value)
    if node is None or node.op_type != "HardSigmoid":
        return None if node is None else _gate(node)
    is_sixth = math.isclose(attribute(node, "alpha", 0.2), 1 / 6, rel_tol=1e-3)
    return node.inputs[0] if is_sixth and attribute(node, "beta", 0.5) == 0.5 else None


def _sixth(node: ir.Node) -> ir.Value | None:
    """Return what ``node`` divides by six, or None."""
    if node.op_type not in ("Div", "Mul") or len(node.inputs) != 2:
        return None
    for position, wanted in ((1, 6.0), (1, 1 / 6), (0, 1 / 6)):
        if (wanted == 6.0) == (node.op_type == "Div") and _is(node.inputs[position], wanted):
            return node.inputs[1 - position]
    return None


def _clipped(value: ir.Value | None) -> ir.Value | None:
    """Return x where ``value`` is clip(x + 3, 0, 6), or None."""
    clip = _made_by(value, "Clip")
    if clip is None or len(clip.inputs) < 3:
        return None
    if not (_is(clip.inputs[1], 0.0) and _is(clip.inputs[2], 6.0)):
        return None
    add = _made_by(clip.inputs[0], "Add")
    for position in (0, 1) if add is not None else ():
        if add is not None and _is(add.inputs[position], 3.0):
            return add.inputs[1 - position]
    return None


def _made_by(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = maker(value)
    return node if node is not None and node.op_type == kind else None


def _is(value: ir.Value | None, number: float) -> bool:
    array = constant(value)
    return (
        array is not None
        and array.size == 1
        and math.isclose(float(array.reshape(-1)[0]), number, rel_tol=1e-4, abs_tol=1e-9)
    )
