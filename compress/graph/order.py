"""Nodes in an order in which they can be computed."""

from __future__ import annotations

import contextlib

from onnx import GraphProto
from onnx_ir import serde

from compress.graph.model import reads


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
    inner = (
        each
        for node in graph.node
        for attribute in node.attribute
        for each in (attribute.g, *attribute.graphs)
    )
    later = {name for node in graph.node for name in node.output if name}
    for node in graph.node:
        if later.intersection(reads(node)):
            return False
        later.difference_update(node.output)
    return all(map(_is_sorted, inner))
