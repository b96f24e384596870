"""What a plan says of itself beside its figures: parts left in float, how far to trust it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnx import AttributeProto, NodeProto

from compress.graph.model import WEIGHTED, Graph
from compress.qdq.placement import place
from compress.quantize.sqnr import shown

ENOUGH = 32  # images, with which an SQNR is right to about a decibel
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})


def float_parts(graph: Graph, target: str) -> list[str]:
    """Return a sentence for each part with weights that ``target`` cannot have in int8.

    Args:
        graph: A prepared graph.
        target: The runtime.
    """
    left = place(graph, target).left_float
    products = {n.name for n in graph.nodes if len(graph.data_inputs(n)) > 1}
    found = [f"{name} stays in float: {why}" for name, why in left.items() if name not in products]
    for node in graph.nodes:
        inside = _weighted_inside(node)
        if node.op_type in _RECURRENT:
            found.append(f"{node.name} ({node.op_type}) stays in float: no target has it in int8")
        elif inside:
            found.append(f"{node.name} ({node.op_type}) stays in float, {inside} layers inside")
    return found


def of_judging(images: int, names: Sequence[str], each_db: Sequence[float]) -> list[str]:
    """Return sentences on the answers that were compared.

    Args:
        images: How many they were compared on.
        names: Tensors that were compared.
        each_db: SQNR of each, decibels.
    """
    found = []
    told = [db for db in each_db if not math.isnan(db)]
    if len(names) > 1 and told:
        pairs = zip(names, each_db, strict=True)
        found.append("SQNR by output: " + ", ".join(f"{name} {shown(db)}" for name, db in pairs))
    if images < ENOUGH and told:
        found.append(
            f"judged on {images} images: an SQNR may be some dB off; give {2 * ENOUGH} or more"
        )
    return found


def _weighted_inside(node: NodeProto) -> int:
    """Return the number of weighted ops in the subgraphs of ``node``."""
    bodies = [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]
    children = [child for body in bodies for child in body.node]
    return sum((child.op_type in WEIGHTED) + _weighted_inside(child) for child in children)
