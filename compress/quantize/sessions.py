"""ONNX Runtime sessions of graphs in memory, for calibration and for judging; quiet, on the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from compress.qdq.skeleton import is_large, skeleton


def session_of(model: ModelProto, threads: int | None = None, *, float_qdq: bool = False) -> Any:
    """Return a session of ``model``.

    Args:
        model: Any graph, of any size.
        threads: CPU threads; all cores if absent.
        float_qdq: Compute Q/DQ arithmetic in float instead of fusing it into integer kernels.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    if float_qdq:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    light, weights = _without_weights(model)
    values = [ort.OrtValue.ortvalue_from_numpy(value) for value in weights.values()]
    options.add_external_initializers(list(weights), values)
    session = ort.InferenceSession(
        light.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    session.weights = values  # it reads their memory
    return session


def is_runtime_error(error: Exception) -> bool:
    """Return whether ``error`` is ONNX Runtime's; its errors have no class in common."""
    return type(error).__module__.startswith("onnxruntime")


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
    copy = ModelProto()
    copy.CopyFrom(model)
    present = {output.name for output in copy.graph.output}
    for name in names:
        if name not in present:
            copy.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return copy
