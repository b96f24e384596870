"""Tiny ONNX networks whose answers can be computed by hand, one for each task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compress.graph.metadata import stamp

HEIGHT, WIDTH = 32, 48
FIT = {"resize": "short side", "interpolation": "bilinear", "crop": 0.875}
FACTS: dict[str, Any] = {
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.25, 0.3],
    "color": "RGB",
    "input_range": [0.0, 1.0],
    "labels": ["dark", "grey", "light"],
    **FIT,
}
BOXES = np.array(  # x1, y1, x2, y2, score, class
    [[4, 4, 20, 12, 0.9, 0], [10, 8, 40, 30, 0.6, 2], [0, 0, 5, 5, 0.1, 1]], np.float32
)
YOLO = (
    np.array(  # centre, size and three scores of each of four boxes; the second overlaps the first
        [
            [12, 13, 30, 5],
            [8, 8, 20, 5],
            [16, 16, 20, 4],
            [8, 8, 10, 4],
            [0.9, 0.8, 0.0, 0.2],
            [0.0, 0.0, 0.1, 0.0],
            [0.0, 0.1, 0.7, 0.0],
        ],
        np.float32,
    )
)
WEIGHT = np.array([[-1.0, -2, -1], [0.1, 0, 0.2], [1, 2, 1]], np.float32)  # of the three classes


def network(path: Path, form: str, facts: dict[str, Any] = FACTS, *, nhwc: bool = False) -> Path:
    """Write the network of a task; its input is (N, 3, 32, 48), or (N, 32, 48, 3), maps alike."""
    nodes, constants = _parts(form)
    shape: list[Any] = ["batch", 3, HEIGHT, WIDTH]
    source = "x"
    if nhwc:
        shape = ["batch", HEIGHT, WIDTH, 3]
        nodes.insert(0, helper.make_node("Transpose", ["x"], ["nchw"], perm=[0, 3, 1, 2]))
        source = "nchw"
        if form in ("class map", "image"):
            nodes[-1].output[:] = ["nchw_map"]
            nodes.append(helper.make_node("Transpose", ["nchw_map"], ["y"], perm=[0, 2, 3, 1]))
    for node in nodes[int(nhwc) :]:
        node.input[:] = [source if name == "x" else name for name in node.input]
    graph = helper.make_graph(
        nodes,
        form,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    stamp(made, facts)
    onnx.save(made, path)
    return path


def _parts(form: str) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Return the nodes from "x" to "y" and their constants."""
    conv = helper.make_node("Conv", ["x", "w"], ["map"])
    weight = {"w": WEIGHT[..., None, None]}
    if form == "class map":
        return [helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2])], weight
    if form == "image":
        return [helper.make_node("Mul", ["x", "half"], ["y"])], {"half": np.float32(0.5)}
    if form in ("boxes", "yolo"):
        rows = {"rows": BOXES[None] if form == "boxes" else YOLO[None]}
        zero = [
            helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1, 2, 3], keepdims=1),
            helper.make_node("Mul", ["mean", "nothing"], ["none"]),
            helper.make_node("Squeeze", ["none", "last"], ["flat"]),
            helper.make_node("Add", ["flat", "rows"], ["y"]),
        ]
        return zero, rows | {"nothing": np.float32(0), "last": np.array([3], np.int64)}
    pooled = helper.make_node("GlobalAveragePool", ["map"], ["pooled"])
    if form == "softmax":
        flat = helper.make_node("Flatten", ["pooled"], ["flat"])
        return [conv, pooled, flat, helper.make_node("Softmax", ["flat"], ["y"], axis=1)], weight
    return [conv, pooled, helper.make_node("Flatten", ["pooled"], ["y"])], weight
