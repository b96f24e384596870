"""Torchvision's detectors as networks that return boxes before NMS, and through the commands."""

from __future__ import annotations

import numpy as np
import onnxruntime  # noqa: TID253
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model  # noqa: TID253
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet  # noqa: TID253
from torchvision.models.detection.anchor_utils import (  # noqa: TID253
    AnchorGenerator,
    DefaultBoxGenerator,
)
from torchvision.models.detection.ssd import SSD  # noqa: TID253
from torchvision.ops import MultiScaleRoIAlign  # noqa: TID253

import compress
from compress.groups.proof import prove
from compress.modules.detectors import before_nms
from compress.tasks import load_task

CLASSES = ("a", "b", "c")


class Backbone(nn.Module):
    """Two maps of 32 channels, strides 8 and 16."""

    out_channels = 32  # FCOS divides them into 32 groups

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(self._layer(3, 8, 4), self._layer(8, 32, 2))
        self.down, self.side = self._layer(32, 24, 2), nn.Conv2d(24, 32, 1)

    @staticmethod
    def _layer(channels: int, out: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.stem(x)
        return {"0": fine, "1": self.side(self.down(fine))}


class Maps(Backbone):
    """The same, as SSD asks for it: channels of each map."""

    out_channels = (32, 32)  # type: ignore[assignment]


def detector(kind: str) -> nn.Module:
    """Return a tiny detector whose scores are spread over (0, 1)."""
    torch.manual_seed(1)
    sizes = ((12,), (28,))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0),) * 2)
    size = {"min_size": 64, "max_size": 96}
    if kind == "ssd":
        boxes = DefaultBoxGenerator([[2], [2]])
        model: nn.Module = SSD(
            Maps(), boxes, (64, 96), 4, score_thresh=0.001, nms_thresh=0.7,
            topk_candidates=5000, detections_per_img=5000,
        )  # fmt: skip
    elif kind == "retinanet":
        model = RetinaNet(
            Backbone(), 3, anchor_generator=anchors, score_thresh=0.001, nms_thresh=0.7,
            topk_candidates=5000, detections_per_img=5000, **size,
        )  # fmt: skip
    elif kind == "fcos":
        points = AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
        model = FCOS(
            Backbone(), 3, anchor_generator=points, score_thresh=0.001, nms_thresh=0.7,
            topk_candidates=5000, detections_per_img=5000, **size,
        )  # fmt: skip
    else:
        pool = MultiScaleRoIAlign(["0", "1"], 3, 2)
        model = FasterRCNN(
            Backbone(), 4, rpn_anchor_generator=anchors, box_roi_pool=pool, box_score_thresh=0.001,
            box_nms_thresh=0.7, box_detections_per_img=5000, rpn_post_nms_top_n_test=40, **size,
        )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running_var" in name:
                tensor.uniform_(0.5, 2.0, generator=generator)
            elif tensor.is_floating_point() and ("logits" in name or "cls" in name):
                tensor.normal_(0, 0.3, generator=generator)
            elif "bbox" in name and tensor.ndim > 1:
                tensor.normal_(0, 0.05, generator=generator)
    return model.eval()


KINDS = ("ssd", "retinanet", "fcos", "fasterrcnn")
IMAGES = torch.rand(2, 3, 80, 112, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
def test_nms_of_the_rows_gives_what_the_detector_finds(kind: str) -> None:
    model = detector(kind)
    task = load_task("detection", classes=CLASSES)
    object.__setattr__(task, "multi_label", True)
    object.__setattr__(task, "max_boxes", 5000)
    rows = before_nms(model)
    assert rows is not None
    with torch.no_grad():
        found = task.predict({"output": rows(IMAGES)})
        theirs = model(list(IMAGES))
    shift = int(kind in ("ssd", "fasterrcnn"))
    for mine, want in zip(found, theirs, strict=True):
        assert len(want["scores"]) > 20
        order = want["scores"].argsort(descending=True, stable=True)
        assert len(mine["scores"]) == len(order)
        np.testing.assert_allclose(mine["scores"], want["scores"][order], atol=1e-5)
        np.testing.assert_allclose(mine["boxes"], want["boxes"][order], atol=1e-2)
        assert mine["labels"].tolist() == (want["labels"][order] - shift).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_detector_equals_the_masked_one(kind: str) -> None:
    model = detector(kind)
    plan = compress.plan_pruning(
        model, IMAGES[:1], criterion="obs", keep_macs=0.6, batches=[IMAGES], answers="numbers"
    )
    assert plan.macs_after < 0.65 * plan.macs_before
    assert kind == "fasterrcnn" or not any("stem" in name for name in plan.frozen)
    assert prove(model, plan, IMAGES[:1]) < 1e-4
    small = before_nms(compress.apply_pruning(model, plan))
    masked = before_nms(compress.mask_pruning(model, plan))
    assert small is not None and masked is not None
    with torch.no_grad():
        want = masked(IMAGES)
        torch.testing.assert_close(small(IMAGES), want, atol=1e-3, rtol=1e-4)
        whole = before_nms(model)
        assert whole is not None and not torch.allclose(whole(IMAGES), want, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_of_a_detector_finds_its_boxes(kind: str, tmp_path) -> None:
    model = detector(kind)
    path = compress.export_onnx(model, IMAGES[:1], tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(path)
    (got,) = session.run(None, {"input": IMAGES.numpy()})
    rows = before_nms(model)
    assert rows is not None
    with torch.no_grad():
        np.testing.assert_allclose(got, rows(IMAGES).numpy(), atol=1e-2)
    out = tmp_path / "int8.onnx"
    compress.quantize_onnx(path, [IMAGES.numpy()], out, method="plain")
    (int8,) = onnxruntime.InferenceSession(out).run(None, {"input": IMAGES.numpy()})
    assert int8.shape == got.shape


def test_no_part_of_a_detector_changes_its_mode() -> None:
    model = detector("ssd").train()
    model.backbone.stem[0].eval()  # type: ignore[union-attr,index]
    modes = [part.training for part in model.modules()]
    assert before_nms(model) is not None
    assert [part.training for part in model.modules()] == modes


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
