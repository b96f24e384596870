"""Read ONNX files that anybody may have written; write them whole or not at all."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import checker, inliner

from compress.artifact import replacing
from compress.errors import ModelError, boundary
from compress.graph import files

LARGEST = 2**31 - 1  # bytes of one protobuf message
INVALID = "is not valid ONNX"
FIX = "Export it again, or copy it again and compare its SHA-256"


def load_onnx(path: str | Path) -> onnx.ModelProto:
    """Return the model in ``path`` with its weights, checked, its local functions inlined.

    Raises:
        EngineError: the file is absent, cut short, or wants weights from outside its folder.
        ModelError: it is no valid ONNX.
    """
    model = files.load(path)
    with boundary(ModelError, INVALID, where=str(path), fix=FIX):
        if model.ByteSize() < LARGEST:
            checker.check_model(model)
        return inliner.inline_local_functions(model) if model.functions else model


def save_onnx(model: onnx.ModelProto, path: str | Path) -> Path:
    """Write ``model`` to ``path`` after checking it with full shape inference.

    Raises:
        ModelError: the model is larger than one file of ONNX can be, or breaks its rules.
    """
    path = Path(path)
    if model.ByteSize() >= LARGEST:
        raise ModelError(
            f"the graph has {model.ByteSize() / 2**30:.1f} GiB",
            where=str(path),
            expected="less than 2 GiB, all that one ONNX file can hold",
        )
    with boundary(ModelError, INVALID, where=str(path)):
        checker.check_model(model, full_check=True)
    with replacing(path) as temporary:
        onnx.save_model(model, temporary)
    return path
