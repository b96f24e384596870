"""Detectors that end in one tensor of boxes in pixels and scores: both survive int8."""

import numpy as np
import onnx
import pytest
from int8_graphs import Sketch, images, run
from onnx import numpy_helper

import compress
from compress.qdq import TARGETS, prepare
from compress.quantize.planning_graph import judged_tensors
from compress.quantize.sqnr import sqnr_db


def detector():
    """Boxes in pixels by softmax over distances, scores by sigmoid, joined, as YOLO has them."""
    s = Sketch((3, 16, 16))
    x = s.relu(s.conv("input", "stem", 3, 16, 3))
    x = s.relu(s.conv(x, "body", 16, 16, 3))
    flat = s.constant("flat", np.array([0, 4, 8, -1]))
    distances = s.op("Reshape", [s.conv(x, "box", 16, 32, 1), flat], "bins")
    shares = s.op("Softmax", [distances], "shares", axis=2)
    steps = s.constant("steps", (40 * np.arange(8, dtype=np.float32)).reshape(1, 1, 8, 1))
    axes = s.constant("axes", np.array([2]))
    boxes = s.op("ReduceSum", [s.op("Mul", [shares, steps], "parts"), axes], "boxes", keepdims=0)
    rows = s.constant("rows", np.array([0, 5, -1]))
    scores = s.op("Reshape", [s.conv(x, "class", 16, 5, 1), rows], "logits")
    scores = s.op("Sigmoid", [scores], "scores")
    s.op("Concat", [boxes, scores], "detections", axis=1)
    model = s.model(["detections"])
    shape = ("batch", 9, 256)
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("detections", 1, shape))
    return model


@pytest.mark.parametrize("target", TARGETS)
def test_scores_beside_boxes_in_pixels_survive(target, tmp_path):
    model = detector()
    assert set(judged_tensors(prepare(model))) == {"boxes", "scores"}
    onnx.save(model, tmp_path / "float.onnx")
    feed = images(model, 16)
    compress.quantize_onnx(tmp_path / "float.onnx", [feed], tmp_path / "int8.onnx", target, "plain")
    written = onnx.load(tmp_path / "int8.onnx")
    want, got = run(model, feed)[0], run(written, feed, plain=True)[0]
    assert sqnr_db([want[:, 4:]], [got[:, 4:]]) > 25
    assert sqnr_db([want[:, :4]], [got[:, :4]]) > 25
    assert compress.lint_onnx(tmp_path / "int8.onnx", target=target) == []


def joined_in_int8(path):
    """Return a file as other tools write it: one pair behind the Concat of boxes and scores."""
    model = detector()
    names = {"scale": np.float32(320 / 255), "zero": np.uint8(0)}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(v), n) for n, v in names.items()
    )
    concat = next(node for node in model.graph.node if node.op_type == "Concat")
    concat.output[0] = "joined"
    make = onnx.helper.make_node
    model.graph.node.extend(
        [
            make("QuantizeLinear", ["joined", "scale", "zero"], ["codes"]),
            make("DequantizeLinear", ["codes", "scale", "zero"], ["detections"]),
        ]
    )
    onnx.save(model, path)
    return model


def test_lint_finds_and_mends_scores_that_vanish(tmp_path):
    model = detector()
    broken = joined_in_int8(tmp_path / "joined.onnx")
    feed = images(model, 4)
    want = run(model, feed)[0]
    assert sqnr_db([want[:, 4:]], [run(broken, feed, plain=True)[0][:, 4:]]) < 10
    found = compress.lint_onnx(tmp_path / "joined.onnx", target="onnxruntime")
    (problem,) = [f for f in found if f.rule == "vanishing-scores"]
    assert problem.fixable and "'scores', at most 1" in problem.message
    compress.qdq.lint.fix_onnx(
        tmp_path / "joined.onnx", tmp_path / "fixed.onnx", target="onnxruntime"
    )
    fixed = run(onnx.load(tmp_path / "fixed.onnx"), feed, plain=True)[0]
    assert sqnr_db([want[:, 4:]], [fixed[:, 4:]]) > 60
