"""Heads of detectors: boxes in pixels and scores up to 1 that share one scale."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from compress.graph.model import WEIGHTED
from compress.graph.signs import MOVING
from compress.graph.values import EditableGraph, label, maker
from compress.qdq.lint.finding import Problem
from compress.qdq.lint.patterns import DQ, Q, QdqPair, pair_before, pairs
from compress.qdq.lint.placement import bypass

UP_TO_ONE = frozenset({"Sigmoid", "HardSigmoid", "Softmax"})
FEWEST_STEPS = 32  # between 0 and 1; with fewer of them scores of different objects are equal


def vanishing_scores(graph: EditableGraph) -> Iterator[Problem]:
    """Scores up to 1 quantized with the step of what they are joined with, as boxes in pixels."""
    for pair in pairs(graph):
        if pair.numbers.scale is None or pair.numbers.scale.size != 1:
            continue
        step = float(np.max(pair.numbers.scale))
        scores = [n for n in _makers(pair.source) if n.op_type in UP_TO_ONE]
        if not scores or step * FEWEST_STEPS <= 1 or _is_feature_map(pair.dequantizes):
            continue
        feeds_layer = any(node.op_type in WEIGHTED for node, _ in _uses(pair))
        yield Problem(
            label(pair.quantize),
            f"values of {label(scores[0])!r}, at most 1, are quantized in steps of {step:.3g}: "
            f"{int(1 / step)} of them; leave what joins them with larger values in float",
            None if feeds_layer else partial(_skip, graph, pair),
        )


def _makers(value: ir.Value) -> Iterator[ir.Node]:
    """Yield the nodes whose values ``value`` holds, as they were but for their place."""
    waiting: list[ir.Value | None] = [value]
    while waiting:
        each = waiting.pop()
        pair, node = pair_before(each), maker(each)
        if pair is not None:
            waiting.append(pair.source)
        elif node is not None and node.op_type == "Concat":
            waiting += node.inputs
        elif node is not None and node.op_type in MOVING:
            waiting.append(node.inputs[0])
        elif node is not None:
            yield node


def _is_feature_map(nodes: Sequence[ir.Node]) -> bool:
    """Return whether layers alone read what ``nodes`` make, in whatever place: it is no answer."""
    values = [value for node in nodes for value in node.outputs]
    readers = [reader for value in values for reader, _ in value.uses()]
    moved = [node for node in readers if node.op_type in MOVING | {"Pad", Q, DQ}]
    rest = [node for node in readers if node.op_type not in WEIGHTED and node not in moved]
    ends = not readers or rest or any(value.is_graph_output() for value in values)
    return not ends and (not moved or _is_feature_map(moved))


def _uses(pair: QdqPair) -> list[tuple[ir.Node, int]]:
    return [use for node in pair.dequantizes for use in node.outputs[0].uses()]


def _skip(graph: EditableGraph, pair: QdqPair) -> None:
    """Let all that reads ``pair`` read what it quantizes."""
    for node, index in _uses(pair):
        bypass(graph, node, index, pair)
    for dequantize in pair.dequantizes:
        if dequantize.outputs[0].is_graph_output():
            graph.replace(dequantize.outputs[0], pair.source)
