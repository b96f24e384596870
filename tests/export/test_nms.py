"""Files that end in NMS: their boxes are those of torch's NMS, and quantization leaves it float."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime  # noqa: TID253
import pytest
import torch
from torch import Tensor, nn

import compress
from compress.errors import ExportError
from compress.graph.ends import Nms
from compress.models.detector import detector
from compress.qdq import prepare
from compress.quantize.planning_graph import judged_tensors
from compress.tasks import load_task

SIZE = (64, 96)


def trained_like() -> nn.Module:
    """Return a detector whose scores and boxes are spread, as those of a trained one are."""
    torch.manual_seed(0)
    model = detector(3, 4).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("scores.weight", "sides.weight")):
                tensor.normal_(0, 0.15, generator=generator)  # none saturates
            elif name.endswith("sides.bias"):
                tensor.fill_(0.7)
    return model


IMAGES = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def run(path, images: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {"input": images.numpy()})[0]


def test_boxes_of_the_file_are_those_of_torch(tmp_path) -> None:
    model, task = trained_like(), load_task("detection", classes=("a", "b", "c"))
    plain = compress.export_onnx(model, IMAGES[:1], tmp_path / "plain.onnx")
    path = compress.export_onnx(model, IMAGES[:1], tmp_path / "nms.onnx", nms=Nms())
    assert run(path, IMAGES).shape[2] == 6
    for size in (1, 3):
        found = task.predict({"detections": run(path, IMAGES[:size])})
        with torch.no_grad():
            want = task.predict({"output": model(IMAGES[:size])})
        before = task.predict({"output": run(plain, IMAGES[:size])})
        for mine, theirs, own in zip(found, want, before, strict=True):
            assert len(own["scores"]) > 10
            for other in (own, theirs):  # equal scores come in any order
                np.testing.assert_allclose(mine["scores"], other["scores"], atol=1e-4)
                assert task.agreement(mine, other) > 98


def test_quantization_is_judged_by_what_nms_is_given(tmp_path) -> None:
    plain = compress.export_onnx(trained_like(), IMAGES[:1], tmp_path / "plain.onnx")
    path = compress.export_onnx(trained_like(), IMAGES[:1], tmp_path / "nms.onnx", nms=Nms())
    found, want = (set(judged_tensors(prepare(onnx.load(each)))) for each in (path, plain))
    assert want <= found
    assert not [name for name in found - want if "ReduceMax" not in name]  # their best scores


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_quantization_leaves_nms_in_float(target: str, tmp_path) -> None:
    model = trained_like()
    path = compress.export_onnx(model, IMAGES[:1], tmp_path / "nms.onnx", nms=Nms())
    out = tmp_path / "int8.onnx"
    compress.quantize_onnx(path, [IMAGES.numpy()] * 3, out, target, "plain")
    written = onnx.load(out)
    makers = {name: node for node in written.graph.node for name in node.output}
    assert any(node.op_type == "DequantizeLinear" for node in written.graph.node)
    for node in written.graph.node:
        if node.name.startswith("nms_"):
            above = [makers[name].op_type for name in node.input if name in makers]
            assert "DequantizeLinear" not in above, node.name
    task = load_task("detection", classes=("a", "b", "c"))
    pairs = zip(
        task.predict({"x": run(path, IMAGES)}), task.predict({"x": run(out, IMAGES)}), strict=True
    )
    assert np.mean([task.agreement(*pair) for pair in pairs]) > 60


def test_a_recipe_asks_for_it_by_an_option_of_the_task() -> None:
    task = load_task({"detection": {"nms_in_graph": True, "max_boxes": 7}}, classes=("a",))
    assert task.ending() == Nms(max_boxes=7)
    assert load_task("detection").ending() is None and load_task("classification").ending() is None


class Classifier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def test_nms_behind_something_else_is_refused(tmp_path) -> None:
    with pytest.raises(ExportError, match="NMS takes boxes and scores"):
        compress.export_onnx(Classifier(), IMAGES[:1], tmp_path / "x.onnx", nms=Nms())
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize("spread", [30.0, 400.0])  # few boxes are kept of the first, or many
def test_the_best_boxes_are_those_of_torch_and_not_all_candidates_are_looked_at(
    monkeypatch, spread
):
    from torchvision import ops

    rng = np.random.default_rng(0)
    places, classes = 6000, 3
    head = rng.uniform(0, spread, (4 + classes, places)).astype(np.float32)
    head[2:4] = rng.uniform(8, 30, (2, places))
    ranks = rng.permutation(classes * places).reshape(classes, places)
    head[4:] = (ranks + 1000) / ranks.size / 2  # no two alike: torch leaves their order open
    low, high = head[:2] - head[2:4] / 2, head[:2] + head[2:4] / 2
    boxes, scores = np.concatenate([low, high]).T.copy(), head[4:].max(0)
    labels, original, seen = head[4:].argmax(0), ops.batched_nms, []
    given = (torch.from_numpy(each) for each in (boxes, scores, labels))
    kept = original(*given, 0.3).numpy()[:100]

    def counting(boxes, *others):
        seen.append(len(boxes))
        return original(boxes, *others)

    monkeypatch.setattr(ops, "batched_nms", counting)
    found = Nms(iou=0.3).of(head)
    for mine, theirs in zip(found, (boxes[kept], scores[kept], labels[kept]), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert len(found[1]) == 100 or seen[-1] >= places
    assert seen[0] == 3000
