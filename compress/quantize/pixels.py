"""Find inputs whose values lie on a grid of up to 256 steps, as pixels do after normalization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from compress.graph.model import WEIGHTED, GraphIndex, attribute
from compress.qdq.grid import LAST, OFF, changes, put_on_grid
from compress.qdq.placement import place
from compress.qdq.plan import ActivationRange, InputGrid, QuantPlan
from compress.qdq.writer import quantizer
from compress.quantize.images import Feed
from compress.quantize.sessions import answers

_MOST = 8  # channels of an image
_SIGNED_ZERO = 128  # of integers from -128 to 127


def with_exact_pixels(prepared: ModelProto, plan: QuantPlan, feed: Feed) -> QuantPlan:
    """Return ``plan`` with the grids of what first layers read, and ranges that hold them exactly.

    Pixels have 256 values, and so have integers; but normalization gives each channel a step and an
    offset of its own, and one range for all rounds nearly every pixel to another value: a quarter
    of what quantized activations cost EfficientNet-Lite0. With a step of their own for each channel
    nothing is rounded. ``plan``, which must hold no grids yet, is returned itself where no values
    lie on a grid, or where its range fits already.
    """
    graph = GraphIndex(prepared)
    layers = set(place(graph, plan.target, plan.float_nodes).weights)
    grids = []
    for node in graph.nodes:
        if node.name in layers and _is_first(graph, node):
            read = node.input[0]
            values = feed[read] if read in feed else answers(prepared, feed, names=[read])[0]
            grid = _grid_of(node.name, values, plan.target)
            if grid is not None and not _is_exact(grid, plan, read):
                grids.append(grid)
    if not grids:
        return plan
    found = plan.changed(grids=tuple(grids))
    made = {node.name: node.input[0] for node in put_on_grid(prepared, found).graph.node}
    observer = next(iter(plan.activations.values())).observer
    ranges = dict(plan.activations)
    for grid in grids:
        low, high = -grid.zero * grid.step, (LAST - grid.zero) * grid.step
        limit = 127 * grid.step
        ranges[made[grid.node]] = ActivationRange(low, high, limit, observer, (low, high))
    return found.changed(activations=ranges)


def as_rounded(plan: QuantPlan, tensor: str, values: NDArray[Any]) -> NDArray[Any]:
    """Return ``values`` as integers of the range of ``tensor`` hold them; as they are without."""
    found = plan.activations.get(tensor)
    if found is None:
        return values
    made = quantizer(found, plan.target)
    ends, zero = np.iinfo(made.zero_point.dtype), int(made.zero_point)
    codes = np.clip(np.rint(values / made.scale) + zero, ends.min, ends.max)
    return np.asarray((codes - zero) * made.scale, np.float32)


def _is_first(graph: GraphIndex, node: NodeProto) -> bool:
    """Return whether ``node`` is a plain Conv that alone reads what no layer has changed."""
    plain = node.op_type == "Conv" and attribute(node, "group", 1) == 1
    numbers = attribute(node, "auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    biased = len(node.input) > 2 and node.input[2]
    if not plain or not numbers or min(attribute(node, "pads", ()), default=0) < 0:
        return False
    if graph.only_reader(node.input[0]) is None or (biased and graph.constant(biased) is None):
        return False
    edge = [node.input[0]]
    for tensor in edge:
        maker = graph.producer.get(tensor)
        if maker is not None and maker.op_type in WEIGHTED:
            return False
        edge += [] if maker is None else [n for n in graph.data_inputs(maker) if n not in edge]
    return True


def _grid_of(node: str, values: NDArray[Any], target: str) -> InputGrid | None:
    """Return the grid of ``values``, (B, C, ...); None where a channel has none."""
    channels = values.swapaxes(0, 1).reshape(values.shape[1], -1)
    found = [_steps_of(np.unique(channel).astype(np.float64)) for channel in channels[:_MOST]]
    if len(channels) > _MOST or any(each is None for each in found):
        return None
    lows, steps = zip(*(each for each in found if each is not None), strict=True)
    zero = _SIGNED_ZERO if target == "tensorrt" else round(-np.mean(np.divide(lows, steps)))
    return InputGrid(node, steps, lows, int(np.clip(zero, 0, LAST)))


def _steps_of(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """Return lowest value and step of the grid of 256 values that holds ``values``, sorted.

    Values may leave room: it is filled with finer steps, and the rest is shared by both ends.
    """
    if not 1 < len(values) <= LAST + 1:
        return None
    count = round((values[-1] - values[0]) / np.diff(values).min())
    if count > LAST:
        return None
    step = (values[-1] - values[0]) / count
    places = (values - values[0]) / step
    if np.abs(places - np.rint(places)).max() > OFF:
        return None
    finer = LAST // count
    room = (LAST - count * finer) // 2
    return float(values[0] - room * step / finer), float(step / finer)


def _is_exact(grid: InputGrid, plan: QuantPlan, tensor: str) -> bool:
    """Return whether the integers of the range that ``tensor`` has hold the grid as it is."""
    factors, shifts = changes(grid)
    if np.all(factors == 1) and not shifts.any():
        return True
    found: Mapping[str, ActivationRange] = plan.activations
    if tensor not in found or plan.target == "tensorrt":
        return False
    step = (found[tensor].high - found[tensor].low) / LAST
    return bool(np.abs(np.asarray(grid.steps) / step - 1).max() * LAST < 2 * OFF)
