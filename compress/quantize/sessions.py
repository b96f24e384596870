"""ONNX Runtime sessions of graphs in memory, for calibration and for judging; quiet, on the CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

_PROTOBUF_LIMIT = 2**31 - 2**20  # bytes of one message


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
    providers = ["CPUExecutionProvider"]
    if model.ByteSize() < _PROTOBUF_LIMIT:
        return ort.InferenceSession(model.SerializeToString(), options, providers=providers)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.onnx")
        copy = ModelProto()
        copy.CopyFrom(model)
        onnx.save(copy, path, save_as_external_data=True, location="weights.bin")
        return ort.InferenceSession(path, options, providers=providers)


def with_outputs(model: ModelProto, names: Iterable[str]) -> ModelProto:
    """Return a copy of ``model`` that has ``names`` as outputs, after its own."""
    copy = ModelProto()
    copy.CopyFrom(model)
    present = {output.name for output in copy.graph.output}
    for name in names:
        if name not in present:
            copy.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return copy
