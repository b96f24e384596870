"""What an ONNX file says of its input: in its metadata, and by its shape."""

from __future__ import annotations

import ast
import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import onnx

from compress.graph.shapes import dims_of, real_inputs

PREFIX = "compress."  # of the keys that are ours
CHANNELS = (1, 3)  # of pictures: how an input of unknown layout is recognised
FITTING = ("resize", "interpolation", "crop")  # how a picture is fitted to the size
LARGEST_PIXEL = 256.0  # of images that are not normalized
_KEPT = (*FITTING, "mean", "std", "labels", "task")
CARRIED = (*_KEPT, "color", "input_range")  # that hold for any file of the same network
_TASKS = {"detect": "detection", "classify": "classification"}  # Ultralytics' words for them
_SEES = {"color": "RGB", "mean": [0.0] * 3, "std": [1.0] * 3, "resize": "letterbox", "crop": 1.0}


def metadata(model: onnx.ModelProto) -> dict[str, Any]:
    """Return what ``stamp``, ``export_onnx`` or Ultralytics' exporter noted in a file."""
    facts = _of_ultralytics({entry.key: entry.value for entry in model.metadata_props})
    for entry in model.metadata_props:
        if entry.key.startswith(PREFIX):
            with contextlib.suppress(ValueError):  # a mark of ours that is no JSON
                facts[entry.key.removeprefix(PREFIX)] = json.loads(entry.value)
    return facts


def _of_ultralytics(props: Mapping[str, str]) -> dict[str, Any]:
    """Return names of classes, size and task in our words, and how all their detectors see.

    Empty where another program wrote the file.
    """
    if not {"names", "stride"} <= props.keys():
        return {}
    noted: dict[str, Any] = {"task": props.get("task")}
    for key in ("names", "imgsz"):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            noted[key] = ast.literal_eval(props.get(key, ""))
    found: dict[str, Any] = {}
    names, size = noted.get("names"), noted.get("imgsz")
    if isinstance(names, dict) and sorted(map(str, names)) == sorted(map(str, range(len(names)))):
        found["labels"] = [str(names[key]) for key in sorted(names, key=int)]
    if (
        isinstance(size, list)
        and len(size) == 2
        and all(isinstance(s, int) and s > 0 for s in size)
    ):
        found["usual_size"] = size
    if noted["task"] in _TASKS:
        found["task"] = _TASKS[noted["task"]]
    return found | (_SEES if noted["task"] == "detect" else {})


def as_text(value: Any) -> str:
    """Return a fact as it is written into a file."""
    return json.dumps(value, sort_keys=True)


def stamp(model: onnx.ModelProto, facts: Mapping[str, Any]) -> None:
    """Keep ``facts`` in a model, beside what it already says."""
    new = {f"{PREFIX}{key}": as_text(value) for key, value in facts.items()}
    kept = [entry for entry in model.metadata_props if entry.key not in new]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    for key, value in new.items():
        model.metadata_props.add(key=key, value=value)


def input_facts(model: onnx.ModelProto) -> dict[str, Any]:
    """Return what is known of the input that takes pictures; what is not said is absent.

    Keys are those of ``data`` in a recipe: image_size, channels, layout, color, mean and std (of
    images in [0, 1]), resize, interpolation, crop; beside them labels and task, and usual_size of
    an input that takes any.
    """
    noted = metadata(model)
    found = _of_graph(model, noted.get("layout"))
    found |= {key: noted[key] for key in _KEPT if key in noted}
    if noted.get("color") in ("RGB", "BGR"):
        found["color"] = noted["color"]
    if "usual_size" in noted and "layout" in found and "image_size" not in found:
        found["usual_size"] = noted["usual_size"]
    return found


def usual_range(model: onnx.ModelProto) -> tuple[float, float] | None:
    """Return the values of black and white pixels as the file says they are normalized.

    None where it does not say so, or says what no network was trained with.

    A share of 1 % is added on both sides, for filters that overshoot and for rounding.
    """
    noted = metadata(model)
    mean, std = noted.get("mean"), noted.get("std")
    if not mean or not std or len(mean) != len(std) or not all(each > 0 for each in std):
        return None
    pairs = list(zip(mean, std, strict=True))
    low, high = min(-m / s for m, s in pairs), max((1 - m) / s for m, s in pairs)
    if max(-low, high) > LARGEST_PIXEL:
        return None  # a slip of whoever wrote it
    slack = 0.01 * (high - low)
    return low - slack, high + slack


def layout_of(shape: Sequence[int | str | None]) -> str | None:
    """Return "NCHW" or "NHWC" by where a shape has 1 or 3 channels; None where that is open."""
    if len(shape) != 4:
        return None
    first, last = shape[1] in CHANNELS, shape[3] in CHANNELS
    if first or tuple(shape[2:]) == (1, 1):  # where both are, one or three columns are rarer
        return "NCHW"
    return "NHWC" if last else None


def _of_graph(model: onnx.ModelProto, layout: str | None) -> dict[str, Any]:
    """Return size, channels and layout of the first input with four dimensions."""
    value = picture_input(model)
    shape = [] if value is None else dims_of(value)
    layout = layout or layout_of(shape)
    if value is None or layout is None:
        return {}
    rows, columns, channels = (1, 2, 3) if layout == "NHWC" else (2, 3, 1)
    found: dict[str, Any] = {"layout": layout}
    if shape[rows] and shape[columns]:
        found["image_size"] = (shape[rows], shape[columns])
    if shape[channels] in CHANNELS:
        found["channels"] = shape[channels]
    return found


def picture_input(model: onnx.ModelProto) -> onnx.ValueInfoProto | None:
    """Return the first input with four dimensions that is no weight, or None."""
    inputs = real_inputs(model)
    return next((v for v in inputs if len(v.type.tensor_type.shape.dim) == 4), None)
