"""Latency of single layers on the runtime that will be used: measured, kept on disk, looked up."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from pydantic import Field, TypeAdapter
from torch import nn

from compress import artifact, environment, packages, progress
from compress.artifact import read_json, scratch, write_json
from compress.errors import EngineError, RunError
from compress.runtimes import open_built, open_session, runtime_class, unavailable

SMOOTH = 0.10  # a cell whose centre is further than this from interpolation is measured finer
NOISE_MS = 0.003  # differences below this are never called rough
SMALLEST_CELL = 4  # channels; finer cells are measured point by point
SECONDS = 0.03  # of timed calls for one point
LEAST_CALLS = 10
LONGEST_MS = 3.6e6  # an hour: nothing that is looked up takes longer
_POINTS = TypeAdapter(dict[str, dict[str, Annotated[float, Field(gt=0, lt=LONGEST_MS)]]])

Measure = Callable[["LayerShape", int, int], float]


@dataclass(frozen=True)
class LayerShape:
    """All of a layer that its latency depends on, but its channels."""

    kernel: tuple[int, ...]  # () for a linear layer
    stride: tuple[int, ...]
    padding: tuple[int, ...]  # before and after each dimension, as ONNX writes it
    dilation: tuple[int, ...]
    size: tuple[int, ...]  # of the input, without batch and channels
    groups: int = 1  # 0 = as many as channels
    rows: int = 1  # of the input of a linear layer

    @property
    def key(self) -> str:
        """This shape as a key of a file."""
        return json.dumps(asdict(self), separators=(",", ":"))


class LatencyTable:
    """Milliseconds of a layer by its input and output channels, measured where it is asked for.

    The channels of a layer span a plane. It is divided into cells; the corners of a cell that a
    question falls into are measured, and its centre. Where the centre lies on the plane through the
    corners to ``SMOOTH``, the cell is interpolated; else it is divided in four. What is measured
    once is never measured again, in this process or the next: without a ``file`` in this one alone.
    ``measure`` returns the milliseconds of a layer: (shape, inputs, outputs) -> ms.
    """

    def __init__(self, measure: Measure, file: Path | None = None) -> None:
        self.measure = measure
        self._file = file
        self._known: dict[str, dict[str, float]] = _read(file)
        self._answers: dict[tuple[LayerShape, int, int], float] = {}
        self.measured = 0  # points that this table has measured itself

    def ms(self, shape: LayerShape, inputs: int, outputs: int, whole: tuple[int, int]) -> float:
        """Return the latency of one layer, ms.

        ``whole`` are its channels before anything is cut: the far corner of the plane.
        """
        question = (shape, inputs, outputs)
        if question not in self._answers:
            self._answers[question] = self._looked_up(*question, whole)
        return self._answers[question]

    def save(self) -> None:
        """Write what was measured to the file, if there is one; it is only a cache."""
        if self._file is None or not self.measured:
            return
        merged = _read(self._file)
        for key, points in self._known.items():
            merged[key] = merged.get(key, {}) | points
        try:
            write_json(self._file, merged)
        except RunError as error:
            progress.warn(f"latencies are not kept: {error}")

    def _looked_up(
        self, shape: LayerShape, inputs: int, outputs: int, whole: tuple[int, int]
    ) -> float:
        if shape.groups == 0:  # inputs are outputs: the plane is a line
            inputs, whole = 1, (1, whole[1])
        low, high = (1, 1), whole
        while True:
            if max(b - a for a, b in zip(low, high, strict=True)) <= SMALLEST_CELL:
                return self._point(shape, inputs, outputs)
            centre = _inside(low, high, 8)
            if all(self._is_smooth(shape, low, high, at) for at in (centre, _inside(low, high, 5))):
                return self._between(shape, low, high, (inputs, outputs))
            low, high = _quarter(low, high, centre, (inputs, outputs))

    def _is_smooth(self, shape: LayerShape, low: Any, high: Any, at: tuple[int, ...]) -> bool:
        truth = self._point(shape, *at)
        return abs(truth - self._between(shape, low, high, at)) <= max(SMOOTH * truth, NOISE_MS)

    def _between(self, shape: LayerShape, low: Any, high: Any, at: tuple[int, ...]) -> float:
        """Return the bilinear interpolation of a cell's corners."""
        across = [
            (x - a) / (b - a) if b > a else 0.0 for x, a, b in zip(at, low, high, strict=True)
        ]
        total = 0.0
        for ends in itertools.product((0, 1), repeat=2):
            weight = math.prod(x if end else 1 - x for x, end in zip(across, ends, strict=True))
            if weight:
                corner = ((low, high)[end][dim] for dim, end in enumerate(ends))
                total += weight * self._point(shape, *corner)
        return total

    def _point(self, shape: LayerShape, inputs: int, outputs: int) -> float:
        points = self._known.setdefault(shape.key, {})
        place = f"{inputs},{outputs}"
        if place not in points:
            ms = round(self.measure(shape, inputs, outputs), 6)
            if not 0 < ms < LONGEST_MS:
                fix = "Measure again; check the clock"
                raise EngineError(f"was measured to take {ms} ms", where=shape.key, fix=fix)
            points[place] = ms
            self.measured += 1
        return points[place]


