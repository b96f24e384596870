"""Where TensorRT wants Q and DQ: on inputs of weighted ops, and on the skip of a residual Add.

Source: NVIDIA, TensorRT documentation, Working with Quantized Types, Q/DQ placement.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from compress.qdq.lint.activations import implied_clip
from compress.qdq.lint.finding import Problem
from compress.qdq.lint.graph import Graph, Use, label
from compress.qdq.lint.patterns import (
    MOVING,
    WEIGHTED,
    Pair,
    Q,
    is_quantized,
    pair_before,
    pair_of,
    pairs,
    weight_of,
)
from compress.qdq.lint.placement import bypass, quantize_weight

JOINING = MOVING | {"Concat"}


def residual_both_sides(graph: Graph) -> Iterator[Problem]:
    """Q/DQ on both inputs of a residual Add, which keeps it out of the convolution before it."""
    depth: dict[str, int] | None = None
    for node in graph.of_type("Add"):
        found = [pair_before(graph, value) for value in node.input]
        sides = [side for side in found if side is not None]
        if len(sides) < 2 or sides[0].source == sides[1].source:
            continue
        depth = depth if depth is not None else _depths(graph)
        index = _branch_side(graph, sides, depth)
        yield Problem(
            label(node),
            "both of its inputs are quantized; with the branch left float, Conv, Add and Relu "
            "become one int8 kernel",
            partial(bypass, graph, Use(node, index), sides[index]),
        )


def residual_skip_float(graph: Graph) -> Iterator[Problem]:
    """A residual Add that reads its skip in float though the same tensor is there quantized."""
    for node in graph.of_type("Add"):
        if any(pair_before(graph, value) is not None for value in node.input):
            continue
        for index in (0, 1):
            branch = graph.maker(node.input[1 - index])
            shared = _existing_pair(graph, node.input[index])
            if shared is None or branch is None or branch.op_type not in WEIGHTED:
                continue
            if weight_of(graph, branch) is None or not graph.is_read_once(branch.output[0]):
                continue
            yield Problem(
                label(node),
                f"it reads {node.input[index]!r} in float though that is quantized for the next "
                "layer; the float copy doubles the traffic and keeps the kernel out of int8",
                partial(graph.rewire, Use(node, index), shared.dequantizes[0].output[0]),
            )
            break


def needless_pair(graph: Graph) -> Iterator[Problem]:
    """Q/DQ before an op that runs in float all the same: global pooling, gates, the output."""
    for pair in pairs(graph):
        for dequantize in pair.dequantizes:
            value = dequantize.output[0]
            if value in graph.outputs:
                yield Problem(
                    label(dequantize),
                    "the output of the network is quantized: error without any gain in speed",
                    partial(_give_float, graph, value, pair),
                )
            for use in graph.readers(value):
                if not _gains(graph, use):
                    yield Problem(
                        label(use.node),
                        f"{use.node.op_type} reads a quantized value but runs in float: error "
                        "without any gain in speed",
                        partial(bypass, graph, use, pair),
                    )


def float_weight(graph: Graph) -> Iterator[Problem]:
    """A layer that reads int8 and multiplies with float weights.

    On a CPU this is how a layer is kept in float between int8 neighbours. TensorRT reads the float
    value just as well.
    """
    for node in graph.of_type(*WEIGHTED):
        values = graph.constant(node.input[1])
        if values is not None and is_quantized(graph, node.input[0]):
            yield Problem(
                label(node),
                "its input is quantized and its weight is not, so it runs in float",
                partial(quantize_weight, graph, node),
            )


def _gains(graph: Graph, use: Use, depth: int = 30) -> bool:
    """Return whether a quantized value brings speed at ``use``, or behind ops that move values."""
    node = use.node
    if node.op_type in WEIGHTED or node.op_type == Q or depth == 0:
        return True
    if node.op_type == "Add":
        other = graph.maker(node.input[1 - use.index])
        return other is not None and other.op_type in WEIGHTED | {"DequantizeLinear"}
    if node.op_type == "AveragePool":
        return any(u.node.op_type == Q for u in graph.readers(node.output[0]))
    if node.op_type not in JOINING or (node.op_type in MOVING and use.index != 0):
        return False
    return any(_gains(graph, u, depth - 1) for v in node.output for u in graph.readers(v))


def _give_float(graph: Graph, value: str, pair: Pair) -> None:
    graph.replace(value, implied_clip(graph, pair))


def _existing_pair(graph: Graph, value: str) -> Pair | None:
    for use in graph.readers(value):
        if use.node.op_type == Q and (pair := pair_of(graph, use.node)).dequantizes:
            return pair
    return None


def _branch_side(graph: Graph, sides: list[Pair], depth: dict[str, int]) -> int:
    """Return which input of an Add is the branch: made by a layer for this Add alone, deeper."""

    def rank(index: int) -> tuple[bool, bool, int]:
        pair = sides[index]
        maker = graph.maker(pair.source)
        readers = sum(len(graph.readers(d.output[0])) for d in pair.dequantizes)
        weighted = maker is not None and maker.op_type in WEIGHTED
        return weighted, readers == 1, depth.get(pair.source, 0)

    return max((1, 0), key=rank)


def _depths(graph: Graph) -> dict[str, int]:
    """Return for each value how many weighted ops lie on the longest path to it."""
    depth: dict[str, int] = {}
    for node in graph.in_order():
        before = max((depth.get(value, 0) for value in node.input), default=0)
        depth |= dict.fromkeys(node.output, before + (node.op_type in WEIGHTED))
    return depth
