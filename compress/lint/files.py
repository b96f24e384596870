"""Read ONNX files that anybody may have written; write them whole or not at all."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import checker, inliner

from compress import onnx_file
from compress.artifact import replacing
from compress.errors import ModelError

LARGEST = 2**31 - 1  # bytes of one protobuf message


def load_onnx(path: str | Path) -> onnx.ModelProto:
    """Return the model in ``path`` with its weights, checked, its local functions inlined.

    Raises:
        EngineError: the file is absent, cut short, or wants weights from outside its folder.
        ModelError: it is no valid ONNX.
    """
    model = onnx_file.load(path)
    try:
        if model.ByteSize() < LARGEST:
            checker.check_model(model)
        return inliner.inline_local_functions(model) if model.functions else model
    except (checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(
            f"is not valid ONNX: {str(error).strip().splitlines()[0]}",
            where=str(path),
            fix="Export it again, or copy it again and compare its SHA-256",
        ) from None


def save_onnx(model: onnx.ModelProto, path: str | Path) -> Path:
    """Write ``model`` to ``path`` after checking it with full shape inference.

    Raises:
        ModelError: the model is larger than one file of ONNX can be.
    """
    path = Path(path)
    if model.ByteSize() >= LARGEST:
        raise ModelError(
            f"the graph has {model.ByteSize() / 2**30:.1f} GiB",
            where=str(path),
            expected="less than 2 GiB, all that one ONNX file can hold",
        )
    checker.check_model(model, full_check=True)
    with replacing(path) as temporary:
        onnx.save_model(model, temporary)
    return path
