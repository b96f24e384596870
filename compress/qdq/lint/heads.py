"""Heads of detectors: boxes in pixels and scores up to 1 that share one scale."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import onnx

from compress.qdq.lint.finding import Problem
from compress.qdq.lint.graph import Graph, Use, label
from compress.qdq.lint.patterns import DQ, MOVING, WEIGHTED, Pair, pair_before, pairs
from compress.qdq.lint.placement import bypass

UP_TO_ONE = frozenset({"Sigmoid", "HardSigmoid", "Softmax"})
FEWEST_STEPS = 32  # between 0 and 1; with fewer of them scores of different objects are equal


def vanishing_scores(graph: Graph) -> Iterator[Problem]:
    """Scores up to 1 quantized with the step of what they are joined with, as boxes in pixels."""
    for pair in pairs(graph):
        if pair.numbers.scale is None or pair.numbers.scale.size != 1:
            continue
        step = float(np.max(pair.numbers.scale))
        scores = [n for n in _makers(graph, pair.source) if n.op_type in UP_TO_ONE]
        if not scores or step * FEWEST_STEPS <= 1:
            continue
        feeds_layer = any(use.node.op_type in WEIGHTED for use in _uses(graph, pair))
        yield Problem(
            label(pair.quantize),
            f"values of {label(scores[0])!r}, at most 1, are quantized in steps of {step:.3g}: "
            f"{int(1 / step)} of them; leave what joins them with larger values in float",
            None if feeds_layer else partial(_skip, graph, pair),
        )


def _makers(graph: Graph, value: str) -> Iterator[onnx.NodeProto]:
    """Yield the nodes whose values ``value`` holds, as they were but for their place."""
    waiting = [value]
    while waiting:
        name = waiting.pop()
        pair, node = pair_before(graph, name), graph.maker(name)
        if pair is not None:
            waiting.append(pair.source)
        elif node is not None and node.op_type == "Concat":
            waiting += node.input
        elif node is not None and node.op_type in MOVING and node.op_type != DQ:
            waiting.append(node.input[0])
        elif node is not None:
            yield node


def _uses(graph: Graph, pair: Pair) -> list[Use]:
    return [use for node in pair.dequantizes for use in graph.readers(node.output[0])]


def _skip(graph: Graph, pair: Pair) -> None:
    """Let all that reads ``pair`` read what it quantizes."""
    for node in pair.dequantizes:
        for use in graph.readers(node.output[0]):
            bypass(graph, use, pair)
        if node.output[0] in graph.outputs:
            graph.replace(node.output[0], pair.source)
