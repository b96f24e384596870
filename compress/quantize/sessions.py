"""ONNX Runtime sessions of graphs in memory, for calibration and for judging; quiet, on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, numpy_helper

from compress.errors import QuantizationError
from compress.graph.weightless import is_large, skeleton
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
    model: ModelProto, *, float_qdq: bool = False, optimized: bool = True
) -> GraphSession:
    """Return a session of any graph, of any size, on all cores.

    With ``float_qdq`` Q/DQ arithmetic is computed in float, not fused into integer kernels. Not
    ``optimized``, nothing at all is fused.

    Raises:
        CannotRunError: ONNX Runtime cannot load it, as with an operator of somebody's own.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # what it says is raised as well
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
