"""Torchvision's detectors as networks that return boxes before NMS, and through the commands."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_detectors
import torch
from int8_graphs import run
from scipy.spatial import KDTree
from tiny_detectors import KINDS, WITH_BACKGROUND, detector
from torch import nn
from torchvision.models import get_model  # noqa: TID253
from torchvision.models.detection import KeypointRCNN  # noqa: TID253
from torchvision.ops import MultiScaleRoIAlign  # noqa: TID253

import compress
from compress.errors import ModelError, QuantizationError
from compress.graph.ends import Nms
from compress.groups.proof import prove
from compress.models import check_forward
from compress.models.references import check_reference
from compress.modules.detectors import before_nms, size_inside
from compress.qdq import TARGETS
from compress.quantize.sessions import sqnr_db
from compress.tasks import load_task

CLASSES = ("a", "b", "c")
IMAGES = torch.rand(8, 3, 64, 96, generator=torch.Generator().manual_seed(3))
OTHER = torch.rand(2, 3, 80, 112, generator=torch.Generator().manual_seed(3))
ALL = {"max_boxes": 5000, "multi_label": True}


def rows_of(model: nn.Module) -> nn.Module:
    found = before_nms(model)
    assert found is not None
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_of_pytorch_answers_with_rows_as_the_exported_file_does(kind):
    model = detector(kind)
    with compress.open_session(model, runtime="pytorch") as session:
        (found,) = session.run(IMAGES.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(found, rows_of(model)(IMAGES).numpy(), rtol=1e-3, atol=1e-3)


def place(found: dict[str, Any]) -> np.ndarray:
    """Return boxes in pixels, scores in steps of 0.001 and labels of 100, in one space."""
    boxes, scores, labels = (np.asarray(found[name]) for name in ("boxes", "scores", "labels"))
    return np.concatenate([boxes, 1e3 * scores[:, None], 100.0 * labels[:, None]], 1)


@pytest.mark.parametrize("images", [IMAGES[:2], OTHER], ids=["as inside", "resized inside"])
@pytest.mark.parametrize("kind", KINDS)
def test_nms_of_the_rows_gives_what_the_detector_finds(kind, images):
    model = detector(kind)
    task = load_task({"detection": ALL}, classes=CLASSES)
    with torch.no_grad():
        found = task.predict({"output": rows_of(model)(images)})
        theirs = model(list(images))
    for mine, want in zip(found, theirs, strict=True):
        assert len(mine["scores"]) == len(want["scores"]) > 20 and want["scores"].std() > 0.05
        shifted = want | {"labels": want["labels"] - int(kind in WITH_BACKGROUND)}
        distance, index = KDTree(place(mine)).query(place(shifted))  # equal scores in any order
        assert distance.max() < 0.02 and len(set(index)) == len(index)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_detector_equals_the_masked_one(kind):
    model = detector(kind)
    plan = compress.plan_pruning(
        model, IMAGES[:1], criterion="obs", keep_macs=0.6, batches=[IMAGES], answers="numbers"
    )
    assert plan.macs_after < 0.65 * plan.macs_before
    assert not any("stem" in name for name in plan.frozen), plan.frozen
    assert prove(model, plan, IMAGES[:1]) < 1e-4
    small = rows_of(compress.apply_pruning(model, plan).double())
    masked = rows_of(compress.mask_pruning(model, plan).double())
    whole = rows_of(model.double())
    for size in ((80, 112), (64, 96), (96, 72)):
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(4)).double()
        with torch.no_grad():
            want = masked(images)
            torch.testing.assert_close(small(images), want, atol=1e-8, rtol=1e-8)
            assert (whole(images) - want).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_a_detector_find_its_boxes_in_float_and_int8(kind, tmp_path):
    model = detector(kind)
    path = compress.export_onnx(model, IMAGES[:1], tmp_path / "model.onnx")
    feed = {"input": IMAGES.numpy()}
    got = run(onnx.load(path), feed)[0]
    with torch.no_grad():
        want = rows_of(model)(IMAGES)
    np.testing.assert_allclose(got, want.numpy(), atol=1e-2)
    task = load_task("detection", classes=CLASSES)
    boxes = task.predict({"output": got})
    with_nms = compress.export_onnx(model, IMAGES[:1], tmp_path / "nms.onnx", nms=Nms())
    ended = task.predict({"output": run(onnx.load(with_nms), feed)[0]})
    for mine, theirs in zip(ended, boxes, strict=True):
        np.testing.assert_allclose(mine["scores"], theirs["scores"], atol=1e-5)
        assert task.agreement(mine, theirs) > 98  # equal scores in any order
    for target in TARGETS:
        out = tmp_path / f"{target}.onnx"
        try:
            compress.quantize_onnx(path, [IMAGES.numpy()], out, target, "plain")
        except QuantizationError as error:  # kernels that saturate, on processors without VNNI
            assert target == "openvino" and "openvino computes the int8 graph wrongly" in str(error)
            continue
        assert compress.lint_onnx(out, target=target) == []
        int8 = run(onnx.load(out), feed, plain=True)[0]
        assert any(node.op_type == "DequantizeLinear" for node in onnx.load(out).graph.node)
        if kind == "fasterrcnn":  # which regions it looks at may change, and with them the rows
            pairs = zip(task.predict({"output": int8}), boxes, strict=True)
            assert np.mean([task.agreement(*pair) for pair in pairs]) > 60
        else:
            assert sqnr_db([got[:, 4:]], [int8[:, 4:]]) > 25
            assert sqnr_db([got[:, :4]], [int8[:, :4]]) > 25


def test_regions_that_the_first_nms_took_out_have_neither_score_nor_size() -> None:
    model = detector("fasterrcnn")
    model.rpn._post_nms_top_n = {"training": 400, "testing": 400}  # more than NMS leaves
    with torch.no_grad():
        rows = rows_of(model)(IMAGES[:2])
    out = (rows[:, 4:] == 0).all(1)
    assert 0.02 < out.float().mean() < 0.9
    assert rows.transpose(1, 2)[out].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_its_own_loss_trains_a_pruned_detector(kind):
    model = detector(kind)
    plan = compress.plan_pruning(model, IMAGES[:1], keep_macs=0.7)
    small = compress.apply_pruning(model, plan).train()
    task = load_task("detection", classes=CLASSES)
    boxes = torch.tensor([[4.0, 4, 40, 40], [30, 20, 60, 62]])
    targets = [{"boxes": boxes, "labels": torch.tensor([0, 2])}] * len(IMAGES)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.002)
    torch.manual_seed(0)  # it samples anchors
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(task.loss(small, IMAGES, targets))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] and torch.isfinite(torch.stack(losses)).all()
    assert all(parameter.grad is not None for parameter in small.parameters())


RELOAD = """
import sys, torch, compress
from compress.models import check_forward
from compress.models.references import check_reference
from compress.modules.detectors import before_nms, size_inside
for folder in sys.argv[1:]:
    model = before_nms(compress.load_model(folder).eval())
    with torch.no_grad():
        torch.save(model(torch.load(folder + "/x.pt", weights_only=True)), folder + "/y.pt")
