"""What int8 costs in each layer alone, what the error is made of, and what to try against it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import Tensor

from compress.artifact import replacing
from compress.errors import DataError
from compress.graph.model import WEIGHTED
from compress.graph.values import EditableGraph, label
from compress.measure.macs import node_macs
from compress.progress import track
from compress.qdq import QuantPlan, prepare, write_qdq
from compress.qdq.lint.patterns import QdqPair, Weight, pair_before, weight_of
from compress.qdq.rewrite import apply_corrections, rewrite_for
from compress.quantize.sessions import session_of, with_outputs
from compress.tasks import TOP1, Primary, Task, contributions, primary_of, values_of

HARMLESS_DB = 40.0  # one layer this quiet is not heard in the answer
MUCH_CLIPPED_PCT = 0.5
OUTLYING = 24.0  # largest value over root mean square: more stretches the range of few values
UNEVEN = 16.0  # largest over median peak of a channel

Batches = Iterable[tuple[Tensor, Any]]
Array = NDArray[Any]
Labelled = Sequence[tuple[Array, Any]]  # images as the graph takes them, and their targets
Outputs = Mapping[str, Array]  # of one batch, by name


@dataclass(frozen=True)
class LayerSensitivity:
    """The error and the loss of accuracy when this layer alone is quantized."""

    node: str
    op: str
    macs: int
    sqnr_db: float  # of the network's answer, weight and input of this layer quantized
    sqnr_weight_db: float  # only its weight
    sqnr_activation_db: float  # only its input
    value: float  # of the metric
    drop: float  # of the metric, in its unit
    saturation_pct: float  # share of its input's values that are clipped
    dynamic_range: float  # largest magnitude of its input over root mean square
    channel_spread: float  # largest peak of an input channel over the median one
    weight_peak_over_rms: float  # largest over all output channels
    diagnosis: str


@dataclass(frozen=True)
class QuantSensitivity:
    """The layers of a network by what int8 costs in each, and all of them together."""

    target: str
    images: int
    float_value: float  # of the metric
    int8_value: float  # everything the plan quantizes
    int8_sqnr_db: float
    layers: tuple[LayerSensitivity, ...]  # in the order of the graph
    left_float: dict[str, str]  # node -> why the plan leaves it
    metric: Primary = TOP1

    def worst_first(self) -> list[LayerSensitivity]:
        """Return the layers, the most sensitive first."""
        return sorted(self.layers, key=lambda layer: layer.sqnr_db)

    def to_json(self) -> dict[str, Any]:
        """Return this as JSON-able data."""
        data = asdict(self)
        if self.metric != TOP1:
            return data
        del data["metric"]
        data["layers"] = [_spelled(layer) for layer in data["layers"]]
        return _spelled(data)


def _spelled(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the metric by the names that they have where it is top-1."""
    names = {"value": "top1_pct", "drop": "top1_drop_pct"}
    names |= {f"{form}_value": f"{form}_top1_pct" for form in ("float", "int8")}
    return {names.get(key, key): value for key, value in data.items()}


@dataclass(frozen=True)
class Judge:
    """The primary metric of a graph's outputs over labelled images: top-1 unless a task is told."""

    labelled: Labelled
    task: Task | None = None

    @property
    def metric(self) -> Primary:
        """What is measured."""
        return primary_of(self.task)

    @property
    def images(self) -> int:
        """How many images it is measured on."""
        return sum(len(images) for images, _ in self.labelled)

    def outputs(self, model: onnx.ModelProto, *, float_qdq: bool) -> list[Outputs]:
        """Return what ``model`` answers to every batch."""
        session = session_of(model, float_qdq=float_qdq)
        feed, names = session.get_inputs()[0].name, [each.name for each in model.graph.output]
        return [
            dict(zip(names, session.run(names, {feed: images}), strict=True))
            for images, _ in self.labelled
        ]

    def value(self, outputs: Sequence[Outputs]) -> float:
        """Return the metric."""
        if self.task is None or self.task.tells_classes:
            logits = np.concatenate([next(iter(batch.values())) for batch in outputs])
            labels = np.concatenate([np.asarray(targets) for _, targets in self.labelled])
            return top1_pct(logits, labels)
        scores = [
            each
            for batch, (_, targets) in zip(outputs, self.labelled, strict=True)
            for each in contributions(self.task, self.task.predict(batch), targets)
        ]
        return values_of(self.task, scores)[self.task.primary]

    def sqnr_db(self, reference: Sequence[Outputs], answers: Sequence[Outputs]) -> float:
        """Return the signal-to-noise ratio of the worst output; of classification, the first."""
        names = list(reference[0])
        if self.task is None or self.task.tells_classes:
            names = names[:1]
        return min(
            _sqnr_db(*(np.concatenate([batch[name] for batch in each]) for each in (reference,
                                                                                   answers)))
            for name in names
        )  # fmt: skip


@dataclass(frozen=True)
class _Layer:
    """One weighted op of the written graph: its quantized weight and input."""

    name: str
    weight: Weight
    pair: QdqPair


