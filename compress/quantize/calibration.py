"""One pass of calibration images through the fp32 graph: a histogram of each tensor it shows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto
from scipy.special import expit

from compress import plugins, progress
from compress.errors import QuantizationError, UsageError
from compress.graph.model import ACTIVATIONS, GraphIndex, attribute
from compress.graph.preprocess import prepare
from compress.qdq.placement import place
from compress.qdq.plan import TARGETS, ActivationRange, QuantPlan
from compress.qdq.rewrite import rewrite_for
from compress.quantize.images import Batches, CalibrationImages, Feed, images_in
from compress.quantize.observers import ChannelHistogram, Histogram, Pointwise
from compress.quantize.sessions import session_of, with_outputs

SAMPLE = 16_384  # values counted of each tensor of each image; the smallest and largest are of all
SAMPLE_OF_CHANNELS = 4096  # values counted of each image where channels have bins of their own
_CACHED = 131_072  # values that a processor's cache holds from one look at them to the next
_ELEMENTS = 4_000_000  # of all observed tensors together, in one batch of the pass


@dataclass
class Statistics:
    """What was seen of each tensor.

    What is worked out of it is kept for all that ``of`` and ``divided`` return too: plans that are
    tried, and targets, share most tensors.
    """

    # Histograms, by tensor of the prepared graph
    tensors: dict[str, Histogram] = field(default_factory=dict)
    images: int = 0  # number of images seen
    counted: bool = True  # whether values were counted, or only the smallest and the largest kept
    # What was seen of each channel of some tensors
    by_channel: dict[str, ChannelHistogram] = field(default_factory=dict)
    # Histograms that ``divided`` made, by tensor and bytes of the factors
    rescaled: dict[tuple[str, bytes], Histogram] = field(default_factory=dict)
    # Ranges, by histogram and observer
    chosen: dict[tuple[Histogram, str], ActivationRange] = field(default_factory=dict)

    def of(self, names: Iterable[str]) -> Statistics:
        """Return what was seen of the tensors ``names`` alone, and of all channels."""
        return dataclasses.replace(self, tensors={name: self.tensors[name] for name in names})

    def divided(self, factors: Mapping[str, NDArray[np.float64]]) -> Statistics:
        """Return what would be seen with channels divided by ``factors``, (C,), of tensors."""
        divided = {
            name: self._divided(name, factors[name]) if name in factors else seen
            for name, seen in self.tensors.items()
        }
        return dataclasses.replace(self, tensors=divided)

    def _divided(self, name: str, factors: NDArray[np.float64]) -> Histogram:
        key = name, factors.tobytes()
        if key not in self.rescaled:
            through = self.tensors[name].through
            self.rescaled[key] = self.by_channel[name].divided(factors, through)
        return self.rescaled[key]


def calibrate(
    model: ModelProto,
    batches: Batches | CalibrationImages,
    *,
    targets: Iterable[str] = TARGETS,
    histograms: bool = True,
    by_channel: Collection[str] = (),
) -> Statistics:
    """Return what the images do to every tensor that one of ``targets`` quantizes.

    The graph runs once over all images, in batches that keep memory flat; of each tensor the
    extremes of all values and a histogram of evenly spaced ones are kept.

    Args:
        model: An fp32 graph, prepared or not.
        batches: float32 arrays (B, C, H, W), or as ``CalibrationImages`` takes them.
        targets: Whose tensors to observe.
        histograms: False keeps extremes only, for the minmax observer, and is cheaper.
        by_channel: Tensors with channels in dimension 1, each of which is observed on its own too.

    Raises:
        QuantizationError: the images do not fit, or a value is NaN or infinite; the message names
            the node that made it.
    """
    prepared = prepare(model)
    graph = GraphIndex(prepared)
    images = (
        batches if isinstance(batches, CalibrationImages) else CalibrationImages(graph, batches)
    )
    names = observed_tensors(prepared, targets)
    seen = {name: Histogram(_through(graph, name)) for name in names}
    statistics = Statistics(seen, counted=histograms)
    runner = _Runner(prepared, list(dict.fromkeys([*names, *by_channel])))
    total = len(images.order) if images.stream is None else None
    with progress.task("Calibrating", total) as counter:
        for feed in images.feeds(runner.batch_size(images)):
            count = images_in(feed)
            for name, values in runner.run(feed, images.fixed_batch).items():
                if name in by_channel:
                    _observe_channels(statistics, name, values)
                if name in seen:
                    _observe(seen[name], values, count, graph, name, histograms)
            statistics.images += count
            counter.advance(count)
    return statistics


def observed_tensors(prepared: ModelProto, targets: Iterable[str]) -> list[str]:
    """Return every tensor whose range one of ``targets`` needs, in the order of the graph."""
    wanted: set[str] = set()
    for target in targets:
        placement = place(GraphIndex(rewrite_for(prepared, target)), target)
        wanted |= {placement.source(name) for name in placement.readers}
        wanted |= {name for group in placement.joined for name in group}
    graph = GraphIndex(prepared)
    order = [*graph.inputs, *(name for node in graph.nodes for name in node.output)]
    return [name for name in order if name in wanted]


def _through(graph: GraphIndex, tensor: str) -> Pointwise | None:
    """Return the pointwise function that alone reads ``tensor``, or None."""
    node = graph.producer.get(tensor)
    if node is None or len(node.output) > 1:
        return None
    activation = activation_of(graph, node)
    return None if activation.output == tensor else activation.value


class _Runner:
    """Runs the graph with the observed tensors as outputs, into buffers that are used again."""

    def __init__(self, prepared: ModelProto, names: list[str]) -> None:
        inputs = {value.name for value in prepared.graph.input}
        self.inputs = [name for name in names if name in inputs]
        self.names = [name for name in names if name not in inputs]
        self.session = session_of(with_outputs(prepared, self.names))
        self.shapes = GraphIndex(prepared).shapes
        self.buffers: dict[tuple[Any, ...], dict[str, NDArray[Any]]] = {}  # by shapes of the inputs

    def batch_size(self, images: CalibrationImages) -> int:
        """Return how many images go into one run: what the graph fixes, or what fits in memory."""
        if images.fixed_batch:
            return images.fixed_batch
        shapes = [self.shapes.get(name) for name in self.names]
        sizes = [0 if shape is None else math.prod(d or 0 for d in shape[1:]) for shape in shapes]
        if not all(sizes):
            values = self.session.run(self.names, next(images.feeds(1)))
            sizes = [value.size for value in values]
        return int(np.clip(_ELEMENTS // max(sum(sizes), 1), 1, 32))

    def run(self, feed: Feed, fixed_batch: int | None) -> Mapping[str, NDArray[Any]]:
        """Return the observed tensors for a batch; they are overwritten by the next run."""
        count = images_in(feed)
        if fixed_batch and count < fixed_batch:
            feed = {
                name: np.concatenate([array, np.repeat(array[-1:], fixed_batch - count, 0)])
                for name, array in feed.items()
            }
        size = images_in(feed)
        seen = {name: feed[name] for name in self.inputs} | self._outputs(feed)
        if size == count:
            return seen
        return {
            name: array[:count] if array.shape[0] == size else array for name, array in seen.items()
        }

    def _outputs(self, feed: Feed) -> dict[str, NDArray[Any]]:
        if not self.names:  # only inputs are observed
            return {}
        size = tuple(array.shape for array in feed.values())
        if size not in self.buffers:
            values = self.session.run(self.names, feed)
            made = zip(self.names, (np.asarray(value, order="C") for value in values), strict=True)
            self.buffers[size] = dict(made)
            return self.buffers[size]
        self.session.run_into(feed, self.buffers[size])
        return self.buffers[size]


def _extremes(values: NDArray[Any]) -> tuple[float, float]:
    """Return the smallest and the largest of ``values``, NaN if one is, reading memory once."""
    flat = values.reshape(-1)
    parts = [flat[start : start + _CACHED] for start in range(0, flat.size, _CACHED)]
    found = [(part.min(), part.max()) for part in parts]
    return float(np.min([low for low, _ in found])), float(np.max([high for _, high in found]))


def _observe(
    histogram: Histogram,
    values: NDArray[Any],
    images: int,
    graph: GraphIndex,
    name: str,
    counted: bool,
) -> None:
    low, high = _extremes(values)
    if not (math.isfinite(low) and math.isfinite(high)):
        node = graph.producer.get(name)
        maker = f"node {node.name!r} ({node.op_type})" if node is not None else "the input"
        raise QuantizationError(
            f"tensor {name!r}, made by {maker}, is NaN or infinite on calibration images",
            expected="finite values",
            fix="Check the weights of that node and the normalization of the images",
        )
    if not counted:
        histogram.see(low, high)
        return
    per_image = values.size // images
    whole = per_image * images == values.size
    rows = values.reshape(images if whole else 1, -1)
    histogram.add(rows[:, :: _stride(per_image)].reshape(-1), low, high)


def _observe_channels(statistics: Statistics, name: str, values: NDArray[Any]) -> None:
    images, channels = values.shape[:2]
    seen = statistics.by_channel
    if name not in seen:
        seen[name] = ChannelHistogram(channels)
    rows = values.reshape(images, channels, -1)
    ends = [rows[0].min(1), rows[0].max(1)]
    for row in rows[1:]:  # one image after the other, which a cache holds
        np.minimum(ends[0], row.min(1), out=ends[0])
        np.maximum(ends[1], row.max(1), out=ends[1])
    picked = np.arange(0, rows[0].size, _stride(rows[0].size, SAMPLE_OF_CHANNELS))
    sample = values.reshape(images, -1)[:, picked].reshape(-1)
    seen[name].add(sample, np.tile(picked // rows.shape[2], images), *ends)


def _stride(values: int, sample: int = SAMPLE) -> int:
    """Return the step that takes ``sample`` of so many values, over all columns and channels."""
    stride = values // sample + 1
    while stride > 1 and any(stride % prime == 0 for prime in (2, 3, 5, 7)):
        stride += 1
    return stride


Array = NDArray[Any]
Function = Callable[[Array], Array]


@dataclass(frozen=True)
class ActivationFunction:
    """A pointwise function and its derivative."""

    output: str  # the tensor that holds its value in the graph
    value: Function  # the function
    slope: Function  # its derivative


def activation_of(graph: GraphIndex, node: NodeProto) -> ActivationFunction:
    """Return what ``node`` is followed by: Relu, Clip, SiLU, hard-swish, a gate or nothing."""
    tensor = node.output[0]
    readers = [] if graph.is_seen(tensor) else [r for r, _ in graph.readers.get(tensor, [])]
    kinds = sorted(reader.op_type for reader in readers)
    if kinds == ["Relu"]:
        return _clip(readers[0].output[0], 0.0, np.inf)
    if kinds == ["Clip"]:
        low, high = (_bound(graph, readers[0], i) for i in (1, 2))
        return _clip(
            readers[0].output[0],
            -np.inf if low is None else low,
            np.inf if high is None else high,
        )
    if kinds == ["HardSwish"]:
        return ActivationFunction(readers[0].output[0], _hard_swish, _hard_swish_slope)
    if kinds in (["Sigmoid"], ["HardSigmoid"]):
        return ActivationFunction(readers[0].output[0], *_gate(readers[0]))
    if kinds in (["Mul", "Sigmoid"], ["HardSigmoid", "Mul"]):
        product, gate = sorted(readers, key=lambda r: r.op_type != "Mul")
        if set(product.input) == {tensor, gate.output[0]}:
            value, slope = _gate(gate)
            return ActivationFunction(
                product.output[0],
                lambda z: z * value(z),
                lambda z: value(z) + z * slope(z),
            )
    return ActivationFunction(tensor, identity, np.ones_like)


def identity(z: Array) -> Array:
    """Return ``z``."""
    return z


def _bound(graph: GraphIndex, node: NodeProto, position: int) -> float | None:
    name = node.input[position] if len(node.input) > position else ""
    value = graph.constant(name) if name else None
    return None if value is None else float(value.reshape(-1)[0])


def _clip(output: str, low: float, high: float) -> ActivationFunction:
    return ActivationFunction(
        output, lambda z: np.clip(z, low, high), lambda z: ((z > low) & (z < high)).astype(z.dtype)
    )


def _gate(node: NodeProto) -> tuple[Function, Function]:
    """Return the function and the derivative of a Sigmoid or HardSigmoid."""
    if node.op_type == "Sigmoid":
        return _sigmoid, _sigmoid_slope
    steep, middle = attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)

    def slope(z: Array) -> Array:
        inside = np.abs(steep * z + middle - 0.5) < 0.5
        return np.asarray(inside * steep, z.dtype)

    return lambda z: np.clip(steep * z + middle, 0, 1), slope


def _sigmoid(z: Array) -> Array:
    return np.asarray(expit(z))


def _sigmoid_slope(z: Array) -> Array:
    gate = _sigmoid(z)
    return np.asarray(gate * (1 - gate))


def _hard_swish(z: Array) -> Array:
    return np.asarray(z * np.clip(z / 6 + 0.5, 0, 1))


def _hard_swish_slope(z: Array) -> Array:
    return np.where(z <= -3, 0.0, np.where(z >= 3, 1.0, z / 3 + 0.5)).astype(z.dtype)


def make_quant_plan(
    statistics: Statistics,
    *,
    target: str = "onnxruntime",
    observer: str | Mapping[str, Any] = "mse",
    exclude: Mapping[str, str] | None = None,
) -> QuantPlan:
    """Return a plan with the ranges that ``observer`` chooses; one pass serves any of them.

    The observer is the name of a plug-in, with options or without; ``exclude`` are nodes to leave
    in float, and why.

    Raises:
        UsageError: the observer needs histograms and only extremes were kept.
        UnknownNameError: there is no such observer or target.
    """
    name, _ = plugins.parse("observers", observer)
    choose = plugins.create("observers", observer)
    if not statistics.counted and name != "minmax":
        raise UsageError(
            f"observer {name!r} needs histograms, and calibration kept extremes only",
            fix="Calibrate with histograms=True",
        )
    ranges, known = {}, statistics.chosen
    for tensor, seen in statistics.tensors.items():
        key = seen, repr(observer)
        if key not in known:
            low, high = seen.trimmed(*choose(seen, symmetric=False))
            limit = max(map(abs, seen.trimmed(*choose(seen, symmetric=True))))
            known[key] = ActivationRange(low, high, limit, name, (seen.low, seen.high))
        ranges[tensor] = known[key]
    return QuantPlan(target, name, ranges, float_nodes=dict(exclude or {}))


def begin_below_zero(plan: QuantPlan, prepared: ModelProto) -> QuantPlan:
    """Return a plan for OpenVINO with a zero point of 1 behind BatchNorms that no layer took up.

    With a range that begins at 0, quantizing does what the Relu between them does. OpenVINO then
    drops the Relu and folds the BatchNorm into the quantization, as an op that it runs in fp32
    between two reorders: DenseNet-121 takes 1.3 times as long. One code of 255 keeps them apart.
    Plans for other targets are returned as they are.
    """
    if plan.target != "openvino":
        return plan
    ranges, graph = dict(plan.activations), GraphIndex(prepared)
    for node in graph.nodes:
        maker = graph.producer.get(node.input[0]) if node.op_type in ACTIVATIONS else None
        found = ranges.get(node.output[0])
        is_behind = maker is not None and maker.op_type == "BatchNormalization"
        if is_behind and found is not None and found.low >= 0.0:
            ranges[node.output[0]] = dataclasses.replace(found, low=-found.high / 254)
    return plan.changed(activations=ranges)
