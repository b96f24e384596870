"""ONNX files on disk: written in one step, with facts about themselves inside."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import nn

from compress.artifact import replacing
from compress.errors import ExportError, boundary
from compress.graph.metadata import PREFIX, as_text, metadata

LARGEST_SINGLE_FILE = 2**31 - 2**24  # bytes of weights; protobuf ends at 2 GiB


def weights_sha256(module: nn.Module) -> str:
    """Return a hash of every parameter and buffer of ``module``, by name and value."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().numpy()))
    return digest.hexdigest()


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return what ``export_onnx`` noted in the file: labels, mean, std, lineage and so on.

    Raises:
        ExportError: the file is absent or is no ONNX.
    """
    with boundary(ExportError, "cannot be read as ONNX", where=str(path)):
        model = onnx.load(str(path), load_external_data=False)
        return metadata(model)


def name_sizes(model: ir.Model) -> None:
    """Call the free dimensions of images "height" and "width", whatever torch called them.

    Raises:
        ExportError: one of them is not free: the trace holds for one size.
    """
    names = {4: ("height", "width"), 5: ("depth", "height", "width")}
    for value in model.graph.inputs:
        shape = value.shape
        if shape is None:
            continue
        for dim in range(2, len(shape)):
            if isinstance(shape[dim], int):
                raise ExportError(
                    f"its code fixes dimension {dim} of {value.name!r} to {shape[dim]}",
                    fix="Take sizes from x.shape, or export without dynamic_size (--fixed-size)",
                )
            if len(shape) in names:
                shape[dim] = ir.SymbolicDim(names[len(shape)][dim - 2])


def name_batch(model: ir.Model) -> None:
    """Call the free first dimension of every input and output "batch", whatever torch called it.

    Raises:
        ExportError: the first dimension of an input is not free: the trace holds for one batch.
    """
    for value in model.graph.inputs:
        if value.shape is not None and isinstance(value.shape[0], int):
            raise ExportError(
                f"its code fixes the batch to {value.shape[0]}",
                fix="Take the batch from x.shape[0], or export with dynamic_batch=False "
                "(--fixed-batch)",
            )
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and len(value.shape) and not isinstance(value.shape[0], int):
            value.shape[0] = ir.SymbolicDim("batch")


@contextlib.contextmanager
def writing(model: ir.Model, target: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """Yield a temporary file that holds ``model``; it becomes ``target`` if the block succeeds."""
    data = target.with_name(f"{target.name}.data")
    before = data.stat().st_mtime_ns if data.exists() else None
    try:
        with replacing(target) as temporary:
            save_exported(model, temporary, facts, data=data)
            yield temporary
    except BaseException:
        if data.exists() and data.stat().st_mtime_ns != before:
            data.unlink()
        raise


def save_exported(
    model: ir.Model, path: Path, facts: Mapping[str, Any], data: Path | None = None
) -> None:
    """Write ``model`` with ``facts`` to ``path``, and weights over 2 GB to ``data``."""
    model.metadata_props.clear()
    model.metadata_props.update({f"{PREFIX}{key}": as_text(value) for key, value in facts.items()})
    weights = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    if weights < LARGEST_SINGLE_FILE:
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto)
        path.write_bytes(proto.SerializeToString(deterministic=True))
    elif data is None:
        raise ExportError(f"{weights} bytes of weights do not fit one ONNX file")
    else:
        ir.save(model, path, external_data=data.name)
        onnx.checker.check_model(str(path))
