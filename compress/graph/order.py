"""Nodes in an order in which they can be computed."""

from __future__ import annotations

import heapq

from onnx import GraphProto, NodeProto

from compress.graph.model import reads


def sort_nodes(graph: GraphProto) -> None:
    """Put the nodes of ``graph``, and those inside them, behind what they read.

    Tools that convert a file to half precision append their casts at its end. ONNX Runtime sorts
    such files for itself; ONNX's checker and its shape inference refuse them or stop there. Nodes
    that were in order keep their places, and so do those that need each other.
    """
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                sort_nodes(inner)
    order = _order(list(graph.node))
    if order != sorted(order):
        nodes = [graph.node[index] for index in order]
        copies = GraphProto(node=nodes)
        del graph.node[:]
        graph.node.extend(copies.node)


def _order(nodes: list[NodeProto]) -> list[int]:
    """Return the places of ``nodes`` in the new order; the old one where they go in circles."""
    maker = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    waits = [{maker[name] for name in reads(node) if name in maker} for node in nodes]
    if all(max(needed, default=-1) < index for index, needed in enumerate(waits)):
        return list(range(len(nodes)))
    readers: list[list[int]] = [[] for _ in nodes]
    for index, needed in enumerate(waits):
        for other in needed:
            readers[other].append(index)
    left = [len(needed) for needed in waits]
    ready = [index for index, count in enumerate(left) if not count]
    order = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for reader in readers[index]:
            left[reader] -= 1
            if not left[reader]:
                heapq.heappush(ready, reader)
    return order if len(order) == len(nodes) else list(range(len(nodes)))
