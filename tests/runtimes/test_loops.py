"""Graphs whose Loop never ends, through the commands that run other people's files."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image


def endless(path: Path, *, empty: bool = False) -> Path:
    """Write a Conv and a Loop of 2^62 turns around it, with a Relu or nothing in its body."""
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Relu", ["v"], ["w"])]
    ends = ("go", "v") if empty else ("on", "w")
    body = helper.make_graph(
        [] if empty else nodes,
        "body",
        [value("i", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("v", 1, None)],
        [value(ends[0], TensorProto.BOOL, []), value(ends[1], TensorProto.FLOAT, None)],
    )
    weight = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "k"], ["c"]),
            helper.make_node("Loop", ["n", "t", "c"], ["y"], "around", body=body),
        ],
        "graph",
        [value("x", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [value("y", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(np.int64(2**62), "n"),
            numpy_helper.from_array(np.bool_(True), "t"),
            numpy_helper.from_array(weight, "k"),
        ],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return path


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, list[object]]:
    """Return a command line of each command that runs an ONNX file, without the file."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(16):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    data = ["--data", f"images:{folder}"]
    return {
        "quantize": [*data, "--target", "onnxruntime", "--out", tmp_path / "out.onnx"],
        "bench": ["--batch", "1"],
        "compare": [endless(tmp_path / "other.onnx"), *data],
    }


@pytest.mark.parametrize("command", ["quantize", "bench", "compare"])
def test_a_loop_without_end_is_ended(command, compress, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.runtimes.onnxruntime.LOOP_SECONDS", 0.2)
    code, _, err = compress(command, endless(tmp_path / "x.onnx"), *arguments[command])
    assert code == 2
    assert "a Loop of the graph does not end within 0.2 seconds" in err
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("command", ["quantize", "bench", "compare"])
def test_a_loop_around_nothing_is_refused(command, compress, arguments, tmp_path):
    """ONNX Runtime ends a run between two nodes: here there is none."""
    code, _, err = compress(command, endless(tmp_path / "x.onnx", empty=True), *arguments[command])
    assert code == 2
    assert "its Loop 'around' has nothing in its body" in err
