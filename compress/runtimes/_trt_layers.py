"""The layers of a TensorRT engine, in one dialect, whoever tells of them.

With a GPU the engine inspector does. Without one an engine cannot be loaded, but the builder prints
the same facts at the end of its verbose log.
"""

from __future__ import annotations

import json
import re
from types import ModuleType
from typing import Any

_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: (?P<inputs>\[.*?\]), "
    r"(?:Constants: (?P<constants>\[.*?\]), )?Outputs: (?P<outputs>\[.*?\])"
    r"(?:, (?P<rest>(?:ParameterType|TacticName|TacticValue|StreamId|Metadata).*))?$"
)
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<dims>[^\]]*)\]"
    r".*?Format(?:/Datatype)?: (?P<format>[^}]*?)\s*\}"
)
_DATATYPE = re.compile(r"Datatype: (\w+)")


def from_engine(trt: ModuleType, engine: Any) -> dict[str, Any]:
    """Return what the inspector of a loaded engine says, shaped by ``normalized_layers``."""
    inspector = engine.create_engine_inspector()
    told = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return normalized_layers(json.loads(told))


def normalized_layers(told: dict[str, Any]) -> dict[str, Any]:
    """Return inspector JSON of TensorRT 10 or 11 in one shape.

    10 names its "Bindings" and writes "Format/Datatype" in one; 11 has "I/O Tensors" objects and
    writes them apart. Layers may be bare names where the engine was built without details.
    """
    layers = [
        {"Name": layer, "LayerType": "", "Inputs": [], "Outputs": [], "Constants": []}
        if isinstance(layer, str)
        else layer
        | {key: [_tensor(t) for t in layer.get(key) or []] for key in ("Inputs", "Outputs")}
        for layer in told.get("Layers", [])
    ]
    ends = told.get("I/O Tensors", told.get("Bindings", []))
    names = [end["Name"] if isinstance(end, dict) else end for end in ends]
    return {"Layers": layers, "Bindings": names}


def from_log(messages: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the layers that the builder printed; none if it printed none."""
    dumps = [text for _, text in messages if text.startswith("Layers:\n")]
    if not dumps:
        return {"Layers": [], "Bindings": []}
    head, _, tail = dumps[-1].partition("\nI/O Tensors:")
    layers = [_layer(found) for line in head.splitlines() if (found := _LAYER.match(line))]
    names = re.findall(r"^ ?Name: (.*?), IOMode", tail, re.MULTILINE)
    return {"Layers": layers, "Bindings": names}


def _layer(found: re.Match[str]) -> dict[str, Any]:
    rest = found["rest"] or ""
    tactic = re.search(r"TacticName: (.*?), StreamId", rest)
    metadata = re.search(r"Metadata: (.*)$", rest)
    return {
        "Name": found["name"],
        "LayerType": found["type"],
        "Inputs": _tensors(found["inputs"]),
        "Outputs": _tensors(found["outputs"]),
        "Constants": _tensors(found["constants"] or ""),
        "TacticName": tactic[1] if tactic else "",
        "Metadata": metadata[1] if metadata else "",
    }


def _tensors(text: str) -> list[dict[str, Any]]:
    return [
        _tensor(
            {
                "Name": found["name"],
                "Dimensions": [int(size) for size in found["dims"].split(",") if size],
                "Format": found["format"],
                "Datatype": (_DATATYPE.search(found[0]) or ["", ""])[1],
            }
        )
        for found in _TENSOR.finditer(text)
    ]


def _tensor(told: dict[str, Any]) -> dict[str, Any]:
    """Return one tensor with "Datatype" apart from "Format", whatever the dialect."""
    joined = told.get("Format/Datatype", told.get("Format", ""))
    return {
        "Name": told.get("Name", ""),
        "Dimensions": told.get("Dimensions", []),
        "Format": joined,
        "Datatype": told.get("Datatype") or _kind(joined),
    }


def _kind(text: str) -> str:
    """Return the data type that TensorRT 10 hides in a format: "... INT8 format", "Half"."""
    upper = text.upper()
    for mark, kind in (
        ("INT8", "Int8"),
        ("FP16", "Half"),
        ("HALF", "Half"),
        ("BF16", "BFloat16"),
        ("FP32", "Float"),
        ("FLOAT", "Float"),
        ("INT32", "Int32"),
        ("INT64", "Int64"),
    ):
        if mark in upper:
            return kind
    return ""
