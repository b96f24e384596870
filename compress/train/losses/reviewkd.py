"""Knowledge review (Chen et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.train.losses import Layers, Needs, Taps

WIDEST = 512  # channels in which features are fused
PYRAMID = (4, 2, 1)  # sizes at which features are compared once more, with halving weights


@dataclass(eq=False, repr=False)
class Reviewkd(nn.Module):
    """Match each stage after fusing into it what the student's deeper stages know (review).

    From the deepest stage to the shallowest, the student's feature is fused with the result so far
    by learned attention, and compared to the teacher's at several resolutions.

    Args:
        layers: "auto", names of layers that both networks have, or {student: teacher}, from
            shallow to deep.

    Source: Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021,
    https://arxiv.org/abs/2104.09044, section 3.3. Difference: convolutional stages only, without
    the pooled feature.
    """

    layers: Layers = "auto"

    weight: ClassVar[float] = 1.0
    needs: ClassVar[Needs] = "stages"

    def __post_init__(self) -> None:
        super().__init__()
        self.fusions = nn.ModuleList()  # deepest first

    def prepare(self, student: Taps, teacher: Taps, labels: Tensor) -> None:
        """Create a fusion for every pair of features of a dry run."""
        deepest = student.features[-1]
        middle = min(WIDEST, deepest.shape[1])
        pairs = list(zip(student.features, teacher.features, strict=True))
        for position, (mine, theirs) in enumerate(reversed(pairs)):
            fusion = _Fusion(mine.shape[1], middle, theirs.shape[1], fuses=position > 0)
            self.fusions.append(fusion.to(mine.device))

    def forward(self, student: Taps, teacher: Taps, target: Tensor) -> Tensor:
        """Return the hierarchical distances, summed over stages, a scalar."""
        losses, so_far = [], None
        pairs = zip(reversed(student.features), reversed(teacher.features), strict=True)
        for fusion, (mine, theirs) in zip(self.fusions, pairs, strict=True):
            mapped, so_far = fusion(mine, so_far, theirs.shape[2:])
            losses.append(_distance(mapped.float(), theirs.float()))
        return torch.stack(losses).sum()


class _Fusion(nn.Module):
    """Fuses a feature with that of deeper stages and maps it to the teacher's channels."""

    def __init__(self, inputs: int, middle: int, outputs: int, fuses: bool) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle))
        self.leave = nn.Sequential(
            nn.Conv2d(middle, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.attend = nn.Conv2d(2 * middle, 2, 1) if fuses else None

    def forward(self, x: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Return the mapped feature, and the fused one for the next stage."""
        x = self.enter(x)
        if x.shape[2:] != size:
            x = F.interpolate(x, tuple(size), mode="nearest")
        if self.attend is not None and deeper is not None:
            deeper = F.interpolate(deeper, tuple(size), mode="nearest")
            share = torch.sigmoid(self.attend(torch.cat([x, deeper], 1)))
            x = x * share[:, :1] + deeper * share[:, 1:]
        return self.leave(x), x


def _distance(mine: Tensor, theirs: Tensor) -> Tensor:
    """Return the mean squared difference over a pyramid of resolutions, a scalar."""
    loss, weight, total = F.mse_loss(mine, theirs), 1.0, 1.0
    for size in PYRAMID:
        if size >= mine.shape[2]:
            continue
        weight /= 2
        coarse = F.mse_loss(F.adaptive_avg_pool2d(mine, size), F.adaptive_avg_pool2d(theirs, size))
        loss, total = loss + weight * coarse, total + weight
    return loss / total