@dataclass(frozen=True)
class Seen:
    """What the images do to the input of one layer."""

    saturation_pct: float
    dynamic_range: float
    channel_spread: float


def quantize_sensitivity(
    model: onnx.ModelProto,
    plan: QuantPlan,
    batches: Batches,
    *,
    task: Task | None = None,
) -> QuantSensitivity:
    """Quantize one layer at a time and see what it does to the answers.

    Method: with the plan's own ranges, scales and corrections, the fp32 graph is run with one layer
    quantized in weight and input, then in either alone; Q and DQ are computed in float. Everything
    else, other operators included, stays in fp32, so the figures of layers do not add up to that
    of the whole network.

    Args:
        model: The fp32 graph with one input that the plan was made for. Not modified.
        plan: Which layers are quantized, and how.
        batches: Labelled images, float32 (B, C, H, W) and int64 (B,), or the task's targets.
        task: Whose primary metric counts; top-1 of one class an image if absent.

    Raises:
        QuantizationError: the plan does not fit the graph.
        DataError: there are no images.
    """
    target = plan.target
    judge = Judge(labelled_arrays(batches), task)
    images = [batch for batch, _ in judge.labelled]
    base = rewrite_for(apply_corrections(prepare(model), plan), target)
    whole = write_qdq(model, plan, target)
    layers = list(_layers(EditableGraph(whole)))
    reference = judge.outputs(base, float_qdq=True)
    value = judge.value(reference)
    seen = _observe(base, layers, images)
    macs = layer_macs(base)
    found = []
    for layer in track(layers, "Sensitivity"):
        alone = [  # in weight and input, then in either
            judge.outputs(_with_layer(base, layer, *parts), float_qdq=True)
            for parts in ((True, True), (True, False), (False, True))
        ]
        lost = judge.value(alone[0])
        sqnrs = [judge.sqnr_db(reference, answers) for answers in alone]
        judged = lost, judge.metric.drop(value, lost)
        found.append(_describe(layer, sqnrs, judged, seen[layer.name], macs.get(layer.name, 0)))
    answer = judge.outputs(whole, float_qdq=True)
    names = {layer.name for layer in layers}
    weighted = [n.name for n in base.graph.node if n.op_type in WEIGHTED and n.name not in names]
    return QuantSensitivity(
        target,
        judge.images,
        value,
        judge.value(answer),
        judge.sqnr_db(reference, answer),
        tuple(found),
        {name: plan.float_nodes.get(name, f"not for {target}") for name in weighted},
        judge.metric,
    )


