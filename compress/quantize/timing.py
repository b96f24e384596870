"""Layers that ONNX Runtime computes faster in float, found by timing it.

What int8 gains grows with the products behind each value; what it costs, rounding and moving the
values, does not. Layers with few products, such as depthwise ones, may be faster in float, or slow
down int8 layers around them by being there: that depends on kernels and on the processor, and is
tried.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from compress import progress
from compress.graph.model import GraphIndex, attribute
from compress.qdq.placement import place
from compress.qdq.plan import QuantPlan
from compress.qdq.writer import write_qdq
from compress.quantize.equalization import is_depthwise
from compress.quantize.images import Feed
from compress.quantize.sessions import CannotRunError, GraphSession, session_of
from compress.quantize.workbench import Workbench, first

_SHORTEST_S = 2e-4  # of a run, below which a session by itself counts for more than layers
_FASTER = 0.93  # of the time; sessions of one graph differ by as much as 5 %
_LARGEST_PCT = 50.0  # of the MACs that may be in float for speed
_PIXEL_CHANNELS = 4  # and fewer
_FEW_PRODUCTS = (16, 32, 64, 128)  # behind a value
_FEWEST, _MOST, _SECONDS = 3, 60, 0.25  # rounds of runs in turn, and how long they go on


def faster_in_float(
    bench: Workbench, plan: QuantPlan, shares_pct: Mapping[str, float]
) -> tuple[QuantPlan, float]:
    """Return ``plan`` with those layers in float, and its time as a share of that of ``plan``.

    One image is run on one thread. A plan has to be faster twice, in sessions of its own.

    Args:
        bench: What is quantized, for ONNX Runtime.
        plan: Ranges of all tensors.
        shares_pct: Of the MACs of each layer, by its output.
    """
    stopwatch = _Stopwatch(bench)
    best, ratio = plan, 1.0
    if stopwatch.times_s(plan)[0] < _SHORTEST_S:
        return best, ratio
    candidates = _candidates(stopwatch.graph, plan)
    with progress.task("Timing layers in float", len(candidates)) as counter:
        for names in candidates:
            tried = best.keep_float(names, "ONNX Runtime computes it faster in float")
            is_new = tried.float_nodes != best.float_nodes
            if is_new and _in_float_pct(stopwatch.graph, tried, shares_pct) <= _LARGEST_PCT:
                share = stopwatch.share_of_time(tried, best)
                if share < _FASTER:
                    best, ratio = tried, ratio * share
            counter.advance(1)
    return best, ratio


class _Stopwatch:
    """Times plans on one image of a workbench."""

    def __init__(self, bench: Workbench) -> None:
        self.prepared, self.graph = bench.prepared, GraphIndex(bench.prepared)
        self.feed = first(bench.fitted, bench.images.fixed_batch or 1)

    def times_s(self, *plans: QuantPlan) -> list[float]:
        """Return the least time of a run of each plan, in turn with the others."""
        written = [write_qdq(self.prepared, plan, checked=False) for plan in plans]
        return _times_s([session_of(model, threads=1) for model in written], self.feed)

    def share_of_time(self, plan: QuantPlan, other: QuantPlan) -> float:
        """Return the larger of two measurements; one is enough where it is no gain."""
        largest = 0.0
        for _ in range(2):
            try:
                before, after = self.times_s(other, plan)
            except CannotRunError:  # ONNX Runtime fails on some mixtures of int8 and float
                return 1.0
            largest = max(largest, after / before)
            if largest >= _FASTER:
                break
        return largest


def _in_float_pct(graph: GraphIndex, plan: QuantPlan, shares_pct: Mapping[str, float]) -> float:
    """Return the share of the MACs in float, with those of layers that others leave there."""
    int8 = set(place(graph, "onnxruntime", plan.float_nodes).weights)
    layers = [node for node in graph.nodes if graph.weight(node) and node.name not in int8]
    return sum(shares_pct.get(node.output[0], 0.0) for node in layers)


def _candidates(graph: GraphIndex, plan: QuantPlan) -> list[list[str]]:
    """Return sets of int8 convolutions that may be faster in float, the likeliest first."""
    int8 = set(place(graph, "onnxruntime", plan.float_nodes).weights)
    layers = [node for node in graph.nodes if node.name in int8 and node.op_type == "Conv"]
    dims = {node.name: graph.initializers[node.input[1]].dims for node in layers}
    channels = {n.name: dims[n.name][1] * attribute(n, "group", 1) for n in layers}
    of_pixels = [name for name in dims if channels[name] <= _PIXEL_CHANNELS]
    depthwise = [node.name for node in layers if is_depthwise(graph, node)]
    narrow = [[n for n in dims if np.prod(dims[n][1:]) <= count] for count in _FEW_PRODUCTS]
    return [of_pixels, depthwise, *narrow]


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
