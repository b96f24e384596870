"""Losses that come with a network, called as its authors call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def ultralytics_loss(
    model: nn.Module, images: Tensor, targets: Sequence[Mapping[str, Tensor]]
) -> Tensor:
    """Return the loss of one of Ultralytics' networks, a mean over images, a scalar.

    Args:
        model: The network, in training mode.
        images: (B, 3, H, W).
        targets: Of each image "boxes" (M, 4) as x1, y1, x2, y2 in pixels and "labels" (M,).
    """
    height, width = images.shape[2:]
    boxes = torch.cat([each["boxes"] for each in targets]).to(images)
    low, high = boxes[:, :2], boxes[:, 2:]
    sides = torch.tensor([width, height]).to(boxes)
    counts = torch.tensor([len(each["boxes"]) for each in targets])
    batch = {
        "img": images,
        "bboxes": torch.cat([(low + high) / 2 / sides, (high - low) / sides], 1),
        "cls": torch.cat([each["labels"] for each in targets]).to(boxes)[:, None],
        "batch_idx": torch.arange(len(targets)).repeat_interleave(counts).to(boxes),
    }
    network: Any = model
    parts, _ = network.init_criterion()(model(images), batch)
    total: Tensor = parts.sum() / len(images)
    return total
