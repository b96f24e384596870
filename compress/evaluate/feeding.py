"""Feed artifacts: what a file says of its input, and images as the arrays it takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress import plugins
from compress.data import Dataset, given_normalization
from compress.errors import EngineError, UnknownNameError, UsageError
from compress.graph import files
from compress.graph.metadata import CARRIED, FITTING, input_facts, layout_of, metadata
from compress.graph.shapes import input_axes, leading
from compress.recipe.settings import DataSettings
from compress.runtimes import Session, TensorSpec, build_record, open_session

FACTS = ("image_size", "channels", "mean", "std", "color", "layout")
ONNX_NAME = "model.onnx"  # in a stage's folder
SETTINGS = "the data's settings"


def artifact_facts(path: Path) -> dict[str, Any]:
    """Return what an artifact says of its input: keys of ``DataSettings``, labels and task.

    An ONNX file says it in its metadata and by the shape of its input, an engine by its record,
    the folder of a stage by the ONNX file in it. What is not said is absent.
    """
    if path.is_dir():
        path = path / ONNX_NAME
        if not path.is_file():
            return {}
    if path.suffix != ".onnx":
        noted: dict[str, Any] = build_record(path).get("input", {})
        return noted
    return input_facts(files.load(path, weights=False))


def carried(folder: Path) -> dict[str, Any]:
    """Return what the ONNX file of a stage notes that holds for any file of its network."""
    path = folder / ONNX_NAME
    noted = metadata(files.load(path, weights=False)) if path.is_file() else {}
    return {key: noted[key] for key in CARRIED if key in noted}


def completed(settings: DataSettings, paths: Iterable[Path]) -> DataSettings:
    """Return ``settings`` with what they leave open taken from the files that will be fed.

    Raises:
        UsageError: they contradict a file, or the files contradict each other.
    """
    known = settings.model_dump(exclude_none=True)
    known |= {key: settings.options[key] for key in FITTING if key in settings.options}
    in_unit_range = zip(("mean", "std"), given_normalization(settings), strict=True)
    known |= {key: value for key, value in in_unit_range if value is not None}
    said_by: dict[str, str] = dict.fromkeys(known, SETTINGS)
    found: dict[str, Any] = {}
    readable = plugins.options("data", settings.name)
    usual: Sequence[int] | None = None
    for path in paths:
        facts = artifact_facts(path)
        usual = usual or facts.get("usual_size")
        for key, value in facts.items():
            if key not in FACTS and (key not in FITTING or key not in readable):
                continue
            if key in known:
                _check_same(key, known[key], value, said_by[key], path)
            elif key != "layout":  # the shape of each file's own input tells
                known[key], said_by[key], found[key] = value, str(path), value
    if usual is not None and "image_size" not in known:
        found["image_size"] = usual
    if settings.input_range is not None:  # mean and std are the user's
        found = {key: value for key, value in found.items() if key not in ("mean", "std")}
    fitting = {key: found.pop(key) for key in FITTING if key in found}
    changed = {key: tuple(v) if isinstance(v, list) else v for key, v in found.items()}
    return settings.model_copy(update=changed | {"options": {**settings.options, **fitting}})


def arrays_for(specs: Sequence[TensorSpec], images: Tensor, dataset: Dataset) -> list[NDArray[Any]]:
    """Return what a session with these inputs takes for ``images``, normalized as the dataset says.

    Images are (B, C, H, W) as the dataset stores them: uint8, or floats that are used as they are.

    Raises:
        EngineError: an input is no picture and nothing says what it gets.
    """
    if dataset.parts:
        return _parts(specs, images, dataset)
    picture, axes = picture_of(specs, dataset.inputs), _axes(specs)
    return [
        _picture(spec, images, dataset)
        if spec is picture
        else _further(spec, dataset.inputs, len(images), axes.get(spec.name, 0))
        for spec in specs
    ]


def _parts(specs: Sequence[TensorSpec], images: Tensor, dataset: Dataset) -> list[NDArray[Any]]:
    """Return what each input takes of rows that hold the values of all of them."""
    rows, start, values = images.flatten(1).numpy(), 0, {}
    for name, shape in dataset.parts.items():
        end = start + math.prod(shape)
        values[name], start = rows[:, start:end].reshape(-1, *shape), end
    own, axes = {spec.name for spec in specs}, _axes(specs)
    absent = sorted(own - values.keys() - dataset.inputs.keys())
    unknown = sorted(values.keys() - own)
    if absent or unknown:
        raise EngineError(
            f"the data holds arrays for {', '.join(values)}",
            expected=f"arrays for the inputs of the network: {', '.join(s.name for s in specs)}",
            fix="Write it with np.savez(FILE, **{NAME: ARRAY, ...}), a name for each input",
        )
    return [
        np.ascontiguousarray(
            np.moveaxis(values[spec.name], 0, axes.get(spec.name, 0)), spec.dtype or "float32"
        )
        if spec.name in values
        else _further(spec, dataset.inputs, len(images), axes.get(spec.name, 0))
        for spec in specs
    ]


def leading_input(specs: Sequence[TensorSpec], dataset: Dataset) -> TensorSpec:
    """Return the input that says how many rows a run takes: that of pictures, if there is one."""
    if not dataset.parts:
        return picture_of(specs, dataset.inputs)
    name = leading({spec.name: spec.shape for spec in specs if spec.name in dataset.parts})
    return next((spec for spec in specs if spec.name == name), specs[0])


def _axes(specs: Sequence[TensorSpec]) -> dict[str, int]:
    return input_axes({spec.name: spec.shape for spec in specs})


def picture_of(specs: Sequence[TensorSpec], given: Mapping[str, Any] = {}) -> TensorSpec:
    """Return the input that takes pictures: the first with four dimensions that is not given.

    Raises:
        EngineError: there is none.
        UnknownNameError: something is given for an input that is not there.
    """
    names = [spec.name for spec in specs]
    for name in given:
        if name not in names:
            raise UnknownNameError("input", name, names, where="--input")
    others = [spec for spec in specs if spec.name not in given]
    found = [spec for spec in others if spec.shape is None or len(spec.shape) == 4]
    if not found:
        shapes = ", ".join(f"{spec.name} {spec.shape}" for spec in specs)
        raise EngineError(
            f"no input takes pictures: {shapes}",
            expected="an input (B, C, H, W) or (B, H, W, C)",
            fix="Give an archive with an array for each input by name: --data npz:FILE.npz",
        )
    return found[0]


def shapes_answered(path: Path, dataset: Dataset) -> list[tuple[int, ...]]:
    """Return the shape of each output of an ONNX file for one test image of ``dataset``.

    Raises:
        EngineError: it does not run on the images.
    """
    with open_session(path) as session:
        fed = Fed(session, dataset)
        shape = fed.inputs[0].shape
        rows = shape[0] if shape and isinstance(shape[0], int) else 1
        image = dataset.splits["test"].take([0])
        return [output.shape for output in fed.run(image.expand(rows, -1, -1, -1).numpy())]


class Fed:
    """A session that takes pictures alone, as a dataset stores them, (B, C, H, W)."""

    def __init__(self, session: Session, dataset: Dataset) -> None:
        self._session, self._dataset = session, dataset
        picture = leading_input(session.inputs, dataset)
        self.inputs = (picture, *(spec for spec in session.inputs if spec is not picture))
        self.outputs = session.outputs

    def run(self, images: NDArray[Any]) -> list[NDArray[Any]]:
        """Return one array for each output."""
        given = arrays_for(self._session.inputs, torch.from_numpy(images), self._dataset)
        return self._session.run(*given)


def _check_same(key: str, own: Any, said: Any, by: str, path: Path) -> None:
    if key == "image_size":
        own = (own, own) if isinstance(own, int) else tuple(own)
        said = tuple(said)
    if _same(own, said):
        return
    fix = f"Leave --{key.replace('_', '-')} out to use the file's"
    if key not in ("image_size", "layout", "channels"):
        fix += ", or write the file again"
    if by != SETTINGS:
        fix = "The same images are fed to all of them: give files that take the same input"
    raise UsageError(
        f"{key} is {shown(own)} by {by}, and {shown(said)} by the file", where=str(path), fix=fix
    )


def _same(own: Any, said: Any) -> bool:
    if isinstance(own, list | tuple) and isinstance(said, list | tuple):
        length = max(len(own), len(said))
        first, second = (
            np.broadcast_to(np.asarray(each, np.float64), length)
            if len(each) in (1, length)
            else None
            for each in (own, said)
        )
        return first is not None and second is not None and np.allclose(first, second, atol=1e-4)
    if isinstance(own, float) or isinstance(said, float):
        return bool(np.isclose(own, said, atol=1e-4))
    return bool(own == said)


def shown(value: Any) -> str:
    """Return a fact of an input as it is read."""
    if isinstance(value, list | tuple):
        return ",".join(f"{each:.4g}" for each in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _picture(spec: TensorSpec, images: Tensor, dataset: Dataset) -> NDArray[Any]:
    """Return images as one input takes them.

    A graph that takes uint8 normalizes by itself; its order of dimensions is that of its shape.
    """
    shape = spec.shape or (len(images), *images.shape[1:])
    layout = dataset.layout or layout_of(shape) or "NCHW"
    if spec.dtype == "uint8":
        layout = layout_of(shape) or "NHWC"
        values = images.flip(1) if dataset.color == "BGR" else images
    else:
        values = dataset.normalize(images)
    _check_sides(spec, tuple(values.shape[2:]), layout)
    if layout == "NHWC":
        values = values.permute(0, 2, 3, 1)
    return values.contiguous().numpy().astype(spec.dtype or "float32", copy=False)


def _check_sides(spec: TensorSpec, sides: tuple[int, ...], layout: str) -> None:
    """Refuse pictures of other sides than an input fixes; a file that fixes one tells no size."""
    if spec.shape is None:
        return
    wanted = spec.shape[1:3] if layout == "NHWC" else spec.shape[2:4]
    pairs = zip(wanted, sides, strict=True)
    if all(isinstance(want, str) or want == side for want, side in pairs):
        return
    shown = [str(want) if isinstance(want, int) else "any" for want in wanted]
    named = zip(wanted, ("HEIGHT", "WIDTH"), strict=True)
    asked = ",".join(str(want) if isinstance(want, int) else name for want, name in named)
    raise EngineError(
        f"input {spec.name!r} takes pictures of {' x '.join(shown)} pixels (height x width), and "
        f"they are {' x '.join(map(str, sides))}",
        fix=f"Give the size it was trained on: --image-size {asked} (data.image_size of a recipe)",
    )


def _further(
    spec: TensorSpec, given: Mapping[str, NDArray[Any]], batch: int, axis: int
) -> NDArray[Any]:
    """Return what an input that is no picture gets: a value for all rows, or the same for each.

    ``axis`` is its dimension that is the batch.
    """
    if spec.name not in given:
        shown = ", ".join(map(str, spec.shape or ()))
        raise EngineError(
            f"the network also takes {spec.name!r} of shape ({shown}), and nothing says what",
            fix=f"Give --input {spec.name}=0.5 or --input {spec.name}=FILE.npy (data.inputs "
            "of a recipe), or an array for each input by name: --data npz:FILE.npz",
        )
    value = given[spec.name].astype(spec.dtype or given[spec.name].dtype)
    if spec.shape is None:
        return value
    shape = tuple(
        size if isinstance(size, int) else batch if dim == axis else 0
        for dim, size in enumerate(spec.shape)
    )
    if value.ndim == len(shape):
        shape = tuple(size or own for size, own in zip(shape, value.shape, strict=True))
    try:
        return np.ascontiguousarray(np.broadcast_to(value, shape)).reshape(shape)
    except ValueError:
        raise EngineError(
            f"input {spec.name!r} is given an array of shape {value.shape}",
            expected=f"shape {spec.shape}",
        ) from None