def _inside(low: tuple[int, ...], high: tuple[int, ...], sixteenths: int) -> tuple[int, ...]:
    """Return the point of a cell that lies so many sixteenths from its low corner."""
    return tuple(a + (b - a) * sixteenths // 16 for a, b in zip(low, high, strict=True))


def _quarter(
    low: tuple[int, ...], high: tuple[int, ...], centre: tuple[int, ...], at: tuple[int, ...]
) -> tuple[Any, Any]:
    """Return the quarter of a cell that ``at`` lies in."""
    below = [x <= c for x, c in zip(at, centre, strict=True)]
    return (
        tuple(a if b else c for a, b, c in zip(low, below, centre, strict=True)),
        tuple(c if b else h for h, b, c in zip(high, below, centre, strict=True)),
    )


def _read(file: Path | None) -> dict[str, dict[str, float]]:
    """Return the points of a file; none if it is absent or damaged, since it is only a cache."""
    if file is None or not file.exists():
        return {}
    try:
        return _POINTS.validate_python(read_json(file), strict=True)
    except (RunError, ValueError) as error:
        reason = error.what if isinstance(error, RunError) else "holds no table of latencies"
        progress.warn(f"{file}: {reason}; it is measured again")
        return {}


@functools.lru_cache(maxsize=8)
def table_for(runtime: str) -> LatencyTable:
    """Return the table of ``runtime`` on this machine, with what earlier runs have measured.

    Its file is named after the runtime, its version and the processor.

    Raises:
        EngineError: nothing can run on ``runtime`` here.
    """
    reason = unavailable(runtime)
    if reason is not None:
        raise EngineError(f"nothing can be measured on {runtime}: {reason}", where="runtime")
    version = packages.version(runtime_class(runtime).package.replace("_", "-"))
    device = environment.describe_machine()["device"]
    cpu, threads = str(device.get("cpu", "unknown")), device.get("threads_usable")
    machine = [runtime, version, cpu, threads, None]  # None: all threads
    name = hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:16]
    measure = functools.partial(measure_layer, runtime=runtime)
    return LatencyTable(measure, artifact.cache_folder() / "latency" / f"{runtime}-{name}.json")


