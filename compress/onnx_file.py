"""ONNX files from anywhere, read with suspicion: damaged ones and ones that reach outside."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import GraphProto, ModelProto, TensorProto

from compress.artifact import replacing
from compress.errors import EngineError
from compress.onnx_facts import layout_of, stamp


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
    _free_negative_sizes(model.graph)
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


def _free_negative_sizes(graph: GraphProto) -> None:
    """Leave sizes open that are written as -1 or 0, as Paddle writes free ones."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value") and dim.dim_value < 1:
                dim.dim_param = f"{value.name}_{axis}" if axis else "batch"


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


def copy(
    source: Path,
    target: Path,
    *,
    facts: Mapping[str, Any],
    sizes: tuple[int, int, int] | None = None,
) -> None:
    """Copy an ONNX file with the weights beside it, and keep ``facts`` in the copy.

    Args:
        source: The file; it is left as it is.
        target: The copy.
        facts: See ``onnx_facts.stamp``.
        sizes: Channels, height and width that free ones of its first picture are fixed to.

    Raises:
        EngineError: the file is damaged, or its sizes are others.
    """
    model = load(source, weights=False)
    if sizes is not None:
        fix_sizes(model, sizes, where=str(source))
    stamp(model, facts)
    target.parent.mkdir(parents=True, exist_ok=True)
    for location in sorted(_locations(model.graph)):
        with replacing(target.parent / location) as temporary:
            shutil.copyfile(source.parent / location, temporary)
    with replacing(target) as temporary:
        temporary.write_bytes(model.SerializeToString())


def fix_sizes(model: ModelProto, sizes: tuple[int, int, int], *, where: str) -> None:
    """Fix free channels, height and width of the first input with four dimensions.

    Raises:
        EngineError: there is no such input, or a size that is fixed is another.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name in weights or len(dims) != 4:
            continue
        shape = [dim.dim_value if dim.dim_value > 0 else None for dim in dims]
        channels, height, width = sizes
        wanted = sizes if layout_of(shape) != "NHWC" else (height, width, channels)
        for dim, size in zip(list(dims)[1:], wanted, strict=True):
            if dim.dim_value > 0 and dim.dim_value != size:
                raise EngineError(
                    f"input {value.name!r} has the shape {shape}",
                    where=where,
                    expected=f"sizes {sizes} (C, H, W), or free ones",
                    fix="Leave --input-size out",
                )
            dim.dim_value = size
        del model.graph.value_info[:]  # they may tell of other sizes
        for output in model.graph.output:
            for dim in list(output.type.tensor_type.shape.dim)[1:]:
                if not dim.HasField("dim_value"):
                    dim.ClearField("dim_param")
        return
    raise EngineError("no input has four dimensions", where=where, fix="Leave --input-size out")


def _locations(graph: GraphProto) -> set[str]:
    """Return the files beside a graph that its weights lie in."""
    return {
        entry.value
        for tensor in _tensors(graph)
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
