"""The one reader of ONNX files: from anywhere, damaged, or made to reach outside their folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    SparseTensorProto,
    TensorProto,
    helper,
    numpy_helper,
)

from compress.artifact import is_utf8, make_folder, replacing, state_of
from compress.errors import EngineError, absence, boundary, unreadable
from compress.graph.lenient import sort_nodes, write_plainly
from compress.graph.metadata import layout_of, picture_input, stamp
from compress.graph.model import bodies, graphs_in
from compress.graph.shapes import dims_of

DEEPEST = 64  # branches and loops inside each other, functions that call functions
MOST_NODES = 2**20  # of the graph once its functions are written out
SPARSEST = 1000  # places of a sparse constant for each value that it holds
MOST_READ = 4  # times the bytes of the files beside it: a part of one can be shared by weights
_PACKED_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}
_COMPLEX = {TensorProto.COMPLEX64, TensorProto.COMPLEX128}
_DAMAGED = "Export it again, or copy it again and compare its SHA-256"


@dataclass(frozen=True)
class _Checked:
    states: dict[Path, tuple[int, ...]]  # of the file and those of its weights, as they were
    has_loop: bool


_intact: dict[Path, _Checked] = {}


def load(path: str | Path, *, weights: bool = True) -> ModelProto:
    """Return the model in ``path`` after ``check_onnx``.

    It takes memory for at most four times the bytes that are there, whatever sizes are claimed.

    Args:
        path: An ONNX file; weights beside it are read as well.
        weights: Whether to read weights that lie in other files.

    Raises:
        EngineError: the file is absent, damaged, or its weights lie outside its folder.
    """
    source = Path(path)
    states = {source.absolute(): state_of(source)} if source.is_file() else {}
    model = _parse(source)
    with boundary(EngineError, "is no valid ONNX file", where=str(source), fix=_DAMAGED):
        _check_calls(model, source)
        looped = _check_loops(model, source)
        write_plainly(model)
        sort_nodes(model.graph)
        tensors = list(_all_tensors(model))
        _check_external(tensors, source)
        for location in _locations(tensors):
            states[(source.parent / location).absolute()] = state_of(source.parent / location)
        free_negative_sizes(model.graph)
        if weights:
            onnx.load_external_data_for_model(model, str(source.parent))
        for tensor in tensors:
            _check_size(tensor, source)
        if weights:
            _store_densely(model.graph, source)
    _intact[source.absolute()] = _Checked(states, looped)
    return model


def check_onnx(path: str | Path) -> None:
    """Check that ``path`` is a whole ONNX file whose weights lie in its own folder.

    Raises:
        EngineError: it is not; the message says what is wrong.
    """
    parts(path)


def parts(path: str | Path) -> set[Path]:
    """Return the files that a model lies in: ``path`` and those of its weights, as checked.

    It is read again only if one of them has changed.

    Raises:
        EngineError: it is no whole ONNX file.
    """
    return set(_checked(path).states)


def has_loop(path: str | Path) -> bool:
    """Return whether a model holds a Loop, which may turn 2^62 times.

    Raises:
        EngineError: it is no whole ONNX file.
    """
    return _checked(path).has_loop


def _checked(path: str | Path) -> _Checked:
    source = Path(path).absolute()
    known = _intact.get(source)
    if known is None or any(not p.is_file() or state_of(p) != s for p, s in known.states.items()):
        load(path, weights=False)
    return _intact[source]


def _parse(path: Path) -> ModelProto:
    if not path.is_file():
        raise EngineError(absence(path), where=str(path), expected="an ONNX file")
    if not is_utf8(path):
        raise EngineError("has a name that is not UTF-8", where=str(path), fix="Rename it")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except PermissionError as error:
        raise unreadable(EngineError, error, str(path)) from None
    except Exception:  # noqa: BLE001 - protobuf and onnx raise several kinds
        raise EngineError(
            f"is no ONNX file, or only a part of one ({path.stat().st_size} bytes)",
            where=str(path),
            fix=_DAMAGED,
        ) from None
    if not model.graph.node or not model.graph.output:
        raise EngineError(
            f"holds no graph ({path.stat().st_size} bytes)", where=str(path), fix=_DAMAGED
        )
    return model


def _check_external(tensors: list[TensorProto], path: Path) -> None:
    folder = path.parent.resolve()
    files: dict[Path, int] = {}
    total = 0
    for tensor in tensors:
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        location = entry.get("location", "")
        file = (folder / location).resolve()
        climbs = Path(location).is_absolute() or ".." in Path(location).parts
        if not location or climbs or folder not in file.parents:
            raise EngineError(
                f"its weight {tensor.name!r} is to be read from {location!r}, outside the folder "
                "of the model",
                where=str(path),
                expected="weights inside the file or in a file beside it",
                fix="Do not use this file unless you trust who wrote it",
            )
        if file.is_file() and file.stat().st_nlink > 1:
            raise EngineError(
                f"its weight {tensor.name!r} is to be read from {location!r}, a hard link: what "
                "it holds may be a file outside the folder",
                where=str(path),
                fix=f"Copy it ({location}) if you know where it comes from",
            )
        offset, length = (int(entry.get(key) or 0) for key in ("offset", "length"))
        needed = offset + length
        present = files[file] = file.stat().st_size if file.is_file() else 0
        if present:
            file.open("rb").close()  # onnx tells a file that may not be read badly
        if min(offset, length) < 0 or not present or present < needed:
            raise EngineError(
                f"its weight {tensor.name!r} needs {needed} bytes of {location!r}, "
                f"which has {present}",
                where=str(path),
                fix="Copy the file with the weights as well",
            )
        total += length or present - offset
    if total > MOST_READ * sum(files.values()):
        raise EngineError(
            f"its weights are said to have {total} bytes, the files they lie in have "
            f"{sum(files.values())}",
            where=str(path),
            expected=f"at most {MOST_READ} times as many",
        )


def _check_size(tensor: TensorProto, path: Path) -> None:
    """Refuse a tensor that does not hold as many values as its shape says."""
    if tensor.data_location == TensorProto.EXTERNAL:
        return
    kind, count = TensorProto.DataType.Name(tensor.data_type), math.prod(tensor.dims)
    if min(tensor.dims, default=0) < 0:
        raise EngineError(
            f"its constant {tensor.name!r} has shape {list(tensor.dims)}", where=str(path)
        )
    if tensor.HasField("raw_data"):
        bits = (
            _PACKED_BITS.get(kind) or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        )
        wanted, there, unit = -(-count * bits // 8), len(tensor.raw_data), "bytes"
    else:
        per = 2 if tensor.data_type in _COMPLEX else 1
        bits = _PACKED_BITS.get(kind, 8)
        wanted, unit = -(-count * bits // 8) * per, "values"
        there = len(getattr(tensor, helper.tensor_dtype_to_field(tensor.data_type)))
    if wanted != there:
        raise EngineError(
            f"its constant {tensor.name!r} holds {there} {unit}, and its shape needs {wanted}",
            where=str(path),
            fix=_DAMAGED,
        )


def _store_densely(graph: GraphProto, path: Path) -> None:
    """Store sparse constants as dense ones, which are all that passes over graphs look at."""
    graph.initializer.extend(_dense(sparse, path) for sparse in graph.sparse_initializer)
    del graph.sparse_initializer[:]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "sparse_value":  # of a Constant
                dense = _dense(attribute.sparse_tensor, path)
                attribute.CopyFrom(helper.make_attribute("value", dense))
        for inner in bodies(node):
            _store_densely(inner, path)


def _dense(sparse: SparseTensorProto, path: Path) -> TensorProto:
    """Return a sparse constant as a dense one; its places are numbers or rows of them."""
    values, places = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    count = math.prod(sparse.dims)
    if min(sparse.dims, default=0) < 0 or count > SPARSEST * max(1, len(values)):
        raise EngineError(
            f"its sparse constant {sparse.values.name!r} has {len(values)} values for the shape "
            f"{list(sparse.dims)}",
            where=str(path),
            expected=f"at least one value for {SPARSEST} places",
        )
    if places.ndim > 1:
        places = np.ravel_multi_index(tuple(places.T), tuple(sparse.dims))
    if len(places) != len(values) or places.min(initial=0) < 0:
        raise ValueError("a sparse constant has wrong indices")
    dense = np.zeros(count, values.dtype)
    dense[places] = values
    return numpy_helper.from_array(dense.reshape(sparse.dims), sparse.values.name)


def _check_calls(model: ModelProto, path: Path) -> None:
    """Refuse functions that call themselves, and graphs that grow or nest beyond all bounds."""
    functions = {(f.domain, f.name): f for f in model.functions}
    counted: dict[tuple[str, str], int] = {}

    def nodes_in(body: GraphProto | FunctionProto, above: int) -> int:
        if above > DEEPEST:
            raise EngineError(
                "its functions call themselves, or its branches lie too deep in each other",
                where=str(path),
                expected=f"at most {DEEPEST} levels",
            )
        count = len(body.node)
        for node in body.node:
            key = (node.domain, node.op_type)
            if key in functions:
                if key not in counted:
                    counted[key] = nodes_in(functions[key], above + 1)
                count += counted[key]
            count += sum(nodes_in(inner, above + 1) for inner in bodies(node))
        return count

    total = max(nodes_in(body, 0) for body in (model.graph, *model.functions))
    if total > MOST_NODES:
        raise EngineError(
            f"its functions expand to {total} nodes",
            where=str(path),
            expected=f"at most {MOST_NODES}",
        )


def _check_loops(model: ModelProto, path: Path) -> bool:
    """Return whether there is a Loop; refuse one whose body is empty: nothing can stop it."""
    inside = (each for body in (model.graph, *model.functions) for each in graphs_in(body))
    loops = [node for graph in inside for node in graph.node if node.op_type == "Loop"]
    for node in loops:
        if not all(body.node for body in bodies(node)):
            raise EngineError(
                f"its Loop {node.name!r} has nothing in its body",
                where=str(path),
                fix="Remove it: it gives what it is given",
            )
    return bool(loops)


def _all_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield every tensor of a file, those of functions and of training included."""
    training = [
        part for each in model.training_info for part in (each.initialization, each.algorithm)
    ]
    wholes = (model.graph, *model.functions, *training)
    for body in (inner for whole in wholes for inner in graphs_in(whole)):
        sparse: list[SparseTensorProto] = []
        attributes = [item for node in body.node for item in node.attribute]
        if isinstance(body, FunctionProto):
            attributes += body.attribute_proto
        else:
            yield from body.initializer
            sparse += body.sparse_initializer
        for item in attributes:
            yield from ([item.t] if item.HasField("t") else [])
            yield from item.tensors
            sparse += [item.sparse_tensor] if item.HasField("sparse_tensor") else []
            sparse += item.sparse_tensors
        for part in sparse:
            yield from (part.values, part.indices)