def plot_quantize_sensitivity(found: QuantSensitivity, path: Path) -> None:
    """Draw, layer by layer, what weight and input cost alone; the suffix says the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 0.32 * len(found.layers) + 2), 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = np.arange(len(found.layers))
    series = {
        "weight alone": [layer.sqnr_weight_db for layer in found.layers],
        "input alone": [layer.sqnr_activation_db for layer in found.layers],
        "both": [layer.sqnr_db for layer in found.layers],
    }
    for (name, values), marker in zip(series.items(), "^vo", strict=True):
        axes.plot(places, values, marker, label=name, markersize=5)
    axes.axhline(found.int8_sqnr_db, color="grey", linestyle=":", label="whole network")
    axes.set_xticks(places, [layer.node for layer in found.layers], rotation=90, fontsize=7)
    axes.set_ylabel("SQNR of the answer, dB (higher is better)")
    axes.set_title(f"One layer in int8 at a time ({found.target}, {found.images} images)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.lstrip(".") or "png", dpi=120)


def layer_macs(model: onnx.ModelProto) -> dict[str, int]:
    """Return the MACs of one image of each convolution and matrix product, by node."""
    macs = node_macs(model)
    return {n.name: macs[n.output[0]] for n in model.graph.node if n.output[0] in macs}


def _layers(graph: EditableGraph) -> Iterable[_Layer]:
    for node in graph.of_type(*WEIGHTED):
        weight, pair = weight_of(node), pair_before(node.inputs[0])
        if weight is not None and pair is not None:
            yield _Layer(label(node), weight, pair)


def _with_layer(
    base: onnx.ModelProto, layer: _Layer, weight: bool, activation: bool
) -> onnx.ModelProto:
    """Return ``base`` with one layer quantized in weight, input, or both."""
    graph = EditableGraph(base)
    node = next(node for node in graph.nodes if node.name == layer.name)
    if activation:
        numbers = layer.pair.numbers
        if numbers.scale is None:
            raise TypeError(f"the scale before {node.name} is computed at run time")
        constants = [
            graph.add_constant("sensitivity_scale", numbers.scale),
            graph.add_constant("sensitivity_zero_point", numbers.zero.astype(numbers.dtype)),
        ]
        codes = graph.add("QuantizeLinear", [node.inputs[0], *constants], "sensitivity_codes")
        real = graph.add("DequantizeLinear", [codes, *constants], "sensitivity_real")
        node.replace_input_with(0, real)
    if weight:
        values = np.asarray(layer.weight.values, np.float32)
        node.replace_input_with(1, graph.add_constant("sensitivity_weight", values))
    return graph.to_model()


def _observe(
    base: onnx.ModelProto, layers: Sequence[_Layer], images: list[Array]
) -> dict[str, Seen]:
    """Return what the images do to the input of each layer, in one more pass of the fp32 graph."""
    inputs = {node.name: node.input[0] for node in base.graph.node if node.input}
    names = sorted({inputs[layer.name] for layer in layers})
    made = [name for name in names if name not in {v.name for v in base.graph.input}]
    session = session_of(with_outputs(base, made))
    feed_name = session.get_inputs()[0].name
    limits = {inputs[layer.name]: layer.pair.numbers.limits for layer in layers}
    totals = {name: np.zeros(3) for name in names}  # values, squares, clipped
    peaks: dict[str, Array] = {}
    for batch in images:
        values = dict(zip(made, session.run(made, {feed_name: batch}), strict=True))
        for name in names:
            value = values.get(name, batch)
            low, high = limits[name]
            step = (high - low) / 510  # half a step beyond the limit is still rounded, not clipped
            clipped = np.count_nonzero((value < low - step) | (value > high + step))
            squares = float(np.square(value, dtype=np.float64).sum())
            totals[name] += np.array([value.size, squares, clipped])
            others = tuple(d for d in range(value.ndim) if d != 1)
            peak = np.abs(value).max(axis=others) if value.ndim > 1 else np.abs(value)
            peaks[name] = np.maximum(peaks.get(name, 0.0), peak)
    return {
        layer.name: _seen(totals[inputs[layer.name]], peaks[inputs[layer.name]]) for layer in layers
    }


def _seen(totals: Array, peaks: Array) -> Seen:
    count, squares, clipped = totals
    rms = float(np.sqrt(squares / count))
    live = peaks[peaks > 0]
    return Seen(
        100 * float(clipped / count),
        float(peaks.max()) / max(rms, 1e-30),
        float(peaks.max() / np.median(live)) if live.size else 1.0,
    )


def _describe(
    layer: _Layer, sqnrs: list[float], judged: tuple[float, float], seen: Seen, macs: int
) -> LayerSensitivity:
    both, weight, activation = sqnrs
    values = np.asarray(layer.weight.values, np.float64)
    axis = layer.weight.channel_axis or 0
    rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    rms = np.sqrt(np.square(rows).mean(1))
    peak_over_rms = float((np.abs(rows).max(1) / np.maximum(rms, 1e-30)).max())
    return LayerSensitivity(
        layer.name,
        layer.weight.node.op_type,
        macs,
        both,
        weight,
        activation,
        *judged,
        seen.saturation_pct,
        seen.dynamic_range,
        seen.channel_spread,
        peak_over_rms,
        diagnose(both, weight - activation, seen, peak_over_rms),
    )


def diagnose(
    sqnr_db: float,
    weight_minus_activation_db: float,
    seen: Seen,
    weight_peak_over_rms: float,
) -> str:
    """Return one sentence: where the error of a layer comes from, and what to try."""
    if sqnr_db >= HARMLESS_DB:
        return "Harmless: leave it in int8."
    if weight_minus_activation_db < -3:
        if weight_peak_over_rms > OUTLYING / 3:
            return (
                f"Its weight costs most: single weights reach {weight_peak_over_rms:.1f} times the "
                "root mean square of their channel; try method rounding, or leave it in float."
            )
        return "Its weight costs most: try method rounding, or bias-correction."
    if seen.saturation_pct > MUCH_CLIPPED_PCT:
        return (
            f"Its input costs most: {seen.saturation_pct:.1f} % of the values are clipped; "
            "try observer minmax or percentile 99.999."
        )
    if seen.channel_spread > UNEVEN:
        return (
            f"Its input costs most: the largest channel reaches {seen.channel_spread:.0f} times "
            "the median one and sets the scale for all; try method equalization."
        )
    if seen.dynamic_range > OUTLYING:
        return (
            f"Its input costs most: few values reach {seen.dynamic_range:.0f} times the root mean "
            "square and stretch the range; try observer mse, or leave it in float."
        )
    return "Both cost alike: leave it in float if it is cheap, or train with qat."


def labelled_arrays(batches: Batches) -> Labelled:
    """Return images and their targets, batch by batch.

    Raises:
        DataError: there are none.
    """
    pairs = [(images.numpy(), targets) for images, targets in batches]
    if not pairs:
        raise DataError("there are no images to measure sensitivity on")
    return pairs


def top1_pct(logits: Array, labels: Array) -> float:
    """Return the share of right answers, percent."""
    return 100 * float(np.mean(logits.reshape(len(labels), -1).argmax(1) == labels))


def _sqnr_db(reference: Array, answer: Array) -> float:
    error = float(np.square(reference.astype(np.float64) - answer).sum())
    power = float(np.square(reference, dtype=np.float64).sum())
    return float(10 * np.log10(max(power, 1e-30) / max(error, power * 1e-15, 1e-30)))
