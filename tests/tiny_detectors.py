"""Torchvision's detectors, tiny: references for recipes, and networks whose scores are spread."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet  # noqa: TID253
from torchvision.models.detection.anchor_utils import (  # noqa: TID253
    AnchorGenerator,
    DefaultBoxGenerator,
)
from torchvision.models.detection.ssd import SSD  # noqa: TID253
from torchvision.ops import MultiScaleRoIAlign  # noqa: TID253

KINDS = ("ssd", "retinanet", "fcos", "fasterrcnn")
WITH_BACKGROUND = ("ssd", "fasterrcnn")
SIZES = {"min_size": 64, "max_size": 96}  # of images inside
ALL: dict[str, Any] = {  # no box is left out but by NMS
    "score_thresh": 0.001, "nms_thresh": 0.7, "topk_candidates": 5000, "detections_per_img": 5000,
}  # fmt: skip
WIDTH = 64  # FCOS divides it into 32 groups


class Backbone(nn.Module):
    """Two maps of as many channels, strides 8 and 16."""

    def __init__(self, *, several: bool = False) -> None:
        super().__init__()
        self.out_channels: Any = (WIDTH, WIDTH) if several else WIDTH  # SSD asks for each map's
        self.stem = nn.Sequential(self._layer(3, 8, 4), self._layer(8, WIDTH, 2))
        self.down, self.side = self._layer(WIDTH, 24, 2), nn.Conv2d(24, WIDTH, 1)

    @staticmethod
    def _layer(channels: int, out: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.stem(x)
        return {"0": fine, "1": self.side(self.down(fine))}


def anchors() -> AnchorGenerator:
    """Return two anchors at each place of two maps."""
    return AnchorGenerator(((12,), (28,)), ((0.5, 1.0),) * 2)


def ssd(num_classes: int = 3) -> nn.Module:
    """Return an SSD; as in the others, ``num_classes`` is without the background."""
    boxes = DefaultBoxGenerator([[2], [2]])
    return SSD(Backbone(several=True), boxes, (96, 64), num_classes + 1, **ALL)


def retinanet(num_classes: int = 3) -> nn.Module:
    """Return a RetinaNet."""
    return RetinaNet(Backbone(), num_classes, anchor_generator=anchors(), **ALL, **SIZES)


def fcos(num_classes: int = 3) -> nn.Module:
    """Return an FCOS."""
    points = AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
    return FCOS(Backbone(), num_classes, anchor_generator=points, **ALL, **SIZES)


def fasterrcnn(num_classes: int = 3) -> nn.Module:
    """Return a Faster R-CNN that looks at 40 regions."""
    return FasterRCNN(
        Backbone(), num_classes + 1, rpn_anchor_generator=anchors(), box_score_thresh=0.001,
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 3, 2), box_nms_thresh=0.7,
        box_detections_per_img=5000, rpn_post_nms_top_n_test=40, **SIZES,
    )  # fmt: skip


def spread(model: nn.Module) -> nn.Module:
    """Return ``model`` with random weights under which scores spread over (0, 1)."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_var.uniform_(0.5, 2.0, generator=draw)
                layer.running_mean.normal_(0, 0.2, generator=draw)
                layer.weight.uniform_(0.7, 1.4, generator=draw)
                layer.bias.normal_(0, 0.2, generator=draw)
            elif isinstance(layer, nn.Conv2d | nn.Linear):
                is_box = "bbox_pred" in name or "regression_head.module_list" in name
                fan_in = layer.weight[0].numel()
                std = (0.3 if is_box else 2**0.5) * fan_in**-0.5
                layer.weight.normal_(0, std, generator=draw)
                if layer.bias is not None:
                    layer.bias.normal_(0, 0.1, generator=draw)
    return model.eval()


def detector(kind: str) -> nn.Module:
    """Return a network of ``kind`` with spread scores."""
    return spread(globals()[kind]())
