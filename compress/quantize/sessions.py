"""ONNX Runtime sessions of graphs in memory, and how close a quantized graph's answers come."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper

from compress.errors import QuantizationError
from compress.graph.weightless import is_large, skeleton
from compress.quantize.images import Feed
from compress.runtimes._plain_kernels import take_exact_kernels
from compress.runtimes.onnxruntime import onnxruntime_error, run_within

# Of no use in float arithmetic; ONNX Runtime 1.23 fails in it where a graph begins with a Clip.
_CLIP_FUSION = "ClipQuantRewrite"


class CannotRunError(QuantizationError):
    """ONNX Runtime cannot load a graph, or not run it on these inputs."""

    @classmethod
    def of(cls, error: Exception, feed: Mapping[str, NDArray[Any]] | None = None) -> CannotRunError:
        """Return an error of ONNX Runtime as one of ours; no ``feed``: the graph did not load."""
        told = onnxruntime_error(error, None)
        shapes = ", ".join(f"{name} {value.shape}" for name, value in (feed or {}).items())
        fix = "Check that the fp32 network runs on such images" if feed else "Check the fp32 file"
        return cls(told.what, where=f"run on {shapes}" if shapes else "", fix=told.fix or fix)


class TooLongError(QuantizationError):
    """A run of a graph was ended because it took too long."""


class GraphSession:
    """A loaded graph; what ONNX Runtime raises becomes one kind of error."""

    def __init__(self, session: Any, weights: Sequence[Any]) -> None:
        self.session = session
        self.weights = weights  # the session reads their memory

    def run(
        self,
        names: Sequence[str] | None,
        feed: Mapping[str, NDArray[Any]],
        *,
        seconds: float | None = None,
    ) -> list[NDArray[Any]]:
        """Return the outputs ``names``, or all.

        Args:
            names: Of outputs.
            feed: Inputs by name.
            seconds: After which the run is ended, between two nodes; no limit if absent.

        Raises:
            TooLongError: it was ended.
            CannotRunError: a node fails on these inputs.
        """
        try:
            if seconds is not None:
                return run_within(self.session, names, feed, seconds)
            found: list[NDArray[Any]] = self.session.run(names, feed)
        except TimeoutError as error:
            raise TooLongError(str(error)) from None
        except Exception as error:  # noqa: BLE001 - onnxruntime has no common error class
            raise CannotRunError.of(error, feed) from None
        return found

    def run_into(
        self, feed: Mapping[str, NDArray[Any]], buffers: Mapping[str, NDArray[Any]]
    ) -> None:
        """Run, writing the float32 outputs ``buffers`` in place.

        Raises:
            CannotRunError: a node fails on these inputs.
        """
        binding = self.session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, np.asarray(array, order="C"))
        for name, buffer in buffers.items():
            binding.bind_output(name, "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # noqa: BLE001 - onnxruntime has no common error class
            raise CannotRunError.of(error, feed) from None

    def get_inputs(self) -> Any:
        """Return ONNX Runtime's descriptions of the inputs."""
        return self.session.get_inputs()


