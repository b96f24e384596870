"""Layers that ONNX Runtime computes faster in float, found by timing it.

What int8 gains grows with the products behind each value; what it costs, rounding and moving the
values, does not. Layers with few products, such as depthwise ones, may be faster in float, or slow
down int8 layers around them by being there: that depends on kernels and on the processor, and is
tried.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from compress.graph.model import GraphIndex, attribute
from compress.qdq.placement import place
from compress.qdq.plan import QuantPlan
from compress.qdq.writer import write_qdq
from compress.quantize.equalization import is_depthwise
from compress.quantize.images import Feed
from compress.quantize.sessions import GraphSession, session_of
from compress.quantize.workbench import Workbench, first

_SHORTEST_S = 2e-4  # of a run, below which a session by itself counts for more than layers
_FASTER = 0.93  # of the time; sessions of one graph differ by as much as 5 %
_LARGEST_PCT = 50.0  # of the MACs that may be in float for speed
_PIXEL_CHANNELS = 4  # and fewer
_FEW_PRODUCTS = (16, 32, 64, 128)  # behind a value
_FEWEST, _MOST, _SECONDS = 5, 60, 0.25  # rounds of runs in turn, and how long they may take


def faster_in_float(
    bench: Workbench, plan: QuantPlan, shares_pct: Mapping[str, float]
) -> tuple[QuantPlan, float]:
    """Return ``plan`` with those layers in float, and its time as a share of that of ``plan``.

    One image is run on one thread. A plan has to be faster twice, in sessions of their own.

    Args:
        bench: What is quantized, for ONNX Runtime.
        plan: Ranges of all tensors.
        shares_pct: Of the MACs of each layer, by its output.
    """
    graph = GraphIndex(bench.prepared)
    feed = first(bench.fitted, bench.images.fixed_batch or 1)
    layers = {node.name: node.output[0] for node in graph.nodes if graph.weight(node)}

    def in_float_pct(tried: QuantPlan) -> float:
        """Return the share of the MACs in float, with those of layers that others leave there."""
        int8 = place(graph, bench.target, tried.float_nodes).weights
        return sum(shares_pct.get(made, 0.0) for name, made in layers.items() if name not in int8)

    def session(tried: QuantPlan) -> GraphSession:
        return session_of(write_qdq(bench.prepared, tried, checked=False), threads=1)

    best, ratio = plan, 1.0
    if _times_s([session(plan)], feed)[0] < _SHORTEST_S:
        return best, ratio
    for names in _candidates(graph, plan):
        tried = best.keep_float(names, "ONNX Runtime computes it faster in float")
        if tried.float_nodes == best.float_nodes or in_float_pct(tried) > _LARGEST_PCT:
            continue
        found: list[float] = []
        while len(found) < 2 and all(each < _FASTER for each in found):
            before, after = _times_s([session(best), session(tried)], feed)
            found.append(after / before)
        if max(found) < _FASTER:
            best, ratio = tried, ratio * max(found)
    return best, ratio


def _candidates(graph: GraphIndex, plan: QuantPlan) -> Iterator[list[str]]:
    """Yield int8 convolutions that may be faster in float, the likeliest first."""
    int8 = set(place(graph, "onnxruntime", plan.float_nodes).weights)
    layers = [node for node in graph.nodes if node.name in int8 and node.op_type == "Conv"]
    dims = {node.name: graph.initializers[node.input[1]].dims for node in layers}
    channels = {n.name: dims[n.name][1] * attribute(n, "group", 1) for n in layers}
    yield [name for name in dims if channels[name] <= _PIXEL_CHANNELS]
    yield [node.name for node in layers if is_depthwise(graph, node)]
    for count in _FEW_PRODUCTS:
        yield [name for name in dims if np.prod(dims[name][1:]) <= count]


def _times_s(sessions: Sequence[GraphSession], feed: Feed) -> list[float]:
    """Return the least time of a run of each, of processor time where the clock is fine enough."""
    fine = time.get_clock_info("thread_time").resolution < _SHORTEST_S / 100
    clock = time.thread_time if fine else time.perf_counter
    for each in sessions:
        each.run(None, feed)  # the first run lays out memory
    times: list[list[float]] = [[] for _ in sessions]
    start = clock()
    while len(times[0]) < _FEWEST or (len(times[0]) < _MOST and clock() - start < _SECONDS):
        for each, found in zip(sessions, times, strict=True):
            begin = clock()
            each.run(None, feed)
            found.append(clock() - begin)
    return [min(found) for found in times]