def measure_layer(shape: LayerShape, inputs: int, outputs: int, *, runtime: str) -> float:
    """Return the latency of one layer alone on ``runtime``, ms, for a batch of one.

    **Method:** the layer is written as an ONNX file of its own with random weights, loaded, and
    called for ``SECONDS``; the number is the lowest tenth of the calls, so that what else the
    machine does counts as little as possible. What a call costs by itself is in every number: sums
    over layers rank networks, and become milliseconds only by comparison with whole networks that
    were measured.
    """
    inputs = outputs if shape.groups == 0 else inputs
    array = np.random.default_rng(0).standard_normal(_input_shape(shape, inputs)).astype(np.float32)
    with scratch() as folder:
        if runtime_class(runtime).opens == "network":
            session = open_session(layer_module(shape, inputs, outputs), runtime)
        else:
            onnx.save(layer_graph(shape, inputs, outputs), folder / "layer.onnx")
            session = open_built(folder / "layer.onnx", runtime)
        with session:
            return time_calls(functools.partial(session.run, array), SECONDS, quantile=0.1)


def layer_module(shape: LayerShape, inputs: int, outputs: int) -> nn.Module:
    """Return a torch module that is one convolution or matrix product, with its padding."""
    if not shape.kernel:
        return nn.Linear(inputs, outputs)
    rank = len(shape.kernel)
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    groups = math.gcd(shape.groups or outputs, inputs, outputs)
    before, after = shape.padding[:rank], shape.padding[rank:]
    options = {"stride": shape.stride, "dilation": shape.dilation, "groups": groups}
    if before == after:
        layer: nn.Module = kind(inputs, outputs, shape.kernel, padding=before, **options)
        return layer
    around = [size for pair in zip(before[::-1], after[::-1], strict=True) for size in pair]
    pad: Any = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)[rank - 1]
    return nn.Sequential(pad(tuple(around), 0.0), kind(inputs, outputs, shape.kernel, **options))


def time_calls(call: Callable[[], object], seconds: float, quantile: float = 0.5) -> float:
    """Return the milliseconds of one call: a quantile over ``seconds`` of single calls.

    A low quantile is what a call takes when nothing disturbs it; the median is what users see.
    """
    call()
    took: list[float] = []
    end = time.perf_counter() + seconds
    while len(took) < LEAST_CALLS or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return 1e3 * float(np.quantile(took, quantile))


def layer_graph(shape: LayerShape, inputs: int, outputs: int) -> onnx.ModelProto:
    """Return an ONNX model that is one convolution or matrix product."""
    size: tuple[int, ...] = (inputs, outputs)
    given: dict[str, Any] = {}
    if shape.kernel:
        groups = math.gcd(shape.groups or outputs, inputs, outputs)
        size = (outputs, inputs // groups, *shape.kernel)
        given = {"strides": shape.stride, "pads": shape.padding, "dilations": shape.dilation}
        given["group"] = groups
    values = {
        "weight": np.random.default_rng(1).standard_normal(size).astype(np.float32),
        "bias": np.zeros(outputs, np.float32),
    }
    node = helper.make_node("Conv" if given else "Gemm", ["input", *values], ["output"], **given)
    read = _input_shape(shape, inputs)
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, read)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [None] * len(read))],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _input_shape(shape: LayerShape, inputs: int) -> tuple[int, ...]:
    return (1, inputs, *shape.size) if shape.kernel else (shape.rows, inputs)


@functools.cache
def kernel_step(table: LatencyTable, shape: LayerShape, inputs: int, outputs: int) -> int:
    """Return the multiple of output channels that the runtime's kernels work in: 16, 8, 4 or 1.

    A step of s shows in that half a step less than a full one buys next to nothing: 56 channels
    take as long as 64 when kernels work on 16 at a time.
    """
    steps = (step for step in (16, 8, 4) if _is_step(table, shape, inputs, outputs, step))
    return next(steps, 1)


def _is_step(table: LatencyTable, shape: LayerShape, inputs: int, outputs: int, step: int) -> bool:
    full = outputs // step * step
    if full < 2 * step:
        return False
    less = full - step // 2
    ratios = [
        table.measure(shape, inputs, less) / table.measure(shape, inputs, full) for _ in range(3)
    ]
    return statistics.median(ratios) > 1 - 0.25 * (step / 2) / full
