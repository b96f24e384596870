"""A small object detector that the detection recipe trains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.models.cifar import BasicBlock, convolved

STRIDES = (8, 16)
LARGE = 8.0  # objects with a side above this many steps of the fine grid belong to the coarse one
RADIUS = 1.5  # a cell answers for an object whose centre is within so many steps
LARGEST_EXPONENT = 4.0


class SmallDetector(nn.Module):
    """One-stage detector without anchors, on two grids: strides 8 and 16.

    In training with targets it returns its losses, as torchvision's detectors do; otherwise boxes
    before NMS as YOLO heads give them, (B, 4 + K, A): centre x, y, width and height in pixels, and
    a score in [0, 1] for each class.

    Source: cells and distances to the four sides as in Tian et al., FCOS, ICCV 2019,
    https://arxiv.org/abs/1904.01355; scores that learn the overlap of the box as in Li et al.,
    Generalized Focal Loss, NeurIPS 2020, https://arxiv.org/abs/2006.04388.
    """

    def __init__(self, num_classes: int = 3, width: int = 16) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem = _conv(3, width, 3, 2)
        self.quarter = _down(width, 2 * width)
        self.eighth = _down(2 * width, 4 * width)
        self.sixteenth = nn.Sequential(
            _down(4 * width, 8 * width), BasicBlock(8 * width, 8 * width, 1)
        )
        self.lateral = _conv(8 * width, 4 * width, 1)
        self.fine = _conv(8 * width, 4 * width, 3)
        self.coarse = _conv(8 * width, 4 * width, 3)
        self.heads = nn.ModuleList(_Head(4 * width, num_classes) for _ in STRIDES)

    def forward(
        self, images: Tensor, targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> Tensor | dict[str, Tensor]:
        """Return boxes and scores, (B, 4 + K, A), or losses by name where targets are given.

        Args:
            images: (B, 3, H, W); H and W multiples of 16.
            targets: Of each image "boxes" (M, 4) as x1, y1, x2, y2 in pixels and "labels" (M,).
        """
        eighth = self.eighth(self.quarter(self.stem(images)))
        sixteenth = self.sixteenth(eighth)
        up = F.interpolate(self.lateral(sixteenth), scale_factor=2.0, mode="nearest")
        maps = (self.fine(torch.cat([up, eighth], 1)), self.coarse(sixteenth))
        answers = [head(each) for head, each in zip(self.heads, maps, strict=True)]
        corners = torch.cat(
            [_corners(sides, s) for (sides, _), s in zip(answers, STRIDES, strict=True)], 2
        )
        logits = torch.cat([scores.flatten(2) for _, scores in answers], 2)
        if targets is not None:
            sizes = [tuple(sides.shape[2:]) for sides, _ in answers]
            return _losses(corners.float(), logits.float(), sizes, targets)
        low, high = corners[:, :2], corners[:, 2:]
        return torch.cat([(low + high) / 2, high - low, logits.sigmoid()], 1)


class _Head(nn.Module):
    """Distances to the four sides of a box and a logit for each class, at every cell."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.shared = _conv(channels, channels, 3)
        self.sides = nn.Conv2d(channels, 4, 1)
        self.scores = nn.Conv2d(channels, num_classes, 1)
        nn.init.constant_(self.scores.bias, -math.log(99.0))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return distances (B, 4, H, W) in steps of the grid, before exp, and logits."""
        shared = self.shared(x)
        return self.sides(shared), self.scores(shared)


def _conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Sequential:
    return convolved(in_channels, out_channels, size, nn.ReLU(), stride=stride)


def _down(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        _conv(in_channels, out_channels, 3, 2), BasicBlock(out_channels, out_channels, 1)
    )


def _cells(height: int, width: int, stride: int, like: Tensor) -> Tensor:
    """Return the centres of the cells of a grid in pixels: x and y, (2, H * W)."""
    y, x = torch.meshgrid(
        torch.arange(height, device=like.device),
        torch.arange(width, device=like.device),
        indexing="ij",
    )
    return (torch.stack([x, y]).flatten(1).to(like.dtype) + 0.5) * stride


def _corners(sides: Tensor, stride: int) -> Tensor:
    """Return boxes (B, 4, H * W) as x1, y1, x2, y2 in pixels, from what the head says."""
    cells = _cells(sides.shape[2], sides.shape[3], stride, sides)
    reach = sides.flatten(2).clamp(max=LARGEST_EXPONENT).exp() * stride
    return torch.cat([cells - reach[:, :2], cells + reach[:, 2:]], 1)


def _losses(
    corners: Tensor,
    logits: Tensor,
    sizes: Sequence[tuple[int, ...]],
    targets: Sequence[Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Return the mean losses of boxes and scores for each cell that answers for an object."""
    from torchvision.ops import box_iou, generalized_box_iou_loss

    places = [_cells(h, w, s, corners).T for (h, w), s in zip(sizes, STRIDES, strict=True)]
    strides = torch.cat([p.new_full((len(p),), s) for p, s in zip(places, STRIDES, strict=True)])
    cells, boxes = torch.cat(places), corners.transpose(1, 2)
    wanted = torch.zeros_like(logits).transpose(1, 2)  # (B, A, K)
    box_losses, count = [corners.sum() * 0.0], 0
    for number, target in enumerate(targets):
        owner = _owners(cells, strides, target["boxes"].to(cells))
        mine = (owner >= 0).nonzero()[:, 0]
        if not len(mine):
            continue
        found, true = boxes[number, mine], target["boxes"].to(cells)[owner[mine]]
        overlap = box_iou(found.detach(), true).diagonal()
        wanted[number, mine, target["labels"][owner[mine]]] = overlap.to(wanted)
        box_losses.append(generalized_box_iou_loss(found, true, reduction="sum"))
        count += len(mine)
    scores = logits.transpose(1, 2)
    plain = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none")
    quality = ((wanted - scores.sigmoid()).square() * plain).sum()
    total = max(1, count)
    return {"scores": quality / total, "boxes": torch.stack(box_losses).sum() / total}


def _owners(cells: Tensor, strides: Tensor, boxes: Tensor) -> Tensor:
    """Return for every cell the object that it answers for, the smallest of several, (A,); or -1.

    ``cells`` are centres, (A, 2), ``strides`` the pixels between those of a cell's grid, (A,).
    """
    if not len(boxes):
        return torch.full((len(cells),), -1, device=cells.device)
    size, middle = boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] + boxes[:, :2]) / 2
    is_large = size.amax(1) > LARGE * STRIDES[0]
    right_grid = (strides[:, None] > STRIDES[0]) == is_large[None]  # (A, M)
    near = (cells[:, None] - middle[None]).abs().amax(2) < RADIUS * strides[:, None]
    inside = ((cells[:, None] > boxes[None, :, :2]) & (cells[:, None] < boxes[None, :, 2:])).all(2)
    area = size.prod(1).expand(len(cells), -1)
    area = torch.where(right_grid & near & inside, area, torch.inf)
    best = area.min(1)
    return torch.where(best.values.isfinite(), best.indices, -1)


detector = SmallDetector  # what recipes call it