"""


@pytest.mark.slow
def test_pruned_detectors_are_saved_and_reloaded_in_a_fresh_process(tmp_path):
    kept = {}
    for kind in KINDS:
        model, folder = detector(kind), tmp_path / kind
        plan = compress.plan_pruning(model, IMAGES[:1], keep_macs=0.7)
        kept[folder] = compress.apply_pruning(model, plan)
        reference = f"{tiny_detectors.__file__}:{kind}"
        compress.save_model(kept[folder], folder, reference=reference, plan=plan, num_classes=3)
        torch.save(IMAGES, folder / "x.pt")
    subprocess.run([sys.executable, "-c", RELOAD, *map(str, kept)], check=True, timeout=300)
    for folder, small in kept.items():
        with torch.no_grad():
            want = rows_of(small.eval())(IMAGES)
        torch.testing.assert_close(torch.load(folder / "y.pt", weights_only=True), want)


def test_no_part_of_a_detector_changes_its_mode() -> None:
    model: Any = detector("ssd").train()
    model.backbone.stem[0].eval()
    modes = [part.training for part in model.modules()]
    assert before_nms(model) is not None
    assert [part.training for part in model.modules()] == modes


class Wrapped(nn.Module):
    """A detector of somebody's own around one of torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_detectors.retinanet()

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x)


def keypoint_rcnn() -> nn.Module:
    return KeypointRCNN(
        tiny_detectors.Backbone(),
        4,
        rpn_anchor_generator=tiny_detectors.anchors(),
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 3, 2),
        keypoint_roi_pool=MultiScaleRoIAlign(["0", "1"], 3, 2),
        keypoint_layers=(8,),
        num_keypoints=2,
        rpn_post_nms_top_n_test=4,
        **tiny_detectors.SIZES,
    )


def test_a_network_that_returns_lists_after_nms_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        check_forward(Wrapped(), torch.rand(2, 3, 64, 64))
    assert "returns boxes, scores, labels in each image after NMS" in str(caught.value)
    assert "fasterrcnn_resnet50_fpn in place of maskrcnn_resnet50_fpn" in str(caught.value)


def test_detectors_with_masks_and_key_points_are_refused_before_they_run(monkeypatch) -> None:
    network = keypoint_rcnn()

    def run(*args: Any) -> None:
        raise AssertionError("it ran")

    network.backbone.register_forward_pre_hook(run)
    with pytest.raises(ModelError, match="KeypointRCNN: returns what it finds in each image"):
        check_forward(network, torch.rand(2, 3, 64, 64))
    monkeypatch.setattr(KeypointRCNN, "__init__", run)
    for name in ("maskrcnn_resnet50_fpn_v2", "keypointrcnn_resnet50_fpn"):
        with pytest.raises(ModelError, match=f"torchvision:{name}: returns what it finds"):
            check_reference(f"torchvision:{name}")
    for name in ("fasterrcnn_resnet50_fpn", "ssd300_vgg16", "resnet18", "raft_large"):
        check_reference(f"torchvision:{name}")


def test_other_networks_are_left_as_they_are() -> None:
    assert before_nms(nn.Conv2d(3, 4, 1)) is None


def test_references_of_detectors_download_nothing_and_count_the_background() -> None:
    from compress.models.references import count_of, takes_unit_range

    assert count_of("torchvision:ssdlite320_mobilenet_v3_large", 3) == 4
    assert count_of("torchvision:retinanet_resnet50_fpn", 3) == 3
    assert count_of("torchvision:resnet18", 3) == 3
    assert takes_unit_range("torchvision:fcos_resnet50_fpn")
    assert not takes_unit_range("torchvision:resnet18")
    own = compress.load_model("torchvision:ssdlite320_mobilenet_v3_large", num_classes=4)
    want = get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None)
    assert type(own) is type(want)


@pytest.mark.parametrize(
    ("images", "inside"), [(IMAGES, None), (torch.zeros(1, 3, 32, 32), (64, 64))]
)
def test_the_size_that_a_detector_resizes_to_is_known(images, inside):
    model = detector("retinanet")
    assert size_inside(model, images) == inside
    taken = model.transform(list(images))[0].tensors.shape[-2:]
    assert tuple(taken) == (inside or (64, 96))
    assert size_inside(nn.ReLU(), images) is None
