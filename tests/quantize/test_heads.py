"""Detectors that end in one tensor of boxes in pixels and scores: both survive int8."""

from typing import Any

import foreign
import numpy as np
import onnx
import pytest
import torch
from int8_graphs import Sketch, images, run
from onnx import numpy_helper
from torch import Tensor, nn

import compress
from compress.graph.model import GraphIndex
from compress.qdq import TARGETS, prepare
from compress.quantize.planning_graph import judged_tensors
from compress.quantize.sessions import sqnr_db


def detector(*, by_conv=False):
    """Boxes in pixels by softmax over distances, scores by sigmoid, joined, as YOLO has them.

    Ultralytics writes the mean of the distances as a Conv with the weights 0, 1, 2, ...
    """
    s = Sketch((3, 16, 16))
    x = s.relu(s.conv("input", "stem", 3, 16, 3))
    x = s.relu(s.conv(x, "body", 16, 16, 3))
    flat = s.constant("flat", np.array([0, 4, 8, -1]))
    distances = s.op("Reshape", [s.conv(x, "box", 16, 32, 1), flat], "bins")
    shares = s.op("Softmax", [distances], "shares", axis=2)
    if by_conv:
        moved = s.op("Transpose", [shares], "moved", perm=[0, 2, 1, 3])
        weight = s.constant(
            "bins.weight", (40 * np.arange(8, dtype=np.float32)).reshape(1, 8, 1, 1)
        )
        mean = s.op("Conv", [moved, weight], "mean", kernel_shape=[1, 1])
        return _joined(
            s, x, s.op("Reshape", [mean, s.constant("four", np.array([0, 4, -1]))], "boxes")
        )
    steps = s.constant("steps", (40 * np.arange(8, dtype=np.float32)).reshape(1, 1, 8, 1))
    axes = s.constant("axes", np.array([2]))
    boxes = s.op("ReduceSum", [s.op("Mul", [shares, steps], "parts"), axes], "boxes", keepdims=0)
    return _joined(s, x, boxes)


def _joined(s, x, boxes):
    rows = s.constant("rows", np.array([0, 5, -1]))
    scores = s.op("Reshape", [s.conv(x, "class", 16, 5, 1), rows], "logits")
    scores = s.op("Sigmoid", [scores], "scores")
    s.op("Concat", [boxes, scores], "detections", axis=1)
    model = s.model(["detections"])
    shape = ("batch", 9, 256)
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("detections", 1, shape))
    return model


@pytest.mark.parametrize("by_conv", [False, True])
@pytest.mark.parametrize("target", TARGETS)
def test_scores_beside_boxes_in_pixels_survive(target, by_conv, tmp_path):
    model = detector(by_conv=by_conv)
    assert set(judged_tensors(prepare(model))) == {"boxes", "scores"}
    onnx.save(model, tmp_path / "float.onnx")
    feed = images(model, 16)
    compress.quantize_onnx(tmp_path / "float.onnx", [feed], tmp_path / "int8.onnx", target, "plain")
    written = onnx.load(tmp_path / "int8.onnx")
    want, got = run(model, feed)[0], run(written, feed, plain=True)[0]
    assert sqnr_db([want[:, 4:]], [got[:, 4:]]) > 25
    assert sqnr_db([want[:, :4]], [got[:, :4]]) > 25
    assert compress.lint_onnx(tmp_path / "int8.onnx", target=target) == []


@pytest.mark.parametrize("target", TARGETS)
def test_the_mean_of_a_softmax_stays_in_float_with_all_behind_it(target, tmp_path):
    model = detector(by_conv=True)
    onnx.save(model, tmp_path / "float.onnx")
    out = tmp_path / "int8.onnx"
    feed = [images(model, 16)]
    plan = compress.quantize_onnx(tmp_path / "float.onnx", feed, out, target, "plain")
    graph = GraphIndex(onnx.load(out))
    (mean,) = [node for node in graph.nodes if "mean" in node.output]
    why = "averages the probabilities of a Softmax"
    assert any(mean.name in note and why in note for note in plan.notes)
    quantized = {node.input[0] for node in graph.nodes if node.op_type == "QuantizeLinear"}
    assert not quantized & {"bins", "shares", "moved", "mean", "boxes", "logits", "scores"}
    layers = {"box", "class"}  # an int8 kernel of ONNX Runtime makes int8
    assert (quantized & layers) == (layers if target == "onnxruntime" else set())


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


@pytest.mark.parametrize("by", ["onnxruntime", "nncf"])
def test_lint_finds_vanished_scores_in_graphs_of_others_and_only_there(by, tmp_path):
    model = detector()
    model.graph.node[-1].name = "joined"
    is_nncf = by == "nncf"
    written = foreign.by_nncf(model) if is_nncf else foreign.by_onnxruntime(model, tmp_path)
    onnx.save(written, tmp_path / "theirs.onnx")
    feed = {"input": foreign.images(16, 9)}
    want, got = run(model, feed)[0], run(written, feed, plain=True)[0]
    have_vanished = sqnr_db([want[:, 4:]], [got[:, 4:]]) < 15
    found = [
        problem
        for problem in compress.lint_onnx(tmp_path / "theirs.onnx", target="onnxruntime")
        if problem.rule == "vanishing-scores"
    ]
    assert bool(found) == have_vanished
    assert have_vanished or is_nncf  # ONNX Runtime's own quantizer has this fault
    if found:
        fixed = tmp_path / "fixed.onnx"
        compress.qdq.lint.fix_onnx(tmp_path / "theirs.onnx", fixed, target="onnxruntime")
        mended = run(onnx.load(fixed), feed, plain=True)[0]
        assert sqnr_db([want[:, 4:]], [mended[:, 4:]]) > 20


class Head(nn.Module):
    """The head of one of Ultralytics' detectors: three feature maps in, boxes and scores out."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        network: Any = compress.load_model(f"ultralytics:{name}.yaml", num_classes=3)
        self.detect = network.model[-1]
        for each in self.modules():
            if isinstance(each, nn.Conv2d) and each.weight.requires_grad:  # not that of the sums
                nn.init.kaiming_normal_(each.weight, nonlinearity="relu")
                if each.bias is not None:
                    nn.init.zeros_(each.bias)

    def forward(self, fine: Tensor, middle: Tensor, coarse: Tensor) -> Tensor:
        rows: Tensor = self.detect([fine, middle, coarse])[0]
        return rows


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
def test_the_scores_of_a_yolo_head_survive(name, tmp_path):
    pytest.importorskip("ultralytics")
    head = Head(name).eval()
    maps = tuple(
        nn.functional.silu(2 * torch.randn(16, channels, side, side))
        for channels, side in ((64, 20), (128, 10), (256, 5))
    )
    path = compress.export_onnx(head, tuple(each[:1] for each in maps), tmp_path / "head.onnx")
    feed = {f"input_{n}": each.numpy() for n, each in enumerate(maps)}
    want = run(onnx.load(path), feed)[0]
    assert want[:, 4:].std() > 0.05 and want[:, :4].max() > 100
    for target in TARGETS:
        out = tmp_path / f"{target}.onnx"
        compress.quantize_onnx(path, [feed], out, target)
        got = run(onnx.load(out), feed, plain=True)[0]
        assert sqnr_db([want[:, 4:]], [got[:, 4:]]) > 25
        assert sqnr_db([want[:, :4]], [got[:, :4]]) > 25
        assert compress.lint_onnx(out, target=target) == []
