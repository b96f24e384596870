"""Relational knowledge distillation (Park et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.train.losses import Layers, Needs, Taps, feature_pairs, full_precision, vectors


@dataclass(frozen=True)
class Rkd:
    """Match the distances between two images and the angles among three (relational).

    Args:
        distance: Weight of the part about distances.
        angle: Weight of the part about angles.
        layers: "auto" (what the classifiers are fed with), names of layers that both networks
            have, or {student: teacher}.

    Source: Park et al., Relational Knowledge Distillation, CVPR 2019,
    https://arxiv.org/abs/1904.05068, equations 5 to 10.
    """

    distance: float = 25.0
    angle: float = 50.0
    layers: Layers = "auto"

    weight: ClassVar[float] = 1.0
    needs: ClassVar[Needs] = "embedding"
    relational: ClassVar[bool] = True

    def __call__(self, student: Taps, teacher: Taps, target: Tensor) -> Tensor:
        """Return the weighted Huber losses of both parts, summed over pairs, a scalar."""
        losses = []
        with full_precision(student.logits):
            for pair in feature_pairs(student, teacher):
                mine, theirs = (vectors(part) for part in pair)
                distance = F.smooth_l1_loss(_distances(mine), _distances(theirs))
                angle = F.smooth_l1_loss(_angles(mine), _angles(theirs))
                losses.append(self.distance * distance + self.angle * angle)
        return torch.stack(losses).sum()


def _distances(x: Tensor) -> Tensor:
    """Return Euclidean distances over their mean, (B, B), 0 on the diagonal."""
    products = x @ x.T
    squares = products.diagonal()
    squared = (squares[:, None] + squares[None, :] - 2 * products).clamp(min=1e-12)
    same = torch.eye(len(x), dtype=torch.bool, device=x.device)
    distances = squared.sqrt().masked_fill(same, 0.0)
    between = distances[~same]
    return distances / between.mean().clamp(min=1e-12) if len(between) else distances


def _angles(x: Tensor) -> Tensor:
    """Return the cosine of the angle at image i between j and k, (B, B, B)."""
    directions = F.normalize(x[None, :, :] - x[:, None, :], dim=2)  # from i to j, (B, B, C)
    return directions @ directions.transpose(1, 2)
