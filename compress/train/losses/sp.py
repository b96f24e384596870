"""Similarity-preserving distillation (Tung and Mori 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.train.losses import Layers, Needs, Taps, feature_pairs, full_precision


@dataclass(frozen=True)
class Sp:
    """Match which images of a batch activate a layer alike (similarity preserving).

    Args:
        layers: "auto" (the last pair), names of layers that both networks have, or
            {student: teacher}.

    Source: Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019,
    https://arxiv.org/abs/1907.09682, equations 2 to 4.
    """

    layers: Layers = "auto"

    weight: ClassVar[float] = 3000.0
    needs: ClassVar[Needs] = "last"
    relational: ClassVar[bool] = True

    def __call__(self, student: Taps, teacher: Taps, target: Tensor) -> Tensor:
        """Return the mean squared difference of similarities, summed over pairs, a scalar."""
        losses = []
        with full_precision(student.logits):
            for mine, theirs in feature_pairs(student, teacher):
                losses.append((_similarity(mine) - _similarity(theirs)).square().mean())
        return torch.stack(losses).sum()


def _similarity(feature: Tensor) -> Tensor:
    """Return the similarity of each image to each, rows of length 1, (B, B)."""
    flat = feature.float().flatten(1)
    return F.normalize(flat @ flat.T)
