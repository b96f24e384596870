"""ONNX files from anywhere, read with suspicion: damaged ones and ones that reach outside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, TensorProto

from compress.errors import EngineError


def load(path: str | Path, *, weights: bool = True) -> ModelProto:
    """Return the model in ``path`` after ``check``.

    Args:
        path: An ONNX file; weights beside it are read as well.
        weights: Whether to read weights that lie in other files.

    Raises:
        EngineError: the file is absent, damaged, or its weights lie outside its folder.
    """
    source = Path(path)
    model = _parse(source)
    _check(model, source)
    if weights:
        onnx.load_external_data_for_model(model, str(source.parent))
    return model


def check(path: str | Path) -> None:
    """Check that ``path`` is a whole ONNX file whose weights lie in its own folder.

    Raises:
        EngineError: it is not; the message says what is wrong.
    """
    load(path, weights=False)


def _parse(path: Path) -> ModelProto:
    if not path.is_file():
        raise EngineError("no such file", where=str(path), expected="an ONNX file")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # noqa: BLE001 - protobuf and onnx raise several kinds
        raise EngineError(
            f"is no ONNX file, or only a part of one ({path.stat().st_size} bytes)",
            where=str(path),
            fix="Export it again, or copy it again and compare its SHA-256",
        ) from None
    if not model.graph.node or not model.graph.output:
        raise EngineError(
            f"holds no graph ({path.stat().st_size} bytes)",
            where=str(path),
            fix="Export it again, or copy it again and compare its SHA-256",
        )
    return model


def _check(model: ModelProto, path: Path) -> None:
    folder = path.parent.resolve()
    for tensor in _tensors(model.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        location = entry.get("location", "")
        file = (folder / location).resolve()
        if not location or Path(location).is_absolute() or folder not in file.parents:
            raise EngineError(
                f"its weight {tensor.name!r} is to be read from {location!r}, outside the folder "
                "of the model",
                where=str(path),
                expected="weights inside the file or in a file beside it",
                fix="Do not use this file unless you trust who wrote it",
            )
        needed = int(entry.get("offset", 0)) + int(entry.get("length", 0))
        present = file.stat().st_size if file.is_file() else 0
        if not present or present < needed:
            raise EngineError(
                f"its weight {tensor.name!r} needs {needed} bytes of {location!r}, "
                f"which has {present}",
                where=str(path),
                fix="Copy the file with the weights as well",
            )


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)
            for sub in attribute.graphs:
                yield from _tensors(sub)