def free_negative_sizes(graph: GraphProto) -> None:
    """Leave sizes open that are written as -1 or 0, as Paddle writes free ones."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value") and dim.dim_value < 1:
                dim.dim_param = f"{value.name}_{axis}" if axis else "batch"


def copy(
    source: Path,
    target: Path,
    *,
    facts: Mapping[str, Any],
    sizes: tuple[int, int, int] | None = None,
) -> None:
    """Copy an ONNX file with the weights beside it, and ``stamp`` the copy with ``facts``.

    Free channels, height and width of its first picture are fixed to ``sizes``, if given.

    Raises:
        EngineError: the file is damaged, or its sizes are others.
    """
    model = load(source, weights=False)
    if sizes is not None:
        fix_sizes(model, sizes, where=str(source))
    stamp(model, facts)
    make_folder(target.parent)
    for location in sorted(_locations(_all_tensors(model))):
        with replacing(target.parent / location) as temporary:
            shutil.copyfile(source.parent / location, temporary)
    with replacing(target) as temporary:
        temporary.write_bytes(model.SerializeToString())


def fix_sizes(model: ModelProto, sizes: tuple[int, int, int], *, where: str) -> None:
    """Fix free channels, height and width of the first input with four dimensions.

    Raises:
        EngineError: there is no such input, or a size that is fixed is another.
    """
    value = picture_input(model)
    if value is None:
        raise EngineError("no input has four dimensions", where=where, fix="Leave --input-size out")
    shape, (channels, height, width) = dims_of(value), sizes
    wanted = sizes if layout_of(shape) != "NHWC" else (height, width, channels)
    for dim, size in zip(list(value.type.tensor_type.shape.dim)[1:], wanted, strict=True):
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


def _locations(tensors: Iterable[TensorProto]) -> set[str]:
    """Return the files beside a model that its weights lie in."""
    return {
        entry.value
        for tensor in tensors
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