def session_of(
    model: ModelProto,
    *,
    float_qdq: bool = False,
    optimized: bool = True,
    threads: int = 0,
) -> GraphSession:
    """Return a session of any graph, of any size, on ``threads`` threads; 0: on all cores.

    With ``float_qdq`` Q/DQ arithmetic is computed in float, not fused into integer kernels. Not
    ``optimized``, nothing at all is fused.

    Raises:
        CannotRunError: ONNX Runtime cannot load it, as with an operator of somebody's own.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it says is raised as well
    options.intra_op_num_threads = threads
    take_exact_kernels(options)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it wastes a core
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if float_qdq:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    light, weights = _without_weights(model)
    values = [
        # numpy has no bfloat16 of its own: its bits are handed over
        ort.OrtValue.ortvalue_from_numpy_with_onnx_type(value.view(np.uint16), TensorProto.BFLOAT16)
        if value.dtype.name == "bfloat16"
        else ort.OrtValue.ortvalue_from_numpy(value)
        for value in weights.values()
    ]
    options.add_external_initializers(list(weights), values)
    try:
        session = ort.InferenceSession(
            light.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=[_CLIP_FUSION] if float_qdq else [],
        )
    except Exception as error:  # noqa: BLE001 - onnxruntime has no common error class
        raise CannotRunError.of(error) from None
    return GraphSession(session, values)


def _without_weights(model: ModelProto) -> tuple[ModelProto, dict[str, NDArray[Any]]]:
    """Return a graph whose large constants are said to lie elsewhere, and these.

    Handed over beside the graph they are copied once, and no message grows past 2 GiB.
    """
    light = skeleton(model)
    weights = {}
    for tensor in model.graph.initializer:
        if is_large(tensor):
            value = weights[tensor.name] = numpy_helper.to_array(tensor)
            entry = light.graph.initializer.add(
                name=tensor.name,
                dims=tensor.dims,
                data_type=tensor.data_type,
                data_location=onnx.TensorProto.EXTERNAL,
            )
            for key, text in (("location", "memory"), ("length", str(value.nbytes))):
                entry.external_data.add(key=key, value=text)
    return light, weights


def with_outputs(model: ModelProto, names: Iterable[str]) -> ModelProto:
    """Return a copy of ``model`` that has ``names`` as outputs, after its own."""
    copy = deepcopy(model)
    present = {output.name for output in copy.graph.output}
    for name in names:
        if name not in present:
            copy.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return copy


_EXACT = 1e-6  # share of noise that nobody sees: 60 dB of one image count as all above
_ERRORS = 2.0  # standard errors that chance explains


def answers(
    model: ModelProto,
    feed: Feed,
    *,
    target: str | None = None,
    names: Sequence[str] | None = None,
    optimized: bool = True,
) -> list[NDArray[Any]]:
    """Return the outputs of a float or Q/DQ graph for ``feed``, or its tensors ``names``.

    For the target "onnxruntime" a Q/DQ graph runs the integer kernels that it would run in use; for
    any other the Q/DQ arithmetic is computed in float. Not ``optimized``, sums are in other orders.
    """
    (found,) = answers_each(model, [feed], target=target, names=names, optimized=optimized)
    return found


def answers_each(
    model: ModelProto,
    feeds: Sequence[Feed],
    *,
    target: str | None = None,
    names: Sequence[str] | None = None,
    optimized: bool = True,
) -> list[list[NDArray[Any]]]:
    """Return what ``answers`` does for each of ``feeds``, of one session."""
    wanted = [output.name for output in model.graph.output] if names is None else list(names)
    asked = with_outputs(model, wanted)
    session = session_of(asked, float_qdq=target != "onnxruntime", optimized=optimized)
    fixed = next((i.shape[0] for i in session.get_inputs() if len(i.shape) > 1), None)
    runs = [[session.run(wanted, part) for part in portions(feed, fixed)] for feed in feeds]
    return [[_joined(found) for found in zip(*parts, strict=True)] for parts in runs]


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Return the values of several batches; in one row where the batch is not what comes first."""
    if len({part.shape[1:] for part in parts}) == 1:
        return np.concatenate([np.atleast_1d(part) for part in parts])
    return np.concatenate([part.reshape(-1) for part in parts])[None]


