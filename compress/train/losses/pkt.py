"""Probabilistic knowledge transfer (Passalis and Tefas 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.train.losses import Layers, Needs, Taps, feature_pairs, full_precision, vectors

EPSILON = 1e-7


@dataclass(frozen=True)
class Pkt:
    """Match how likely each image of a batch is the neighbour of each other (probabilistic).

    Args:
        layers: "auto" (what the classifiers are fed with), names of layers that both networks
            have, or {student: teacher}.

    Source: Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer,
    ECCV 2018, https://arxiv.org/abs/1803.10837, equations 4 to 6 with the cosine kernel.
    """

    layers: Layers = "auto"

    weight: ClassVar[float] = 30000.0
    needs: ClassVar[Needs] = "embedding"
    relational: ClassVar[bool] = True

    def __call__(self, student: Taps, teacher: Taps, target: Tensor) -> Tensor:
        """Return the mean of p log(p / q) over pairs of images, summed over layers, a scalar."""
        losses = []
        with full_precision(student.logits):
            for pair in feature_pairs(student, teacher):
                q, p = (_neighbours(vectors(part)) for part in pair)
                losses.append((p * ((p + EPSILON) / (q + EPSILON)).log()).mean())
        return torch.stack(losses).sum()


def _neighbours(x: Tensor) -> Tensor:
    """Return the probability that image j is the neighbour of image i, rows sum to 1, (B, B)."""
    x = F.normalize(x, eps=EPSILON)
    closeness = (x @ x.T + 1) / 2
    return closeness / closeness.sum(1, keepdim=True)