def portions(feed: Feed, fixed: object = None) -> Iterator[Feed]:
    """Yield ``feed`` in batches of 2, or of the size that a graph fixes; a rest does not fit it.

    What few images make stays in the caches: large ones take 0.6 to 0.9 of the time of 8 at once.

    Values that are no images, as a threshold is, go with every batch.
    """
    count = max(len(array) for array in feed.values() if array.ndim > 1)
    images = {name for name, array in feed.items() if array.ndim > 1 and len(array) == count}
    batch = fixed if isinstance(fixed, int) else 2
    for start in range(0, count // batch * batch if isinstance(fixed, int) else count, batch):
        rows = slice(start, start + batch)
        yield {name: array[rows] if name in images else array for name, array in feed.items()}


@dataclass(frozen=True)
class Closeness:
    """How close outputs come to the float ones, decibels.

    What people are told is the noise of all images together. What is decided rests on the mean of
    the decibels of each image: the power of a detector's scores, and so their noise, rests on the
    one or two images with an object, and moves by 10 dB from one set of images to the next. Beyond
    60 dB all are alike there: a score that is 0 or 1 on some images has no noise at all on them.
    """

    # SQNR of each output over all images; NaN where it is the same for all
    each_db: tuple[float, ...]
    # Of each output, the noise of each image against its mean power, (B,)
    by_image_db: tuple[NDArray[np.float64], ...]

    @property
    def typical_db(self) -> list[float]:
        """The mean over the images, of each output; NaN where it is the same for all."""
        return [float(each.mean()) for each in self.by_image_db]

    @property
    def weakest_db(self) -> float:
        """The smallest of ``typical_db``; NaN without any."""
        return weakest_db(self.typical_db)

    @property
    def mean_db(self) -> float:
        """The mean of ``typical_db``; NaN without any."""
        told = [each for each in self.typical_db if not math.isnan(each)]
        return sum(told) / len(told) if told else math.nan

    def gain_over(self, other: Closeness) -> float:
        """Return how much closer the outputs are in the mean, decibels; each counts the same."""
        return self.mean_db - other.mean_db

    def sure_gain_over(self, other: Closeness) -> float:
        """Return ``gain_over`` less what chance explains of it, decibels."""
        pairs = zip(self.by_image_db, other.by_image_db, strict=True)
        sure = [_sure(mine - its) for mine, its in pairs if not math.isnan(its[0])]
        return sum(sure) / len(sure) if sure else math.nan

    def falls_below(self, other: Closeness, by_db: float) -> bool:
        """Return whether an output loses more than ``by_db``, and more than chance explains."""
        pairs = zip(self.by_image_db, other.by_image_db, strict=True)
        return any(_sure(its - mine) > by_db for mine, its in pairs)


def closeness(
    reference: Sequence[NDArray[Any]], candidate: Sequence[NDArray[Any]], images: int
) -> Closeness:
    """Return how close outputs come to ``reference``, both (B, ...), of ``images`` images."""
    each, by_image = [], []
    for want, got in zip(reference, candidate, strict=True):
        rows = images if len(want) % images == 0 else 1  # else nobody knows what is whose
        error, power = _squares(want, got, rows)
        each.append(_db(error, power))
        known = not math.isnan(power)
        share = np.nan_to_num(error * (rows / power if known else 1), nan=math.inf, posinf=math.inf)
        noise_db = -10 * np.log10(np.clip(share, _EXACT, 1 / _EXACT))
        by_image.append(noise_db if known else np.full(1, math.nan))
    return Closeness(tuple(each), tuple(by_image))


def sqnr_db(reference: Sequence[NDArray[Any]], candidate: Sequence[NDArray[Any]]) -> float:
    """Return the ratio of signal to quantization noise over all outputs, decibels.

    Every output weighs the same, whatever its magnitude; the higher the better. Outputs that are
    the same for all images count for nothing; NaN where all are.
    """
    return mean_db(sqnr_each(reference, candidate))


def sqnr_each(reference: Sequence[NDArray[Any]], candidate: Sequence[NDArray[Any]]) -> list[float]:
    """Return the SQNR of each output, decibels; NaN where it is the same for all images."""
    pairs = zip(reference, candidate, strict=True)
    return [_db(*_squares(want, got, len(want))) for want, got in pairs]


def mean_db(values: Sequence[float]) -> float:
    """Return the SQNR of which the noise is the mean of that of ``values``; NaN without any."""
    noise = [10 ** (-value / 10) for value in values if not math.isnan(value)]
    return -10 * math.log10(max(sum(noise) / len(noise), 1e-30)) if noise else math.nan


def weakest_db(values: Sequence[float]) -> float:
    """Return the smallest of ``values``; NaN without any."""
    return min((value for value in values if not math.isnan(value)), default=math.nan)


def sqnr_text(value_db: float) -> str:
    """Return an SQNR for people to read."""
    if math.isnan(value_db):
        return "no SQNR (the same for all these images)"
    return f"{value_db:.2f} dB"


def _sure(gains: NDArray[np.float64]) -> float:
    """Return the mean over images, less what chance explains; of one image it says nothing."""
    error = gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return float(gains.mean() - _ERRORS * error)


def _squares(want: NDArray[Any], got: NDArray[Any], rows: int) -> tuple[NDArray[np.float64], float]:
    """Return the squared error of each of ``rows`` parts, (R,), and the power of all.

    The power is NaN where ``want`` is the same for all images.
    """
    if _is_constant(want):
        return np.zeros(1), math.nan
    error, power = np.empty(rows), 0.0
    for row, (one, other) in enumerate(
        zip(want.reshape(rows, -1), got.reshape(rows, -1), strict=True)
    ):
        value = one.astype(np.float64)
        power += float(value @ value)
        value -= other
        error[row] = value @ value
    return error, power


def _db(error: NDArray[np.float64], power: float) -> float:
    if math.isnan(power):
        return math.nan
    if not np.isfinite(error).all():
        return -math.inf
    return -10 * math.log10(max(float(error.sum()) / power, 1e-30))


def _is_constant(values: NDArray[Any]) -> bool:
    """Return whether all images have the same values; of one image, whether all are equal."""
    first = values[:1] if len(values) > 1 else values.reshape(-1)[:1]
    return bool(np.all(values == first))
